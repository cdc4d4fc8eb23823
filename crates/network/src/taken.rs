//! A namespace taken as it is found, and given back.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kapsel_netlink::Socket;
use serde::{Deserialize, Serialize};

use crate::error::Context;
use crate::namespace::Namespace;
use crate::read::{self, Found};
use crate::tap::Tap;
use crate::{Error, Interface, Result, redirect};

/// The version of [`Note`].
const VERSION: u32 = 1;

/// A machine's end of an interface.
#[derive(Debug)]
pub struct Port {
    /// What the guest shall have.
    pub interface: Interface,
    /// The tap, for the monitor.
    pub tap: OwnedFd,
}

/// A namespace that is taken. Dropping it gives it back.
#[derive(Debug)]
pub struct Taken {
    namespace: Namespace,
    indices: Vec<u32>,
    note: PathBuf,
}

/// What another process must know to give the namespace back.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    version: u32,
    namespace: PathBuf,
    /// Device and inode: under that path there may be another one meanwhile.
    identity: (u64, u64),
    /// The interfaces that have a discipline of ours.
    indices: Vec<u32>,
}

impl Taken {
    /// Takes every Ethernet interface of the namespace at `path`, at most `max`. What must be undone is in the file `note`
    /// before it is done.
    ///
    /// # Errors
    /// When there is no such namespace or its interfaces cannot be had. It is as it was then.
    pub fn take(path: &Path, note: &Path, max: usize) -> Result<(Self, Vec<Port>)> {
        let namespace = Namespace::open(path)?;
        let identity = namespace.identity()?;
        let mut taken = Self { namespace, indices: Vec::new(), note: note.to_owned() };
        let write = |indices: &[u32]| {
            let indices = indices.to_vec();
            Note { version: VERSION, namespace: path.to_owned(), identity, indices }.write(note)
        };
        // Gathered outside, so that what was done is undone when a later step fails.
        let mut done = Vec::new();
        let ports = taken.namespace.run(|| connect(path, max, &mut done, &write));
        taken.indices = done;
        Ok((taken, ports?))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let indices = std::mem::take(&mut self.indices);
        if let Err(error) = self.namespace.run(|| disconnect(&indices)) {
            tracing::warn!(%error, "a namespace is not as it was found");
            // The next command tries again.
            return;
        }
        let _ = fs::remove_file(&self.note);
    }
}

/// Gives back what a process that was killed had taken: what the file `note` says of it. There may be none.
///
/// # Errors
/// When the file cannot be read or the namespace not be given back.
pub fn release(note: &Path) -> Result<()> {
    let failed = |what, source| Error::Note { what, path: note.to_owned(), source };
    let text = match fs::read(note) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        text => text.map_err(|source| failed("read", source))?,
    };
    let known: Note = serde_json::from_slice(&text).map_err(|error| failed("understand", error.into()))?;
    if known.version != VERSION {
        let newer = io::Error::other(format!("it has version {}, not {VERSION}", known.version));
        return Err(failed("understand", newer));
    }
    match Namespace::open(&known.namespace) {
        Ok(namespace) if namespace.identity()? == known.identity => {
            namespace.run(|| disconnect(&known.indices))?;
        }
        // Gone, and all that was in it, or another one.
        Ok(_) | Err(Error::Namespace { .. }) => {}
        Err(error) => return Err(error),
    }
    fs::remove_file(note).map_err(|source| failed("remove", source))
}

impl Note {
    fn write(&self, path: &Path) -> Result<()> {
        let failed = |source| Error::Note { what: "write", path: path.to_owned(), source };
        let text = serde_json::to_vec(self).map_err(|error| failed(error.into()))?;
        let new = path.with_extension("new");
        let file = fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&new);
        file.and_then(|mut file| file.write_all(&text)).and_then(|()| fs::rename(&new, path)).map_err(failed)
    }
}

/// Makes a tap beside each interface. `done` tells which interfaces have a discipline of ours.
fn connect(
    path: &Path,
    max: usize,
    done: &mut Vec<u32>,
    note: &dyn Fn(&[u32]) -> Result<()>,
) -> Result<Vec<Port>> {
    let mut socket = Socket::open().context(|| format!("speak with the kernel in {}", path.display()))?;
    let found = read::interfaces(&mut socket)?;
    if found.len() > max {
        return Err(Error::TooMany { namespace: path.to_owned(), found: found.len(), max });
    }
    let mut ports = Vec::new();
    for Found { index, interface } in found {
        let redirected = |result: io::Result<()>| {
            result.context(|| format!("redirect the frames of {} in {}", interface.name, path.display()))
        };
        let mut planned = done.clone();
        planned.push(index);
        note(&planned)?;
        match redirect::add_ingress(&mut socket, index) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // Not ours to remove.
                note(done)?;
                let namespace = path.to_owned();
                return Err(Error::InUse { interface: interface.name, namespace });
            }
            result => redirected(result)?,
        }
        *done = planned;
        let tap = Tap::new()?;
        let tap_index = tap.index(&mut socket)?;
        tap.up(&mut socket, tap_index, interface.mtu)?;
        redirected(redirect::add_ingress(&mut socket, tap_index))?;
        redirected(redirect::add_filter(&mut socket, tap_index, index))?;
        redirected(redirect::add_filter(&mut socket, index, tap_index))?;
        ports.push(Port { interface, tap: tap.fd });
    }
    Ok(ports)
}

/// Removes the disciplines from these interfaces, so far as there are any.
fn disconnect(indices: &[u32]) -> Result<()> {
    let mut socket = Socket::open().context(|| "speak with the kernel".into())?;
    for index in indices {
        match redirect::remove_ingress(&mut socket, *index) {
            // The interface or its discipline is gone already.
            Err(error)
                if [libc::ENODEV, libc::ENOENT, libc::EINVAL]
                    .contains(&error.raw_os_error().unwrap_or(0)) => {}
            result => result.context(|| format!("remove the redirection of interface {index}"))?,
        }
    }
    Ok(())
}
