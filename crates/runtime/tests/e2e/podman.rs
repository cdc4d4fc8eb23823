//! Debian's Podman, with storage of its own and one changed word: the runtime.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use serde_json::Value;

use crate::world::{Ran, World, eventually, finish, world};

/// Podman, where it is installed.
struct Podman {
    world: &'static World,
    dir: PathBuf,
}

fn podman(world: &'static World) -> Option<&'static Podman> {
    static PODMAN: OnceLock<Option<Podman>> = OnceLock::new();
    let podman = PODMAN.get_or_init(|| {
        Path::new("/usr/bin/podman").exists().then(|| {
            let podman = Podman { world, dir: world.dir.join("podman") };
            podman.import();
            podman
        })
    });
    if podman.is_none() {
        println!("skipped: needs podman");
    }
    podman.as_ref()
}

impl Podman {
    fn run(&self, args: &[&str]) -> Ran {
        let mut command = Command::new("podman");
        // vfs: the machine may have no overlayfs to nest. Limits that the machine may not let anybody raise are kept.
        for (flag, value) in [
            ("--root", self.dir.join("storage")),
            ("--runroot", self.dir.join("run")),
            ("--tmpdir", self.dir.join("tmp")),
            ("--storage-driver", "vfs".into()),
            ("--cgroup-manager", "cgroupfs".into()),
            ("--events-backend", "file".into()),
            ("--runtime", self.world.runtime.clone()),
        ] {
            command.arg(flag).arg(value);
        }
        finish(command.args(args))
    }

    fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
        ran.stdout
    }

    /// `podman run` of the image.
    fn image(&self, flags: &[&str], command: &[&str]) -> Ran {
        self.run(&[&["run", "--network", "none"], flags, &["busybox"], command].concat())
    }

    fn import(&self) {
        let engine = self.world.engine();
        engine.bundle("true", |_| ());
        let tar = self.world.dir.join("busybox.tar");
        let rootfs = engine.dir.join("rootfs");
        let packed = Command::new("tar").arg("-C").arg(rootfs).arg("-cf").arg(&tar).arg(".").status();
        assert!(packed.expect("tar").success());
        self.ok(&["import", tar.to_str().expect("text"), "busybox"]);
    }
}

/// Removes a container with the test.
struct Named(&'static Podman, &'static str);

impl Drop for Named {
    fn drop(&mut self) {
        let _ = self.0.run(&["rm", "-f", "-t", "0", self.1]);
    }
}

#[test]
fn run() {
    let world = world!();
    let Some(podman) = podman(world) else { return };
    let ran = podman.image(&["--rm"], &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (7, "out\n"), "{}", ran.stderr);
    assert!(ran.stderr.contains("err\n"), "{}", ran.stderr);
    let missing = podman.image(&["--rm"], &["/none"]);
    assert_eq!(missing.code, 127, "{}", missing.stderr);
    let host = podman.run(&["run", "--rm", "--network", "host", "busybox", "true"]);
    assert!(host.code != 0 && host.stderr.contains("--network=host"), "{}", host.stderr);
    let volume = world.dir.join("volume");
    fs::create_dir_all(&volume).unwrap();
    let bind = format!("{}:/data", volume.display());
    let ran = podman
        .image(&["--rm", "-v", &bind, "--memory", "64m"], &["sh", "-c", "cat /etc/hostname > /data/name"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(fs::read_to_string(volume.join("name")).unwrap().trim().len(), 12);
}

#[test]
fn a_life_in_the_background() {
    let world = world!();
    let Some(podman) = podman(world) else { return };
    let _named = Named(podman, "web");
    let script = "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done";
    let ran = podman.image(&["-d", "--name", "web"], &["sh", "-c", script]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    eventually("it is up", || podman.run(&["logs", "web"]).stdout.contains("up"));
    let exec = podman.run(&["exec", "-e", "A=b", "web", "sh", "-c", "echo $A; exit 9"]);
    assert_eq!((exec.code, exec.stdout.as_str()), (9, "b\n"), "{}", exec.stderr);
    assert_eq!(podman.run(&["exec", "web", "/none"]).code, 127);
    podman.ok(&["pause", "web"]);
    assert!(podman.ok(&["inspect", "--format", "{{.State.Status}}", "web"]).contains("paused"));
    podman.ok(&["unpause", "web"]);
    podman.ok(&["stop", "-t", "20", "web"]);
    let state: Value = serde_json::from_str(&podman.ok(&["inspect", "web"])).unwrap();
    assert_eq!(state[0]["State"]["ExitCode"], 3, "{}", state[0]["State"]);
    // The same container again, in another sandbox.
    podman.ok(&["start", "web"]);
    podman.ok(&["kill", "web"]);
    eventually("it is killed", || podman.ok(&["ps", "-q"]).trim().is_empty());
    podman.ok(&["rm", "web"]);
}
