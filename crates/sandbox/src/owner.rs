//! Who owns a bundle: the shim holds a lock on `shim.pid` as long as it lives, so no reused pid can be mistaken for it.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use rustix::{
    fs::{CWD, FlockOperation, RenameFlags},
    io::Errno,
};

use crate::paths::Bundle;

/// What a command that clears up writes instead of a number: nobody shall take it for a shim, and kill it.
const CLEARING: &str = "clearing";

/// The lock; the bundle is owned until it is dropped.
#[derive(Debug)]
pub struct Ownership {
    _file: File,
}

/// Takes a bundle for this process; `None` when another shim owns it.
///
/// # Errors
/// When the file cannot be written.
pub fn claim(bundle: &Bundle) -> io::Result<Option<Ownership>> {
    claim_as(bundle, &std::process::id().to_string())
}

/// Takes a bundle whose shim is gone, to clear away what it left; `None` when somebody owns it.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn claim_for_clearing(bundle: &Bundle) -> io::Result<Option<Ownership>> {
    claim_as(bundle, CLEARING)
}

fn claim_as(bundle: &Bundle, who: &str) -> io::Result<Option<Ownership>> {
    let path = bundle.shim_pid();
    // The file appears locked. Whoever looked at it before it was would take its owner for dead, and their look would be
    // a lock that is in the owner's way.
    let new = path.with_extension(format!("pid-{}", std::process::id()));
    let file = open(OpenOptions::new().truncate(true), &new)?;
    let owned = lock(file, who)?;
    match rustix::fs::renameat_with(CWD, &new, CWD, &path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(owned),
        Err(Errno::EXIST) => {
            std::fs::remove_file(&new)?;
            lock(open(&mut OpenOptions::new(), &path)?, who)
        }
        Err(error) => Err(error.into()),
    }
}

fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    options.read(true).write(true).create(true).mode(0o600).open(path)
}

fn lock(mut file: File, who: &str) -> io::Result<Option<Ownership>> {
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(e) => return Err(e.into()),
    }
    file.set_len(0)?;
    file.write_all(who.as_bytes())?;
    Ok(Some(Ownership { _file: file }))
}

/// Keeps a descriptor that was passed to this process from its children.
///
/// # Errors
/// When it is not open.
pub fn close_on_exec(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)?)
}

/// Whether and by which process a bundle is owned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A shim lives.
    Shim(u32),
    /// The bundle is made, its shim is not there yet.
    NotYet,
    /// The shim is gone, and a command clears away what it left.
    Clearing,
    /// The shim is gone.
    Gone,
}

/// Finds the owner of a bundle without waiting for it.
pub fn of(bundle: &Bundle) -> Owner {
    let Ok(mut file) = File::open(bundle.shim_pid()) else { return Owner::NotYet };
    // A shared lock: many may look at the same time. Dropped with the file.
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Owner::Gone,
        Err(_) => {
            let mut text = String::new();
            let _ = file.read_to_string(&mut text);
            match text.trim() {
                CLEARING => Owner::Clearing,
                pid => Owner::Shim(pid.parse().unwrap_or(0)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::at(dir.path());
        assert_eq!(of(&bundle), Owner::NotYet);
        let first = claim(&bundle).unwrap().unwrap();
        assert!(claim(&bundle).unwrap().is_none());
        assert_eq!(of(&bundle), Owner::Shim(std::process::id()));
        drop(first);
        assert_eq!(of(&bundle), Owner::Gone);
        assert!(claim(&bundle).unwrap().is_some());
    }

    /// Every command looks at all sandboxes, also at those that are just being born.
    #[test]
    fn nobody_sees_an_owner_before_it_owns() {
        let dir = tempfile::tempdir().unwrap();
        let mut claimed = Vec::new();
        let done = std::sync::atomic::AtomicBool::new(false);
        let bundle = |n: usize| Bundle::at(dir.path().join(n.to_string()));
        (0..200).for_each(|n| std::fs::create_dir(bundle(n).dir()).unwrap());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        (0..200).for_each(|n| assert_ne!(of(&bundle(n)), Owner::Gone));
                    }
                });
            }
            for n in 0..200 {
                claimed.push(claim(&bundle(n)));
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(claimed.iter().all(|claim| matches!(claim, Ok(Some(_)))), "nobody else wanted them");
    }
}
