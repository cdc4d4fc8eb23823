//! Where the time goes: what Create and Start tell the host for `--timings`.

use kapsel_protocol::api;

use crate::container::report::{Timing, monotonic_us};

/// A stopwatch whose laps become the API's phases.
#[derive(Debug)]
pub struct Phases {
    last: u64,
    phases: Vec<api::Phase>,
}

impl Phases {
    /// Starts now.
    pub fn start() -> Self {
        Self { last: monotonic_us(), phases: Vec::new() }
    }

    /// What was done since the last lap is called `name`.
    pub fn lap(&mut self, name: &str) {
        let now = monotonic_us();
        self.push(name, self.last, now - self.last);
        self.last = now;
    }

    /// Adds what a child did meanwhile.
    pub fn child(&mut self, timings: &[Timing]) {
        for timing in timings {
            self.push(&format!("child.{}", timing.step.name()), timing.start_us, timing.duration_us);
        }
    }

    fn push(&mut self, name: &str, start_us: u64, duration_us: u64) {
        self.phases.push(api::Phase { name: name.to_owned(), start_us, duration_us, ..Default::default() });
    }

    /// For a reply.
    pub fn into_vec(self) -> Vec<api::Phase> {
        self.phases
    }
}
