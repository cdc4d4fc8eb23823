//! The memory balloon (virtio 1.2, section 5.5): pages that the guest gives up, at the host's wish or because they are free,
//! go back to the host.

mod statistics;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::calls::{SystemCall, SystemCalls, any, only};
use crate::chain::{Buffers, Chain};
use crate::queue::{Position, Queue, QueueError, Request};
use crate::state::{Reader, StateError, Writer};
use crate::timer::Timer;
use crate::{Activation, Device, Event, Kind, Memory, Metric, Slice};

pub use statistics::Statistics;

/// Feature bits (section 5.5.3).
const VIRTIO_BALLOON_F_STATS_VQ: u32 = 1;
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;
/// The balloon's unit, in bytes, whatever the guest's pages are.
const PAGE: u64 = 4096;
/// Pages in one MiB.
const PAGES_PER_MIB: u32 = 256;
/// A request names at most this many pages; Linux names 256. What a driver names beyond stays with the guest.
const REQUEST_PAGES_MAX: usize = 4096;
/// Where the driver says how large the balloon is, in the configuration space.
const ACTUAL: u64 = 4;

/// Pages go back to the host.
const CALLS: &[SystemCall] = &[
    only(libc::SYS_madvise, 2, libc::MADV_DONTNEED as u32),
    only(libc::SYS_madvise, 2, libc::MADV_REMOVE as u32),
    TIMER,
];
const TIMER: SystemCall = any(libc::SYS_timerfd_settime);

/// What a balloon is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// How large it shall be, in MiB.
    pub mib: u32,
    /// The guest takes pages back from it rather than run out of memory.
    pub deflate_on_oom: bool,
    /// The guest says which pages are free, also while the balloon is empty.
    pub reporting: bool,
    /// How often the guest is asked for its statistics; never if it is zero, and then it cannot be asked later either.
    pub statistics: Duration,
}

/// In saved state: the driver's buffer for statistics is not here.
const NO_BUFFER: u32 = u32::MAX;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// Statistics are not possible, or would become so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StatisticsError {
    /// The balloon was made without them.
    #[error("Statistics for the balloon device are not enabled")]
    Disabled,
    /// They are there for as long as the balloon is, or never.
    #[error("Statistics cannot be enabled/disabled after activation.")]
    Change,
}

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    config: Config,
    /// How many pages the driver says are in it.
    actual: u32,
    queues: Vec<(Role, Queue)>,
    timer: Timer,
    statistics: Statistics,
    /// The driver's buffer, to be given back when the next statistics are wanted (section 5.5.6.3).
    buffer: Option<Request>,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    inflate_count: u64,
    deflate_count: u64,
    stats_updates_count: u64,
    free_page_report_count: u64,
}

impl Balloon {
    /// A balloon without a driver.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(config: Config) -> io::Result<Self> {
        let (queues, timer) = (Vec::new(), Timer::new()?);
        let (statistics, counters) = (Statistics::default(), Counters::default());
        Ok(Balloon { config, actual: 0, queues, timer, statistics, buffer: None, counters })
    }

    /// What the guest said last.
    ///
    /// # Errors
    /// [`StatisticsError::Disabled`].
    pub fn statistics(&self) -> Result<Statistics, StatisticsError> {
        if self.config.statistics.is_zero() {
            return Err(StatisticsError::Disabled);
        }
        Ok(self.statistics)
    }

    /// Asks for statistics at other intervals.
    ///
    /// # Errors
    /// [`StatisticsError`]; the interval stays as it was.
    pub fn poll_statistics(&mut self, interval: Duration) -> Result<(), StatisticsError> {
        match (self.config.statistics.is_zero(), interval.is_zero()) {
            (true, true) => Ok(()),
            (true, false) | (false, true) => Err(StatisticsError::Change),
            (false, false) => {
                self.config.statistics = interval;
                if !self.queues.is_empty() {
                    self.timer.every(interval);
                }
                Ok(())
            }
        }
    }

    /// Queues in their order: those of features that are not offered do not count (section 5.5.2).
    fn roles(&self) -> Vec<Role> {
        let mut roles = vec![Role::Inflate, Role::Deflate];
        if !self.config.statistics.is_zero() {
            roles.push(Role::Statistics);
        }
        if self.config.reporting {
            roles.push(Role::Reporting);
        }
        roles
    }

    /// Has the guest fill its buffer with new statistics.
    fn ask(&mut self) -> Result<(), QueueError> {
        let queue = self.queues.iter_mut().find(|(role, _)| *role == Role::Statistics);
        if let (Some((_, queue)), Some(buffer)) = (queue, self.buffer.take()) {
            queue.complete(buffer, 0)?;
            queue.notify()?;
        }
        Ok(())
    }

    /// Takes the buffer with the statistics, and keeps it until the next are wanted.
    fn listen(&mut self) -> Result<(), QueueError> {
        let Some((_, queue)) = self.queues.iter_mut().find(|(role, _)| *role == Role::Statistics) else {
            return Ok(());
        };
        // A driver has one buffer. Should it have more, only the last is kept.
        for _ in 0..queue.size() {
            let Some(request) = queue.pop()? else { break };
            match queue.chain(request) {
                Ok(chain) => {
                    self.statistics.read(chain.readable);
                    self.counters.stats_updates_count += 1;
                }
                Err(error) => tracing::debug!(%error, "the balloon's statistics are malformed"),
            }
            if let Some(earlier) = self.buffer.replace(request) {
                queue.complete(earlier, 0)?;
            }
        }
        queue.enable_notification()?;
        queue.notify()
    }

    /// How large it shall be, in MiB. The driver has to be told: see
    /// [`Transport::reconfigure`](crate::mmio::Transport::reconfigure).
    pub fn resize(&mut self, mib: u32) {
        self.config.mib = mib;
    }

    /// How many pages of 4 KiB are in it, as the driver says.
    pub fn actual_pages(&self) -> u32 {
        self.actual
    }
}

impl Device for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn features(&self) -> u64 {
        let on = |condition: bool, feature: u32| u64::from(condition) << feature;
        on(self.config.deflate_on_oom, VIRTIO_BALLOON_F_DEFLATE_ON_OOM)
            | on(!self.config.statistics.is_zero(), VIRTIO_BALLOON_F_STATS_VQ)
            | on(self.config.reporting, VIRTIO_BALLOON_F_REPORTING)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256; 4][..self.roles().len()]
    }

    fn config(&self) -> Vec<u8> {
        let pages = self.config.mib.saturating_mul(PAGES_PER_MIB);
        [pages, self.actual].iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(word)) = (offset, data.try_into()) {
            self.actual = u32::from_le_bytes(word);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), QueueError> {
        for (index, role) in self.roles().into_iter().enumerate() {
            let wanted = match role {
                Role::Inflate | Role::Deflate => true,
                Role::Statistics => activation.has(VIRTIO_BALLOON_F_STATS_VQ),
                Role::Reporting => activation.has(VIRTIO_BALLOON_F_REPORTING),
            };
            if wanted {
                self.queues.push((role, activation.take(index)?));
            }
        }
        if self.queues.iter().any(|(role, _)| *role == Role::Statistics) {
            self.timer.every(self.config.statistics);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.queues.clear();
        self.buffer = None;
        self.timer.stop();
        self.actual = 0;
    }

    fn positions(&self) -> Vec<Option<Position>> {
        let position = |role| self.queues.iter().find(|(other, _)| *other == role);
        self.roles().into_iter().map(|role| position(role).map(|(_, queue)| queue.position())).collect()
    }

    fn save(&self, writer: &mut Writer) {
        writer.u32(self.actual);
        writer.u32(self.buffer.map_or(NO_BUFFER, |request| u32::from(request.head())));
    }

    fn restore(&mut self, reader: &mut Reader<'_>) -> Result<(), StateError> {
        self.actual = reader.u32()?;
        self.buffer = match reader.u32()? {
            NO_BUFFER => None,
            head => Some(Request::of(u16::try_from(head).map_err(|_| StateError::Invalid("a request"))?)),
        };
        Ok(())
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.timer.as_fd()]
    }

    fn metrics(&self) -> Vec<Metric> {
        vec![
            ("inflate_count", self.counters.inflate_count),
            ("deflate_count", self.counters.deflate_count),
            ("stats_updates_count", self.counters.stats_updates_count),
            ("free_page_report_count", self.counters.free_page_report_count),
        ]
    }

    fn system_calls(&self) -> SystemCalls {
        SystemCalls { events: CALLS, registers: &[TIMER] }
    }

    fn handle(&mut self, event: Event) -> Result<bool, QueueError> {
        let Event::Queue(index) = event else {
            self.timer.clear();
            return self.ask().map(|()| false);
        };
        let role = self.roles().get(index).copied();
        if role == Some(Role::Statistics) {
            return self.listen().map(|()| false);
        }
        let Some((role, queue)) = self.queues.iter_mut().find(|(other, _)| Some(*other) == role) else {
            return Ok(false);
        };
        let (role, memory, counters) = (*role, queue.memory().clone(), &mut self.counters);
        let pages = Pages { memory: &memory, advice: advice(&memory) };
        queue.serve(|chain| {
            match chain {
                Ok(chain) => pages.give_up(role, chain, counters),
                Err(error) => tracing::debug!(%error, "a request to the balloon is malformed"),
            }
            Some(0)
        })
    }
}

/// How pages are given back. Those of a file that others have mapped too, a back end's, are taken out of the file: they would stay there
/// otherwise.
fn advice(memory: &Memory) -> i32 {
    let shared = memory.iter().any(|region| region.get_mmap().flags() & libc::MAP_SHARED != 0);
    if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED }
}

/// Gives the whole pages in a range of the guest's memory back to the host, as the balloon's are.
pub(crate) fn release(memory: &Memory, slice: &Slice<'_>) {
    Pages { memory, advice: advice(memory) }.release(slice);
}

/// The guest's memory, of which the host gets pages back.
struct Pages<'a> {
    memory: &'a Memory,
    advice: i32,
}

impl Pages<'_> {
    fn give_up(&self, role: Role, chain: Chain<'_>, counters: &mut Counters) {
        match role {
            Role::Inflate => {
                counters.inflate_count += 1;
                self.give_up_numbers(chain.readable);
            }
            Role::Reporting => {
                counters.free_page_report_count += 1;
                chain.writable.slices().for_each(|slice| self.release(slice));
            }
            // A page that the guest takes back comes when it is touched.
            Role::Deflate => counters.deflate_count += 1,
            Role::Statistics => {}
        }
    }

    /// Releases pages by their numbers; neighbours together.
    fn give_up_numbers(&self, mut numbers: Buffers<'_>) {
        let mut run: Option<(u64, u64)> = None;
        for _ in 0..REQUEST_PAGES_MAX {
            let Ok(number) = numbers.read_obj::<u32>() else { break };
            let number = u64::from(u32::from_le(number));
            run = match run {
                Some((first, count)) if number == first + count => Some((first, count + 1)),
                Some((first, count)) if number + 1 == first => Some((number, count + 1)),
                other => {
                    self.release_run(other);
                    Some((number, 1))
                }
            };
        }
        self.release_run(run);
    }

    fn release_run(&self, run: Option<(u64, u64)>) {
        let Some((first, count)) = run else { return };
        match self.memory.get_slice(GuestAddress(first * PAGE), (count * PAGE) as usize) {
            Ok(slice) => self.release(&slice),
            // A run across the hole between two parts of memory, or outside of it.
            Err(error) if count == 1 => {
                tracing::debug!(%error, "the balloon was given a page that does not exist")
            }
            Err(_) => (first..first + count).for_each(|page| self.release_run(Some((page, 1)))),
        }
    }

    /// Gives the whole pages in a range of the guest's memory back to the host. They read as zeroes, or as the file behind the
    /// memory, when the guest touches them again.
    fn release(&self, slice: &Slice<'_>) {
        let guard = slice.ptr_guard_mut();
        let start = guard.as_ptr();
        let skip = start.align_offset(PAGE as usize);
        let length = slice.len().saturating_sub(skip) / PAGE as usize * PAGE as usize;
        if length == 0 {
            return;
        }
        // SAFETY: the range is within `slice`, a checked part of the guest's memory, which stays mapped as long as the guard
        // lives. The contents change as if the guest had written zeroes; only the guest relies on them.
        let result = unsafe { libc::madvise(start.wrapping_add(skip).cast(), length, self.advice) };
        if result != 0 {
            tracing::debug!(error = %std::io::Error::last_os_error(), "pages were not given back to the host");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmio::Slot;
    use crate::testing::{Rig, fuzz};

    const INTERVAL: Duration = Duration::from_millis(10);
    const ALL: Config = Config { mib: 1, deflate_on_oom: true, reporting: true, statistics: INTERVAL };
    const INFLATE: usize = 0;
    const STATISTICS: usize = 2;
    const REPORTING: usize = 3;
    const LIST: u64 = 0x8000;
    const FILLED: u64 = 0x2_0000;

    /// A balloon with memory that is full of ones from [`FILLED`] on.
    fn rig() -> Rig<Balloon> {
        let rig = Rig::new(Balloon::new(ALL).unwrap());
        rig.drivers[0].put(FILLED, &vec![1; 0x10 * PAGE as usize]);
        rig
    }

    /// Which of the filled pages are still there.
    fn kept(rig: &Rig<Balloon>) -> Vec<u64> {
        (0..0x10).filter(|page| rig.drivers[0].get(FILLED + page * PAGE, 4096) == [1; 4096]).collect()
    }

    fn inflate(rig: &mut Rig<Balloon>, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        rig.drivers[INFLATE].put(LIST, &bytes);
        rig.drivers[INFLATE].add(&[(LIST, bytes.len() as u32, false)]);
        rig.kick(INFLATE);
        assert_eq!(rig.drivers[INFLATE].used().len(), 1);
    }

    #[test]
    fn exactly_the_named_pages_go() {
        let mut rig = rig();
        inflate(&mut rig, &[0x21, 0x22, 0x25, 0x24, 0x2f]);
        assert_eq!(kept(&rig), [0, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14]);
        assert_eq!(rig.drivers[0].get(FILLED + PAGE, 4096), [0; 4096]);
    }

    #[test]
    fn pages_that_others_have_mapped_leave_the_file() {
        use std::os::unix::fs::MetadataExt;
        use vm_memory::{Bytes, GuestMemoryRegion};

        let memory = crate::testing::shared_memory();
        memory.write_slice(&[1; 4 * PAGE as usize], GuestAddress(0)).unwrap();
        let blocks = || {
            let file = memory.iter().next().unwrap().file_offset().unwrap().file();
            file.metadata().unwrap().blocks() * 512 / PAGE
        };
        assert_eq!(blocks(), 4);
        Pages { memory: &memory, advice: advice(&memory) }.release_run(Some((1, 2)));
        assert_eq!(blocks(), 2);
    }

    #[test]
    fn pages_that_do_not_exist_do_not_protect_those_that_do() {
        let mut rig = rig();
        // The memory ends with page 0xff; the list runs across its end, and wraps.
        inflate(&mut rig, &[0xfe, 0xff, 0x100, 0x101, u32::MAX, 0x20]);
        assert!(!kept(&rig).contains(&0));
    }

    #[test]
    fn only_whole_pages_are_released_when_free_ones_are_reported() {
        let mut rig = rig();
        rig.drivers[REPORTING].add(&[(FILLED + 100, 3 * 4096, true), (FILLED + 8 * PAGE, 4096, true)]);
        rig.kick(REPORTING);
        assert_eq!(kept(&rig), [0, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(rig.drivers[0].get(FILLED, 4096), [1; 4096]);
    }

    #[test]
    fn a_long_list_is_cut() {
        let mut rig = rig();
        let mut numbers = vec![0x30; REQUEST_PAGES_MAX];
        numbers.push(0x20);
        inflate(&mut rig, &numbers);
        assert!(kept(&rig).contains(&0));
    }

    #[test]
    fn sizes_are_told_in_both_directions() {
        let mut rig = rig();
        assert_eq!(rig.transport.read_u32(0x100), 256);
        rig.transport.reconfigure(|balloon| balloon.resize(3));
        assert_eq!(rig.transport.read_u32(0x100), 768);
        rig.transport.write_u32(0x104, 512);
        assert_eq!(rig.transport.device().actual_pages(), 512);
        for (offset, bytes) in [(0x100, &[9; 4][..]), (0x104, &[9; 8]), (0x105, &[9])] {
            rig.transport.write(offset, bytes);
        }
        assert_eq!((rig.transport.read_u32(0x100), rig.transport.read_u32(0x104)), (768, 512));
    }

    #[test]
    fn without_reporting_and_statistics_there_are_two_queues() {
        let mut rig =
            Rig::new(Balloon::new(Config { reporting: false, statistics: Duration::ZERO, ..ALL }).unwrap());
        rig.transport.write_u32(crate::mmio::register::QUEUE_SEL, 2);
        assert_eq!(rig.transport.read_u32(crate::mmio::register::QUEUE_NUM_MAX), 0);
        assert!(rig.transport.active());
    }

    #[test]
    fn statistics_are_asked_for_again_and_again_and_the_buffer_is_kept_in_between() {
        let mut rig = rig();
        for (round, value) in [1u64, 5].into_iter().enumerate() {
            let entries = [(4u16, value), (5, 100), (99, 3), (7, u64::MAX)];
            let bytes: Vec<u8> = entries
                .iter()
                .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
                .collect();
            rig.drivers[STATISTICS].put(LIST, &bytes);
            rig.drivers[STATISTICS].add(&[(LIST, bytes.len() as u32, false)]);
            rig.kick(STATISTICS);
            assert_eq!(rig.drivers[STATISTICS].used(), [], "round {round}");
            let statistics = rig.transport.device().statistics().unwrap();
            assert_eq!((statistics.free_memory, statistics.total_memory), (Some(value), Some(100)));
            assert_eq!((statistics.disk_caches, statistics.swap_in), (None, None));
            std::thread::sleep(2 * INTERVAL);
            rig.transport.source(0);
            assert_eq!(rig.drivers[STATISTICS].used().len(), 1, "round {round}");
        }
    }

    #[test]
    fn statistics_cannot_be_switched_on_or_off() {
        let mut with = Balloon::new(ALL).unwrap();
        assert_eq!(with.poll_statistics(2 * INTERVAL), Ok(()));
        assert_eq!(with.poll_statistics(Duration::ZERO), Err(StatisticsError::Change));
        let mut without = Balloon::new(Config { statistics: Duration::ZERO, ..ALL }).unwrap();
        assert_eq!(without.poll_statistics(INTERVAL), Err(StatisticsError::Change));
        assert_eq!(without.statistics(), Err(StatisticsError::Disabled));
    }

    #[test]
    fn hostile_drivers_do_no_harm() {
        fuzz(
            400,
            || Balloon::new(ALL).unwrap(),
            |random| {
                let wide = random.below(2) == 0;
                (0..random.below(300))
                    .flat_map(|_| {
                        if wide { random.next() as u32 } else { random.below(0x102) as u32 }.to_le_bytes()
                    })
                    .collect()
            },
        );
    }
}
