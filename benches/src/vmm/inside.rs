//! Starts monitors in turn and takes the time.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

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

/// A part of what is measured, which has a deadline of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Phase {
    /// Time, exits and memory of a start
    Starts,
    /// Time until a snapshot goes on
    Loads,
    /// Bytes by disk, network and socket
    Throughput,
    /// Many machines at once
    Crowd,
}

impl Phase {
    /// How long it may take with so many runs. In the box, on a quiet machine, a run takes a tenth of that.
    fn limit(self, runs: usize, machines: usize) -> Duration {
        let (base, each, times) = match self {
            Phase::Starts => (60, 120, runs + 1),
            Phase::Loads => (300, 30, runs + 1),
            Phase::Throughput => (60, 480, runs),
            Phase::Crowd => (240, 10, machines),
        };
        Duration::from_secs(base + each * times as u64)
    }
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
    /// Without filters of system calls.
    #[arg(long)]
    pub no_seccomp: bool,
    #[arg(long, required = true)]
    pub phase: Vec<Phase>,
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
        if self.no_seccomp {
            words.push("--no-seccomp".into());
        }
        for name in self.phase.iter().filter_map(ValueEnum::to_possible_value) {
            words.extend(["--phase".into(), name.get_name().into()]);
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
    let begun = Instant::now();
    let mut measures = Measures::default();
    for (name, path) in [(KAPSEL, Some(&files.vmm)), (FIRECRACKER, files.firecracker.as_ref())] {
        if let Some(path) = path {
            measures.add(name, "program", "MB", std::fs::metadata(path)?.len() as f64 / 1e6);
        }
    }
    for &phase in &order.phase {
        let limit = phase.limit(order.runs, order.machines);
        progress(begun, &format!("{phase:?} begins, and may take {} s", limit.as_secs()));
        let deadline = Instant::now() + limit;
        let no_seccomp = order.no_seccomp;
        let mut programs = vec![Program { name: KAPSEL, path: &files.vmm, no_seccomp, deadline }];
        if let Some(path) = &files.firecracker {
            programs.push(Program { name: FIRECRACKER, path, no_seccomp, deadline });
        }
        match phase {
            Phase::Starts => starts(&programs, files, order.runs, &mut measures),
            Phase::Loads => snapshots::loads(&programs, files, order.runs, &mut measures),
            Phase::Throughput => throughput::measure(&programs, files, order.runs, &mut measures),
            Phase::Crowd => snapshots::crowd(&programs, files, order.machines, &mut measures),
        }
        .with_context(|| format!("measuring {phase:?}"))?;
    }
    progress(begun, "all is measured");
    println!("{RESULTS}{}", serde_json::to_string(&measures.finish())?);
    Ok(())
}

/// What has happened, and when. The results alone are for the standard output.
fn progress(begun: Instant, what: &str) {
    eprintln!("{:>4} s: {what}", begun.elapsed().as_secs());
}

/// What the monitor has to itself a while after the start is what it has then for good.
const SETTLED: Duration = Duration::from_millis(500);

/// From nothing to the guest's first program.
fn starts(programs: &[Program<'_>], files: &Files, runs: usize, measures: &mut Measures) -> Result<()> {
    for run in 0..=runs {
        for program in programs {
            let mut monitor = Monitor::start(program)?;
            monitor.configure(&files.kernel, &files.small, "", SMALL_MIB)?;
            let begun = Instant::now();
            monitor.begin()?;
            let took = monitor.wait(FIRST)? - begun;
            let exits = memory::exits(monitor.id())?;
            std::thread::sleep(SETTLED);
            let beside = memory::beside_guest(monitor.id(), SMALL_MIB)?;
            eprintln!("{}: {took:?} to the first program, API after {:?}", program.name, monitor.ready);
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
