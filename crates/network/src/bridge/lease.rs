//! Who has which address: one file an address, locked by its holder's process for as long as it lives.
//!
//! The kernel frees a lock with the process that has it, however that ends. So a file that can be locked is a killed shim's, and no
//! number of a process has to be believed. All changes are made under one lock over all stores.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::Subnet;
use crate::{Error, Result};

/// The version of [`Written`].
const VERSION: u32 = 1;
/// Whoever has the lock runs a few commands of the kernel's and lets go.
const PATIENCE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(2);
const LOCK: &str = "lock";

/// An address with whom it was given to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leased {
    /// The sandbox's id.
    pub sandbox: String,
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its IPv6 address, if the bridge has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address6: Option<Ipv6Addr>,
    /// The bridge's network.
    pub subnet: Subnet,
    /// The sandbox's interface on the host.
    pub tap: String,
}

#[derive(Serialize, Deserialize)]
struct Written {
    version: u32,
    #[serde(flatten)]
    leased: Leased,
}

/// A lease of this process's.
#[derive(Debug)]
pub(super) struct Lease {
    pub leased: Leased,
    path: PathBuf,
    _held: File,
}

impl Lease {
    pub(super) fn remove(&self) -> Result<()> {
        absent(fs::remove_file(&self.path)).map_err(failed("remove", &self.path))
    }

    pub(super) fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }
}

/// All stores, locked.
pub(super) struct Stores {
    base: PathBuf,
    lock: Arc<File>,
}

/// The leases of one network namespace; all are locked while it is there.
pub(super) struct Store {
    dir: PathBuf,
    _lock: Arc<File>,
}

/// The namespaces that have leases, by their numbers.
pub(super) fn namespaces(base: &Path) -> Result<Vec<u64>> {
    let entries = match fs::read_dir(base) {
        // Whoever may not look has no bridge.
        Err(e) if [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied].contains(&e.kind()) => {
            return Ok(Vec::new());
        }
        entries => entries.map_err(failed("list", base))?,
    };
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

impl Store {
    /// Waits for all stores, and locks them.
    pub(super) fn lock(base: &Path) -> Result<Stores> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(base);
        made.map_err(failed("make", base))?;
        let path = base.join(LOCK);
        let file = File::options().append(true).create(true).mode(0o600).open(&path);
        let file = file.map_err(failed("open", &path))?;
        let until = Instant::now() + PATIENCE;
        while !try_lock(&file).map_err(failed("lock", &path))? {
            if Instant::now() > until {
                let source = io::Error::other("another kapsel does not let go of it");
                return Err(failed("lock", &path)(source));
            }
            std::thread::sleep(LOOK);
        }
        Ok(Stores { base: base.to_owned(), lock: Arc::new(file) })
    }

    /// What is leased, and how many leases nobody holds any more.
    pub(super) fn scan(&self) -> Result<(Vec<Leased>, usize)> {
        let (mut live, mut dead) = (Vec::new(), 0);
        for path in self.files()? {
            match held(&path)? {
                true => live.push(read(&path)?),
                false => dead += 1,
            }
        }
        live.sort_by_key(|leased| leased.address);
        Ok((live, dead))
    }

    /// Notes a lease and holds it.
    pub(super) fn write(&self, leased: &Leased) -> Result<Lease> {
        let path = self.dir.join(leased.address.to_string());
        // A killed shim's, perhaps: who has it could not hold it otherwise.
        absent(fs::remove_file(&path)).map_err(failed("remove", &path))?;
        let text = serde_json::to_vec(&Written { version: VERSION, leased: leased.clone() });
        let text = text.map_err(|error| failed("write", &path)(error.into()))?;
        // Appears held and whole: whoever looks by a watch does not take the lock first.
        let new = self.dir.join("new");
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new);
        let mut file = file.map_err(failed("create", &new))?;
        let written =
            try_lock(&file).and_then(|_| file.write_all(&text)).and_then(|()| fs::rename(&new, &path));
        written.map_err(failed("write", &path))?;
        Ok(Lease { leased: leased.clone(), path, _held: file })
    }

    /// Removes the leases that nobody holds, and the store when none is left.
    pub(super) fn forget_dead(&self) -> Result<()> {
        for path in self.files()? {
            if !held(&path)? {
                absent(fs::remove_file(&path)).map_err(failed("remove", &path))?;
            }
        }
        match fs::remove_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            result => absent(result).map_err(failed("remove", &self.dir)),
        }
    }

    /// Removes all: the namespace is gone.
    pub(super) fn clear(&self) -> Result<()> {
        absent(fs::remove_dir_all(&self.dir)).map_err(failed("remove", &self.dir))
    }

    fn files(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&self.dir).map_err(failed("list", &self.dir))?;
        let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>();
        paths.map_err(failed("list", &self.dir))
    }
}

impl Stores {
    /// The store of one namespace.
    pub(super) fn of(&self, namespace: u64) -> Result<Store> {
        let dir = self.base.join(namespace.to_string());
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(failed("make", &dir))?;
        Ok(Store { dir, _lock: self.lock.clone() })
    }
}

fn read(path: &Path) -> Result<Leased> {
    let text = fs::read(path).map_err(failed("read", path))?;
    let written: Written =
        serde_json::from_slice(&text).map_err(|error| failed("understand", path)(error.into()))?;
    match written.version {
        VERSION => Ok(written.leased),
        other => {
            let source = io::Error::other(format!("it has version {other}, not {VERSION}"));
            Err(failed("understand", path)(source))
        }
    }
}

/// Whether somebody holds a lease.
fn held(path: &Path) -> Result<bool> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file.map_err(failed("open", path))?,
    };
    try_lock(&file).map(|free| !free).map_err(failed("lock", path))
}

fn try_lock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Note { what, path: path.clone(), source }
}

fn absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
