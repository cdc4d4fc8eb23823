//! What a guest has read of a file it keeps from one opening to the next, as long as the file has not changed.
//!
//! The crate's policies know two extremes: a guest forgets a file's content whenever it opens the file (`auto`), or does not until it
//! learns of other attributes (`always`). In between is what libfuse calls `auto_cache`: at each opening the file is compared with what it
//! was at the one before. So what the host changes is still seen by whoever opens the file after that.
//!
//! A file that is only read is also closed without a word: there is nothing that closing it could report.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};

/// A file that has changed within this time may change again without another time of change: file systems count in steps, of
/// milliseconds or, some, of two seconds.
const SETTLED: Duration = Duration::from_secs(3);

/// A file system whose files are kept.
pub struct KeepCache<F> {
    fs: F,
    /// As each file was when the guest last opened it, by the number that the guest has for it. The guest makes it grow by opening files, and
    /// holds a descriptor of ours for each, of which there are so many.
    opened: Mutex<HashMap<u64, Version>>,
}

/// What tells a file's content from that at another time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    /// Of the last change, of content or attributes, since 1970: nobody can set it back.
    changed: Duration,
    size: u64,
}

impl Version {
    fn of(attr: &Attr) -> Self {
        Self { changed: Duration::new(attr.ctime, attr.ctimensec), size: attr.size }
    }

    fn is_settled(&self, now: Duration) -> bool {
        now.checked_sub(self.changed).is_some_and(|age| age >= SETTLED)
    }
}

impl<F> KeepCache<F> {
    /// Nothing is known of any file yet.
    pub fn new(fs: F) -> Self {
        Self { fs, opened: Mutex::default() }
    }

    fn opened(&self) -> MutexGuard<'_, HashMap<u64, Version>> {
        // Whole between statements, so a panic elsewhere does not spoil it.
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes an opening, and tells whether the file is as it was at the one before.
    fn unchanged(&self, inode: u64, version: Option<Version>, now: Duration) -> bool {
        match version.filter(|version| version.is_settled(now)) {
            Some(version) => self.opened().insert(inode, version) == Some(version),
            None => {
                self.opened().remove(&inode);
                false
            }
        }
    }
}

/// Passes calls on as they are.
macro_rules! pass {
    ($(fn $name:ident$(<$generic:ident: $bound:path>)?(&self $(, $arg:ident: $typ:ty)* $(,)?) $(-> $ret:ty)?;)*) => {
        $(fn $name$(<$generic: $bound>)?(&self $(, $arg: $typ)*) $(-> $ret)? {
            self.fs.$name($($arg),*)
        })*
    };
}

impl<F: FileSystem> FileSystem for KeepCache<F> {
    type Inode = F::Inode;
    type Handle = F::Handle;
    type DirIter = F::DirIter;

    fn open(
        &self,
        ctx: Context,
        inode: Self::Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Self::Handle>, OpenOptions)> {
        let inode: u64 = inode.into();
        let (handle, mut options) = self.fs.open(ctx, inode.into(), kill_priv, flags)?;
        // After the opening, which may have cut the file off.
        let attr = self.fs.getattr(ctx, inode.into(), None).ok();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.unchanged(inode, attr.map(|(attr, _)| Version::of(&attr)), now) {
            options |= OpenOptions::KEEP_CACHE;
        }
        if flags & libc::O_ACCMODE.unsigned_abs() == libc::O_RDONLY.unsigned_abs() {
            options |= OpenOptions::NOFLUSH;
        }
        Ok((handle, options))
    }

    fn forget(&self, ctx: Context, inode: Self::Inode, count: u64) {
        let inode: u64 = inode.into();
        // The guest has its content no more, or reads it again.
        self.opened().remove(&inode);
        self.fs.forget(ctx, inode.into(), count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Self::Inode, u64)>) {
        let requests: Vec<(u64, u64)> =
            requests.into_iter().map(|(inode, count)| (inode.into(), count)).collect();
        {
            let mut opened = self.opened();
            for (inode, _) in &requests {
                opened.remove(inode);
            }
        }
        self.fs.batch_forget(ctx, requests.into_iter().map(|(inode, count)| (inode.into(), count)).collect());
    }

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.opened().clear();
        self.fs.init(capable)
    }

    pass! {
        fn destroy(&self);
        fn statfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<libc::statvfs64>;
        fn lookup(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<Entry>;
        fn opendir(&self, ctx: Context, inode: Self::Inode, flags: u32)
            -> io::Result<(Option<Self::Handle>, OpenOptions)>;
        fn releasedir(&self, ctx: Context, inode: Self::Inode, flags: u32, handle: Self::Handle)
            -> io::Result<()>;
        fn mkdir(&self, ctx: Context, parent: Self::Inode, name: &CStr, mode: u32, umask: u32, ext: Extensions)
            -> io::Result<Entry>;
        fn rmdir(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<()>;
        fn readdir(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, size: u32, offset: u64)
            -> io::Result<Self::DirIter>;
        fn release(&self, ctx: Context, inode: Self::Inode, flags: u32, handle: Self::Handle, flush: bool,
            flock_release: bool, lock_owner: Option<u64>) -> io::Result<()>;
        fn create(&self, ctx: Context, parent: Self::Inode, name: &CStr, mode: u32, kill_priv: bool, flags: u32,
            umask: u32, ext: Extensions) -> io::Result<(Entry, Option<Self::Handle>, OpenOptions)>;
        fn unlink(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<()>;
        fn read<W: ZeroCopyWriter>(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, to: W, size: u32,
            offset: u64, lock_owner: Option<u64>, flags: u32) -> io::Result<usize>;
        fn write<R: ZeroCopyReader>(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, from: R, size: u32,
            offset: u64, lock_owner: Option<u64>, delayed: bool, kill_priv: bool, flags: u32) -> io::Result<usize>;
        fn getattr(&self, ctx: Context, inode: Self::Inode, handle: Option<Self::Handle>)
            -> io::Result<(Attr, Duration)>;
        fn setattr(&self, ctx: Context, inode: Self::Inode, attr: SetattrIn, handle: Option<Self::Handle>,
            valid: SetattrValid) -> io::Result<(Attr, Duration)>;
        fn rename(&self, ctx: Context, old_dir: Self::Inode, old_name: &CStr, new_dir: Self::Inode, new_name: &CStr,
            flags: u32) -> io::Result<()>;
        fn mknod(&self, ctx: Context, parent: Self::Inode, name: &CStr, mode: u32, rdev: u32, umask: u32,
            ext: Extensions) -> io::Result<Entry>;
        fn link(&self, ctx: Context, inode: Self::Inode, new_parent: Self::Inode, new_name: &CStr)
            -> io::Result<Entry>;
        fn symlink(&self, ctx: Context, target: &CStr, parent: Self::Inode, name: &CStr, ext: Extensions)
            -> io::Result<Entry>;
        fn readlink(&self, ctx: Context, inode: Self::Inode) -> io::Result<Vec<u8>>;
        fn flush(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, lock_owner: u64) -> io::Result<()>;
        fn fsync(&self, ctx: Context, inode: Self::Inode, data_only: bool, handle: Self::Handle) -> io::Result<()>;
        fn fsyncdir(&self, ctx: Context, inode: Self::Inode, data_only: bool, handle: Self::Handle) -> io::Result<()>;
        fn access(&self, ctx: Context, inode: Self::Inode, mask: u32) -> io::Result<()>;
        fn setxattr(&self, ctx: Context, inode: Self::Inode, name: &CStr, value: &[u8], flags: u32,
            extra: SetxattrFlags) -> io::Result<()>;
        fn getxattr(&self, ctx: Context, inode: Self::Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(&self, ctx: Context, inode: Self::Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(&self, ctx: Context, inode: Self::Inode, name: &CStr) -> io::Result<()>;
        fn fallocate(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, mode: u32, offset: u64,
            length: u64) -> io::Result<()>;
        fn lseek(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, offset: u64, whence: u32)
            -> io::Result<u64>;
        fn copyfilerange(&self, ctx: Context, inode_in: Self::Inode, handle_in: Self::Handle, offset_in: u64,
            inode_out: Self::Inode, handle_out: Self::Handle, offset_out: u64, len: u64, flags: u64)
            -> io::Result<usize>;
        fn syncfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<()>;
    }
}

impl<F: SerializableFileSystem> SerializableFileSystem for KeepCache<F> {
    pass! {
        fn prepare_serialization(&self, cancel: Arc<AtomicBool>);
        fn serialize(&self, state: File) -> io::Result<()>;
        fn deserialize_and_apply(&self, state: File) -> io::Result<()>;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_kept_only_if_it_cannot_have_changed() {
        let cache = KeepCache::new(());
        let now = Duration::from_secs(1000);
        let at = |changed, size| Some(Version { changed: Duration::from_secs(changed), size });
        assert!(!cache.unchanged(7, at(10, 5), now), "it was never opened");
        assert!(cache.unchanged(7, at(10, 5), now));
        assert!(!cache.unchanged(8, at(10, 5), now), "another one");
        assert!(!cache.unchanged(7, at(11, 5), now));
        assert!(!cache.unchanged(7, at(11, 6), now));
        assert!(cache.unchanged(7, at(11, 6), now));
        // It may change once more within the step of the clock in which it was looked at.
        assert!(!cache.unchanged(7, at(999, 6), now));
        assert!(!cache.unchanged(7, at(999, 6), now));
        assert!(!cache.unchanged(7, at(999, 6), now + SETTLED), "for the first time since it may have");
        assert!(cache.unchanged(7, at(999, 6), now + SETTLED));
        // The clock of another machine.
        assert!(!cache.unchanged(7, at(5000, 6), now));
        assert!(!cache.unchanged(7, None, now));
    }
}
