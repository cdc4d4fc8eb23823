//! Machines that go on where another one was saved.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use tempfile::TempDir;

use crate::guest::FLOOD;
use crate::inside::{ECHO, FIRST, Files, SMALL_MIB, milliseconds};
use crate::memory;
use crate::monitor::{Monitor, Program};
use crate::results::Measures;

const LARGE_MIB: u64 = 2048;

/// A saved machine.
struct Saved {
    directory: TempDir,
}

impl Saved {
    /// Of a guest that does what its initramfs and its command line say, and is at it, as `at_work` sees.
    fn make(
        program: &Program<'_>,
        (kernel, initramfs, task): (&Path, &Path, &str),
        memory_mib: u64,
        at_work: impl FnOnce(&mut Monitor) -> Result<()>,
    ) -> Result<Saved> {
        let saved = Saved { directory: tempfile::tempdir_in("/dev/shm")? };
        let mut monitor = Monitor::start(program)?;
        monitor.configure(kernel, initramfs, task, memory_mib)?;
        monitor.begin()?;
        monitor.wait(FIRST)?;
        // Saved on its way there, the guest of one monitor would have more before it than the other's.
        at_work(&mut monitor)?;
        monitor.ask("PATCH", "/vm", &json!({"state": "Paused"}))?;
        let to = json!({"snapshot_path": saved.state(), "mem_file_path": saved.memory()});
        monitor.ask("PUT", "/snapshot/create", &to)?;
        Ok(saved)
    }

    fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    fn memory(&self) -> PathBuf {
        self.directory.path().join("memory")
    }

    /// A machine that goes on, and how it was asked to.
    fn load(&self, program: &Program<'_>) -> Result<(Monitor, Instant)> {
        let mut monitor = Monitor::start(program)?;
        let begun = Instant::now();
        let backend = json!({"backend_type": "File", "backend_path": self.memory()});
        let load = json!({"snapshot_path": self.state(), "mem_backend": backend, "resume_vm": true});
        monitor.ask("PUT", "/snapshot/load", &load)?;
        Ok((monitor, begun))
    }
}

/// Until a guest that prints all the time prints on.
pub fn loads(programs: &[Program<'_>], files: &Files, runs: usize, measures: &mut Measures) -> Result<()> {
    for memory_mib in [SMALL_MIB, LARGE_MIB] {
        let saved: Vec<_> = programs
            .iter()
            .map(|program| {
                Saved::make(program, (&files.kernel, &files.flood, ""), memory_mib, |monitor| {
                    monitor.wait(FLOOD)?;
                    // What the kernel puts off during its start is done by then.
                    std::thread::sleep(Duration::from_millis(500));
                    Ok(())
                })
            })
            .collect::<Result<_>>()?;
        for run in 0..=runs {
            for (program, saved) in programs.iter().zip(&saved) {
                let (monitor, begun) = saved.load(program)?;
                let took = monitor.wait("")? - begun;
                eprintln!("{}: {took:?} to go on with {memory_mib} MiB", program.name);
                if run > 0 {
                    let name = format!("snapshot load to guest, {memory_mib} MiB");
                    measures.add(program.name, &name, "ms", milliseconds(took));
                }
            }
        }
    }
    Ok(())
}

/// As many machines at once as wanted, or as the host has memory for, out of one that was saved. Each has to answer.
pub fn crowd(
    programs: &[Program<'_>],
    files: &Files,
    machines: usize,
    measures: &mut Measures,
) -> Result<()> {
    /// A host is full before it has to kill.
    const LEFT_KIB: f64 = 256.0 * 1024.0;
    for program in programs {
        let guest = (files.kernel.as_path(), files.small.as_path(), ECHO);
        let saved = Saved::make(program, guest, SMALL_MIB, |monitor| {
            // What is typed earlier would be in the middle of it.
            monitor.wait(&format!("{FIRST}\r\n"))?;
            monitor.type_line("ready")?;
            // The terminal's own echo comes first.
            monitor.wait("ready\r\nready\r\n").map(drop)
        })?;
        // What the last ones had comes back in its own time.
        std::thread::sleep(Duration::from_secs(2));
        let before = memory::available()?;
        let (mut crowd, begun) = (Vec::new(), Instant::now());
        while crowd.len() < machines && memory::available()? > LEFT_KIB {
            let (mut monitor, _) = saved.load(program)?;
            let word = format!("machine {}", crowd.len());
            monitor.type_line(&word)?;
            monitor.wait(&word)?;
            crowd.push(monitor);
            if crowd.len().is_multiple_of(10) {
                eprintln!("{}: {} machines after {:?}", program.name, crowd.len(), begun.elapsed());
            }
        }
        let count = crowd.len() as f64;
        let shares = crowd.iter().map(|monitor| memory::share(monitor.id())).collect::<Result<Vec<_>>>()?;
        let taken = before - memory::available()?;
        eprintln!("{}: {count} machines at once took {taken} KiB", program.name);
        measures.add(program.name, "machines at once", "", count);
        measures.add(program.name, "each one's share of memory", "KiB", shares.iter().sum::<f64>() / count);
        measures.add(program.name, "what the host gave for each", "KiB", taken / count);
    }
    Ok(())
}
