//! The log, in lines as Firecracker's: `2026-11-24T10:35:56.123456789 [id:thread:LEVEL] message key=value`. Times are UTC.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber, span};

/// The least important messages that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(try_from = "String")]
#[repr(u8)]
pub enum Level {
    /// None.
    Off,
    /// Something does not work.
    Error,
    /// Something is not as it should be.
    Warning,
    /// What happens.
    Info,
    /// Also what a guest does wrong.
    Debug,
    /// Everything.
    Trace,
}

impl Level {
    const NAMES: [(&'static str, Level); 7] = [
        ("off", Level::Off),
        ("error", Level::Error),
        ("warning", Level::Warning),
        ("warn", Level::Warning),
        ("info", Level::Info),
        ("debug", Level::Debug),
        ("trace", Level::Trace),
    ];

    fn of(level: tracing::Level) -> Self {
        match level {
            tracing::Level::ERROR => Level::Error,
            tracing::Level::WARN => Level::Warning,
            tracing::Level::INFO => Level::Info,
            tracing::Level::DEBUG => Level::Debug,
            tracing::Level::TRACE => Level::Trace,
        }
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Level::NAMES.iter().find(|(other, _)| other.eq_ignore_ascii_case(name));
        known.map(|(_, level)| *level).ok_or_else(|| {
            format!("{name:?} is not a level; these are: Off, Error, Warning, Info, Debug, Trace")
        })
    }
}

impl TryFrom<String> for Level {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

/// How the log is to be; what is absent stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// A file or a FIFO, which is made if it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// Which messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<Level>,
    /// Whether lines have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether lines have the place in the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only messages of modules whose path begins so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// Opens what is written to a line at a time: a regular file at its end, or a FIFO, whose reader may come later.
///
/// # Errors
/// When it cannot be opened or made.
pub fn open(path: &Path) -> io::Result<File> {
    // For reading as well: a FIFO without a reader cannot be opened for writing only. Nobody may hold up the monitor.
    File::options().read(true).append(true).create(true).custom_flags(libc::O_NONBLOCK).open(path)
}

struct State {
    id: String,
    file: Option<File>,
    show_level: bool,
    show_origin: bool,
    module: String,
}

struct Log {
    level: AtomicU8,
    state: Mutex<State>,
}

static LOG: Log = Log {
    level: AtomicU8::new(Level::Info as u8),
    state: Mutex::new(State {
        id: String::new(),
        file: None,
        show_level: false,
        show_origin: false,
        module: String::new(),
    }),
};

/// Messages of this process go to the log from now on: to the standard error output, until [`configure`] says otherwise.
pub fn start(id: &str) {
    state().id = id.to_owned();
    // It fails when there is one already, which is this one.
    let _ = tracing::subscriber::set_global_default(&LOG);
}

/// Changes the log and gives the descriptor that it is written to, which stays open.
///
/// # Errors
/// When the file cannot be opened; nothing changes then.
pub fn configure(settings: &Settings) -> io::Result<RawFd> {
    let file = settings.log_path.as_deref().map(open).transpose()?;
    let mut state = state();
    if let Some(file) = file {
        // The descriptor of an earlier file may be in the hands of a signal handler.
        std::mem::forget(state.file.replace(file));
    }
    state.show_level = settings.show_level.unwrap_or(state.show_level);
    state.show_origin = settings.show_log_origin.unwrap_or(state.show_origin);
    if let Some(module) = &settings.module {
        state.module.clone_from(module);
    }
    if let Some(level) = settings.level {
        LOG.level.store(level as u8, Ordering::Relaxed);
    }
    Ok(state.file.as_ref().map_or(libc::STDERR_FILENO, AsRawFd::as_raw_fd))
}

fn state() -> std::sync::MutexGuard<'static, State> {
    LOG.state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Subscriber for &'static Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && Level::of(*metadata.level()) as u8 <= self.level.load(Ordering::Relaxed)
    }

    // Levels change while the process runs, so no answer holds for good.
    fn register_callsite(&self, _: &'static Metadata<'static>) -> tracing::subscriber::Interest {
        tracing::subscriber::Interest::sometimes()
    }

    fn event(&self, event: &Event<'_>) {
        let state = state();
        if !event.metadata().module_path().unwrap_or_default().starts_with(&state.module) {
            return;
        }
        let line = state.line(event);
        // A log that cannot be written to is no reason to do anything else.
        let _ = match &state.file {
            Some(file) => (&mut &*file).write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
    }

    // Spans are not used.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

impl State {
    fn line(&self, event: &Event<'_>) -> String {
        let metadata = event.metadata();
        let mut line = String::with_capacity(160);
        // Writing to a string does not fail.
        let _ = write!(line, "{} [{}", Time(SystemTime::now()), self.id);
        let _ = write!(line, ":{}", std::thread::current().name().unwrap_or("-"));
        if self.show_level {
            let _ = write!(line, ":{}", metadata.level());
        }
        if self.show_origin {
            let (file, number) = (metadata.file().unwrap_or("?"), metadata.line().unwrap_or(0));
            let _ = write!(line, ":{file}:{number}");
        }
        line.push(']');
        event.record(&mut Fields(&mut line));
        line.push('\n');
        line
    }
}

/// The message, then the other fields.
struct Fields<'a>(&'a mut String);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Line breaks in a value would look like other messages.
        let text = match field.name() {
            "message" => format!(" {value:?}"),
            name => format!(" {name}={value:?}"),
        };
        self.0.push_str(&text.replace(['\n', '\r'], " "));
    }
}

/// Shown as `2026-11-24T10:35:56.123456789`.
struct Time(SystemTime);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not by the C library, which reads files about time zones even for UTC. The zone is not shown.
        let text = humantime::format_rfc3339_nanos(self.0.max(UNIX_EPOCH)).to_string();
        f.write_str(text.trim_end_matches('Z'))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_written_in_full() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000007"),
            (951_782_399, "2000-02-28T23:59:59.000000007"),
            (1_709_210_096, "2024-02-29T12:34:56.000000007"),
            (4_107_542_400, "2100-03-01T00:00:00.000000007"),
        ] {
            assert_eq!(Time(UNIX_EPOCH + Duration::new(seconds, 7)).to_string(), text);
        }
    }

    #[test]
    fn levels_have_any_case_and_the_short_name_too() {
        for (name, level) in [("INFO", Level::Info), ("Warning", Level::Warning), ("warn", Level::Warning)] {
            assert_eq!(name.parse(), Ok(level));
        }
        assert!("loud".parse::<Level>().is_err());
        let settings: Settings = serde_json::from_str(r#"{"level": "Debug", "show_level": true}"#).unwrap();
        assert_eq!((settings.level, settings.show_level), (Some(Level::Debug), Some(true)));
    }

    // One test, because there is one log.
    #[test]
    fn lines_have_what_was_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        start("the-id");
        let settings = Settings {
            log_path: Some(path.clone()),
            level: Some(Level::Info),
            show_level: Some(true),
            show_log_origin: Some(true),
            module: Some("kapsel_vmm::log".into()),
        };
        configure(&settings).unwrap();
        tracing::info!(count = 3, "one\nline");
        tracing::debug!("not this one");
        tracing::info!(target: "x", "targets do not matter");
        configure(&Settings { module: Some("elsewhere".into()), ..Settings::default() }).unwrap();
        tracing::error!("nor this one");
        let missing = Settings { log_path: Some("/nonexistent/log".into()), ..Settings::default() };
        assert!(configure(&missing).is_err());
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(
            lines[0].contains(" [the-id:") && lines[0].contains(":INFO:crates/vmm/src/log.rs:"),
            "{text}"
        );
        assert!(lines[0].ends_with("] one line count=3"), "{text}");
    }
}
