//! Side-by-side measurements: kapsel beside what a person would run instead, in the same run on the same machine.
//!
//! Times on shared machines drift, so contenders are run in turn (A B C, A B C, …), figures are medians, and each is also
//! given as a ratio to a named baseline. Every measurement is written as data (`results/NAME.json`) and drawn from that
//! data (`results/NAME.svg`).

mod contenders;
mod files;
mod image;
mod memory;
mod parallel;
mod podman;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, ValueEnum};

use contenders::Workshop;
use kapsel_benches::report;

#[derive(Parser)]
#[command(about = "Measure kapsel side by side with runc, crun, runsc and QEMU by hand")]
struct Args {
    /// What to measure
    #[arg(value_enum, default_value = "all")]
    what: What,
    /// Counted runs of each contender
    #[arg(short = 'n', long, default_value_t = 20)]
    runs: usize,
    /// Folder of kapsel's binaries
    #[arg(long, default_value = "target/release")]
    bin: PathBuf,
    /// Folder for JSON and SVG
    #[arg(long, default_value = "benches/results")]
    out: PathBuf,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum What {
    All,
    /// `run --rm busybox true` from a template, against runc, crun and runsc
    Warm,
    /// First output of a cold start, against QEMU by hand with the same kernel
    Cold,
    /// `exec ID true` in a running container
    Exec,
    /// Bytes through a container's standard output
    Pipe,
    /// Host memory of an idle sandbox, split by process
    Memory,
    /// Twenty sandboxes started at once
    Parallel,
    /// `podman run --rm IMAGE true`, against the same with runc
    Podman,
    /// 5,000 small files unpacked, found and read on a shared root file system, against EROFS and tmpfs, and runc
    Files,
    /// A local archive of an image to its EROFS root file system, against tar, umoci and mkfs.erofs
    Image,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let wanted = |what| args.what == What::All || args.what == what;
    std::fs::create_dir_all(&args.out)?;

    if wanted(What::Image) {
        image::measure(args.runs.div_ceil(4), &args.out)?;
    }
    if args.what == What::Image {
        // The rest needs sandboxes.
        return Ok(());
    }
    let workshop = Workshop::prepare(&args.bin)?;
    if wanted(What::Warm) {
        let warm = report::measure("warm", "run true: start to exit", "runsc", args.runs, workshop.warm()?)?;
        warm.publish(&args.out)?;
        // What follows is measured without it.
        contenders::finish(workshop.kapsel().args(["template", "rm", "--standby"]))?;
    }
    if wanted(What::Cold) {
        // Seconds each, so fewer of them: the spread of a cold boot is small.
        let runs = args.runs.div_ceil(4);
        let cold =
            report::measure("cold", "cold start to first output", "qemu by hand", runs, workshop.cold()?)?;
        cold.publish(&args.out)?;
    }
    if wanted(What::Exec) {
        let (contenders, _running) = workshop.exec()?;
        report::measure("exec", "exec true: start to exit", "runc", args.runs, contenders)?
            .publish(&args.out)?;
    }
    if wanted(What::Pipe) {
        let runs = args.runs.div_ceil(4);
        let title = format!("{} MiB through standard output", contenders::PIPE_MIB);
        report::measure("pipe", &title, "runc", runs, workshop.pipe()?)?.publish(&args.out)?;
    }
    if wanted(What::Memory) {
        memory::measure(&workshop, &args.out)?;
    }
    if wanted(What::Parallel) {
        parallel::measure(&workshop, &args.out)?;
    }
    if wanted(What::Podman) {
        let (_storage, contenders) = podman::prepare(&workshop)?;
        report::measure("podman", "podman run true: start to exit", "runc", args.runs, contenders)?
            .publish(&args.out)?;
    }
    if wanted(What::Files) {
        files::measure(&workshop, args.runs.div_ceil(4), &args.out)?;
    }
    Ok(())
}
