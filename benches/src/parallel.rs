//! Many sandboxes at once: all must answer, and none may be left after `rm -f`.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::contenders::{Workshop, finish};
use kapsel_benches::report::{machine, write_json};

const SANDBOXES: usize = 20;

#[derive(Serialize)]
struct Parallel {
    machine: String,
    sandboxes: usize,
    /// Until every one of them had answered an exec.
    answered_s: f64,
    /// Until `rm -f` had removed them all.
    removed_s: f64,
}

/// Starts them together, has each answer an exec, and removes them.
pub fn measure(workshop: &Workshop, out: &Path) -> Result<()> {
    let names: Vec<_> = (0..SANDBOXES).map(|i| format!("kapsel-bench-parallel-{i}")).collect();
    let start = Instant::now();
    let answered = std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = names
            .iter()
            .map(|name| {
                scope.spawn(move || {
                    finish(
                        workshop.kapsel().args(["run", "-d", "--name", name, "busybox", "sleep", "3600"]),
                    )?;
                    finish(workshop.kapsel().args(["exec", name, "true"]))
                })
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|t| t.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked"))))
    });
    let answered_s = start.elapsed().as_secs_f64();
    let start = Instant::now();
    finish(workshop.kapsel().args(["rm", "-f"]).args(&names))?;
    let removed_s = start.elapsed().as_secs_f64();
    answered?;

    let ps = workshop.kapsel().args(["ps", "-a", "--json"]).output()?;
    let ps = String::from_utf8_lossy(&ps.stdout);
    ensure!(!ps.contains("kapsel-bench-parallel"), "sandboxes are left after rm -f: {ps}");
    println!(
        "\n{SANDBOXES} sandboxes at once: all answered after {answered_s:.2} s, removed in {removed_s:.2} s"
    );
    write_json(out, "parallel", &Parallel { machine: machine(), sandboxes: SANDBOXES, answered_s, removed_s })
}
