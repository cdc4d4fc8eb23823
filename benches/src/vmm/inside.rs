//! Starts monitors in turn and takes the time.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::memory;
use crate::monitor::{Monitor, Program};
use crate::results::{FIRECRACKER, KAPSEL, Measures, RESULTS};
use crate::{snapshots, throughput};

/// The first words of a small guest, and what it does then by its command line: nothing, or repeat what is typed.
pub const WORDS: &str = "echo first words
case \"$(cat /proc/cmdline)\" in
*echo*) exec cat ;;
esac
exec sleep 1000000";
/// Has a guest repeat lines.
pub const ECHO: &str = "echo";
/// What a guest's first program says first.
pub const FIRST: &str = "first words";
/// The smallest machine.
pub const SMALL_MIB: u64 = 128;

/// What is needed, and where it is.
#[derive(clap::Args)]
pub struct Files {
    pub vmm: PathBuf,
    #[arg(long)]
    pub firecracker: Option<PathBuf>,
    pub kernel: PathBuf,
    /// The initramfs that has nothing but busybox.
    pub small: PathBuf,
    /// The one with modules and this program.
    pub whole: PathBuf,
    /// The one that prints all the time.
    pub flood: PathBuf,
}

/// What shall be measured.
#[derive(clap::Args)]
pub struct Order {
    #[command(flatten)]
    pub files: Files,
    #[arg(long)]
    pub runs: usize,
    #[arg(long)]
    pub machines: usize,
}

impl Order {
    /// The order as arguments of this program.
    pub fn words(&self) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let files = &self.files;
        let mut words = vec!["inside".into(), text(&files.vmm), text(&files.kernel)];
        words.extend([text(&files.small), text(&files.whole), text(&files.flood)]);
        words.extend([
            "--runs".into(),
            self.runs.to_string(),
            "--machines".into(),
            self.machines.to_string(),
        ]);
        if let Some(firecracker) = &files.firecracker {
            words.extend(["--firecracker".into(), text(firecracker)]);
        }
        words
    }
}

/// Measures everything and prints the results as one line.
pub fn main(order: &Order) -> Result<()> {
    let _awake = kapsel_kvmbox::keep_awake();
    // SAFETY: this process has one thread so far, and no sockets of the network that it leaves.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
        .context("no network namespace; measuring needs root")?;
    shell(
        "ip link set lo up && { [ -d /sys/kernel/debug/kvm ] || mount -t debugfs debugfs /sys/kernel/debug; }",
    )?;
    let files = &order.files;
    let mut programs = vec![Program { name: KAPSEL, path: &files.vmm }];
    if let Some(path) = &files.firecracker {
        programs.push(Program { name: FIRECRACKER, path });
    }
    let mut measures = Measures::default();
    for program in &programs {
        let size = std::fs::metadata(program.path)?.len();
        measures.add(program.name, "program", "MB", size as f64 / 1e6);
    }
    starts(&programs, files, order.runs, &mut measures)?;
    snapshots::loads(&programs, files, order.runs, &mut measures)?;
    throughput::measure(&programs, files, order.runs.div_ceil(2), &mut measures)?;
    snapshots::crowd(&programs, files, order.machines, &mut measures)?;
    println!("{RESULTS}{}", serde_json::to_string(&measures.finish())?);
    Ok(())
}

/// What the monitor has to itself a while after the start is what it has then for good.
const SETTLED: Duration = Duration::from_millis(500);

/// From nothing to the guest's first program.
fn starts(programs: &[Program<'_>], files: &Files, runs: usize, measures: &mut Measures) -> Result<()> {
    for run in 0..=runs {
        for program in programs {
            let mut monitor = Monitor::start(program)?;
            monitor.configure(&files.kernel, &files.small, "", SMALL_MIB)?;
            let begun = std::time::Instant::now();
            monitor.begin()?;
            let took = monitor.wait(FIRST)? - begun;
            let exits = memory::exits(monitor.id())?;
            std::thread::sleep(SETTLED);
            let beside = memory::beside_guest(monitor.id(), SMALL_MIB)?;
            println!("{}: {took:?} to the first program, API after {:?}", program.name, monitor.ready);
            // The first of each is for the caches.
            if run > 0 {
                let mut add = |name: &str, unit: &str, sample| measures.add(program.name, name, unit, sample);
                add("process start to API ready", "ms", milliseconds(monitor.ready));
                add("InstanceStart to first program", "ms", milliseconds(took));
                add("exits until then, for ports and devices", "", exits.to_monitor);
                add("exits until then, others", "", exits.to_kvm);
                add("memory beside the guest's", "KiB", beside);
            }
        }
    }
    Ok(())
}

pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Runs a line of the shell.
pub fn shell(line: &str) -> Result<()> {
    let status = Command::new("sh").args(["-c", line]).status()?;
    ensure!(status.success(), "{line}: {status}");
    Ok(())
}
