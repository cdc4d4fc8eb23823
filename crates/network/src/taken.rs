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
use crate::{Error, Events, Interface, Mac, Result, redirect};

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
    path: PathBuf,
    identity: (u64, u64),
    links: Vec<Link>,
    /// The numbers of our taps, which are no interfaces to be taken.
    taps: Vec<u32>,
    /// Numbers of interfaces that could not be had.
    passed_over: Vec<u32>,
    note: PathBuf,
}

/// An interface that has a discipline of ours.
#[derive(Clone, Copy, Debug)]
struct Link {
    index: u32,
    mac: Mac,
}

/// What has changed in a namespace.
#[derive(Debug, Default)]
pub struct Changes {
    /// Interfaces that have come.
    pub added: Vec<Port>,
    /// Interfaces that have gone. Their taps go with their last descriptors.
    pub gone: Vec<Mac>,
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
        let (path, note) = (path.to_owned(), note.to_owned());
        let (links, taps, passed_over) = (Vec::new(), Vec::new(), Vec::new());
        let mut taken = Self { namespace, path, identity, links, taps, passed_over, note };
        let ports = taken.inside(|taken, socket| {
            let found = read::interfaces(socket)?;
            if found.len() > max {
                let namespace = taken.path.clone();
                return Err(Error::TooMany { namespace, found: found.len(), max });
            }
            found.into_iter().map(|found| taken.connect(socket, found)).collect()
        })?;
        Ok((taken, ports))
    }

    /// Tells of changes from now on.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or the kernel does not tell.
    pub fn events(&self) -> Result<Events> {
        let failed = || format!("watch {}", self.path.display());
        self.namespace.run(|| Events::open().context(failed))
    }

    /// Takes what has come, so that there are `max` at most, and lets go of what has gone. What cannot be had is told to the log, once,
    /// and stays as it is. Interfaces that are taken stay so when they change.
    ///
    /// # Errors
    /// When the namespace cannot be read.
    pub fn update(&mut self, max: usize) -> Result<Changes> {
        self.inside(|taken, socket| {
            let present = read::indices(socket)?;
            let mut changes = Changes::default();
            taken.passed_over.retain(|index| present.contains(index));
            taken.taps.retain(|index| present.contains(index));
            let (links, gone): (Vec<_>, Vec<_>) =
                std::mem::take(&mut taken.links).into_iter().partition(|link| present.contains(&link.index));
            taken.links = links;
            changes.gone = gone.iter().map(|link: &Link| link.mac).collect();
            if !changes.gone.is_empty() {
                taken.write_note()?;
            }
            for found in read::interfaces(socket)? {
                let index = found.index;
                let known = taken.links.iter().any(|link| link.index == index)
                    || [&taken.taps, &taken.passed_over].into_iter().any(|list| list.contains(&index));
                if known {
                    continue;
                }
                let interface = found.interface.name.clone();
                let (namespace, all) = (taken.path.clone(), taken.links.len());
                let connected = match all < max {
                    true => taken.connect(socket, found),
                    false => Err(Error::TooMany { namespace, found: all + 1, max }),
                };
                match connected {
                    Ok(port) => changes.added.push(port),
                    Err(error) => {
                        tracing::warn!(interface, %error, "an interface that was added is left out");
                        taken.leave(socket, index)?;
                    }
                }
            }
            Ok(changes)
        })
    }

    /// Lets go of an interface that came and could not be used.
    ///
    /// # Errors
    /// When its discipline cannot be removed.
    pub fn pass_over(&mut self, mac: Mac) -> Result<()> {
        let Some(index) = self.links.iter().find(|link| link.mac == mac).map(|link| link.index) else {
            return Ok(());
        };
        self.inside(|taken, socket| taken.leave(socket, index))
    }

    /// Does something in the namespace.
    fn inside<T: Send>(
        &mut self,
        work: impl FnOnce(&mut Self, &mut Socket) -> Result<T> + Send,
    ) -> Result<T> {
        let namespace = self.namespace.try_clone()?;
        let failed = format!("speak with the kernel in {}", self.path.display());
        namespace.run(|| {
            let mut socket = Socket::open().context(|| failed)?;
            work(self, &mut socket)
        })
    }

    /// Makes a tap beside an interface.
    fn connect(&mut self, socket: &mut Socket, found: Found) -> Result<Port> {
        let Found { index, interface } = found;
        let (name, path) = (interface.name.clone(), self.path.clone());
        let redirected = |result: io::Result<()>| {
            result.context(|| format!("redirect the frames of {name} in {}", path.display()))
        };
        self.links.push(Link { index, mac: interface.mac });
        self.write_note()?;
        match redirect::add_ingress(socket, index) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // Not ours to remove.
                self.links.pop();
                self.write_note()?;
                return Err(Error::InUse { interface: interface.name, namespace: path });
            }
            result => redirected(result)?,
        }
        let tap = Tap::new()?;
        let tap_index = tap.index(socket)?;
        self.taps.push(tap_index);
        tap.up(socket, tap_index, interface.mtu)?;
        redirected(redirect::add_ingress(socket, tap_index))?;
        redirected(redirect::add_filter(socket, tap_index, index))?;
        redirected(redirect::add_filter(socket, index, tap_index))?;
        Ok(Port { interface, tap: tap.fd })
    }

    /// Lets go of an interface, and does not take it again.
    fn leave(&mut self, socket: &mut Socket, index: u32) -> Result<()> {
        self.passed_over.push(index);
        if self.links.iter().any(|link| link.index == index) {
            disconnect(socket, &[index])?;
            self.links.retain(|link| link.index != index);
            self.write_note()?;
        }
        Ok(())
    }

    fn write_note(&self) -> Result<()> {
        let indices = self.links.iter().map(|link| link.index).collect();
        let (namespace, identity) = (self.path.clone(), self.identity);
        Note { version: VERSION, namespace, identity, indices }.write(&self.note)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let indices: Vec<u32> = self.links.iter().map(|link| link.index).collect();
        if let Err(error) = self.inside(|_, socket| disconnect(socket, &indices)) {
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
            namespace.run(|| {
                let mut socket = Socket::open().context(|| "speak with the kernel".into())?;
                disconnect(&mut socket, &known.indices)
            })?;
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

/// Removes the disciplines from these interfaces, so far as there are any.
fn disconnect(socket: &mut Socket, indices: &[u32]) -> Result<()> {
    for index in indices {
        match redirect::remove_ingress(socket, *index) {
            // The interface or its discipline is gone already.
            Err(error)
                if [libc::ENODEV, libc::ENOENT, libc::EINVAL]
                    .contains(&error.raw_os_error().unwrap_or(0)) => {}
            result => result.context(|| format!("remove the redirection of interface {index}"))?,
        }
    }
    Ok(())
}
