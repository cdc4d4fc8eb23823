//! What a jail costs: the time from asking for a child until it has ended, beside the same program by `posix_spawn`.
//!
//! Prints medians in microseconds; run as root with `cargo bench -p kapsel-jail`.
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot run should say so by stopping")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kapsel_jail::cgroup::Limits;
use kapsel_jail::{Cgroup, Identity, Jail, filters, profiles};

const ROUNDS: usize = 100;
const PAUSE: Duration = Duration::from_millis(20);

fn main() {
    // `cargo test` runs benchmarks to see that they run.
    let rounds = if std::env::args().any(|arg| arg == "--bench") { ROUNDS } else { 2 };
    if !rustix::process::geteuid().is_root() || !Path::new("/bin/busybox").exists() {
        println!("skipped: needs root and busybox-static");
        return;
    }
    let id = format!("bench-{}", std::process::id());
    let cgroup = Cgroup::create(&id, &Limits::default()).unwrap();
    report("posix_spawn", rounds, || {
        let mut child = Command::new("/bin/busybox").arg("true").stdin(Stdio::null()).spawn().unwrap();
        let spawned = Instant::now();
        child.wait().unwrap();
        spawned
    });
    report("jail", rounds, || run(jail()));
    report("jail, with a filter", rounds, || run(jail().seccomp(filters::qemu().unwrap())));
    if let Some(cgroup) = &cgroup {
        report("jail, in a cgroup", rounds, || run(jail().cgroup(cgroup)));
        cgroup.remove(Duration::from_secs(5)).unwrap();
    }
    for program in ["/usr/bin/qemu-system-x86_64-microvm", "/usr/bin/qemu-system-x86_64"] {
        if Path::new(program).exists() {
            report(&format!("describe the jail of {program}"), rounds.min(50), || {
                let jail = profiles::qemu(Path::new(program)).unwrap();
                drop(jail);
                Instant::now()
            });
            // Killed at once: it is the way to the exec that counts.
            report(&format!("start {program}"), rounds.min(50), || {
                let jail =
                    profiles::qemu(Path::new(program)).unwrap().identity(Identity::of_sandbox("bench"));
                let child = jail.arg("--version").spawn().unwrap();
                let spawned = Instant::now();
                drop(child);
                spawned
            });
        }
    }
}

fn jail() -> Jail {
    Jail::new("true").program("/bin/busybox").bind_exec("/bin/busybox", "/bin/busybox").arg("true")
}

fn run(jail: Jail) -> Instant {
    let mut child = jail.identity(Identity::of_sandbox("bench")).spawn().unwrap();
    let spawned = Instant::now();
    child.wait().unwrap();
    spawned
}

/// Prints the median time until the program is executed, and until it has ended.
fn report(what: &str, rounds: usize, mut once: impl FnMut() -> Instant) {
    let (mut starts, mut wholes) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let begin = Instant::now();
        let spawned = once();
        starts.push(spawned - begin);
        wholes.push(begin.elapsed());
        // The kernel takes namespaces apart in the background: that belongs to nobody's start.
        std::thread::sleep(PAUSE);
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort();
        times[times.len() / 2].as_micros()
    };
    println!("{what}: {} us to the exec, {} us to the end", median(&mut starts), median(&mut wholes));
}
