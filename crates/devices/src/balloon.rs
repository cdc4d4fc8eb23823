//! The memory balloon (virtio 1.2, section 5.5): pages that the guest gives up, at the host's wish or because they are free,
//! go back to the host.

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::calls::{SystemCall, SystemCalls, only};
use crate::chain::{Buffers, Chain};
use crate::queue::{Queue, QueueError};
use crate::{Activation, Device, Event, Kind, Memory};

/// Feature bits (section 5.5.3).
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
const CALLS: &[SystemCall] = &[only(libc::SYS_madvise, 2, libc::MADV_DONTNEED as u32)];

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;

/// What a balloon is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// How large it shall be, in MiB.
    pub mib: u32,
    /// The guest takes pages back from it rather than run out of memory.
    pub deflate_on_oom: bool,
    /// The guest says which pages are free, also while the balloon is empty.
    pub reporting: bool,
}

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    config: Config,
    /// How many pages the driver says are in it.
    actual: u32,
    queues: [Option<Queue>; 3],
}

impl Balloon {
    /// A balloon without a driver.
    pub fn new(config: Config) -> Self {
        Balloon { config, actual: 0, queues: [None, None, None] }
    }

    /// How large it shall be, in MiB. The driver has to be told: see
    /// [`Transport::reconfigure`](crate::mmio::Transport::reconfigure).
    pub fn resize(&mut self, mib: u32) {
        self.config.mib = mib;
    }

    /// How large it is, in MiB, as the driver says.
    pub fn actual_mib(&self) -> u32 {
        self.actual / PAGES_PER_MIB
    }
}

impl Device for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn features(&self) -> u64 {
        let on = |condition: bool, feature: u32| u64::from(condition) << feature;
        on(self.config.deflate_on_oom, VIRTIO_BALLOON_F_DEFLATE_ON_OOM)
            | on(self.config.reporting, VIRTIO_BALLOON_F_REPORTING)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        // Queues of features that are not offered do not count (section 5.5.2).
        if self.config.reporting { &[256, 256, 256] } else { &[256, 256] }
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
        let reporting =
            if activation.has(VIRTIO_BALLOON_F_REPORTING) { Some(activation.take(REPORTING)?) } else { None };
        self.queues = [Some(activation.take(INFLATE)?), Some(activation.take(DEFLATE)?), reporting];
        Ok(())
    }

    fn reset(&mut self) {
        self.queues = [None, None, None];
        self.actual = 0;
    }

    fn system_calls(&self) -> SystemCalls {
        SystemCalls { events: CALLS, registers: &[] }
    }

    fn handle(&mut self, event: Event) -> Result<bool, QueueError> {
        let Event::Queue(index) = event else { return Ok(false) };
        let Some(queue) = self.queues.get_mut(index).and_then(Option::as_mut) else { return Ok(false) };
        let memory = queue.memory().clone();
        queue.serve(|chain| {
            match chain {
                Ok(chain) => give_up(&memory, index, chain),
                Err(error) => tracing::debug!(%error, "a request to the balloon is malformed"),
            }
            Some(0)
        })
    }
}

fn give_up(memory: &Memory, queue: usize, chain: Chain<'_>) {
    match queue {
        INFLATE => give_up_numbers(memory, chain.readable),
        REPORTING => chain.writable.slices().for_each(release),
        // A page that the guest takes back comes when it is touched.
        _ => {}
    }
}

/// Releases pages by their numbers; neighbours together.
fn give_up_numbers(memory: &Memory, mut numbers: Buffers<'_>) {
    let mut run: Option<(u64, u64)> = None;
    for _ in 0..REQUEST_PAGES_MAX {
        let Ok(number) = numbers.read_obj::<u32>() else { break };
        let number = u64::from(u32::from_le(number));
        run = match run {
            Some((first, count)) if number == first + count => Some((first, count + 1)),
            Some((first, count)) if number + 1 == first => Some((number, count + 1)),
            other => {
                release_run(memory, other);
                Some((number, 1))
            }
        };
    }
    release_run(memory, run);
}

fn release_run(memory: &Memory, run: Option<(u64, u64)>) {
    let Some((first, count)) = run else { return };
    match memory.get_slice(GuestAddress(first * PAGE), (count * PAGE) as usize) {
        Ok(slice) => release(&slice),
        // A run across the hole between two parts of memory, or outside of it.
        Err(error) if count == 1 => {
            tracing::debug!(%error, "the balloon was given a page that does not exist")
        }
        Err(_) => (first..first + count).for_each(|page| release_run(memory, Some((page, 1)))),
    }
}

/// Gives the whole pages in a range of the guest's memory back to the host. They read as zeroes, or as the file behind the
/// memory, when the guest touches them again.
fn release(slice: &VolatileSlice<'_, ()>) {
    let guard = slice.ptr_guard_mut();
    let start = guard.as_ptr();
    let skip = start.align_offset(PAGE as usize);
    let length = slice.len().saturating_sub(skip) / PAGE as usize * PAGE as usize;
    if length == 0 {
        return;
    }
    // SAFETY: the range is within `slice`, a checked part of the guest's memory, which stays mapped as long as the guard
    // lives. The contents change as if the guest had written zeroes; only the guest relies on them.
    let result = unsafe { libc::madvise(start.wrapping_add(skip).cast(), length, libc::MADV_DONTNEED) };
    if result != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "pages were not given back to the host");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmio::Slot;
    use crate::testing::{Rig, fuzz};

    const ALL: Config = Config { mib: 1, deflate_on_oom: true, reporting: true };
    const LIST: u64 = 0x8000;
    const FILLED: u64 = 0x2_0000;

    /// A balloon with memory that is full of ones from [`FILLED`] on.
    fn rig() -> Rig<Balloon> {
        let rig = Rig::new(Balloon::new(ALL));
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
        assert_eq!(rig.transport.device().actual_mib(), 2);
        for (offset, bytes) in [(0x100, &[9; 4][..]), (0x104, &[9; 8]), (0x105, &[9])] {
            rig.transport.write(offset, bytes);
        }
        assert_eq!((rig.transport.read_u32(0x100), rig.transport.read_u32(0x104)), (768, 512));
    }

    #[test]
    fn without_reporting_there_are_two_queues() {
        let mut rig = Rig::new(Balloon::new(Config { reporting: false, ..ALL }));
        rig.transport.write_u32(crate::mmio::register::QUEUE_SEL, 2);
        assert_eq!(rig.transport.read_u32(crate::mmio::register::QUEUE_NUM_MAX), 0);
        assert!(rig.transport.active());
    }

    #[test]
    fn hostile_drivers_do_no_harm() {
        fuzz(
            400,
            || Balloon::new(ALL),
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
