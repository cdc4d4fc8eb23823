//! Machines that stand by for the next sandbox of their kind: restored from a template with the container in it, and rehearsed
//! ([`Spare`](crate::life::Spare)).
//!
//! Without KVM nearly all of a warm start is the translation of the guest's code, anew in each clone. A machine that stands by has
//! that behind it. Its price is the memory that it holds meanwhile: there is none unless `standby` in the configuration asks for it.
//!
//! The file `standby/KIND.ID` says that there is one, and holds its template's key. Whoever removes it has the machine, and nobody else.
//! Its shim has the bundle of that id, but no record is in it, so that nobody sees a sandbox there. Who takes it writes record and
//! specification, and then one byte to the bundle's `standby.sock`; that connection holds the sandbox to its maker from then on
//! ([`Leash`](crate::launch::Leash)).

use std::{
    fs,
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, MetadataExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use oci_spec::runtime::Spec;
use rustix::fs::FlockOperation;
use sha2::{Digest, Sha256};

use crate::{
    annotations::Wishes,
    cgroup,
    config::Config,
    launch::{self, Error, Leash},
    owner::{self, Owner},
    paths::{Bundle, Id, Paths},
    programs,
    record::{self, Record},
    registry::Registry,
    removal,
};

/// How long a machine stands by before it gives its memory back.
pub const PATIENCE: Duration = Duration::from_secs(30 * 60);
/// The byte that says that it was taken.
pub const TAKEN: u8 = b't';
/// For so long no machine is made of a kind of which one could not be made.
const BAD_FOR: Duration = Duration::from_secs(600);
/// Hexadecimal digits of a kind.
const KIND_LENGTH: usize = 32;

/// What sandboxes have in common that one machine can serve: all but what their first process runs, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kind(String);

impl Kind {
    /// The kind of a sandbox; `None` when no machine stands by for it: the configuration wants none, or it is to be no clone, or a
    /// clone of another kind.
    pub fn of(spec: &Spec, rootfs: &Path, config: &Config) -> Option<Self> {
        let wishes = Wishes::of(spec).ok()?;
        let own = wishes.cold || wishes.storage.is_some() || wishes.pod;
        if config.standby() == 0 || own || !matches!(cgroup::named(spec), Ok(None)) {
            return None;
        }
        let terminal = spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal);
        let mut rest = spec.clone();
        rest.set_process(None).set_hostname(None);
        let mut hash = Sha256::new();
        let mut add = |part: &str| {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        };
        add(if terminal.unwrap_or(false) { "terminal" } else { "" });
        // As a value, since its maps are sorted.
        add(&serde_json::to_value(&rest).ok()?.to_string());
        add(&rootfs.to_string_lossy());
        config.effective().iter().for_each(|setting| add(&format!("{}={}", setting.key, setting.value)));
        add(&circumstances(config).ok()?);
        Some(Self(hex::encode(hash.finalize())[..KIND_LENGTH].to_owned()))
    }
}

/// What a shim has of whoever started it, and which program it is: a sandbox must not be another because a machine stood by.
fn circumstances(config: &Config) -> io::Result<String> {
    let shim = programs::find(programs::SHIM, config).map_err(io::Error::other)?;
    let shim = fs::metadata(shim)?;
    let mut all = format!("{} {} {} {}", shim.dev(), shim.ino(), shim.mtime(), shim.mtime_nsec());
    for namespace in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
        all += &fs::read_link(Path::new("/proc/self/ns").join(namespace))?.to_string_lossy();
    }
    all += &rustix::process::getpriority_process(None)?.to_string();
    all += &format!("{:?}", rustix::thread::sched_getaffinity(None)?);
    all += &fs::read_to_string("/proc/self/oom_score_adj")?;
    if !rustix::process::geteuid().is_root() {
        // There it may have no cgroup of its own.
        all += &fs::read_to_string("/proc/self/cgroup")?;
    }
    Ok(all)
}

/// A machine that stands by.
#[derive(Clone, Debug)]
pub struct Standby {
    /// The key of its template.
    pub template: String,
    file: PathBuf,
    kind: String,
    since: SystemTime,
    id: Id,
}

impl Standby {
    fn read(entry: &fs::DirEntry) -> Option<Self> {
        let name = entry.file_name();
        let (kind, id) = name.to_str()?.split_once('.')?;
        let id = id.parse().ok()?;
        let since = entry.metadata().and_then(|meta| meta.modified()).ok()?;
        let template = fs::read_to_string(entry.path()).ok()?;
        Some(Self { template, file: entry.path(), kind: kind.into(), since, id })
    }

    /// Says that a machine stands by, and gives up the oldest of those that are too many then.
    ///
    /// # Errors
    /// When it cannot be said.
    pub async fn publish(
        paths: &Paths,
        config: &Config,
        kind: &Kind,
        id: &Id,
        template: &str,
    ) -> io::Result<Self> {
        let file = paths.standbys().join(format!("{}.{id}", kind.0));
        let standby = Self {
            template: template.into(),
            file,
            kind: kind.0.clone(),
            since: SystemTime::now(),
            id: id.clone(),
        };
        standby.write()?;
        let standing = list(paths)?;
        for surplus in &standing[..standing.len().saturating_sub(config.standby())] {
            if surplus.id != *id {
                surplus.dismiss(paths).await;
            }
        }
        Ok(standby)
    }

    fn write(&self) -> io::Result<()> {
        record::replace(&self.file, self.template.as_bytes())
    }

    /// Whether it can be taken.
    pub fn stands(&self) -> bool {
        self.file.exists()
    }

    /// Has it; false when somebody else has.
    pub fn take(&self) -> bool {
        fs::remove_file(&self.file).is_ok()
    }

    /// Ends it, and leaves nothing of it.
    async fn dismiss(&self, paths: &Paths) {
        if !self.take() {
            return;
        }
        let removed = async {
            let registry = Registry::open(paths)?;
            removal::remove(&registry, &paths.bundle(&self.id), None).await
        };
        if let Err(error) = removed.await {
            tracing::warn!(id = self.id.short(), %error, "something of a machine that stood by is left");
        }
    }
}

/// All machines that stand by, the oldest first.
///
/// # Errors
/// When the directory cannot be read.
pub fn list(paths: &Paths) -> io::Result<Vec<Standby>> {
    let entries = match fs::read_dir(paths.standbys()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found: Vec<_> = entries.flatten().filter_map(|entry| Standby::read(&entry)).collect();
    found.retain(|standby| {
        let lives = matches!(owner::of(&paths.bundle(&standby.id)), Owner::Shim(_));
        if !lives {
            // What its shim left is cleared away as that of any other.
            let _ = fs::remove_file(&standby.file);
        }
        lives
    });
    found.sort_by_key(|standby| standby.since);
    Ok(found)
}

/// Ends all machines that stand by.
///
/// # Errors
/// When the directory cannot be read.
pub async fn dismiss_all(paths: &Paths) -> io::Result<()> {
    for standby in list(paths)? {
        standby.dismiss(paths).await;
    }
    Ok(())
}

/// Notes why a machine of a kind could not be made: the next runs do not try at once again.
pub fn mark_bad(paths: &Paths, kind: &Kind, reason: &str) {
    let _ = record::replace(&bad(paths, kind), reason.as_bytes());
}

fn bad(paths: &Paths, kind: &Kind) -> PathBuf {
    paths.standbys().join(format!("{}.bad", kind.0))
}

/// Takes a machine that stands by for such a sandbox, whose id it becomes; `None` when there is none that answers. The shim reads the
/// bundle after that.
///
/// # Errors
/// When the sandbox's name cannot be had, or its specification not be written.
pub(crate) fn claim(
    registry: &Registry,
    kind: &Kind,
    record: &mut Record,
    spec: &Spec,
) -> Result<Option<(Bundle, Leash)>, Error> {
    let asked = (record.id.clone(), record.name.clone());
    for standby in list(registry.paths()).unwrap_or_default() {
        if standby.kind != kind.0 || !standby.take() {
            continue;
        }
        record.id = standby.id.clone();
        let bundle = match registry.adopt(record) {
            Ok(bundle) => bundle,
            Err(error) => {
                let _ = standby.write();
                return Err(error.into());
            }
        };
        let handed = launch::write_spec(&bundle, spec).and_then(|()| {
            let socket = bundle.standby_socket();
            let handed = UnixStream::connect(&socket)
                .and_then(|mut stream| stream.write_all(&[TAKEN]).map(|()| stream));
            handed.map_err(|source| Error::Io { what: "take", path: socket, source })
        });
        match handed {
            Ok(stream) => return Ok(Some((bundle, Leash::from(OwnedFd::from(stream))))),
            Err(error) => {
                tracing::warn!(%error, "a machine that stood by is gone");
                let _ = registry.remove(&bundle);
                (record.id, record.name) = asked.clone();
            }
        }
    }
    Ok(None)
}

/// Has a machine made that stands by for the next sandbox of the kind of `spec`, and does not wait for it. Does nothing when there are
/// enough, or one is being made.
pub(crate) fn want(paths: &Paths, config: &Config, spec: &Spec, rootfs: &Path) {
    let Some(kind) = Kind::of(spec, rootfs, config) else { return };
    if let Err(error) = make(paths, config, &kind, spec, rootfs) {
        tracing::warn!(%error, "no machine stands by for the next sandbox");
    }
}

fn make(paths: &Paths, config: &Config, kind: &Kind, spec: &Spec, rootfs: &Path) -> Result<(), Error> {
    let io = |what, path: &Path, source| Error::Io { what, path: path.into(), source };
    let age = fs::metadata(bad(paths, kind)).and_then(|meta| meta.modified()).ok();
    if age.and_then(|at| at.elapsed().ok()).is_some_and(|age| age < BAD_FOR) {
        return Ok(());
    }
    let standbys = paths.standbys();
    let lock = standbys.join("making");
    let making =
        fs::OpenOptions::new().create(true).append(true).open(&lock).map_err(|e| io("open", &lock, e))?;
    let busy = rustix::fs::flock(&making, FlockOperation::NonBlockingLockExclusive).is_err();
    let standing = list(paths).map_err(|e| io("list", &standbys, e))?;
    if busy || standing.iter().filter(|standby| standby.kind == kind.0).count() >= config.standby() {
        return Ok(());
    }
    let shim = programs::find(programs::SHIM, config)?;
    let id = Id::random();
    let bundle = paths.bundle(&id);
    fs::DirBuilder::new().mode(0o700).create(bundle.dir()).map_err(|e| io("create", bundle.dir(), e))?;
    launch::start_standby(&shim, &bundle, &id, spec, rootfs, making)
        .inspect_err(|_| drop(fs::remove_dir_all(bundle.dir())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use oci_spec::runtime::{Process, ProcessBuilder};

    use super::*;
    use crate::{
        config::{Key, Origin},
        network::Network,
        spec::{ImageDefaults, RunOptions},
    };

    fn config() -> (tempfile::TempDir, Config) {
        let mut config = Config::default();
        config.set(Key::Standby, "1".into(), Origin::Flag).unwrap();
        // Any program serves as a shim here.
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(programs::SHIM), "").unwrap();
        config.set(Key::Libexec, dir.path().to_str().unwrap().into(), Origin::Flag).unwrap();
        (dir, config)
    }

    fn spec(options: RunOptions) -> Spec {
        let options = RunOptions { args: vec!["true".into()], ..options };
        crate::spec::build(&ImageDefaults::default(), &options).unwrap()
    }

    fn process() -> Process {
        ProcessBuilder::default().args(vec!["sh".to_owned()]).cwd("/tmp").build().unwrap()
    }

    #[test]
    fn kinds_leave_out_what_a_start_brings() {
        let (_libexec, config) = config();
        let kind = |spec: &Spec| Kind::of(spec, Path::new("/r"), &config);
        let plain = spec(RunOptions::default());
        let of_plain = kind(&plain);
        assert!(of_plain.is_some());
        let mut other = plain.clone();
        other.set_process(Some(process())).set_hostname(Some("box".into()));
        assert_eq!(kind(&other), of_plain);
        assert_ne!(Kind::of(&plain, Path::new("/other"), &config), of_plain);
        for different in [
            RunOptions { read_only: true, ..RunOptions::default() },
            RunOptions { network: Network::Bridge, ..RunOptions::default() },
            RunOptions { terminal: true, ..RunOptions::default() },
            RunOptions { tmpfs: vec!["/x".parse().unwrap()], ..RunOptions::default() },
        ] {
            assert!(
                kind(&spec(different.clone())).is_some_and(|kind| Some(kind) != of_plain),
                "{different:?}"
            );
        }
        for own in [
            RunOptions { cold: true, ..RunOptions::default() },
            RunOptions { storage: Some(1 << 30), ..RunOptions::default() },
        ] {
            assert_eq!(kind(&spec(own)), None);
        }
        let mut changed = config.clone();
        changed.set(Key::KernelArgs, "quiet".into(), Origin::Flag).unwrap();
        assert_ne!(Kind::of(&plain, Path::new("/r"), &changed), of_plain);
        changed.set(Key::Standby, "0".into(), Origin::Flag).unwrap();
        assert_eq!(Kind::of(&plain, Path::new("/r"), &changed), None);
    }

    /// A machine that stands by, as others see it.
    fn standing(registry: &Registry, kind: &Kind) -> (Id, UnixListener, owner::Ownership) {
        let (paths, id) = (registry.paths(), Id::random());
        let bundle = paths.bundle(&id);
        fs::create_dir(bundle.dir()).unwrap();
        let owned = owner::claim(&bundle).unwrap().unwrap();
        let socket = UnixListener::bind(bundle.standby_socket()).unwrap();
        fs::write(paths.standbys().join(format!("{}.{id}", kind.0)), "key").unwrap();
        (id, socket, owned)
    }

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::discover(Some(dir.path())).unwrap();
        (dir, Registry::open(&paths).unwrap())
    }

    #[test]
    fn each_is_taken_once() {
        use std::io::Read;
        let (_dir, registry) = registry();
        let (plain, kind) = (spec(RunOptions::default()), Kind("a".repeat(KIND_LENGTH)));
        let (id, socket, _owned) = standing(&registry, &kind);
        let other = Kind("b".repeat(KIND_LENGTH));
        let new = || Record::new(Id::random(), String::new(), vec![]);
        assert!(claim(&registry, &other, &mut new(), &plain).unwrap().is_none(), "of another kind");
        let won = std::thread::scope(|scope| {
            let claim = || {
                let mut record = new();
                claim(&registry, &kind, &mut record, &plain).unwrap().map(|claimed| (claimed, record))
            };
            let claims: Vec<_> = (0..8).map(|_| scope.spawn(claim)).collect();
            claims.into_iter().filter_map(|claim| claim.join().unwrap()).collect::<Vec<_>>()
        });
        let [((bundle, _leash), record)] = &won[..] else { panic!("{} have taken one", won.len()) };
        assert_eq!((&record.id, bundle), (&id, &registry.paths().bundle(&id)));
        assert_eq!(Record::read(bundle).unwrap(), *record);
        assert_eq!(registry.resolve(&record.name).unwrap(), *bundle);
        let mut byte = [0];
        socket.accept().unwrap().0.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [TAKEN]);
    }

    #[test]
    fn a_name_in_use_leaves_it_standing() {
        let (_dir, registry) = registry();
        let (plain, kind) = (spec(RunOptions::default()), Kind("a".repeat(KIND_LENGTH)));
        let (id, _socket, _owned) = standing(&registry, &kind);
        registry.create(&mut Record::new(Id::random(), "web".into(), vec![])).unwrap();
        let mut record = Record::new(Id::random(), "web".into(), vec![]);
        assert!(claim(&registry, &kind, &mut record, &plain).is_err());
        let left = list(registry.paths()).unwrap();
        assert_eq!(left.iter().map(|standby| &standby.id).collect::<Vec<_>>(), [&id]);
        assert_eq!(left[0].template, "key");
    }

    #[test]
    fn the_dead_do_not_stand() {
        let (_dir, registry) = registry();
        let (plain, kind) = (spec(RunOptions::default()), Kind("a".repeat(KIND_LENGTH)));
        let (_, _, owned) = standing(&registry, &kind);
        drop(owned);
        assert!(list(registry.paths()).unwrap().is_empty());
        assert_eq!(fs::read_dir(registry.paths().standbys()).unwrap().count(), 0);
        // Its socket is gone: it died between being found and being taken.
        let (id, socket, _owned) = standing(&registry, &kind);
        drop(socket);
        let mut record = Record::new(Id::random(), "web".into(), vec![]);
        let asked = record.clone();
        assert!(claim(&registry, &kind, &mut record, &plain).unwrap().is_none());
        assert_eq!(record, asked);
        assert!(!registry.paths().bundle(&id).dir().exists());
        registry.create(&mut record).unwrap();
    }
}
