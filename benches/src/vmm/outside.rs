//! Puts what is needed in the box, and keeps what comes out.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use kapsel_benches::report::{machine, write_json};
use kapsel_kvmbox::guest::{MODULES, PROGRAM, initramfs};
use kapsel_kvmbox::{Kernel, KvmBox, native_kvm};
use serde::Serialize;

use crate::Args;
use crate::inside::{Files, Order, Phase, WORDS};
use crate::results::{Measure, RESULTS, print};

/// The longest that everything may take.
const PATIENCE: Duration = Duration::from_secs(3600);

#[derive(Serialize)]
struct Report {
    machine: String,
    in_a_box: bool,
    /// A nanosecond is an instruction.
    counted: bool,
    runs: usize,
    measures: Vec<Measure>,
}

/// Measures, prints a table and writes `vmm.json` or `vmm-counted.json`.
pub fn main(args: &Args) -> Result<()> {
    ensure!(
        args.vmm.exists(),
        "{} is not there; `make monitor` builds it, and --vmm names another",
        args.vmm.display()
    );
    let work = tempfile::tempdir()?;
    // Each start then finds the same memory.
    let mut kvm_box = KvmBox::new().memory_mib(args.memory).cleared().timeout(PATIENCE);
    if args.counted {
        kvm_box = kvm_box.counted();
    }
    let kernel = Kernel::ensure(kvm_box.cache_directory())?;
    let this = std::env::current_exe()?;
    let outside = Files {
        vmm: args.vmm.clone(),
        firecracker: args.firecracker.clone(),
        kernel: kernel.vmlinux.clone(),
        small: work.path().join("small.cpio"),
        whole: work.path().join("whole.cpio"),
        flood: work.path().join("flood.cpio"),
    };
    initramfs(&kernel, &[], None, WORDS, &outside.small)?;
    let run = format!("exec {PROGRAM} guest");
    initramfs(&kernel, &MODULES, Some(&this), &run, &outside.whole)?;
    initramfs(&kernel, &[], Some(&this), &format!("exec {PROGRAM} flood"), &outside.flood)?;

    let native = native_kvm() && !args.counted;
    let output = if native { here(&this, args, outside)? } else { boxed(&this, args, outside, kvm_box)? };
    let line = output.lines().find_map(|line| line.strip_prefix(RESULTS));
    let measures: Vec<Measure> = serde_json::from_str(line.context("there are no results")?)?;
    print(&measures);
    // What is comparable with other results is kept.
    if !args.only.is_empty() || args.no_seccomp {
        return Ok(());
    }
    let report =
        Report { machine: machine(), in_a_box: !native, counted: args.counted, runs: args.runs, measures };
    std::fs::create_dir_all(&args.out)?;
    write_json(&args.out, if args.counted { "vmm-counted" } else { "vmm" }, &report)
}

fn order(args: &Args, files: Files) -> Order {
    let phase = match &args.only[..] {
        [] => Phase::value_variants().to_vec(),
        only => only.to_vec(),
    };
    Order { files, runs: args.runs, machines: args.machines, no_seccomp: args.no_seccomp, phase }
}

fn here(this: &Path, args: &Args, files: Files) -> Result<String> {
    let order = order(args, files);
    let output = Command::new(this).args(order.words()).stderr(std::process::Stdio::inherit()).output()?;
    ensure!(output.status.success(), "measuring failed: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn boxed(this: &Path, args: &Args, outside: Files, mut kvm_box: KvmBox) -> Result<String> {
    let name = |name: &str| Path::new("/bench").join(name);
    let files = Files {
        vmm: name("kapsel-vmm"),
        firecracker: outside.firecracker.as_ref().map(|_| name("firecracker")),
        kernel: name("vmlinux"),
        small: name("small.cpio"),
        whole: name("whole.cpio"),
        flood: name("flood.cpio"),
    };
    kvm_box = kvm_box.program(this, name("bench"))?.program(&outside.vmm, &files.vmm)?;
    if let (Some(outside), Some(inside)) = (&outside.firecracker, &files.firecracker) {
        kvm_box = kvm_box.program(outside, inside)?;
    }
    kvm_box = kvm_box
        .file(outside.kernel, &files.kernel)
        .file(outside.small, &files.small)
        .file(outside.whole, &files.whole)
        .file(outside.flood, &files.flood);
    let order = order(args, files);
    let words = order.words();
    let command: Vec<&str> =
        std::iter::once("/bench/bench").chain(words.iter().map(String::as_str)).collect();
    let outcome = kvm_box.run_with(&command, &mut std::io::stderr())?;
    ensure!(outcome.status == 0, "measuring failed in the box: {}", outcome.status);
    Ok(String::from_utf8_lossy(&outcome.output).into_owned())
}
