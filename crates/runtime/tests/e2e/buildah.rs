//! Debian's buildah: the steps of a build, each in a sandbox.

use std::{fs, path::Path, process::Command};

use crate::world::{Ran, World, finish, world};

/// buildah with storage of its own, which is removed with it.
struct Buildah(&'static World);

impl Buildah {
    fn run(&self, args: &[&str]) -> Ran {
        let dir = self.0.dir.join("buildah");
        let mut command = Command::new("buildah");
        command.arg("--root").arg(dir.join("storage")).arg("--runroot").arg(dir.join("run"));
        finish(command.args(["--storage-driver", "vfs"]).args(args))
    }

    fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
        ran.stdout
    }
}

impl Drop for Buildah {
    fn drop(&mut self) {
        let _ = self.run(&["rm", "--all"]);
        let _ = self.run(&["rmi", "--all", "--force"]);
    }
}

#[test]
fn steps_run_in_sandboxes() {
    let world = world!();
    if !Path::new("/usr/bin/buildah").exists() {
        println!("skipped: needs buildah");
        return;
    }
    let engine = world.engine();
    engine.bundle("true", |_| ());
    let (buildah, dir) = (Buildah(world), engine.dir.to_str().expect("text"));
    let file = "FROM scratch\nCOPY rootfs /\n\
                RUN cat /proc/version > /kernel && mkdir -p /made && echo there > /made/file && rm /bin/tty\n\
                RUN [\"/bin/busybox\", \"test\", \"-f\", \"/made/file\"]\nCMD [\"cat\", \"/made/file\"]\n";
    fs::write(engine.dir.join("Containerfile"), file).unwrap();
    let runtime = world.runtime.to_str().expect("text");
    // What every step has, in `bud` and in `run`.
    let flags = ["--runtime", runtime, "--isolation", "oci", "--network", "none"];
    buildah.ok(&[&["bud"], &flags[..], &["--layers", "-t", "built", dir]].concat());
    let container = buildah.ok(&["from", "built"]).trim().to_owned();
    let root = buildah.ok(&["mount", &container]).trim().to_owned();
    let kernel = fs::read_to_string(Path::new(&root).join("kernel")).expect("what the step wrote");
    let host = fs::read_to_string("/proc/version").unwrap();
    assert!(kernel.starts_with("Linux version") && kernel != host, "{kernel}");
    assert!(!Path::new(&root).join("bin/tty").exists(), "what a step removes is gone");
    let step = |command: &[&str]| buildah.run(&[&["run"], &flags[..], &[&container, "--"], command].concat());
    let ran = step(&["sh", "-c", "cat /made/file; echo more > /made/file; exit 7"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (7, "there\n"), "{}", ran.stderr);
    assert_eq!(step(&["cat", "/made/file"]).stdout, "more\n");
    let fails = "FROM built\nRUN exit 9\n";
    fs::write(engine.dir.join("Containerfile"), fails).unwrap();
    let ran = buildah.run(&[&["bud"], &flags[..], &[dir]].concat());
    assert!(ran.code != 0 && ran.stderr.contains("9"), "{} {}", ran.code, ran.stderr);
}
