//! What the guest tells about its memory (virtio 1.2, section 5.5.6.3).

use crate::chain::Buffers;

/// More entries than there are kinds of them are not looked at.
const ENTRIES_MAX: usize = 32;

macro_rules! statistics {
    ($($tag:literal $name:ident: $doc:literal),* $(,)?) => {
        /// Numbers that the guest gave. It may give any, and need not give one.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct Statistics {
            $(#[doc = $doc] pub $name: Option<u64>,)*
        }

        impl Statistics {
            fn set(&mut self, tag: u16, value: u64) {
                match tag {
                    // All ones: the guest does not know.
                    $($tag => self.$name = (value != u64::MAX).then_some(value),)*
                    _ => {}
                }
            }

            /// Names and values of those that are known.
            pub fn known(&self) -> Vec<(&'static str, u64)> {
                [$((stringify!($name), self.$name)),*]
                    .into_iter()
                    .filter_map(|(name, value)| Some((name, value?)))
                    .collect()
            }
        }
    };
}

statistics! {
    0 swap_in: "Bytes swapped in.",
    1 swap_out: "Bytes swapped out.",
    2 major_faults: "Page faults that needed a disk.",
    3 minor_faults: "Page faults that did not.",
    4 free_memory: "Bytes that nobody uses.",
    5 total_memory: "Bytes that there are.",
    6 available_memory: "Bytes that new programs could have.",
    7 disk_caches: "Bytes that could be given up at once.",
    8 hugetlb_allocations: "Huge pages that somebody got.",
    9 hugetlb_failures: "Huge pages that nobody got.",
    10 oom_kill: "Programs that were killed for want of memory.",
    11 alloc_stall: "Allocations that had to wait.",
    12 async_scan: "Pages that were looked at in the background.",
    13 direct_scan: "Pages that an allocation looked at.",
    14 async_reclaim: "Pages that were freed in the background.",
    15 direct_reclaim: "Pages that an allocation freed.",
}

impl Statistics {
    /// Takes the entries over, each a tag and a value.
    pub(super) fn read(&mut self, mut buffer: Buffers<'_>) {
        for _ in 0..ENTRIES_MAX {
            let mut entry = [0; 10];
            if buffer.read(&mut entry).is_err() {
                return;
            }
            let (tag, value) = entry.split_at(2);
            let tag = u16::from_le_bytes([tag[0], tag[1]]);
            self.set(tag, u64::from_le_bytes(std::array::from_fn(|n| value[n])));
        }
    }
}
