//! Where the serial console's output goes.

use std::io::{self, Write};
use std::path::PathBuf;

use kapsel_devices::rate::{Limit, Meter};
use serde::Deserialize;

use crate::config::TokenBucket;
use crate::log;

/// What can be said about the serial console before the start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// A file or a FIFO for what the guest writes; the monitor's standard output if there is none.
    pub serial_out_path: Option<PathBuf>,
    /// How many bytes pass; what is too much is lost.
    pub rate_limiter: Option<TokenBucket>,
}

/// The output of a serial console.
pub struct Output {
    sink: Box<dyn Write + Send>,
    meter: Option<Meter>,
    dropped: u64,
}

impl Output {
    /// The output as the settings say.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(settings: &Settings) -> io::Result<Self> {
        let sink: Box<dyn Write + Send> = match &settings.serial_out_path {
            Some(path) => Box::new(log::open(path)?),
            None => Box::new(io::stdout()),
        };
        let meter = settings.rate_limiter.and_then(|bucket| Meter::new(Limit::from(bucket)));
        Ok(Output { sink, meter, dropped: 0 })
    }

    /// An output that goes nowhere.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn nowhere() -> Self {
        Output { sink: Box::new(io::sink()), meter: None, dropped: 0 }
    }

    /// How many bytes were lost because they were too many.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.meter.as_mut().is_none_or(|meter| meter.takes(bytes.len() as u64)) {
            return self.sink.write(bytes);
        }
        self.dropped += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_bucket_has_no_room_for_is_lost_and_counted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "before ").unwrap();
        let bucket = TokenBucket { size: 4, one_time_burst: Some(2), refill_time: 3_600_000 };
        let settings = Settings { serial_out_path: Some(file.path().into()), rate_limiter: Some(bucket) };
        let mut output = Output::open(&settings).unwrap();
        for byte in b"abcdefgh" {
            assert_eq!(output.write(&[*byte]).unwrap(), 1);
        }
        assert_eq!(output.dropped(), 2);
        assert_eq!(std::fs::read(file.path()).unwrap(), b"before abcdef");
        let missing = Settings { serial_out_path: Some("/nonexistent/file".into()), rate_limiter: None };
        assert!(Output::open(&missing).is_err());
    }

    #[test]
    fn a_pipe_that_nobody_reads_holds_nothing_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let settings = Settings { serial_out_path: Some(path), rate_limiter: None };
        let mut output = Output::open(&settings).unwrap();
        let page = [b'x'; 4096];
        let full = (0..1000).find_map(|_| output.write(&page).err());
        assert_eq!(full.unwrap().kind(), io::ErrorKind::WouldBlock);
    }
}
