//! How fast a local archive becomes a root file system, against `tar -x`, `umoci unpack` and `mkfs.erofs` of the same
//! content in the same run. Prints medians and writes them as JSON.
//!
//! `cargo bench -p kapsel-image --bench image_unpack -- [--runs N] [--mib N] [--out FILE] [--dir DIR]`
//!
//! To measure one core, run it under `taskset -c 0`.

#![allow(clippy::unwrap_used, missing_docs, reason = "a measurement that cannot be made should fail loudly")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use kapsel_image::{ImportOptions, Silent, Source, Store};
use kapsel_testkit::{ImageBuilder, Layer, TarBuilder};

struct Options {
    runs: usize,
    mib: usize,
    out: Option<PathBuf>,
    dir: PathBuf,
}

fn main() {
    let options = options();
    let bed = tempfile::tempdir_in(&options.dir).unwrap();
    let tar = content(options.mib);
    let bytes = tar.len();
    let archive = bed.path().join("layer.tar");
    std::fs::write(&archive, &tar).unwrap();
    let oci = bed.path().join("oci");
    ImageBuilder::new().layer(Layer::plain(tar.clone())).build().oci_dir(&oci, "latest");
    let gzip = bed.path().join("gzip.tar");
    std::fs::write(&gzip, ImageBuilder::new().layer(Layer::gzip(tar)).build().oci_archive("g:1")).unwrap();
    nothing_dirty();

    let scratch = bed.path().join("scratch");
    let mut results = serde_json::Map::new();
    let mut measure = |name: &str, run: &mut dyn FnMut(&Path) -> Option<f64>| {
        let mut times = Vec::new();
        for _ in 0..options.runs {
            std::fs::create_dir_all(&scratch).unwrap();
            let time = run(&scratch);
            std::fs::remove_dir_all(&scratch).unwrap();
            nothing_dirty();
            match time {
                Some(time) => times.push(time),
                None => return println!("{name:<42} skipped: it is not installed"),
            }
        }
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        let rate = bytes as f64 / 1e6 / seconds;
        println!("{name:<42} {:>7.0} ms {rate:>7.0} MB/s", seconds * 1e3);
        results.insert(name.into(), serde_json::json!({ "seconds": seconds, "mb_per_second": rate }));
    };

    measure("kapsel: rootfs of a stored image", &mut |dir| {
        let (store, image) = import(dir, &archive, Some("a:1"));
        Some(timed(|| drop(store.rootfs(&image, &Silent).unwrap())))
    });
    measure("kapsel: import + rootfs, uncompressed", &mut |dir| {
        Some(timed(|| {
            let (store, image) = import(dir, &archive, Some("a:1"));
            store.rootfs(&image, &Silent).unwrap();
        }))
    });
    measure("kapsel: import + rootfs, gzip", &mut |dir| {
        Some(timed(|| {
            let (store, image) = import(dir, &gzip, None);
            store.rootfs(&image, &Silent).unwrap();
        }))
    });
    measure("tar -x, sync", &mut |dir| {
        command("tar", &["-xf".as_ref(), archive.as_os_str(), "-C".as_ref(), dir.as_os_str()], dir)
    });
    let image = format!("{}:latest", oci.display());
    measure("umoci raw unpack, sync", &mut |dir| {
        let to = dir.join("out");
        command(
            "umoci",
            &["raw".as_ref(), "unpack".as_ref(), "--image".as_ref(), image.as_ref(), to.as_os_str()],
            dir,
        )
    });
    measure("tar -x + mkfs.erofs, sync", &mut |dir| {
        let (tree, out) = (dir.join("tree"), dir.join("out.erofs"));
        std::fs::create_dir(&tree).unwrap();
        let unpack =
            command("tar", &["-xf".as_ref(), archive.as_os_str(), "-C".as_ref(), tree.as_os_str()], dir)?;
        Some(unpack + command("mkfs.erofs", &[out.as_os_str(), tree.as_os_str()], dir)?)
    });

    if let Some(out) = &options.out {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let report = serde_json::json!({
            "bench": "image_unpack", "layer_bytes": bytes, "runs": options.runs, "cores": cores, "median": results,
        });
        std::fs::write(out, serde_json::to_vec_pretty(&report).unwrap()).unwrap();
    }
}

fn options() -> Options {
    let mut options = Options { runs: 5, mib: 512, out: None, dir: std::env::temp_dir() };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} needs a value"));
        match argument.as_str() {
            "--runs" => options.runs = value().parse().unwrap(),
            "--mib" => options.mib = value().parse().unwrap(),
            "--out" => options.out = Some(value().into()),
            "--dir" => options.dir = value().into(),
            // Cargo's own.
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    options
}

/// A layer like a distribution's: mostly small files, and most bytes in large ones. Not compressible to nothing.
fn content(mib: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut noise = |length: usize| -> Vec<u8> {
        let mut data = Vec::with_capacity(length + 8);
        while data.len() < length {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            data.extend_from_slice(&(state >> 20).to_le_bytes());
        }
        data.truncate(length);
        data
    };
    let mut tar = TarBuilder::new();
    for group in 0..mib / 16 {
        tar = tar.dir(format!("d{group}"));
        for i in 0..100 {
            tar = tar.file(format!("d{group}/small{i}"), noise(300 + i * 113));
        }
        for i in 0..10 {
            tar = tar.file(format!("d{group}/large{i}"), noise(1_500_000 + i * 4321));
        }
    }
    tar.build()
}

fn import(dir: &Path, archive: &Path, name: Option<&str>) -> (Store, kapsel_image::Image) {
    let store = Store::open(&dir.join("store")).unwrap();
    let options =
        ImportOptions { reference: name.map(|name| name.parse().unwrap()), ..ImportOptions::default() };
    let image = store.import(Source::Path(archive), &options, &Silent).unwrap().remove(0);
    (store, image)
}

fn timed(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

/// Times a command and the writing of its output to the disk, which kapsel does too.
fn command(program: &str, arguments: &[&std::ffi::OsStr], dir: &Path) -> Option<f64> {
    let start = Instant::now();
    let status =
        Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status().ok()?;
    assert!(status.success(), "{program}: {status}");
    assert!(Command::new("sync").arg("-f").arg(dir).status().unwrap().success());
    Some(start.elapsed().as_secs_f64())
}

/// What one measurement wrote must not slow the next one.
fn nothing_dirty() {
    assert!(Command::new("sync").status().unwrap().success());
}
