//! From a specification to a running shim: what `kapsel run` does before it can speak to the sandbox.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixListener, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use kapsel_protocol::limits;
use oci_spec::runtime::Spec;

use crate::{
    client::{self, Client},
    config::Config,
    paths::{Bundle, Id, Paths},
    programs,
    record::{self, Record},
    registry::{self, Registry},
    standby::{self, Kind},
};

/// Why a sandbox could not be launched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Name or directory.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// The shim is not installed.
    #[error(transparent)]
    Program(#[from] programs::Error),
    /// It does not listen.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// The container is described at too great a length.
    #[error(
        "arguments, environment and mounts of the container take {bytes} bytes, and at most {} go to a guest; give it \
         large data as a file, with -v",
        limits::SPEC_MAX
    )]
    TooLarge {
        /// Of its specification.
        bytes: usize,
    },
    /// The bundle cannot be written.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// A sandbox that was launched.
#[derive(Debug)]
pub struct Sandbox {
    /// Its identity.
    pub id: Id,
    /// Its directory.
    pub bundle: Bundle,
    /// Connected; the machine starts with [`Client::create`].
    pub client: Client,
    /// Present when one was asked for.
    pub leash: Option<Leash>,
}

/// Holds a sandbox to this process: when the process ends in any way, so does the sandbox.
#[derive(Debug)]
pub struct Leash(OwnedFd);

impl Leash {
    /// Lets the sandbox go on without this process.
    ///
    /// # Errors
    /// When the shim is gone.
    pub fn release(self) -> io::Result<()> {
        rustix::io::write(&self.0, b"d")?;
        Ok(())
    }
}

impl From<OwnedFd> for Leash {
    fn from(ours: OwnedFd) -> Self {
        Self(ours)
    }
}

/// How to launch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// End the sandbox when this process ends.
    pub leash: bool,
    /// The disk with the container's root file system, if a machine that [stands by](standby) for it may be taken. It comes with a
    /// leash.
    pub rootfs: Option<&'a Path>,
    /// What `--config` gave, for the shim to read too.
    pub config_file: Option<&'a Path>,
    /// What `--root` gave.
    pub root: Option<&'a Path>,
}

/// Makes the bundle, starts its shim and connects to it; or takes those of a machine that stands by, and the record has its id then. The
/// record's name is chosen when it is empty.
///
/// Must run within a tokio runtime.
///
/// # Errors
/// When the name is in use, the bundle cannot be written or the shim not be started. Nothing is left then.
pub async fn launch(
    paths: &Paths,
    config: &Config,
    record: &mut Record,
    spec: &Spec,
    options: Options<'_>,
) -> Result<Sandbox, Error> {
    let shim = programs::find(programs::SHIM, config)?;
    let registry = Registry::open(paths)?;
    let kind = options.rootfs.and_then(|rootfs| Kind::of(spec, rootfs, config));
    let claimed = kind.map(|kind| standby::claim(&registry, &kind, record, spec)).transpose()?.flatten();
    let (bundle, launched) = match claimed {
        Some((bundle, leash)) => (bundle, Ok(Some(leash))),
        None => {
            let bundle = registry.create(record)?;
            let launched = start(&shim, &bundle, &record.id, spec, options);
            (bundle, launched)
        }
    };
    let connected = match launched {
        Ok(leash) => {
            Client::connect(&bundle, &record.id).await.map(|client| (client, leash)).map_err(Error::from)
        }
        Err(error) => Err(error),
    };
    match connected {
        Ok((client, leash)) => Ok(Sandbox { id: record.id.clone(), bundle, client, leash }),
        Err(error) => {
            let _ = registry.remove(&bundle);
            Err(error)
        }
    }
}

/// A bundle that is ready to be owned.
#[derive(Debug)]
pub struct Furnished {
    /// Its directory.
    pub bundle: Bundle,
    /// Listens; the Task API.
    pub task: UnixListener,
    /// Listens; streams.
    pub attach: UnixListener,
}

/// Makes a bundle for a shim that is there already: this process.
///
/// # Errors
/// When the bundle cannot be written. Nothing is left then.
pub fn furnish(registry: &Registry, record: &mut Record, spec: &Spec) -> Result<Furnished, Error> {
    let bundle = registry.create(record)?;
    let furnished = fill(&bundle, spec).and_then(|sockets| Ok((sockets, log(&bundle)?)));
    match furnished {
        Ok(((task, attach), _)) => Ok(Furnished { bundle, task, attach }),
        Err(error) => {
            let _ = registry.remove(&bundle);
            Err(error)
        }
    }
}

/// Writes the specification and makes the sockets: here and not by the shim, so that nobody ever waits for one to appear.
fn fill(bundle: &Bundle, spec: &Spec) -> Result<(UnixListener, UnixListener), Error> {
    write_spec(bundle, spec)?;
    Ok((listen(&bundle.shim_socket())?, listen(&bundle.attach_socket())?))
}

pub(crate) fn write_spec(bundle: &Bundle, spec: &Spec) -> Result<(), Error> {
    let unwritten = |source| Error::Io { what: "write", path: bundle.spec(), source };
    let json = serde_json::to_vec(spec).map_err(|error| unwritten(error.into()))?;
    if json.len() > limits::SPEC_MAX {
        return Err(Error::TooLarge { bytes: json.len() });
    }
    record::replace(&bundle.spec(), &json).map_err(unwritten)
}

/// Where the shim and the servers of its shares say what goes wrong.
fn log(bundle: &Bundle) -> Result<fs::File, Error> {
    let open = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(bundle.shim_log());
    open.map_err(|source| Error::Io { what: "create", path: bundle.shim_log(), source })
}

fn start(
    shim: &Path,
    bundle: &Bundle,
    id: &Id,
    spec: &Spec,
    options: Options<'_>,
) -> Result<Option<Leash>, Error> {
    let (task, attach) = fill(bundle, spec)?;
    let (ours, theirs) = match options.leash {
        true => {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(|source| Error::Io {
                what: "make leash for",
                path: bundle.dir().into(),
                source,
            })?;
            (Some(Leash(ours.into())), Some(OwnedFd::from(theirs)))
        }
        false => (None, None),
    };
    let mut passed = vec![("--socket-fd", OwnedFd::from(task)), ("--attach-fd", attach.into())];
    passed.extend(theirs.map(|leash| ("--leash-fd", leash)));
    let mut command = serve(shim, bundle, id, passed)?;
    if let Some(root) = options.root {
        command.env("KAPSEL_ROOT", root);
    }
    if let Some(file) = options.config_file {
        command.env("KAPSEL_CONFIG", file);
    }
    command.spawn().map_err(|source| Error::Io { what: "start", path: shim.into(), source })?;
    Ok(ours)
}

/// Starts a shim whose machine stands by for sandboxes with such a specification, and which holds `making` until that is ready. Must
/// run within a tokio runtime, which reaps it if it ends first.
pub(crate) fn start_standby(
    shim: &Path,
    bundle: &Bundle,
    id: &Id,
    spec: &Spec,
    rootfs: &Path,
    making: fs::File,
) -> Result<(), Error> {
    let (task, attach) = fill(bundle, spec)?;
    let passed = vec![
        ("--socket-fd", OwnedFd::from(task)),
        ("--attach-fd", attach.into()),
        ("--standby-fd", listen(&bundle.standby_socket())?.into()),
        ("--making-fd", making.into()),
    ];
    let mut command = serve(shim, bundle, id, passed)?;
    command.arg("--rootfs").arg(rootfs);
    let spawned = tokio::process::Command::from(command).spawn();
    spawned.map(drop).map_err(|source| Error::Io { what: "start", path: shim.into(), source })
}

/// The command that makes a shim own a bundle.
fn serve(
    shim: &Path,
    bundle: &Bundle,
    id: &Id,
    passed: Vec<(&'static str, OwnedFd)>,
) -> Result<Command, Error> {
    let mut command = Command::new(shim);
    command.arg("serve").arg("--bundle").arg(bundle.dir()).arg("--id").arg(id.as_str());
    for (flag, fd) in &passed {
        command.arg(flag).arg(fd.as_raw_fd().to_string());
    }
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(log(bundle)?));
    inherit(&mut command, passed.into_iter().map(|(_, fd)| fd).collect());
    Ok(command)
}

fn listen(path: &Path) -> Result<UnixListener, Error> {
    UnixListener::bind(path).map_err(|source| Error::Io { what: "listen on", path: path.into(), source })
}

/// Makes `fds` survive the exec, with their numbers, and the shim the leader of a session: keys of a terminal are not for it.
pub fn inherit(command: &mut Command, fds: Vec<OwnedFd>) {
    let in_child = move || {
        // Only async-signal-safe system calls from here on: the parent may have threads.
        rustix::process::setsid()?;
        for fd in &fds {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only; it neither allocates nor takes locks.
    unsafe { command.pre_exec(in_child) };
}
