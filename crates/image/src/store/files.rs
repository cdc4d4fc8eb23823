//! Files that survive crashes, and locks between processes.
//!
//! Locks are `flock(2)`: the kernel drops them when their holder dies, so none is ever stale.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{IoContext, Result};
use crate::{Digest, Error};

/// How often a lock that somebody else holds is tried again.
pub(crate) const LOCK_POLL: Duration = Duration::from_millis(50);

/// Makes a directory, for its owner only, and its parents.
pub(crate) fn create_dir(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).context("create", path)
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).context("sync", path)
}

/// Removes a file; returns the bytes that it took on the disk, or `None` if there was none.
pub(crate) fn remove_file(path: &Path) -> Result<Option<u64>> {
    let allocated = allocated(path)?;
    if allocated.is_some() {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context("remove", path);
            }
            _ => {}
        }
    }
    Ok(allocated)
}

/// The bytes that a file takes on the disk.
pub(crate) fn allocated(path: &Path) -> Result<Option<u64>> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata.blocks() * 512)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("inspect", path),
    }
}

/// The files in a directory, sorted by name.
pub(crate) fn list_dir(path: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).context("list", path)? {
        files.push(entry.context("list", path)?.path());
    }
    files.sort();
    Ok(files)
}

/// Reads a small file whole; one larger than `limit` bytes is refused.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("open", path),
    };
    read_bounded(file, &path.display().to_string(), limit, path).map(Some)
}

/// Reads all of `input`; more than `limit` bytes are refused.
pub(crate) fn read_bounded(
    input: impl std::io::Read,
    what: &str,
    limit: u64,
    path: &Path,
) -> Result<Vec<u8>> {
    use std::io::Read;
    let mut data = Vec::new();
    input.take(limit + 1).read_to_end(&mut data).context("read", path)?;
    if data.len() as u64 > limit {
        return Err(Error::limit(format!("{what}, larger than {limit} bytes,"), "document_size", limit));
    }
    Ok(data)
}

/// A new file in the store's temporary directory. It is locked, by which [`collect_temporary`] knows that its maker
/// lives, and removed when dropped.
pub(crate) struct TempFile {
    pub file: File,
    path: PathBuf,
    keep: bool,
}

impl TempFile {
    pub(crate) fn new(dir: &Path) -> Result<TempFile> {
        loop {
            let temporary =
                tempfile::Builder::new().prefix("").tempfile_in(dir).context("create a file in", dir)?;
            let (file, path) = temporary.keep().map_err(|e| e.error).context("create a file in", dir)?;
            let temporary = TempFile { file, path, keep: false };
            temporary.file.lock().context("lock", &temporary.path)?;
            // Between creation and lock, another process may have taken it for a leftover.
            if temporary.file.metadata().context("inspect", &temporary.path)?.nlink() > 0 {
                return Ok(temporary);
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the content durable, and then the file known as `path`, whatever that was before.
    pub(crate) fn persist(mut self, path: &Path) -> Result<()> {
        self.file.sync_all().context("write", &self.path)?;
        std::fs::rename(&self.path, path).context("create", path)?;
        self.keep = true;
        path.parent().map_or(Ok(()), sync_dir)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Writes a whole file so that after a crash either the old or the new content is there.
pub(crate) fn write_atomic(temporary: &Path, path: &Path, content: &[u8]) -> Result<()> {
    let mut file = TempFile::new(temporary)?;
    let written = file.file.write_all(content);
    written.context("write", path)?;
    file.persist(path)
}

/// Removes the temporary files whose makers are dead.
pub(crate) fn collect_temporary(dir: &Path) -> Result<()> {
    for path in list_dir(dir)? {
        let Ok(file) = File::open(&path) else { continue };
        if file.try_lock().is_ok() {
            tracing::debug!("removing the leftover {}", path.display());
            remove_file(&path)?;
        }
    }
    Ok(())
}

/// A lock that is held until dropped.
pub(crate) struct Lock(#[expect(dead_code, reason = "held for the lock that it has")] File);

/// How a [`Lock`] is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum LockMode {
    Shared,
    Exclusive,
}

impl Lock {
    /// Takes the lock at once, or not at all.
    pub(crate) fn try_take(path: &Path, mode: LockMode) -> Result<Option<Lock>> {
        let file = open_lockable(path)?;
        let attempt = match mode {
            LockMode::Shared => file.try_lock_shared(),
            LockMode::Exclusive => file.try_lock(),
        };
        match attempt {
            Ok(()) => Ok(Some(Lock(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).context("lock", path),
        }
    }

    /// Takes the lock, or gives up after `patience`: `holder` says in the error what kind of operation holds it.
    pub(crate) fn take(
        path: &Path,
        mode: LockMode,
        patience: Duration,
        holder: &'static str,
    ) -> Result<Lock> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(lock) = Lock::try_take(path, mode)? {
                return Ok(lock);
            }
            if Instant::now() >= deadline {
                return Err(Error::Busy { path: path.parent().unwrap_or(path).to_owned(), holder });
            }
            std::thread::sleep(LOCK_POLL);
        }
    }
}

/// The right to make one file of the store. Whoever has it works on a partial file, which has the lock and, after a
/// crash, what was written so far; everybody else waits and finds the file made.
pub(crate) struct Claim {
    pub file: File,
    partial: PathBuf,
    target: PathBuf,
}

/// The outcome of asking for a [`Claim`].
pub(crate) enum Claimed {
    /// The file is there.
    Exists,
    /// Somebody else is making it.
    Busy,
    /// The caller makes it.
    Mine(Claim),
}

impl Claim {
    /// Asks for the right to make `target` by way of `partial`.
    pub(crate) fn attempt(partial: &Path, target: &Path) -> Result<Claimed> {
        loop {
            if target.try_exists().context("inspect", target)? {
                return Ok(Claimed::Exists);
            }
            let file = open_lockable(partial)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(Claimed::Busy),
                Err(TryLockError::Error(error)) => return Err(error).context("lock", partial),
            }
            // Its previous holder may have finished, or given up, since it was opened: then the name is gone or leads
            // to another file, and the lock is on something that nobody else looks at.
            let ours = file.metadata().context("inspect", partial)?;
            let named = std::fs::symlink_metadata(partial);
            if named.is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())) {
                // Somebody may have made it after it was looked for and before the partial file was opened.
                if target.try_exists().context("inspect", target)? {
                    remove_file(partial)?;
                    return Ok(Claimed::Exists);
                }
                return Ok(Claimed::Mine(Claim {
                    file,
                    partial: partial.to_owned(),
                    target: target.to_owned(),
                }));
            }
        }
    }

    /// The partial file.
    pub(crate) fn partial(&self) -> &Path {
        &self.partial
    }

    /// The content is complete and right: makes it durable, then known by its name.
    pub(crate) fn complete(self) -> Result<()> {
        self.file.sync_all().context("write", &self.partial)?;
        std::fs::rename(&self.partial, &self.target).context("create", &self.target)?;
        self.target.parent().map_or(Ok(()), sync_dir)
    }

    /// The content is of no use: the partial file goes.
    pub(crate) fn discard(self) -> Result<()> {
        remove_file(&self.partial).map(drop)
    }
}

fn open_lockable(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).context("open", path)
}

/// The paths in a store.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub dir: PathBuf,
}

impl Layout {
    pub(crate) fn version(&self) -> PathBuf {
        self.dir.join("kapsel.json")
    }

    pub(crate) fn oci_layout(&self) -> PathBuf {
        self.dir.join("oci-layout")
    }

    pub(crate) fn index(&self) -> PathBuf {
        self.dir.join("index.json")
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.dir.join("blobs/sha256")
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Downloads and rootfs files that are not complete, which survive a crash.
    pub(crate) fn partial(&self) -> PathBuf {
        self.dir.join("partial")
    }

    /// Files that are worth nothing once their maker is dead.
    pub(crate) fn temporary(&self) -> PathBuf {
        self.dir.join("tmp")
    }

    /// Held while index.json changes.
    pub(crate) fn index_lock(&self) -> PathBuf {
        self.dir.join("index.lock")
    }

    /// Held shared while blobs may be there that no image needs yet, exclusively while such blobs are removed.
    pub(crate) fn collect_lock(&self) -> PathBuf {
        self.dir.join("collect.lock")
    }
}
