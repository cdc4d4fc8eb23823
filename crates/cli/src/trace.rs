//! `--timings`: where the milliseconds of a start go, kapsel's own and those of the shim, the machine and the agent.

use std::time::Instant;

use kapsel_sandbox::record;
use kapsel_sandbox::timings::Timings;
use serde::Serialize;

use crate::flags::run::TimingsForm;
use crate::output;

/// Takes the time of kapsel's own phases, one after the other.
pub struct Trace {
    began: Instant,
    began_at: u64,
    /// When the phase that is under way began.
    since: Instant,
    phases: Vec<Phase>,
}

/// A phase, as `--timings=json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Phase {
    /// `cli`, or `sandbox` for everything from the shim on.
    who: &'static str,
    /// What was done: short and stable.
    name: String,
    /// Milliseconds from kapsel's first instruction to the beginning of the phase.
    start_ms: f64,
    /// Milliseconds that it took. Phases of different processes overlap.
    took_ms: f64,
}

/// The whole, as `--timings=json` prints it.
#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    total_ms: f64,
    phases: &'a [Phase],
}

impl Trace {
    /// Starts the clock: the first thing that kapsel does.
    pub fn start() -> Self {
        let began = Instant::now();
        Trace { began, began_at: record::now(), since: began, phases: Vec::new() }
    }

    /// What was done since the last phase was this.
    pub fn phase(&mut self, name: &str) {
        let now = Instant::now();
        self.phases.push(Phase {
            who: "cli",
            name: name.to_owned(),
            start_ms: milliseconds(self.since - self.began),
            took_ms: milliseconds(now - self.since),
        });
        self.since = now;
    }

    /// Adds what the shim measured, moved to kapsel's clock.
    pub fn add(&mut self, timings: &Timings) {
        let ahead = (i128::from(timings.began_at) - i128::from(self.began_at)) as f64 / 1e6;
        self.phases.extend(timings.phases.iter().map(|phase| Phase {
            who: "sandbox",
            name: phase.name.clone(),
            start_ms: phase.start_ms + ahead,
            took_ms: phase.took_ms,
        }));
    }

    /// Prints everything on standard error.
    pub fn print(&mut self, form: TimingsForm) {
        let total_ms = milliseconds(self.began.elapsed());
        self.phases.sort_by(|a, b| a.start_ms.total_cmp(&b.start_ms));
        match form {
            TimingsForm::Json => {
                let report = Report { version: 1, total_ms, phases: &self.phases };
                output::complain(&serde_json::to_string(&report).unwrap_or_default());
            }
            TimingsForm::Table => {
                output::complain(&format!("{:>9} {:>9}  phase", "at ms", "took ms"));
                for phase in &self.phases {
                    let name = output::table::harmless(&phase.name, 60);
                    let Phase { who, start_ms, took_ms, .. } = phase;
                    output::complain(&format!("{start_ms:9.1} {took_ms:9.1}  {who}: {name}"));
                }
                output::complain(&format!("{:>9} {total_ms:9.1}  total", ""));
            }
        }
    }
}

fn milliseconds(duration: std::time::Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use kapsel_sandbox::timings;

    #[test]
    fn the_shims_phases_are_put_on_our_clock() {
        let mut trace = Trace::start();
        trace.phase("parse");
        let phase = timings::Phase { name: "machine".into(), start_ms: 1.0, took_ms: 2.0 };
        trace.add(&Timings { version: 1, began_at: trace.began_at + 5_000_000, phases: vec![phase] });
        assert_eq!(trace.phases[0].name, "parse");
        assert_eq!((trace.phases[1].start_ms, trace.phases[1].took_ms), (6.0, 2.0));
    }
}
