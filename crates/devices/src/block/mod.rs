//! The block device (virtio 1.2, section 5.2) on a raw file or a block device of the host.

mod file;
mod request;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::calls::{SystemCall, SystemCalls, any};
use crate::queue::{Position, Queue, QueueError};
use crate::rate::{Limiter, Limits};
use crate::{Activation, Device, Event, Kind, Metric};
use file::Backing;

/// A sector of the virtio protocol, in bytes, whatever the disk's own is.
pub const SECTOR: u64 = 512;

const QUEUE_SIZE: u16 = 256;
/// Data buffers of a request: a full queue less header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Ranges in a discard or write-zeroes request.
const RANGES_MAX: u32 = 16;
/// Sectors that one range of a discard may have: 4 GiB. It is only a note to the file system.
const DISCARD_SECTORS_MAX: u32 = 1 << 23;
/// Sectors that one range of zeroes may have: 1 MiB. It may have to be written.
const ZERO_SECTORS_MAX: u32 = 2048;

/// The limiter's timer is stopped.
const RESET: &[SystemCall] = &[any(libc::SYS_timerfd_settime)];
/// Data moves, and another file takes the place of the first.
const CALLS: &[SystemCall] = &[
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev),
    any(libc::SYS_pwrite64),
    any(libc::SYS_fdatasync),
    any(libc::SYS_fallocate),
    any(libc::SYS_openat),
    any(libc::SYS_statx),
    any(libc::SYS_fstat),
    any(libc::SYS_newfstatat),
    any(libc::SYS_lseek),
    RESET[0],
];

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("cannot open the disk {path}: {source}")]
    Open {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The host has no more descriptors.
    #[error("a disk needs a timer: {0}")]
    Timer(io::Error),
    /// It is a directory, a pipe or the like.
    #[error("the disk {0} is neither a regular file nor a block device")]
    Kind(PathBuf),
}

/// What a disk is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The serial number that the guest sees; cut to 20 bytes.
    pub serial: String,
    /// The file.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Whether the guest may ask for its writes to be durable. Without it the host's cache decides.
    pub flush: bool,
    /// How fast it may be.
    pub limits: Limits,
}

/// Whether a file can be a disk.
///
/// # Errors
/// [`Error`] when it cannot.
pub fn check(path: &Path, read_only: bool) -> Result<(), Error> {
    Backing::open(path, read_only).map(drop)
}

/// A disk.
#[derive(Debug)]
pub struct Block {
    config: Config,
    backing: Backing,
    limiter: Limiter,
    counters: Counters,
    queue: Option<Queue>,
}

/// What a disk has done so far.
#[derive(Debug, Default)]
struct Counters {
    read_count: u64,
    read_bytes: u64,
    write_count: u64,
    write_bytes: u64,
    flush_count: u64,
    /// Requests that failed.
    execute_fails: u64,
    /// Requests that are none.
    invalid_reqs_count: u64,
    /// Files that were replaced.
    update_count: u64,
}

impl Block {
    /// Opens the disk's file.
    ///
    /// # Errors
    /// [`Error`] when it cannot be opened or is no disk.
    pub fn new(config: Config) -> Result<Self, Error> {
        let backing = Backing::open(&config.path, config.read_only)?;
        let limiter = Limiter::new(config.limits).map_err(Error::Timer)?;
        Ok(Block { config, backing, limiter, counters: Counters::default(), queue: None })
    }

    /// What the disk is made of.
    pub fn description(&self) -> &Config {
        &self.config
    }

    /// Continues with another file, or with the same one at a new size. The driver has to be told, because the capacity
    /// may be another: see [`Transport::reconfigure`](crate::mmio::Transport::reconfigure).
    ///
    /// # Errors
    /// [`Error`]; the disk then stays as it was.
    pub fn replace(&mut self, path: &Path) -> Result<(), Error> {
        self.backing = Backing::open(path, self.config.read_only)?;
        self.config.path = path.to_owned();
        self.counters.update_count += 1;
        Ok(())
    }

    /// Changes how fast the disk may be; what is absent stays.
    pub fn limit(&mut self, limits: Limits) {
        self.limiter.set(limits);
    }
}

impl Device for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX;
        if self.config.flush {
            features |= 1 << VIRTIO_BLK_F_FLUSH;
        }
        if self.config.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        features
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    /// The layout is that of section 5.2.4; fields of features that are not offered are zero.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put =
            |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.backing.sectors.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
        put(40, &RANGES_MAX.to_le_bytes());
        // Discards are useful from 4 KiB on, the usual block of a file system.
        put(44, &8u32.to_le_bytes());
        put(48, &ZERO_SECTORS_MAX.to_le_bytes());
        put(52, &RANGES_MAX.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), QueueError> {
        self.queue = Some(activation.take(0)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.limiter.rest();
        self.queue = None;
    }

    fn system_calls(&self) -> SystemCalls {
        SystemCalls { events: CALLS, registers: RESET }
    }

    fn positions(&self) -> Vec<Option<Position>> {
        vec![self.queue.as_ref().map(Queue::position)]
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.limiter.timer()]
    }

    fn metrics(&self) -> Vec<Metric> {
        let counters = &self.counters;
        vec![
            ("read_count", counters.read_count),
            ("read_bytes", counters.read_bytes),
            ("write_count", counters.write_count),
            ("write_bytes", counters.write_bytes),
            ("flush_count", counters.flush_count),
            ("execute_fails", counters.execute_fails),
            ("invalid_reqs_count", counters.invalid_reqs_count),
            ("update_count", counters.update_count),
            ("rate_limiter_throttled_events", self.limiter.throttled()),
        ]
    }

    fn handle(&mut self, event: Event) -> Result<bool, QueueError> {
        if let Event::Source(_) = event {
            self.limiter.wake();
        }
        let Some(queue) = &mut self.queue else { return Ok(false) };
        let (backing, config) = (&self.backing, &self.config);
        let (limiter, counters) = (&mut self.limiter, &mut self.counters);
        queue.serve(|chain| match chain {
            Ok(chain) if !limiter.admits(request::data_length(&chain)) => None,
            Ok(chain) => Some(request::Disk { backing, config, counters }.serve(chain)),
            Err(error) => {
                tracing::debug!(disk = config.serial, %error, "a disk request is malformed");
                counters.invalid_reqs_count += 1;
                Some(0)
            }
        })
    }
}
