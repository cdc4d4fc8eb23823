//! Whether the container's program is there, as far as the host can tell: runc tells at `create`, and engines rely on it for
//! their own exit codes.

use std::{
    fs,
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::Spec;
use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::refusal::{Refusal, refuse};

/// What the host sees of one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// A file that can be executed.
    Program,
    /// Something else.
    NotExecutable,
    /// Nothing.
    Nothing,
    /// A mount lies over it, or its path goes where only the guest can follow.
    Unknown,
}

/// Refuses a program that is certainly not there. Only the guest knows for sure; it has the last word at `start`.
pub fn check(spec: &Spec, rootfs: &Path) -> Result<(), Refusal> {
    let Some(process) = spec.process() else { return Ok(()) };
    let Some(program) = process.args().as_ref().and_then(|args| args.first()) else { return Ok(()) };
    let Ok(root) = open(rootfs) else { return Ok(()) };
    let mounts: Vec<&PathBuf> = spec.mounts().iter().flatten().map(|mount| mount.destination()).collect();
    let look = |path: &Path| look(&root, &mounts, path);
    if program.contains('/') {
        let path = process.cwd().join(program);
        return match look(&path) {
            Seen::Nothing => refuse!("exec: {program:?}: stat {}: no such file or directory", path.display()),
            Seen::NotExecutable => refuse!("exec: {program:?}: permission denied"),
            Seen::Program | Seen::Unknown => Ok(()),
        };
    }
    let path = process.env().iter().flatten().find_map(|variable| variable.strip_prefix("PATH="));
    let mut places = path.unwrap_or_default().split(':').filter(|dir| dir.starts_with('/'));
    match places.any(|dir| matches!(look(&Path::new(dir).join(program)), Seen::Program | Seen::Unknown)) {
        true => Ok(()),
        false => refuse!("exec: {program:?}: executable file not found in $PATH"),
    }
}

fn open(dir: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn look(root: &OwnedFd, mounts: &[&PathBuf], path: &Path) -> Seen {
    let ordinary = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !ordinary || mounts.iter().any(|mount| path.starts_with(mount)) {
        return Seen::Unknown;
    }
    // The kernel follows links as if `root` were `/`: nothing outside of it is looked at.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    match rustix::fs::openat2(
        root,
        path,
        flags,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    ) {
        Err(Errno::NOENT | Errno::NOTDIR) if through_links(root, path) => Seen::Unknown,
        Err(Errno::NOENT | Errno::NOTDIR) => Seen::Nothing,
        Err(_) => Seen::Unknown,
        Ok(file) => match fs::File::from(file).metadata() {
            Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => Seen::Program,
            Ok(_) => Seen::NotExecutable,
            Err(_) => Seen::Unknown,
        },
    }
}

/// Whether some part of the path is a link: it may lead to where a mount is.
fn through_links(root: &OwnedFd, path: &Path) -> bool {
    path.ancestors().any(|part| {
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat2(root, part, flags, Mode::empty(), ResolveFlags::IN_ROOT)
            .and_then(rustix::fs::fstat)
            .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_symlink())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_what_is_certainly_not_there_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("usr/bin")).unwrap();
        fs::write(dir.path().join("usr/bin/tool"), "").unwrap();
        fs::set_permissions(dir.path().join("usr/bin/tool"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("notes"), "").unwrap();
        // Absolute, and out of the root where the host would follow them.
        symlink("/usr/bin", dir.path().join("bin")).unwrap();
        symlink("/opt/mounted/tool", dir.path().join("link")).unwrap();
        let root = open(dir.path()).unwrap();
        let mount = PathBuf::from("/opt");
        let look = |path: &str| look(&root, &[&mount], Path::new(path));
        assert_eq!(look("/bin/tool"), Seen::Program);
        assert_eq!(look("/usr/bin/tool"), Seen::Program);
        assert_eq!(look("/usr/bin/none"), Seen::Nothing);
        assert_eq!(look("/notes"), Seen::NotExecutable);
        assert_eq!(look("/usr/bin"), Seen::NotExecutable);
        assert_eq!(look("/opt/anything"), Seen::Unknown);
        assert_eq!(look("/link"), Seen::Unknown);
        assert_eq!(look("/usr/../usr/bin/none"), Seen::Unknown);
    }
}
