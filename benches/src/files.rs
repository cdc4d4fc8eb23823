//! Work on many small files: a tar unpacked, the tree walked, all of it read. On a root file system that the host shares by virtio-fs, as
//! engines give it, beside the same on an image's EROFS disk under a tmpfs, and beside runc.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::contenders::{Running, Workshop, finish};
use kapsel_benches::report::{self, Contender};

const FILES: usize = 5000;
const DIRECTORIES: usize = 100;
/// Sizes in bytes, in turn: 4.6 KiB on average, as in trees of source.
const SIZES: [usize; 5] = [300, 1500, 3000, 6000, 13_000];

/// The steps, in order: each is timed by itself, as an `exec` of this script.
const STEPS: [(&str, &str, &str); 3] = [
    ("files-unpack", "5,000 files unpacked from a tar", "busybox tar -x -f /files.tar -C /work"),
    ("files-find", "the tree of 5,000 files walked", "busybox find /work -type f | busybox wc -l"),
    ("files-read", "all of 5,000 files read", "busybox find /work -type f -exec busybox cat {} + >/dev/null"),
];

/// A container in which the work is done.
struct Place {
    name: &'static str,
    exec: Box<dyn Fn(&str) -> Command>,
    _running: Running,
}

/// Times each step in each place, in turn.
pub fn measure(workshop: &Workshop, runs: usize, out: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let tar = dir.path().join("files.tar");
    write_tar(&tar)?;
    let mut places = Vec::new();
    places.push(on_erofs(workshop, &tar)?);
    let runtime = workshop.program("kapsel-runtime");
    for (name, runtime) in [("kapsel, virtio-fs", runtime.as_str()), ("runc", "runc")] {
        match on_directory(workshop, name, runtime, &tar) {
            Ok(place) => places.push(place),
            Err(error) if name == "runc" => eprintln!("files: runc is left out: {error:#}"),
            Err(error) => return Err(error),
        }
    }
    for (step, (file, title, _)) in STEPS.iter().enumerate() {
        let contenders = places.iter().map(|place| contender(place, step)).collect();
        report::measure(file, title, "kapsel, EROFS and tmpfs", runs, contenders)?.publish(out)?;
    }
    Ok(())
}

/// Does the steps before `step` once, in the run that is not counted. A tree to be unpacked is removed before each run.
fn contender(place: &Place, step: usize) -> Contender {
    let commands: Vec<_> = STEPS[..=step].iter().map(|(_, _, script)| (place.exec)(script)).collect();
    let mut clean = (place.exec)("busybox rm -rf /work && busybox mkdir /work");
    let (mut commands, mut ready) = (commands, false);
    let run = move || {
        let (last, before) = commands.split_last_mut().context("no step")?;
        if before.is_empty() || !std::mem::replace(&mut ready, true) {
            finish(&mut clean)?;
            before.iter_mut().try_for_each(finish)?;
        }
        let start = Instant::now();
        finish(last)?;
        Ok(start.elapsed())
    };
    Contender { name: place.name.into(), run: Box::new(run) }
}

/// A sandbox of kapsel's own, which has its image as an EROFS disk and changes in memory.
fn on_erofs(workshop: &Workshop, tar: &Path) -> Result<Place> {
    const NAME: &str = "kapsel-bench-files";
    let running = Running::kapsel(workshop, NAME, &["-m", "512m"])?;
    finish(workshop.kapsel().arg("cp").arg(tar).arg(format!("{NAME}:/files.tar")))?;
    let kapsel = workshop.program("kapsel");
    let exec = move |script: &str| {
        let mut command = Command::new(&kapsel);
        command.args(["exec", NAME, "sh", "-c", script]);
        command
    };
    Ok(Place { name: "kapsel, EROFS and tmpfs", exec: Box::new(exec), _running: running })
}

/// A container of an OCI runtime whose root is a directory of the host.
fn on_directory(workshop: &Workshop, name: &'static str, runtime: &str, tar: &Path) -> Result<Place> {
    let bundle = workshop.writable_bundle(&name.replace(", ", "-"), &["sleep", "3600"])?;
    fs::copy(tar, bundle.join("rootfs/files.tar"))?;
    let id = format!("kapsel-bench-files-{}", name.replace(", ", "-"));
    let running = Running::oci(runtime, &bundle, &id)?;
    let runtime = runtime.to_owned();
    let exec = move |script: &str| {
        let mut command = Command::new(&runtime);
        command.args(["exec", &id, "/bin/sh", "-c", script]);
        command
    };
    Ok(Place { name, exec: Box::new(exec), _running: running })
}

fn write_tar(path: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let content = vec![b'x'; SIZES.into_iter().max().unwrap_or(0)];
    for n in 0..FILES {
        let below = dir.path().join(format!("{}", n % DIRECTORIES));
        fs::create_dir_all(&below)?;
        fs::write(below.join(format!("{n}")), &content[..SIZES[n % SIZES.len()]])?;
    }
    let mut pack = Command::new("tar");
    let packed = pack.arg("-c").arg("-C").arg(dir.path()).arg(".").stdout(File::create(path)?).status()?;
    ensure!(packed.success(), "tar failed");
    Ok(())
}
