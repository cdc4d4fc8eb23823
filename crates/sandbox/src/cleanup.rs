//! What a killed shim left behind: mounts, redirected network interfaces, cgroups, sockets, directories. Every command of kapsel does this first.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{
    listing::lost,
    owner::{self, Owner},
    paths::{self, Bundle, Paths},
    record::{self, Record, Status},
    registry::{Error, Registry},
};

/// A bundle without a shim is left alone for so long: its maker may be about to start one.
const BIRTH: Duration = Duration::from_secs(60);

/// How long the processes of a cgroup may take to be gone once they are killed.
const EMPTY_CGROUP: Duration = Duration::from_secs(5);

/// How long an engine's cgroup may take to be left by all.
const LEFT_CGROUP: Duration = Duration::from_secs(1);

/// How long another command may take to clear a sandbox: its cgroup's processes, and as much for the rest.
const ANOTHERS_CLEARING: Duration = EMPTY_CGROUP.saturating_mul(2);
/// How often to look whether it has.
const LOOK: Duration = Duration::from_millis(2);

/// What was found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Bundles whose shim had been killed.
    pub lost: Vec<PathBuf>,
    /// Those of them that were removed.
    pub removed: Vec<PathBuf>,
}

/// Clears away what dead shims left, or waits while another command does: nothing of them is left afterwards. Costs one lock per
/// sandbox when there is nothing to do.
///
/// # Errors
/// When the directory of sandboxes cannot be read; what fails in one sandbox does not keep the others from being cleared.
pub fn sweep(registry: &Registry) -> Result<Report, Error> {
    let mut report = Report::default();
    if let Err(error) = kapsel_network::bridge::sweep() {
        tracing::warn!(%error, "cannot clear up the bridge");
    }
    for bundle in registry.bundles()? {
        let dead = match settled(&bundle) {
            Owner::Shim(_) | Owner::Clearing => false,
            Owner::Gone => needs_clearing(&bundle),
            Owner::NotYet => is_abandoned(&bundle),
        };
        if !dead {
            continue;
        }
        report.lost.push(bundle.dir().into());
        match clear(registry, &bundle) {
            Ok(true) => report.removed.push(bundle.dir().into()),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(bundle = %bundle.dir().display(), %error, "cannot clear a lost sandbox")
            }
        }
    }
    Ok(report)
}

/// The owner of a bundle, once nobody clears it, or after [`ANOTHERS_CLEARING`].
fn settled(bundle: &Bundle) -> Owner {
    let until = Instant::now() + ANOTHERS_CLEARING;
    loop {
        match owner::of(bundle) {
            Owner::Clearing if Instant::now() < until => std::thread::sleep(LOOK),
            owner => return owner,
        }
    }
}

/// A shim that ended in order leaves an exited record and no machine directory.
fn needs_clearing(bundle: &Bundle) -> bool {
    bundle.machine_dir().exists()
        || bundle.shim_socket().exists()
        || Record::read(bundle).map_or(true, |record| record.status != Status::Exited || record.remove)
}

fn is_abandoned(bundle: &Bundle) -> bool {
    let age = fs::metadata(bundle.dir()).and_then(|m| m.modified()).ok().and_then(|at| at.elapsed().ok());
    age.is_some_and(|age| age > BIRTH)
}

/// Clears one bundle whose shim is gone; true when nothing of it is left.
fn clear(registry: &Registry, bundle: &Bundle) -> Result<bool, Error> {
    // Taking the lock keeps a second command from clearing at the same time.
    let claimed =
        owner::claim_for_clearing(bundle).map_err(|source| failed("claim", bundle.dir(), source))?;
    let Some(_claimed) = claimed else { return Ok(false) };
    resources(registry.paths(), bundle)?;
    match Record::read(bundle) {
        Ok(mut record) if !record.remove => {
            if record.status != Status::Exited {
                record.status = Status::Exited;
                record.exit = Some(lost(record::now()));
                record.address = None;
                record.address6 = None;
                record.ports.clear();
                record.write(bundle)?;
            }
            Ok(false)
        }
        // Without a record nobody could find or remove it; with --rm it was to go anyway.
        _ => registry.remove(bundle).map(|()| true),
    }
}

/// Frees what a sandbox holds outside its own processes, which died with the shim. Also the last step of an orderly end.
///
/// # Errors
/// When something cannot be freed.
pub fn resources(paths: &Paths, bundle: &Bundle) -> Result<(), Error> {
    let pod = bundle.pod_dir();
    detach(&pod).map_err(|source| failed("unmount", &pod, source))?;
    unmount_below(bundle.dir()).map_err(|source| failed("unmount below", bundle.dir(), source))?;
    own_cgroup(bundle)?;
    if let Some(cgroup) = crate::cgroup::of_engine(bundle) {
        // Others than the sandbox's may be in it, this process too: who put them there removes it then.
        cgroup.remove_empty(LEFT_CGROUP);
    }
    let sockets = [bundle.shim_socket(), bundle.attach_socket(), bundle.standby_socket()];
    for path in sockets.into_iter().chain([paths.scratch_disk(short(bundle))]) {
        absent(fs::remove_file(&path)).map_err(|source| failed("remove", &path, source))?;
    }
    kapsel_network::release(&bundle.network())
        .map_err(|source| failed("disconnect", bundle.dir(), io::Error::other(source)))?;
    // The last one: while it is there the rest is tried again.
    machine_dir(bundle)
}

/// Frees what a machine held that has ended, so that the sandbox can have another.
///
/// # Errors
/// When something cannot be freed.
pub(crate) fn machine(bundle: &Bundle) -> Result<(), Error> {
    own_cgroup(bundle)?;
    machine_dir(bundle)?;
    Ok(paths::private_dir(&bundle.machine_dir())?)
}

fn own_cgroup(bundle: &Bundle) -> Result<(), Error> {
    let Ok(Some(cgroup)) = kapsel_jail::Cgroup::open(short(bundle)) else { return Ok(()) };
    let removed = cgroup.remove(EMPTY_CGROUP).map_err(io::Error::other);
    removed.map_err(|source| failed("remove the cgroup of", bundle.dir(), source))
}

fn machine_dir(bundle: &Bundle) -> Result<(), Error> {
    let dir = bundle.machine_dir();
    absent(fs::remove_dir_all(&dir)).map_err(|source| failed("remove", &dir, source))
}

fn short(bundle: &Bundle) -> &str {
    bundle.dir().file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Io { what, path: path.into(), source }
}

fn absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Detaches what is mounted at `point`, with all that is mounted in it: directories of the host, which must not be there any more when
/// the bundle is removed. By its path, whatever the mount table calls that.
fn detach(point: &Path) -> io::Result<()> {
    use rustix::mount::UnmountFlags;
    loop {
        match rustix::mount::unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Nothing (more) is mounted there. Who may not unmount has not mounted either.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT | rustix::io::Errno::PERM) => {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Detaches every mount below `dir`, the deepest first.
fn unmount_below(dir: &Path) -> io::Result<()> {
    let dir = match fs::canonicalize(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let mut points: Vec<PathBuf> = mount_points(&table).filter(|point| point.starts_with(&dir)).collect();
    points.sort();
    for point in points.iter().rev() {
        match rustix::mount::unmount(
            point,
            rustix::mount::UnmountFlags::DETACH | rustix::mount::UnmountFlags::NOFOLLOW,
        ) {
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// The fifth field of each line of `/proc/self/mountinfo`, its octal escapes undone (proc(5)).
fn mount_points(table: &str) -> impl Iterator<Item = PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    table.lines().filter_map(|line| line.split(' ').nth(4)).map(|field| {
        let mut bytes = Vec::with_capacity(field.len());
        let mut rest = field.as_bytes();
        while let [first, tail @ ..] = rest {
            let octal = |d: &[u8]| std::str::from_utf8(d).ok().and_then(|d| u8::from_str_radix(d, 8).ok());
            match (first, tail.get(..3).and_then(octal)) {
                (b'\\', Some(byte)) => {
                    bytes.push(byte);
                    rest = &tail[3..];
                }
                _ => {
                    bytes.push(*first);
                    rest = tail;
                }
            }
        }
        PathBuf::from(std::ffi::OsString::from_vec(bytes))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::{paths::Id, record::Exit};

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(&Paths::discover(Some(dir.path())).unwrap()).unwrap();
        (dir, registry)
    }

    /// A sandbox as a killed shim leaves it.
    fn lost_sandbox(registry: &Registry, name: &str, remove: bool) -> Bundle {
        let mut record = Record::new(Id::random(), name.into(), vec![]);
        record.status = Status::Running;
        record.remove = remove;
        let bundle = registry.create(&mut record).unwrap();
        drop(owner::claim(&bundle).unwrap().unwrap());
        std::os::unix::net::UnixListener::bind(bundle.shim_socket()).unwrap();
        std::os::unix::net::UnixListener::bind(bundle.attach_socket()).unwrap();
        fs::create_dir(bundle.machine_dir()).unwrap();
        std::os::unix::net::UnixListener::bind(bundle.machine_dir().join("qmp.sock")).unwrap();
        let scratch = registry.paths().scratch_disk(record.id.short());
        fs::create_dir_all(scratch.parent().unwrap()).unwrap();
        fs::write(scratch, "disk").unwrap();
        bundle
    }

    #[test]
    fn the_lost_are_cleared_and_their_end_is_recorded() {
        let (_dir, registry) = registry();
        let kept = lost_sandbox(&registry, "kept", false);
        let gone = lost_sandbox(&registry, "gone", true);
        let report = sweep(&registry).unwrap();
        assert_eq!(report.lost.len(), 2);
        assert_eq!(report.removed, [gone.dir()]);
        assert!(!gone.dir().exists());
        for left in [kept.shim_socket(), kept.attach_socket(), kept.machine_dir()] {
            assert!(!left.exists(), "{}", left.display());
        }
        assert_eq!(fs::read_dir(registry.paths().data().join("scratch")).unwrap().count(), 0);
        let record = Record::read(&kept).unwrap();
        assert_eq!(record.status, Status::Exited);
        assert!(matches!(record.exit, Some(Exit { code: 255, reason: Some(_), .. })));
        assert_eq!(registry.resolve("kept").unwrap(), kept);
        assert!(registry.resolve("gone").is_err());
        assert_eq!(sweep(&registry).unwrap(), Report::default(), "the second time there is nothing to do");
    }

    #[test]
    fn a_command_waits_while_another_clears() {
        let (_dir, registry) = registry();
        let bundle = lost_sandbox(&registry, "lost", false);
        let other = owner::claim_for_clearing(&bundle).unwrap().unwrap();
        assert_eq!(owner::of(&bundle), Owner::Clearing);
        let cleared = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sweeping = scope.spawn(|| {
                sweep(&registry).unwrap();
                assert!(cleared.load(Ordering::SeqCst), "it did not wait");
            });
            std::thread::sleep(Duration::from_millis(100));
            cleared.store(true, Ordering::SeqCst);
            // It was killed before it had done anything, so that the one that waited does it.
            drop(other);
            sweeping.join().unwrap();
        });
        assert!(!bundle.machine_dir().exists());
    }

    #[test]
    fn the_living_and_the_newborn_are_left_alone() {
        let (_dir, registry) = registry();
        let living = lost_sandbox(&registry, "living", true);
        let _shim = owner::claim(&living).unwrap().unwrap();
        let newborn = registry.create(&mut Record::new(Id::random(), "newborn".into(), vec![])).unwrap();
        assert_eq!(sweep(&registry).unwrap(), Report::default());
        assert!(living.machine_dir().exists() && newborn.dir().exists());
    }

    #[test]
    fn nothing_of_the_hosts_is_removed_with_a_pod() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        use rustix::mount::{MountFlags, mount, mount_bind};
        let (dir, _) = registry();
        // The mount table has another path than this one.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let registry = Registry::open(&Paths::discover(Some(&link.join("root"))).unwrap()).unwrap();
        let lost = lost_sandbox(&registry, "lost", true);
        let volume = dir.path().join("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("precious"), "x").unwrap();
        let pod = lost.pod_dir();
        fs::create_dir(&pod).unwrap();
        mount(c"pod", &pod, c"tmpfs", MountFlags::empty(), None::<&std::ffi::CStr>).unwrap();
        fs::create_dir(pod.join("0")).unwrap();
        mount_bind(&volume, pod.join("0")).unwrap();
        assert_eq!(sweep(&registry).unwrap().removed, [lost.dir()]);
        assert!(volume.join("precious").exists() && !lost.dir().exists());
    }

    #[test]
    fn mount_points_with_spaces_are_read() {
        let table = "36 35 98:0 /mnt1 /mnt\\040two\\134x rw,noatime - ext3 /dev/root rw\n";
        let table = table.replace("\\\\", "\\");
        assert_eq!(mount_points(&table).collect::<Vec<_>>(), [PathBuf::from("/mnt two\\x")]);
    }
}
