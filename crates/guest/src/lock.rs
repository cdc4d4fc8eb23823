//! One process at a time makes a cache entry.

use std::fs::File;
use std::path::Path;

use rustix::fs::FlockOperation;

use crate::Result;
use crate::error::Context;

/// An exclusive lock, held until it is dropped.
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of `dir`; `waiting` is called first when somebody else holds it.
    pub(crate) fn take(dir: &Path, waiting: impl FnOnce()) -> Result<Lock> {
        std::fs::create_dir_all(dir).context(|| format!("cannot create {}", dir.display()))?;
        let path = dir.join(".lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.context(|| format!("cannot open {}", path.display()))?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            waiting();
            rustix::fs::flock(&file, FlockOperation::LockExclusive)
                .context(|| format!("cannot lock {}", path.display()))?;
        }
        Ok(Lock { _file: file })
    }
}
