//! Which pages of the guest's memory the monitor has written, for snapshots that hold only what changed.
//!
//! Accessors of vm-memory mark what they write. What a system call writes has to be marked by hand
//! ([`Buffers::mark_written`](crate::chain::Buffers::mark_written)). What the guest writes itself only KVM knows.

use std::num::NonZeroUsize;

use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap, NewBitmap, WithBitmapSlice};

/// A page, in bytes: the unit of KVM's log.
pub const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// The marks of one region of memory, if somebody wants them.
#[derive(Debug, Default)]
pub struct Dirty(Option<AtomicBitmap>);

impl Dirty {
    /// Marks for a region of so many bytes: none are set, or none are kept.
    pub fn new(size: usize, wanted: bool) -> Self {
        Dirty(wanted.then(|| AtomicBitmap::new(size, PAGE)))
    }

    /// The marks, if they are kept.
    pub fn pages(&self) -> Option<&AtomicBitmap> {
        self.0.as_ref()
    }
}

impl<'a> WithBitmapSlice<'a> for Dirty {
    type S = BS<'a, Option<AtomicBitmap>>;
}

impl Bitmap for Dirty {
    fn mark_dirty(&self, offset: usize, length: usize) {
        self.0.mark_dirty(offset, length);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> BS<'_, Self> {
        self.0.slice_at(offset)
    }
}

impl NewBitmap for Dirty {
    fn with_len(_: usize) -> Self {
        Dirty(None)
    }
}
