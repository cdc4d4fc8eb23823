//! What the monitor counts, as Firecracker tells it: one JSON object a line, at every flush, with what was counted since the
//! one before. A device's counters stand under its kind and, for those that have one, under its name as well.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::log;

/// How often a running machine flushes by itself.
pub const INTERVAL: Duration = Duration::from_secs(60);

/// Where metrics go.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// A file or a FIFO, which is made if it is not there.
    pub metrics_path: PathBuf,
}

/// Where metrics go cannot be said, or not again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("Cannot initialize the metrics system due to bad user input: {0}")]
    Open(#[from] io::Error),
    /// There is one already.
    #[error("Cannot initialize the metrics system due to bad user input: it is initialized already")]
    Again,
    /// They cannot be written.
    #[error("the metrics cannot be written: {0}")]
    Write(io::Error),
}

/// A group of counters and a counter in it.
pub type Name = (String, &'static str);

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    file: Option<File>,
    startup: Startup,
    /// Requests of the API.
    requests: BTreeMap<Name, u64>,
    /// As of the last flush.
    told: BTreeMap<Name, u64>,
}

/// How long the process took until it served its API, in microseconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Startup {
    /// Of the clock on the wall.
    pub wall: u64,
    /// Of the processor.
    pub processor: u64,
}

impl Metrics {
    /// Metrics of a process that took so long to start.
    pub fn new(startup: Startup) -> Self {
        Metrics { startup, ..Metrics::default() }
    }

    /// From now on metrics are written.
    ///
    /// # Errors
    /// [`Error::Open`] or [`Error::Again`].
    pub fn configure(&mut self, settings: &Settings) -> Result<(), Error> {
        if self.file.is_some() {
            return Err(Error::Again);
        }
        self.file = Some(log::open(&settings.metrics_path)?);
        Ok(())
    }

    /// Whether they are written anywhere.
    pub fn wanted(&self) -> bool {
        self.file.is_some()
    }

    /// Counts a request of the API by [`Request::counters`](crate::api::request::Request::counters).
    pub fn count_request(
        &mut self,
        counters: Option<(&str, &'static str, Option<&'static str>)>,
        failed: bool,
    ) {
        let Some((group, name, fails)) = counters else { return };
        for name in [Some(name), fails.filter(|_| failed)].into_iter().flatten() {
            *self.requests.entry((group.to_owned(), name)).or_default() += 1;
        }
    }

    /// Writes a line: what `counters`, which only grow, have grown since the last time.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn flush(&mut self, counters: impl IntoIterator<Item = (Name, u64)>) -> Result<(), Error> {
        let Some(file) = &self.file else { return Ok(()) };
        let mut sums: BTreeMap<Name, u64> = self.requests.clone();
        for (name, value) in counters {
            *sums.entry(name).or_default() += value;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut line = Map::new();
        line.insert("utc_timestamp_ms".into(), json!(now.as_millis() as u64));
        let startup = json!({
            "process_startup_time_us": self.startup.wall,
            "process_startup_time_cpu_us": self.startup.processor,
        });
        line.insert("api_server".into(), startup);
        for ((group, name), value) in &sums {
            let told = self.told.get(&(group.clone(), *name)).copied().unwrap_or(0);
            let entry = line.entry(group.clone()).or_insert_with(|| Value::Object(Map::new()));
            entry[*name] = json!(value.saturating_sub(told));
        }
        let line = Value::Object(line).to_string() + "\n";
        (&mut &*file).write_all(line.as_bytes()).map_err(Error::Write)?;
        self.told = sums;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_has_what_is_new() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics");
        let mut metrics = Metrics::new(Startup { wall: 7, processor: 3 });
        let counter =
            |value| [(("block".to_owned(), "read_count"), value), (("block".to_owned(), "read_count"), 1)];
        metrics.flush(counter(100)).unwrap();
        metrics.configure(&Settings { metrics_path: path.clone() }).unwrap();
        metrics.count_request(Some(("put_api_requests", "drive_count", Some("drive_fails"))), false);
        metrics.flush(counter(5)).unwrap();
        metrics.flush(counter(8)).unwrap();
        assert!(matches!(metrics.configure(&Settings { metrics_path: path.clone() }), Err(Error::Again)));
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["block"], json!({"read_count": 6}));
        assert_eq!(lines[1]["block"], json!({"read_count": 3}));
        let drives = |line: usize| &lines[line]["put_api_requests"]["drive_count"];
        assert_eq!((drives(0), drives(1)), (&json!(1), &json!(0)));
        assert_eq!(lines[1]["api_server"]["process_startup_time_us"], json!(7));
    }
}
