//! Devices whose queues another process serves (vhost-user): disks, and shared directories by virtio-fs.
//!
//! The device here is what the driver sees: registers, features, the configuration space. When the driver is ready the rings are handed
//! over to the back end, with the guest's memory and the events of both sides: from then on requests pass this process by. So the memory
//! has to be a file that both have mapped.
//!
//! The back end is not trusted with this process: its answers are bounded in length and in time, and checked; it learns no address of
//! this process, and writes to its own events only what it likes, for which the guest has to pay. With the guest's memory it can do
//! everything, as the guest could. If it hangs up, or says what makes no sense, the driver is told to reset the device, and the
//! device stays what it is: there is nobody to serve it any more.
//!
//! The front end of the crate `vhost` was not taken. It knows no deadline: it asks again for ever when its socket's timeout has passed,
//! so that a silent back end would hold a processor and the event loop.

mod backend;
mod connection;
mod message;

#[cfg(test)]
mod fuzzing;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::calls::{SystemCall, SystemCalls, any};
use crate::mmio::feature;
use crate::queue::{Position, QueueError};
use crate::state::{Reader, StateError};
use crate::{Activation, Device, Event, Kind, Metric};
use backend::Backend;
pub use connection::Fault;
pub use message::Request;

/// How long requests that follow each other may take together.
const PATIENCE: Duration = Duration::from_secs(15);
/// The longest tag of a shared directory, in bytes (virtio 1.2, section 5.11.4).
pub const TAG_MAX: usize = 36;
/// The configuration space of a disk, in bytes, up to the end of `write_zeroes_may_unmap`.
const BLOCK_SPACE: usize = 60;

/// Messages are exchanged; the session is watched from the driver's start to its reset.
const CALLS: &[SystemCall] =
    &[any(libc::SYS_sendmsg), any(libc::SYS_recvmsg), any(libc::SYS_shutdown), any(libc::SYS_epoll_ctl)];

/// Why a device cannot be made, or cannot go on. The texts are Firecracker's where it has the same.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody is there.
    #[error("Failed to connect to UDS Unix stream: {0}")]
    Connect(#[source] io::Error),
    /// A request was not done.
    #[error("{0} failed: {1}")]
    Request(Request, #[source] Fault),
    /// The back end cannot do what is needed.
    #[error("the back end does not offer {0}")]
    Lacking(&'static str),
    /// The guest's memory is this process's own.
    #[error("the guest's memory is in no file that the back end could map")]
    PrivateMemory,
    /// The host has no more descriptors.
    #[error("a device of another process needs a descriptor: {0}")]
    Host(io::Error),
    /// It failed earlier.
    #[error("the back end is not used any more, since its session failed")]
    Over,
}

/// Which device it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Model {
    /// A disk. Its size and the like are the back end's to tell.
    Disk {
        /// Whether the guest may ask for its writes to be durable.
        flush: bool,
    },
    /// A directory, which the guest mounts by this tag, of 1 to [`TAG_MAX`] bytes.
    Directory {
        /// The tag.
        tag: String,
    },
}

impl Model {
    fn kind(&self) -> Kind {
        match self {
            Model::Disk { .. } => Kind::Block,
            Model::Directory { .. } => Kind::FileSystem,
        }
    }

    /// Features that the device may have, if the back end offers them.
    fn features(&self) -> u64 {
        let of_queues = feature::INDIRECT_DESC | feature::EVENT_IDX;
        let device = match self {
            // All that is a matter of the configuration space alone; and whether it is read-only, which nobody else can say.
            Model::Disk { flush } => [
                (VIRTIO_BLK_F_SIZE_MAX, true),
                (VIRTIO_BLK_F_SEG_MAX, true),
                (VIRTIO_BLK_F_RO, true),
                (VIRTIO_BLK_F_BLK_SIZE, true),
                (VIRTIO_BLK_F_FLUSH, *flush),
                (VIRTIO_BLK_F_TOPOLOGY, true),
                (VIRTIO_BLK_F_DISCARD, true),
                (VIRTIO_BLK_F_WRITE_ZEROES, true),
            ]
            .iter()
            .map(|(bit, wanted)| u64::from(*wanted) << bit)
            .sum(),
            Model::Directory { .. } => 0,
        };
        of_queues | device
    }

    fn queue_sizes(&self) -> &'static [u16] {
        match self {
            Model::Disk { .. } => &[256],
            // For urgent requests, and for the others.
            Model::Directory { .. } => &[512, 512],
        }
    }

    /// What the driver reads as the device's configuration.
    fn space(&self, backend: &mut Backend) -> Result<Vec<u8>, Error> {
        match self {
            Model::Disk { .. } => backend.config(BLOCK_SPACE),
            Model::Directory { tag } => {
                let mut space = tag.as_bytes().to_vec();
                space.resize(TAG_MAX, 0);
                // One queue for requests.
                space.extend(1u32.to_le_bytes());
                Ok(space)
            }
        }
    }
}

/// A device of another process.
#[derive(Debug)]
pub struct VhostUser {
    model: Model,
    backend: Backend,
    space: Vec<u8>,
    /// Stands for the connection, while the back end has rings.
    watch: OwnedFd,
    /// How many it has.
    rings: usize,
    /// The session failed, and there is no other.
    over: bool,
    counters: Counters,
}

/// By Firecracker's names. Times are in microseconds, all together.
#[derive(Debug, Default)]
struct Counters {
    activate_fails: u64,
    cfg_fails: u64,
    init_time_us: u64,
    activate_time_us: u64,
    config_change_time_us: u64,
}

/// Adds the time that it takes.
fn timed<T>(total: &mut u64, work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let done = work();
    *total += u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    done
}

impl VhostUser {
    /// Connects to the back end that listens at `socket`. `fd:` and a number is the connection that this process was started with as that
    /// descriptor.
    ///
    /// # Errors
    /// [`Error`] when nobody is there, or nobody who serves such a device.
    pub fn connect(model: Model, socket: &str) -> Result<Self, Error> {
        let stream = match socket.strip_prefix("fd:") {
            Some(number) => inherited(number),
            None => UnixStream::connect(socket),
        };
        Self::on(model, stream.map_err(Error::Connect)?, PATIENCE)
    }

    fn on(model: Model, stream: UnixStream, patience: Duration) -> Result<Self, Error> {
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| Error::Host(e.into()))?;
        let mut counters = Counters::default();
        let (backend, space) = timed(&mut counters.init_time_us, || {
            let mut backend = Backend::negotiate(stream, model.features(), patience)?;
            let space = model.space(&mut backend)?;
            Ok((backend, space))
        })?;
        Ok(VhostUser { model, backend, space, watch, rings: 0, over: false, counters })
    }

    /// Asks the back end for the configuration again. The driver has to be told: see
    /// [`Transport::reconfigure`](crate::mmio::Transport::reconfigure).
    ///
    /// # Errors
    /// [`Error`]; the configuration stays as it was.
    pub fn refresh(&mut self) -> Result<(), Error> {
        let (model, backend) = (&self.model, &mut self.backend);
        let space = match self.over {
            true => Err(Error::Over),
            false => timed(&mut self.counters.config_change_time_us, || model.space(backend)),
        };
        match space {
            Ok(space) => self.space = space,
            Err(error) => {
                self.counters.cfg_fails += 1;
                return Err(self.failed(error));
            }
        }
        Ok(())
    }

    /// After a failed request nobody knows what the next answer would belong to.
    fn failed(&mut self, error: Error) -> Error {
        self.give_up();
        error
    }

    /// Ends the session: an honest back end lets go of the guest's memory then.
    fn give_up(&mut self) {
        self.over = true;
        self.backend.hang_up();
    }

    fn start(&mut self, mut activation: Activation) -> Result<(), QueueError> {
        let queues = (0..self.queue_sizes().len()).map(|index| activation.take(index));
        let queues = queues.collect::<Result<Vec<_>, _>>()?;
        if self.over {
            return Err(gone(&Error::Over));
        }
        let (events, line) = (&activation.events, activation.interrupt.line());
        let backend = &mut self.backend;
        let started = timed(&mut self.counters.activate_time_us, || {
            backend.start(activation.features, &queues, events, line)
        });
        let watched = started.and_then(|()| {
            let (socket, data) = (self.backend.as_fd(), epoll::EventData::new_u64(0));
            epoll::add(&self.watch, socket, data, epoll::EventFlags::IN).map_err(|e| Error::Host(e.into()))
        });
        watched.map_err(|error| gone(&self.failed(error)))?;
        self.rings = queues.len();
        Ok(())
    }
}

fn gone(error: &Error) -> QueueError {
    QueueError::Backend(error.to_string())
}

/// A copy of the descriptor of that number, which stays open.
fn inherited(number: &str) -> io::Result<UnixStream> {
    let number = number.parse::<u16>().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: a number that is no open descriptor is refused; one that is becomes a new descriptor, owned by nobody else.
    let copy = unsafe { libc::fcntl(number.into(), libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) }.into())
}

impl Device for VhostUser {
    fn kind(&self) -> Kind {
        self.model.kind()
    }

    fn features(&self) -> u64 {
        self.backend.features & !feature::OF_TRANSPORT
    }

    fn queue_features(&self) -> u64 {
        self.backend.features & feature::OF_QUEUES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        self.model.queue_sizes()
    }

    fn config(&self) -> Vec<u8> {
        self.space.clone()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), QueueError> {
        self.start(activation).inspect_err(|_| self.counters.activate_fails += 1)
    }

    fn reset(&mut self) {
        if self.rings == 0 {
            return;
        }
        // It fails when the connection is closed already, which is as well.
        let _ = epoll::delete(&self.watch, self.backend.as_fd());
        if !self.over
            && let Err(error) = self.backend.stop(self.rings)
        {
            tracing::warn!(device = ?self.model, %error, "the back end may still use the guest's memory");
            self.give_up();
        }
        self.rings = 0;
    }

    fn positions(&self) -> Vec<Option<Position>> {
        vec![None; self.queue_sizes().len()]
    }

    fn restore(&mut self, _reader: &mut Reader<'_>) -> Result<(), StateError> {
        Err(StateError::Invalid("a device that another process serves cannot be saved"))
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.watch.as_fd()]
    }

    fn system_calls(&self) -> SystemCalls {
        SystemCalls { events: CALLS, registers: CALLS }
    }

    fn served_elsewhere(&self) -> bool {
        true
    }

    fn metrics(&self) -> Vec<Metric> {
        let counters = &self.counters;
        vec![
            ("activate_fails", counters.activate_fails),
            ("cfg_fails", counters.cfg_fails),
            ("init_time_us", counters.init_time_us),
            ("activate_time_us", counters.activate_time_us),
            ("config_change_time_us", counters.config_change_time_us),
        ]
    }

    fn handle(&mut self, event: Event) -> Result<bool, QueueError> {
        match event {
            Event::Source(_) if self.backend.is_over() => {
                self.give_up();
                Err(QueueError::Backend("it has hung up, or said what it was not asked for".into()))
            }
            _ => Ok(false),
        }
    }
}
