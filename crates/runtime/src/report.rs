//! Errors as engines find them: in the file that `--log` names, in runc's form, and on standard error.

use std::{fs::OpenOptions, io::Write, os::unix::fs::OpenOptionsExt, path::PathBuf, time::SystemTime};

use crate::args::{Global, LogFormat};

/// Where to report to.
#[derive(Clone, Debug)]
pub struct Report {
    file: Option<PathBuf>,
    format: LogFormat,
    debug: bool,
}

impl Report {
    /// What the global flags say.
    pub fn new(global: &Global) -> Self {
        Self { file: global.log.clone(), format: global.log_format, debug: global.debug }
    }

    /// Something failed.
    pub fn error(&self, message: &str) {
        self.log("error", message);
        eprintln!("{message}");
    }

    /// Something is not as it was asked for, which does not keep the container from running.
    pub fn warn(&self, message: &str) {
        self.log("warning", message);
    }

    /// What is done, with `--debug`.
    pub fn debug(&self, message: &str) {
        if self.debug {
            self.log("debug", message);
        }
    }

    /// A log that cannot be written must not keep a container from being killed or removed: standard error has it all.
    fn log(&self, level: &str, message: &str) {
        let Some(path) = &self.file else { return };
        let line = line(self.format, level, message, SystemTime::now());
        let file = OpenOptions::new().create(true).append(true).mode(0o644).open(path);
        if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
            eprintln!("cannot write to log {}: {error}", path.display());
        }
    }
}

fn line(format: LogFormat, level: &str, message: &str, at: SystemTime) -> String {
    let time = humantime::format_rfc3339_seconds(at);
    match format {
        LogFormat::Json => {
            let time = time.to_string();
            format!("{}\n", serde_json::json!({ "level": level, "msg": message, "time": time }))
        }
        // A string of JSON is one of Go's too.
        LogFormat::Text => format!("time=\"{time}\" level={level} msg={}\n", serde_json::json!(message)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_runcs() {
        let at = SystemTime::UNIX_EPOCH;
        assert_eq!(
            line(LogFormat::Text, "error", "no \"x\"", at),
            "time=\"1970-01-01T00:00:00Z\" level=error msg=\"no \\\"x\\\"\"\n"
        );
        let json: serde_json::Value =
            serde_json::from_str(&line(LogFormat::Json, "error", "a\nb", at)).unwrap();
        assert_eq!((json["level"].as_str(), json["msg"].as_str()), (Some("error"), Some("a\nb")));
    }
}
