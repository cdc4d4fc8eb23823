//! One request to a disk, from the header to the status byte (virtio 1.2, section 5.2.6).

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    virtio_blk_discard_write_zeroes, virtio_blk_outhdr,
};
use vm_memory::ByteValued;

use super::file::{Backing, Direction};
use super::{Config, Counters, DISCARD_SECTORS_MAX, RANGES_MAX, SECTOR, ZERO_SECTORS_MAX};
use crate::chain::{Buffers, Chain, TooShort};

/// Length of a serial number, in bytes.
const SERIAL: usize = 20;
/// In a range's flags: the space may be given back.
const UNMAP: u32 = 1;

/// The header as the guest writes it.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Header(virtio_blk_outhdr);
// SAFETY: three integers without padding, so every pattern of bytes is a header.
unsafe impl ByteValued for Header {}

/// A range of sectors as the guest writes it.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Range(virtio_blk_discard_write_zeroes);
// SAFETY: integers without padding, so every pattern of bytes is a range.
unsafe impl ByteValued for Range {}

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the request is out of the disk's bounds or of an impossible length")]
    Bounds,
    #[error("the disk does not know such a request")]
    Unsupported,
    #[error("the disk is read-only")]
    ReadOnly,
    #[error(transparent)]
    TooShort(#[from] TooShort),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What requests are served from.
pub struct Disk<'a> {
    pub backing: &'a Backing,
    pub config: &'a Config,
    pub counters: &'a mut Counters,
}

/// How many bytes a request moves, without its header and its status.
pub fn data_length(chain: &Chain<'_>) -> u64 {
    let overhead = size_of::<Header>() as u64 + 1;
    (chain.readable.len() + chain.writable.len()).saturating_sub(overhead)
}

impl Disk<'_> {
    /// Serves a request and returns how many bytes were written into its buffers.
    pub fn serve(&mut self, mut chain: Chain<'_>) -> u32 {
        // Without a place for the status the driver learns nothing, whatever is done.
        let Some(data_length) = chain.writable.len().checked_sub(1) else { return 0 };
        let Ok(mut status) = chain.writable.split_off(data_length) else { return 0 };
        let (code, written) = match self.execute(chain) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Unsupported) => {
                self.counters.invalid_reqs_count += 1;
                (VIRTIO_BLK_S_UNSUPP, 0)
            }
            Err(error) => {
                self.counters.execute_fails += 1;
                tracing::debug!(disk = self.config.serial, %error, "a disk request failed");
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        match status.write(&[code as u8]) {
            Ok(()) => written + 1,
            Err(TooShort) => 0,
        }
    }

    fn execute(&mut self, mut chain: Chain<'_>) -> Result<u32, Failure> {
        let Header(header) = chain.readable.read_obj()?;
        match header.type_ {
            VIRTIO_BLK_T_IN => {
                let offset = self.bounds(header.sector, chain.writable.len())?;
                let length = chain.writable.len() as u32;
                self.backing.transfer(Direction::Read, offset, chain.writable)?;
                self.counters.read_count += 1;
                self.counters.read_bytes += u64::from(length);
                Ok(length)
            }
            VIRTIO_BLK_T_OUT => {
                self.writable()?;
                let length = chain.readable.len();
                let offset = self.bounds(header.sector, length)?;
                self.backing.transfer(Direction::Write, offset, chain.readable)?;
                self.counters.write_count += 1;
                self.counters.write_bytes += length;
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH if self.config.flush => {
                self.backing.flush()?;
                self.counters.flush_count += 1;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let mut serial = [0; SERIAL];
                let bytes = self.config.serial.as_bytes();
                let length = bytes.len().min(SERIAL);
                serial[..length].copy_from_slice(&bytes[..length]);
                chain.writable.write(&serial)?;
                Ok(SERIAL as u32)
            }
            VIRTIO_BLK_T_DISCARD => {
                self.ranges(chain.readable, DISCARD_SECTORS_MAX, |offset, length, flags| match flags {
                    0 => Ok(self.backing.discard(offset, length)?),
                    _ => Err(Failure::Unsupported),
                })
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                self.ranges(chain.readable, ZERO_SECTORS_MAX, |offset, length, flags| match flags {
                    0 | UNMAP => Ok(self.backing.write_zeroes(offset, length, flags == UNMAP)?),
                    _ => Err(Failure::Unsupported),
                })
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// Calls `act` with offset and length in bytes, and flags, of every range. All are checked before the first is acted on.
    fn ranges(
        &self,
        mut buffers: Buffers<'_>,
        sectors_max: u32,
        act: impl Fn(u64, u64, u32) -> Result<(), Failure>,
    ) -> Result<u32, Failure> {
        self.writable()?;
        let entry = size_of::<Range>() as u64;
        let count = buffers.len() / entry;
        if !buffers.len().is_multiple_of(entry) || count == 0 || count > u64::from(RANGES_MAX) {
            return Err(Failure::Bounds);
        }
        let mut checked = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let Range(range) = buffers.read_obj()?;
            if range.num_sectors > sectors_max {
                return Err(Failure::Bounds);
            }
            let length = u64::from(range.num_sectors) * SECTOR;
            checked.push((self.bounds(range.sector, length)?, length, range.flags));
        }
        for (offset, length, flags) in checked {
            if length > 0 {
                act(offset, length, flags)?;
            }
        }
        Ok(0)
    }

    fn writable(&self) -> Result<(), Failure> {
        if self.config.read_only { Err(Failure::ReadOnly) } else { Ok(()) }
    }

    /// The offset in bytes of a range that is entirely on the disk.
    fn bounds(&self, sector: u64, length: u64) -> Result<u64, Failure> {
        let end = sector.checked_add(length / SECTOR).ok_or(Failure::Bounds)?;
        if !length.is_multiple_of(SECTOR) || end > self.backing.sectors {
            return Err(Failure::Bounds);
        }
        Ok(sector * SECTOR)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;
    use crate::block::Block;
    use crate::mmio::Slot;
    use crate::rate::{Limit, Limits};
    use crate::testing::{Random, Rig, fuzz};

    const HEADER: u64 = 0x2000;
    const DATA: u64 = 0x4000;
    const STATUS: u64 = 0x3000;

    struct Test {
        rig: Rig<Block>,
        file: tempfile::NamedTempFile,
    }

    impl Test {
        /// A disk of 64 sectors; sector n is filled with n.
        fn new(read_only: bool) -> Self {
            let file = tempfile::NamedTempFile::new().unwrap();
            let content: Vec<u8> = (0..64 * SECTOR).map(|n| (n / SECTOR) as u8).collect();
            file.as_file().write_all_at(&content, 0).unwrap();
            let limits = Limits::default();
            let config =
                Config { serial: "rootfs".into(), path: file.path().into(), read_only, flush: true, limits };
            Test { rig: Rig::new(Block::new(config).unwrap()), file }
        }

        /// Sends a request and returns status and used length.
        fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
            let driver = &mut self.rig.drivers[0];
            driver.put(HEADER, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
            driver.put(STATUS, &[0xff]);
            let mut buffers = vec![(HEADER, 16, false)];
            buffers.extend_from_slice(data);
            buffers.push((STATUS, 1, true));
            driver.add(&buffers);
            self.rig.kick(0);
            let driver = &mut self.rig.drivers[0];
            let used = driver.used();
            assert_eq!(used.len(), 1);
            (driver.get(STATUS, 1)[0], used[0].1)
        }

        fn range(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
            let bytes: Vec<u8> = ranges
                .iter()
                .flat_map(|(sector, count, flags)| {
                    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
                })
                .collect();
            self.rig.drivers[0].put(DATA, &bytes);
            self.request(kind, 0, &[(DATA, bytes.len() as u32, false)]).0
        }

        fn sector(&self, sector: u64) -> Vec<u8> {
            let mut bytes = vec![0; 512];
            self.file.as_file().read_exact_at(&mut bytes, sector * SECTOR).unwrap();
            bytes
        }
    }

    #[test]
    fn data_is_read_and_written_where_it_belongs() {
        let mut test = Test::new(false);
        assert_eq!(
            test.request(VIRTIO_BLK_T_IN, 3, &[(DATA, 512, true), (DATA + 0x1000, 512, true)]),
            (0, 1025)
        );
        assert_eq!(test.rig.drivers[0].get(DATA, 512), [3; 512]);
        assert_eq!(test.rig.drivers[0].get(DATA + 0x1000, 512), [4; 512]);

        test.rig.drivers[0].put(DATA, &[0xaa; 512]);
        assert_eq!(test.request(VIRTIO_BLK_T_OUT, 63, &[(DATA, 512, false)]), (0, 1));
        assert_eq!(test.sector(63), [0xaa; 512]);
        assert_eq!(test.sector(62), [62; 512]);
        assert_eq!(test.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
    }

    #[test]
    fn a_header_may_be_in_pieces_and_the_status_may_follow_data_in_one_buffer() {
        let mut test = Test::new(false);
        let driver = &mut test.rig.drivers[0];
        driver.put(HEADER, &[0; 8]);
        driver.put(HEADER + 0x100, &5u64.to_le_bytes());
        driver.put(DATA + 512, &[0xff]);
        driver.add(&[
            (HEADER, 3, false),
            (HEADER + 3, 5, false),
            (HEADER + 0x100, 8, false),
            (DATA, 513, true),
        ]);
        test.rig.kick(0);
        assert_eq!(test.rig.drivers[0].used(), [(0, 513)]);
        assert_eq!(test.rig.drivers[0].get(DATA, 513), [&[5; 512][..], &[0]].concat());
    }

    #[test]
    fn out_of_bounds_is_an_error_and_changes_nothing() {
        let mut test = Test::new(false);
        for (kind, writable) in [(VIRTIO_BLK_T_IN, true), (VIRTIO_BLK_T_OUT, false)] {
            for (sector, length) in
                [(64, 512), (63, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511), (0, 513)]
            {
                let (status, _) = test.request(kind, sector, &[(DATA, length, writable)]);
                assert_eq!(u32::from(status), VIRTIO_BLK_S_IOERR, "{kind} {sector} {length}");
            }
        }
        assert_eq!(test.file.as_file().metadata().unwrap().len(), 64 * SECTOR);
    }

    #[test]
    fn a_read_only_disk_refuses_every_kind_of_write() {
        let mut test = Test::new(true);
        let failed = VIRTIO_BLK_S_IOERR as u8;
        assert_eq!(test.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, false)]).0, failed);
        assert_eq!(test.range(VIRTIO_BLK_T_DISCARD, &[(0, 1, 0)]), failed);
        assert_eq!(test.range(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1, 0)]), failed);
        assert_eq!(test.sector(0), [0; 512]);
        assert_eq!(test.request(VIRTIO_BLK_T_IN, 1, &[(DATA, 512, true)]).0, 0);
    }

    #[test]
    fn zeroes_are_written_and_space_is_given_back() {
        let mut test = Test::new(false);
        let before = test.file.as_file().metadata().unwrap().blocks();
        assert_eq!(test.range(VIRTIO_BLK_T_WRITE_ZEROES, &[(8, 8, 1), (30, 1, 0)]), 0);
        assert_eq!(
            (test.sector(8), test.sector(15), test.sector(30)),
            (vec![0; 512], vec![0; 512], vec![0; 512])
        );
        assert_eq!(
            (test.sector(7), test.sector(16), test.sector(31)),
            (vec![7; 512], vec![16; 512], vec![31; 512])
        );
        assert_eq!(test.range(VIRTIO_BLK_T_DISCARD, &[(32, 32, 0)]), 0);
        assert!(test.file.as_file().metadata().unwrap().blocks() < before);
    }

    #[test]
    fn zeroes_are_written_by_hand_where_the_file_system_cannot() {
        let test = Test::new(false);
        let backing = Backing::open(test.file.path(), false).unwrap();
        backing.write_zeroes_by_hand(5 * SECTOR, 2 * SECTOR).unwrap();
        assert_eq!((test.sector(4), test.sector(5)), (vec![4; 512], vec![0; 512]));
        assert_eq!((test.sector(6), test.sector(7)), (vec![0; 512], vec![7; 512]));
    }

    #[test]
    fn ranges_are_checked_all_before_any_is_done() {
        let mut test = Test::new(false);
        let failed = VIRTIO_BLK_S_IOERR as u8;
        for bad in [(64, 1, 0), (63, 2, 0), (u64::MAX, 1, 0), (0, ZERO_SECTORS_MAX + 1, 0)] {
            assert_eq!(test.range(VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 1, 0), bad]), failed, "{bad:?}");
        }
        assert_eq!(test.range(VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 1, 0); 17]), failed);
        assert_eq!(test.range(VIRTIO_BLK_T_WRITE_ZEROES, &[]), failed);
        assert_eq!(test.sector(1), [1; 512]);
        assert_eq!(test.range(VIRTIO_BLK_T_DISCARD, &[(1, 1, 1)]), VIRTIO_BLK_S_UNSUPP as u8);
    }

    #[test]
    fn the_serial_number_is_told_and_cut() {
        let mut test = Test::new(true);
        assert_eq!(test.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, true)]), (0, 21));
        assert_eq!(test.rig.drivers[0].get(DATA, 8), *b"rootfs\0\0");
        assert_eq!(test.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 19, true)]).0, VIRTIO_BLK_S_IOERR as u8);
        assert_eq!(test.request(77, 0, &[]).0, VIRTIO_BLK_S_UNSUPP as u8);
    }

    #[test]
    fn a_request_without_room_for_the_status_is_given_back_untouched() {
        let mut test = Test::new(false);
        test.rig.drivers[0].put(HEADER, &[1, 0, 0, 0]);
        test.rig.drivers[0].add(&[(HEADER, 16, false), (DATA, 512, false)]);
        test.rig.kick(0);
        assert_eq!(test.rig.drivers[0].used(), [(0, 0)]);
        assert_eq!(test.sector(0), [0; 512]);
    }

    #[test]
    fn a_file_that_shrinks_gives_errors_and_the_disk_lives() {
        let mut test = Test::new(false);
        test.file.as_file().set_len(10 * SECTOR).unwrap();
        assert_eq!(test.request(VIRTIO_BLK_T_IN, 9, &[(DATA, 1024, true)]).0, VIRTIO_BLK_S_IOERR as u8);
        assert_eq!(test.request(VIRTIO_BLK_T_IN, 9, &[(DATA, 512, true)]).0, 0);
    }

    #[test]
    fn the_file_can_be_replaced_under_the_driver() {
        let mut test = Test::new(false);
        let other = tempfile::NamedTempFile::new().unwrap();
        other.as_file().write_all_at(&[0x55; 1024], 0).unwrap();
        test.rig.transport.reconfigure(|disk| disk.replace(other.path())).unwrap();
        assert_eq!(test.request(VIRTIO_BLK_T_IN, 1, &[(DATA, 512, true)]), (0, 513));
        assert_eq!(test.rig.drivers[0].get(DATA, 512), [0x55; 512]);
        assert_eq!(test.rig.transport.read_u32(0x100), 2);
        assert!(test.rig.transport.reconfigure(|disk| disk.replace("/nonexistent".as_ref())).is_err());
        assert_eq!(test.request(VIRTIO_BLK_T_IN, 1, &[(DATA, 512, true)]).0, 0);
    }

    #[test]
    fn a_limited_disk_lets_requests_wait_and_counts_them() {
        let mut test = Test::new(false);
        let limit = Limit { size: 2, burst: 0, refill: std::time::Duration::from_secs(3600) };
        test.rig.transport.device_mut().limit(Limits { bandwidth: None, operations: Some(limit) });
        for sector in [1, 2] {
            assert_eq!(test.request(VIRTIO_BLK_T_IN, sector, &[(DATA, 512, true)]), (0, 513));
        }
        let driver = &mut test.rig.drivers[0];
        driver.add(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
        test.rig.kick(0);
        test.rig.kick(0);
        assert_eq!(test.rig.drivers[0].used(), []);
        // As if an hour had passed.
        test.rig.transport.device_mut().limit(Limits { bandwidth: None, operations: Some(limit) });
        test.rig.transport.source(0);
        assert_eq!(test.rig.drivers[0].used().len(), 1);
        let metrics = test.rig.transport.metrics();
        for expected in [("read_count", 3), ("read_bytes", 1536), ("rate_limiter_throttled_events", 1)] {
            assert!(metrics.contains(&expected), "{metrics:?}");
        }
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let config = |path: &str| Config {
            serial: "x".into(),
            path: path.into(),
            read_only: true,
            flush: false,
            limits: Limits::default(),
        };
        assert!(matches!(Block::new(config("/proc")), Err(super::super::Error::Kind(_))));
        assert!(matches!(Block::new(config("/dev/null")), Err(super::super::Error::Kind(_))));
        assert!(matches!(Block::new(config("/nonexistent")), Err(super::super::Error::Open { .. })));
    }

    #[test]
    fn hostile_drivers_do_no_harm() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 64 * SECTOR as usize]).unwrap();
        let make = || {
            let config = Config {
                serial: "f".into(),
                path: file.path().into(),
                read_only: false,
                flush: false,
                limits: Limits::default(),
            };
            Block::new(config).unwrap()
        };
        fuzz(400, make, |random: &mut Random| {
            let kind = [0u32, 1, 4, 8, 11, 13, 99][random.below(7) as usize];
            let sector = [0u64, 1, 63, 64, u64::MAX][random.below(5) as usize];
            let mut bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
            bytes.truncate(if random.below(8) == 0 { random.below(17) as usize } else { 16 });
            // A range, for the requests that have one.
            bytes.extend((0..random.below(40)).map(|_| random.next() as u8));
            bytes
        });
        assert_eq!(file.as_file().metadata().unwrap().len(), 64 * SECTOR);
    }
}
