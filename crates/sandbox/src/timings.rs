//! Where the milliseconds of a start go: `timings.json` in the bundle, for `kapsel run --timings`.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use serde::{Deserialize, Serialize};

use crate::paths::Bundle;

/// The version of the file.
pub const VERSION: u32 = 1;

/// One phase of a start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done: short and stable.
    pub name: String,
    /// Milliseconds from the shim's first instruction to the phase's beginning.
    pub start_ms: f64,
    /// Milliseconds that it took. Phases may overlap.
    pub took_ms: f64,
}

/// All phases of one start, in the order of their ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// [`VERSION`].
    pub version: u32,
    /// Nanoseconds since 1970 of the shim's first instruction, to line up with the caller's clock.
    pub began_at: u64,
    /// The phases.
    pub phases: Vec<Phase>,
}

impl Timings {
    /// Reads a bundle's timings.
    ///
    /// # Errors
    /// When there are none.
    pub fn read(bundle: &Bundle) -> std::io::Result<Self> {
        Ok(serde_json::from_slice(&std::fs::read(bundle.timings())?)?)
    }
}

/// Takes the time while a sandbox starts. Clones share one list.
#[derive(Clone, Debug)]
pub struct Stopwatch {
    began: Instant,
    began_at: u64,
    phases: Arc<Mutex<Vec<Phase>>>,
}

impl Default for Stopwatch {
    fn default() -> Self {
        Self { began: Instant::now(), began_at: crate::record::now(), phases: Arc::default() }
    }
}

impl Stopwatch {
    /// Starts a phase, which ends when the returned value is dropped.
    #[must_use]
    pub fn phase(&self, name: &'static str) -> Running<'_> {
        Running { watch: self, name, start: Instant::now() }
    }

    /// Adds a phase that somebody else measured, ending now.
    pub fn add(&self, name: impl Into<String>, took_ms: f64) {
        self.add_past(name, took_ms, took_ms);
    }

    /// Adds a phase that somebody else measured, which began `ago_ms` ago.
    pub fn add_past(&self, name: impl Into<String>, ago_ms: f64, took_ms: f64) {
        let now = self.began.elapsed().as_secs_f64() * 1e3;
        self.push(Phase { name: name.into(), start_ms: (now - ago_ms).max(0.0), took_ms });
    }

    fn push(&self, phase: Phase) {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).push(phase);
    }

    /// Writes the file. Timings are a service: what cannot be written is logged, not an error.
    pub fn write(&self, bundle: &Bundle) {
        let phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let timings = Timings { version: VERSION, began_at: self.began_at, phases };
        let written = serde_json::to_vec(&timings)
            .map_err(std::io::Error::from)
            .and_then(|json| crate::record::replace(&bundle.timings(), &json));
        if let Err(error) = written {
            tracing::warn!(%error, "cannot write timings");
        }
    }
}

/// A phase that has begun.
#[derive(Debug)]
pub struct Running<'a> {
    watch: &'a Stopwatch,
    name: &'static str,
    start: Instant,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let start = self.start.duration_since(self.watch.began).as_secs_f64() * 1e3;
        let took = self.start.elapsed().as_secs_f64() * 1e3;
        self.watch.push(Phase { name: self.name.into(), start_ms: start, took_ms: took });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_travel_through_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::at(dir.path());
        let watch = Stopwatch::default();
        drop(watch.phase("machine"));
        watch.clone().add("agent", 1.5);
        watch.write(&bundle);
        let timings = Timings::read(&bundle).unwrap();
        let names: Vec<_> = timings.phases.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["machine", "agent"]);
        assert!(timings.phases.iter().all(|p| p.start_ms >= 0.0 && p.took_ms >= 0.0));
    }
}
