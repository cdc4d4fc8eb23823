//! `podman run --rm IMAGE true` with kapsel-runtime and with runc, in storage of its own.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::contenders::{Workshop, finish, timed};
use kapsel_benches::report::Contender;

/// The storage, as long as it is measured; and the contenders.
pub fn prepare(workshop: &Workshop) -> Result<(TempDir, Vec<Contender>)> {
    let dir = tempfile::tempdir()?;
    let rootfs = dir.path().join("rootfs");
    std::fs::create_dir_all(rootfs.join("bin"))?;
    std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).context("busybox-static is not installed")?;
    std::os::unix::fs::symlink("busybox", rootfs.join("bin/true"))?;
    let tar = dir.path().join("rootfs.tar");
    finish(Command::new("tar").arg("-C").arg(&rootfs).arg("-cf").arg(&tar).arg("."))?;
    let at = dir.path().to_owned();
    finish(podman(&at, "runc").arg("import").arg(&tar).arg("tiny"))?;
    let contenders = [("kapsel", workshop.program("kapsel-runtime")), ("runc", "runc".to_owned())];
    let contenders = contenders.map(|(name, runtime)| {
        let at = at.clone();
        timed(name, move || {
            let mut command = podman(&at, &runtime);
            // Where this process may not raise its limits, runc cannot give Podman's defaults.
            let limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"];
            command.args(["run", "--rm", "--network", "none"]).args(limits).args(["tiny", "true"]);
            command
        })
    });
    Ok((dir, contenders.into()))
}

/// vfs works on every machine, and in both cases alike.
fn podman(dir: &Path, runtime: &str) -> Command {
    let mut command = Command::new("podman");
    let place = |name: &str| dir.join(name).to_string_lossy().into_owned();
    for (flag, value) in [
        ("--root", place("storage")),
        ("--runroot", place("run")),
        ("--tmpdir", place("tmp")),
        ("--storage-driver", "vfs".into()),
        ("--cgroup-manager", "cgroupfs".into()),
        ("--events-backend", "file".into()),
        ("--runtime", runtime.into()),
    ] {
        command.arg(flag).arg(value);
    }
    command
}
