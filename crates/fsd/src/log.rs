//! Messages go to standard error, which kapsel keeps in the sandbox's log. A guest can cause them by the million (every malformed request
//! is one), so that there is an end to them.

use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

use ::log::{LevelFilter, Log, Metadata, Record};

/// Messages in the life of the process.
const MAX_MESSAGES: u32 = 200;

struct Limited {
    count: AtomicU32,
}

impl Log for Limited {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= LevelFilter::Warn
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // Saturating, so that it does not start again after 2^32.
        let before = self
            .count
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| Some(n.saturating_add(1)))
            .unwrap_or(u32::MAX);
        match before {
            0..MAX_MESSAGES => line(*record.args()),
            MAX_MESSAGES => line(format_args!("no further messages: there have been {MAX_MESSAGES}")),
            _ => {}
        }
    }

    fn flush(&self) {}
}

/// Writes one line. Nobody may be reading any more, which is no reason to fail.
pub fn line(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "kapsel-fsd: {text}");
}

/// Installs the logger.
pub fn init() {
    static LOGGER: Limited = Limited { count: AtomicU32::new(0) };
    if ::log::set_logger(&LOGGER).is_ok() {
        ::log::set_max_level(LevelFilter::Warn);
    }
}
