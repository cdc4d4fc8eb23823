//! Network namespaces, entered by threads that end there.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{Error, Result};

/// A network namespace, held open: it stays also when its name goes.
#[derive(Debug)]
pub(crate) struct Namespace {
    file: File,
    path: PathBuf,
}

impl Namespace {
    /// Opens the namespace at `path`, which must not be the host's: that of process 1. It may be this process's own, into which
    /// an engine's command has put it.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let error = |source| Error::Namespace { path: path.to_owned(), source };
        // Whatever is there instead, such as a FIFO, must not make this wait.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(error)?;
        let namespace = Self { file, path: path.to_owned() };
        match is_of(1, &namespace.file.metadata().map_err(error)?) {
            true => Err(Error::Host(path.to_owned())),
            false => Ok(namespace),
        }
    }

    /// The same one, for another to hold.
    pub(crate) fn try_clone(&self) -> Result<Self> {
        let file = self.file.try_clone();
        let file = file.map_err(|source| Error::Namespace { path: self.path.clone(), source })?;
        Ok(Self { file, path: self.path.clone() })
    }

    /// What tells it from every other that exists at the same time.
    pub(crate) fn identity(&self) -> Result<(u64, u64)> {
        let meta = self.file.metadata();
        let meta = meta.map_err(|source| Error::Namespace { path: self.path.clone(), source })?;
        Ok((meta.dev(), meta.ino()))
    }

    /// Runs `work` in the namespace, in a thread that ends with it: a thread cannot be trusted to find its way back.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let entered = scope.spawn(|| {
                move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(
                    |errno| match errno {
                        rustix::io::Errno::PERM => Error::Privilege(self.path.clone()),
                        rustix::io::Errno::INVAL => Error::Namespace {
                            path: self.path.clone(),
                            source: io::Error::other("it is no network namespace"),
                        },
                        other => Error::Namespace { path: self.path.clone(), source: other.into() },
                    },
                )?;
                work()
            });
            entered.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// The network namespace with this number, if any process is in it or it has a name: else it is gone, with all that was in it.
pub(crate) fn find(number: u64) -> Option<Namespace> {
    let named = std::fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.path());
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let lived_in = processes.map(|entry| entry.path().join("ns/net"));
    let first = ["/proc/thread-self/ns/net", "/proc/1/ns/net"].map(PathBuf::from).into_iter();
    first.chain(named).chain(lived_in).find_map(|path| {
        // What is no namespace at all has another device.
        let own = std::fs::metadata("/proc/self/ns/net").ok()?;
        let meta = std::fs::metadata(&path).ok()?;
        ((meta.dev(), meta.ino()) == (own.dev(), number)).then_some(())?;
        Some(Namespace { file: File::open(&path).ok()?, path })
    })
}

/// Refuses the network namespace of the host, and the one that this process is in: for what a person asks for.
///
/// # Errors
/// [`Error::Host`]; [`Error::Namespace`] when there is none at `path`.
pub fn refuse_own(path: &Path) -> Result<()> {
    let meta = std::fs::metadata(path);
    let meta = meta.map_err(|source| Error::Namespace { path: path.to_owned(), source })?;
    match is_of(1, &meta) || is_of(std::process::id(), &meta) {
        true => Err(Error::Host(path.to_owned())),
        false => Ok(()),
    }
}

/// Whether a process is in a namespace, as far as one may look.
fn is_of(pid: u32, namespace: &std::fs::Metadata) -> bool {
    let own = std::fs::metadata(format!("/proc/{pid}/ns/net"));
    own.is_ok_and(|own| (own.dev(), own.ino()) == (namespace.dev(), namespace.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_namespace_of_its_own_is_refused() {
        let host = refuse_own(Path::new("/proc/self/ns/net")).unwrap_err();
        assert!(matches!(host, Error::Host(_)), "{host}");
        let absent = Namespace::open(Path::new("/run/netns/no-such")).unwrap_err();
        assert!(absent.to_string().contains("/run/netns/no-such"), "{absent}");
        let file = tempfile::NamedTempFile::new().unwrap();
        let other = Namespace::open(file.path()).unwrap().run(|| Ok(())).unwrap_err();
        assert!(other.to_string().contains("no network namespace"), "{other}");
    }
}
