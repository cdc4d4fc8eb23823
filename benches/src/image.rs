//! From a local archive of an image to its root file system on one core: kapsel beside what makes the same by hand.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kapsel_image::{ImportOptions, Silent, Source, Store};
use kapsel_testkit::tar::Header;
use kapsel_testkit::{ImageBuilder, Layer, TarBuilder};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tempfile::TempDir;

use crate::contenders::finish;
use kapsel_benches::report::{self, Contender};

/// Bytes of the layer, or a little more.
const CONTENT: usize = 192 << 20;

/// Measures with an uncompressed layer, and with a gzip one. Both are published.
pub fn measure(runs: usize, out: &Path) -> Result<()> {
    let bed = tempfile::tempdir()?;
    let tar = content()?;
    let bytes = tar.len() as u64;
    for (name, title, layer) in [
        ("image", "archive to EROFS, one core", Layer::plain(tar.clone())),
        ("image-gzip", "archive with a gzip layer to EROFS, one core", Layer::gzip(tar)),
    ] {
        let dir = bed.path().join(name);
        fs::create_dir(&dir)?;
        fs::write(dir.join("layer"), &layer.blob)?;
        let archive = dir.join("archive.tar");
        fs::write(&archive, ImageBuilder::new().layer(layer).build().oci_archive("bench:1"))?;
        let one = OneCore::pin()?;
        let report = report::measure(name, title, "tar + mkfs.erofs", runs, contenders(&dir)?)?;
        drop(one);
        report.moving(bytes).publish(out)?;
    }
    Ok(())
}

/// What a distribution's layer is made of: this machine's programs, libraries and data, as far as they go.
fn content() -> Result<Vec<u8>> {
    let mut tar = TarBuilder::new();
    let mut size = 0;
    // Level by level: programs and libraries first, and not all of the documentation.
    let mut pending = VecDeque::from([PathBuf::from("/usr")]);
    while let Some(dir) = pending.pop_front() {
        let mut entries: Vec<_> = fs::read_dir(&dir)?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (path, kind) = (entry.path(), entry.file_type()?);
            let name = path.as_os_str().as_bytes().strip_prefix(b"/").unwrap_or_default();
            if kind.is_dir() {
                tar = tar.dir(name);
                pending.push_back(path);
            } else if kind.is_symlink() {
                tar = tar.symlink(name, fs::read_link(&path)?.as_os_str().as_bytes());
            } else if kind.is_file() {
                let data = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
                // One enormous file would be all that is measured.
                if data.len() > CONTENT / 8 {
                    continue;
                }
                size += data.len();
                tar = tar.entry(
                    Header::new(b'0', name).mode(entry.metadata()?.permissions().mode() & 0o7777),
                    data,
                );
            }
            if size > CONTENT {
                return Ok(tar.build());
            }
        }
    }
    Ok(tar.build())
}

fn contenders(dir: &Path) -> Result<Vec<Contender>> {
    let archive = dir.join("archive.tar");
    let kapsel = {
        let archive = archive.clone();
        move |scratch: &Path| {
            let store = Store::open(&scratch.join("store"))?;
            let images = store.import(Source::Path(&archive), &ImportOptions::default(), &Silent)?;
            for image in images {
                store.rootfs(&image, &Silent)?;
            }
            Ok(())
        }
    };
    let layer = dir.join("layer");
    let extract = move |scratch: &Path| {
        let tree = scratch.join("tree");
        fs::create_dir(&tree)?;
        run("tar", &[OsStr::new("-xf"), layer.as_os_str(), OsStr::new("-C"), tree.as_os_str()])
    };
    let tar_alone = extract.clone();
    let tar_and_mkfs = move |scratch: &Path| {
        extract(scratch)?;
        run("mkfs.erofs", &[scratch.join("out.erofs").as_os_str(), scratch.join("tree").as_os_str()])
    };
    // An archive of an image is more than a tar: skopeo reads it, and umoci what skopeo writes.
    let tools = move |scratch: &Path| {
        let (oci, tree) = (scratch.join("oci"), scratch.join("tree"));
        let [from, to] = [("oci-archive", &archive), ("oci", &oci)]
            .map(|(kind, path)| format!("{kind}:{}:bench:1", path.display()));
        run("skopeo", &["copy", "--quiet", "--insecure-policy", &from, &to].map(OsStr::new))?;
        let image = format!("{}:bench:1", oci.display());
        let unpack = ["raw", "unpack", "--image", &image].map(OsStr::new);
        run("umoci", &[&unpack[..], &[tree.as_os_str()]].concat())?;
        run("mkfs.erofs", &[scratch.join("out.erofs").as_os_str(), tree.as_os_str()])
    };
    Ok(vec![
        contender("kapsel", dir, kapsel),
        contender("tar", dir, tar_alone),
        contender("tar + mkfs.erofs", dir, tar_and_mkfs),
        contender("umoci + mkfs.erofs", dir, tools),
    ])
}

/// A contender that works in an empty directory, and whose work counts once it is on the disk.
fn contender(name: &str, dir: &Path, mut work: impl FnMut(&Path) -> Result<()> + 'static) -> Contender {
    let dir = dir.to_owned();
    let run = move || -> Result<Duration> {
        let scratch = TempDir::new_in(&dir)?;
        sync(&dir)?;
        let start = Instant::now();
        work(scratch.path())?;
        sync(&dir)?;
        Ok(start.elapsed())
    };
    Contender { name: name.into(), run: Box::new(run) }
}

fn run(program: &str, arguments: &[&OsStr]) -> Result<()> {
    finish(Command::new(program).args(arguments))
}

fn sync(dir: &Path) -> Result<()> {
    rustix::fs::syncfs(fs::File::open(dir)?).context("syncfs")
}

/// Keeps this thread, and what it starts, on one core until dropped.
struct OneCore(CpuSet);

impl OneCore {
    fn pin() -> Result<OneCore> {
        let before = sched_getaffinity(None).context("sched_getaffinity")?;
        let first = (0..CpuSet::MAX_CPU).find(|&cpu| before.is_set(cpu)).context("there is no core")?;
        let mut one = CpuSet::new();
        one.set(first);
        sched_setaffinity(None, &one).context("sched_setaffinity")?;
        Ok(OneCore(before))
    }
}

impl Drop for OneCore {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(None, &self.0) {
            eprintln!("still on one core: {error}");
        }
    }
}
