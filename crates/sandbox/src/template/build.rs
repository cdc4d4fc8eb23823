//! Making templates.

use std::{
    fs::{self, File},
    io::{self, Seek, Write},
    os::{
        fd::OwnedFd,
        unix::{fs::DirBuilderExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use kapsel_jail::cgroup::{Limits, Named};
use kapsel_machine::Snapshot;
use rustix::fs::FlockOperation;

use super::{CONTAINER, Error, Held, META, Meta, Prepared, Shape, Template, VERSION, key, read, state_hash};
use crate::{
    annotations::Wishes,
    config::Config,
    life::{
        agent::Agent,
        blueprint::{self, Blueprint, Occupant},
    },
    paths::Paths,
    programs,
    timings::Stopwatch,
};

/// A template that could not be restored keeps its successor from being built for so long.
const BAD_FOR: Duration = Duration::from_secs(3600);

/// Builds the template for sandboxes with such wishes, unless it is there. Waits for another process that builds it.
///
/// # Errors
/// When the machine cannot be booted or saved. Nothing is left then.
pub async fn build(paths: &Paths, config: &Config, wishes: &Wishes) -> Result<Template, Error> {
    paths.prepare()?;
    let work = Work::new(paths)?;
    let blueprint = draw(paths, config, wishes, &work, None)?;
    let key = key(&blueprint).map_err(Error::machine)?;
    build_as(paths, config, blueprint, &key, None).await
}

/// Builds the template that holds a container, unless it is there; before it the empty one, from which it is made.
///
/// # Errors
/// When the machine cannot be started or saved, or the container not be made. Nothing is left then.
pub async fn build_prepared(
    paths: &Paths,
    config: &Config,
    wishes: &Wishes,
    prepared: &Prepared,
) -> Result<Template, Error> {
    let empty = build(paths, config, wishes).await?;
    let work = Work::new(paths)?;
    let blueprint = draw(paths, config, wishes, &work, Some(prepared.rootfs.clone()))?;
    let key = prepared.key(&empty.meta.key);
    build_as(paths, config, blueprint, &key, Some((empty, prepared))).await
}

/// Builds a template under a key: by booting, or by making a container in a clone of the empty one.
async fn build_as(
    paths: &Paths,
    config: &Config,
    blueprint: Blueprint,
    key: &str,
    prepared: Option<(Template, &Prepared)>,
) -> Result<Template, Error> {
    let dir = paths.templates().join(key);
    let lock = lock(paths, key)?;
    let locked = tokio::task::spawn_blocking(move || {
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map(|()| lock)
    });
    let _locked = match locked.await {
        Ok(locked) => locked.map_err(|e| Error::Io { what: "lock", path: dir.clone(), source: e.into() })?,
        Err(e) => return Err(Error::Io { what: "lock", path: dir, source: io::Error::other(e) }),
    };
    if let Ok(template) = read(&dir) {
        return Ok(template);
    }
    save(paths, config, blueprint, key, prepared).await?;
    super::collect(paths, key);
    read(&dir)
}

/// Starts a process that builds the template, and does not wait for it. It yields the processor to everybody else.
/// Does nothing when one is at work already, or when the last one turned out bad a short while ago.
pub fn build_in_background(
    paths: &Paths,
    config: &Config,
    wishes: &Wishes,
    key: &str,
    prepared: Option<&Prepared>,
) {
    let bad = paths.templates().join(format!("{key}.bad"));
    let age = fs::metadata(&bad).and_then(|m| m.modified()).ok().and_then(|at| at.elapsed().ok());
    if age.is_some_and(|age| age < BAD_FOR) {
        return;
    }
    let spawned = (|| -> Result<(), String> {
        let free = lock(paths, key).map_err(|e| e.to_string())?;
        if rustix::fs::flock(&free, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(());
        }
        drop(free);
        let program = programs::find(programs::SHIM, config).map_err(|e| e.to_string())?;
        let log = File::options().create(true).append(true).open(paths.templates().join("build.log"));
        let log = log.map_err(|e| e.to_string())?;
        let mut command = Command::new(program);
        command.arg("build-template");
        // A template has no network; its clones are given theirs.
        for (key, value) in (Wishes { network: None, pod: false, ..wishes.clone() }).to_annotations() {
            command.arg("--annotation").arg(format!("{key}={value}"));
        }
        let stdin = match prepared {
            Some(prepared) => {
                command.arg("--rootfs").arg(&prepared.rootfs);
                command.args(prepared.programs.iter().flat_map(|path| ["--program", path]));
                handed_over(&prepared.bytes().map_err(|e| e.to_string())?).map_err(|e| e.to_string())?
            }
            None => Stdio::null(),
        };
        command.current_dir("/").stdin(stdin).stdout(Stdio::null()).stderr(Stdio::from(log));
        let doors = own_cgroup();
        let in_child = move || {
            rustix::process::setsid()?;
            rustix::process::nice(19)?;
            for door in &doors {
                rustix::io::write(door, b"0")?;
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls only; it neither allocates nor takes locks.
        unsafe { command.pre_exec(in_child) };
        // Tokio reaps a child whose handle is dropped.
        tokio::process::Command::from(command).spawn().map(drop).map_err(|e| e.to_string())
    })();
    if let Err(error) = spawned {
        tracing::warn!(%error, "cannot build a template; sandboxes go on starting cold");
    }
}

/// Ways out of this process's cgroup, which may be an engine's, for one container: what is built is for many.
fn own_cgroup() -> Vec<OwnedFd> {
    let named = "kapsel/templates".parse::<Named>().ok();
    let made = named.map(|named| named.limited(&Limits::default()));
    // Without root there is none, nor an engine's.
    made.and_then(Result::ok).flatten().and_then(|cgroup| cgroup.doors().ok()).unwrap_or_default()
}

/// Bytes that a program finds on its standard input.
fn handed_over(bytes: &[u8]) -> io::Result<Stdio> {
    let mut file = File::from(rustix::fs::memfd_create("request", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

/// A directory for the sockets of a machine that is to be saved.
struct Work {
    dir: PathBuf,
    name: String,
}

impl Work {
    fn new(paths: &Paths) -> Result<Self, Error> {
        let name = format!("t{}", hex::encode(crate::paths::random_bytes::<5>()));
        let dir = paths.state().join(&name);
        let made = fs::DirBuilder::new().mode(0o700).create(&dir);
        made.map_err(|source| Error::Io { what: "create", path: dir.clone(), source })?;
        Ok(Self { dir, name })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn draw(
    paths: &Paths,
    config: &Config,
    wishes: &Wishes,
    work: &Work,
    rootfs: Option<PathBuf>,
) -> Result<Blueprint, Error> {
    let occupant = Occupant {
        name: &work.name,
        dir: work.dir.clone(),
        console: None,
        rootfs,
        scratch: wishes.storage.map(|_| scratch_placeholder(paths)).transpose()?,
        shares: 0,
        network: false,
        cgroup: None,
    };
    blueprint::draw(paths, config, wishes, occupant).map_err(Error::machine)
}

/// Holds the scratch disk's place in a template: never written, since no container runs in one.
fn scratch_placeholder(paths: &Paths) -> Result<PathBuf, Error> {
    let path = paths.templates().join("scratch.img");
    let made = File::options().write(true).create(true).truncate(false).open(&path);
    made.and_then(|file| file.set_len(blueprint::DISK_CAPACITY)).map_err(|source| Error::Io {
        what: "make",
        path: path.clone(),
        source,
    })?;
    Ok(path)
}

fn lock(paths: &Paths, key: &str) -> Result<File, Error> {
    let path = paths.templates().join(format!("{key}.lock"));
    let opened = File::options().create(true).append(true).open(&path);
    opened.map_err(|source| Error::Io { what: "lock", path, source })
}

/// Starts the machine and saves it under its key.
async fn save(
    paths: &Paths,
    config: &Config,
    mut blueprint: Blueprint,
    key: &str,
    prepared: Option<(Template, &Prepared)>,
) -> Result<(), Error> {
    let dir = paths.templates().join(key);
    let unfinished = paths.templates().join(format!("{key}.new"));
    let io = |what, path: &Path, source| Error::Io { what, path: path.into(), source };
    let _ = fs::remove_dir_all(&unfinished);
    fs::DirBuilder::new().mode(0o700).create(&unfinished).map_err(|e| io("create", &unfinished, e))?;
    blueprint.spec.template = true;
    blueprint.spec.memory_dir = Some(unfinished.clone());
    let saved = start_and_save(config, &blueprint, &unfinished, prepared).await;
    let container = saved.inspect_err(|_| drop(fs::remove_dir_all(&unfinished)))?;
    let meta = Meta {
        version: VERSION,
        key: key.into(),
        shape: Shape {
            isolation: blueprint.isolation.to_string(),
            kernel: blueprint.release.clone(),
            vcpus: blueprint.spec.vcpus,
            memory_mib: blueprint.spec.memory_mib.into(),
            scratch: blueprint.spec.disks.len() > 1,
            container,
        },
        created_at: crate::record::now(),
        state_sha256: state_hash(&unfinished).map_err(|e| io("read", &unfinished, e))?,
    };
    let json = serde_json::to_vec_pretty(&meta).map_err(|e| io("write", &unfinished, e.into()))?;
    crate::record::replace(&unfinished.join(META), &json).map_err(|e| io("write", &unfinished, e))?;
    let _ = fs::remove_dir_all(&dir);
    let _ = fs::remove_file(paths.templates().join(format!("{key}.bad")));
    fs::rename(&unfinished, &dir).map_err(|e| io("rename", &unfinished, e))
}

async fn start_and_save(
    config: &Config,
    blueprint: &Blueprint,
    dir: &Path,
    prepared: Option<(Template, &Prepared)>,
) -> Result<Option<Held>, Error> {
    let deadline = config.start_timeout();
    let (monitor, spec) = (&blueprint.monitor, &blueprint.spec);
    let machine = match &prepared {
        Some((empty, _)) => monitor.restore(&Snapshot { dir: empty.dir.clone() }, spec).await,
        None => monitor.boot(spec).await,
    };
    let machine = machine.map_err(Error::machine)?;
    let saved = async {
        let channel = machine.connect(deadline).await.map_err(Error::machine)?;
        // Saved when it answers: whatever the agent does once is done, in every clone.
        let agent = Agent::open(&channel, Stopwatch::default()).await.map_err(Error::machine)?;
        agent.hello_at(crate::record::now()).await.map_err(Error::machine)?;
        let mut held = None;
        if let Some((_, prepared)) = prepared {
            let pid = agent.create(prepared.request()).await.map_err(Error::machine)?;
            held = Some(prepared.held(pid));
            agent.quiesce(CONTAINER, &prepared.programs).await.map_err(Error::machine)?;
        } else {
            agent.quiesce("", &[]).await.map_err(Error::machine)?;
        }
        drop(agent);
        drop(channel);
        let Snapshot { .. } = machine.snapshot(dir).await.map_err(Error::machine)?;
        Ok(held)
    }
    .await;
    machine.kill().await;
    saved
}
