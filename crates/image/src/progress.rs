//! How far a long operation has come.

/// What an item of a long operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A blob is downloaded from a registry.
    Download,
    /// A file is read into the store.
    Import,
    /// A layer is merged into the rootfs.
    Unpack,
}

/// Receives the progress of a pull, an import or the making of a rootfs. Items run in parallel.
pub trait Progress: Send + Sync {
    /// An item begins. `label` is short and fit for a terminal (a digest's first digits, a file's name); `total` is
    /// its size in bytes where known.
    fn start(&self, phase: Phase, label: &str, total: Option<u64>) -> Box<dyn ProgressItem>;
}

/// One item of a [`Progress`]. Dropped without [`done`](ProgressItem::done), it has failed.
pub trait ProgressItem: Send {
    /// `bytes` more are through.
    fn advance(&mut self, bytes: u64);
    /// The item is complete.
    fn done(&mut self);
}

/// Ignores all progress.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _: Phase, _: &str, _: Option<u64>) -> Box<dyn ProgressItem> {
        Box::new(Silent)
    }
}

impl ProgressItem for Silent {
    fn advance(&mut self, _: u64) {}
    fn done(&mut self) {}
}
