//! One small configuration: defaults, files, environment and flags, in this order of strength.
//!
//! Files: `/etc/kapsel/config.toml`, then `/etc/kapsel/config.d/*.toml` in the order of their names, then the same
//! two below `$XDG_CONFIG_HOME/kapsel` for users who are not root. `--config FILE` (or `KAPSEL_CONFIG`) replaces them
//! all by `FILE` and `FILE`'s neighbour `config.d/`. Each key can be set by `KAPSEL_<KEY>` too.

mod key;
mod value;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

pub use key::Key;
use serde::Serialize;
pub(crate) use value::MIN_MEMORY;
pub use value::{Isolation, format_size, parse_size};

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file is not TOML.
    #[error("{path} is not valid TOML: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's words, with the line.
        message: String,
    },
    /// A key that does not exist.
    #[error("{origin}: unknown key {key:?}; did you mean {nearest:?}? (`kapsel config` lists all keys)")]
    UnknownKey {
        /// Where it was set.
        origin: Origin,
        /// The key.
        key: String,
        /// The known key that looks most like it.
        nearest: &'static str,
    },
    /// A value that does not fit its key.
    #[error("{origin}: {key} = {value:?} is not valid: {expected}")]
    BadValue {
        /// Where it was set.
        origin: Origin,
        /// The key.
        key: &'static str,
        /// What was found.
        value: String,
        /// What is accepted.
        expected: String,
    },
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "kind", content = "at")]
pub enum Origin {
    /// Built in.
    Default,
    /// A configuration file.
    File(PathBuf),
    /// An environment variable.
    Environment(String),
    /// The command line.
    Flag,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => path.display().fmt(f),
            Self::Environment(name) => f.write_str(name),
            Self::Flag => f.write_str("command line"),
        }
    }
}

/// One line of `kapsel config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// The key as in the file.
    pub key: &'static str,
    /// The value in force.
    pub value: String,
    /// Who set it.
    pub origin: Origin,
    /// What it does.
    pub help: &'static str,
}

/// The configuration in force. Every value was checked when it was set.
#[derive(Clone, Debug)]
pub struct Config {
    values: BTreeMap<Key, (String, Origin)>,
}

impl Default for Config {
    fn default() -> Self {
        let values =
            Key::ALL.iter().map(|&key| (key, (key.default_value().to_owned(), Origin::Default))).collect();
        Self { values }
    }
}

impl Config {
    /// Reads what is in force here. `file` is what `--config` gave.
    ///
    /// # Errors
    /// Unreadable files, unknown keys, values that do not fit: each names its place.
    pub fn load(file: Option<&Path>) -> Result<Self, Error> {
        let mut config = Self::default();
        let env_file = std::env::var_os("KAPSEL_CONFIG").filter(|v| !v.is_empty()).map(PathBuf::from);
        match file.map(Path::to_owned).or(env_file) {
            Some(file) => {
                config.add_file(&file, true)?;
                config.add_drop_ins(&file.with_file_name("config.d"))?;
            }
            None => {
                for dir in standard_dirs() {
                    config.add_file(&dir.join("config.toml"), false)?;
                    config.add_drop_ins(&dir.join("config.d"))?;
                }
            }
        }
        config.add_environment(std::env::vars_os())?;
        Ok(config)
    }

    fn add_drop_ins(&mut self, dir: &Path) -> Result<(), Error> {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(Error::Read { path: dir.into(), source }),
        };
        let mut files = entries
            .map(|entry| entry.map(|e| e.path()))
            .collect::<io::Result<Vec<_>>>()
            .map_err(|source| Error::Read { path: dir.into(), source })?;
        files.retain(|path| path.extension().is_some_and(|ext| ext == "toml"));
        files.sort();
        files.iter().try_for_each(|file| self.add_file(file, true))
    }

    fn add_file(&mut self, path: &Path, must_exist: bool) -> Result<(), Error> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound && !must_exist => return Ok(()),
            Err(source) => return Err(Error::Read { path: path.into(), source }),
        };
        self.add_toml(&text, path)
    }

    fn add_toml(&mut self, text: &str, path: &Path) -> Result<(), Error> {
        let table: toml::Table = text
            .parse()
            .map_err(|e: toml::de::Error| Error::Syntax { path: path.into(), message: e.to_string() })?;
        for (name, value) in table {
            let text = match value {
                toml::Value::String(s) => s,
                toml::Value::Array(items) => items
                    .into_iter()
                    .map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned))
                    .collect::<Vec<_>>()
                    .join(","),
                other => other.to_string(),
            };
            self.set_named(&name, text, Origin::File(path.into()))?;
        }
        Ok(())
    }

    fn add_environment(
        &mut self,
        vars: impl Iterator<Item = (std::ffi::OsString, std::ffi::OsString)>,
    ) -> Result<(), Error> {
        for (name, value) in vars {
            let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else { continue };
            // Other KAPSEL_ variables belong to the build, the tests or the command line: only keys count here.
            let key = name.strip_prefix("KAPSEL_").and_then(|rest| Key::parse(&rest.to_ascii_lowercase()));
            if let Some(key) = key {
                self.set(key, value.to_owned(), Origin::Environment(name.to_owned()))?;
            }
        }
        Ok(())
    }

    fn set_named(&mut self, name: &str, value: String, origin: Origin) -> Result<(), Error> {
        match Key::parse(name) {
            Some(key) => self.set(key, value, origin),
            None => Err(Error::UnknownKey { origin, key: name.into(), nearest: Key::nearest(name) }),
        }
    }

    /// Sets one value, as a flag of the command line does.
    ///
    /// # Errors
    /// When the value does not fit the key.
    pub fn set(&mut self, key: Key, value: String, origin: Origin) -> Result<(), Error> {
        if let Err(expected) = key.check(&value) {
            return Err(Error::BadValue { origin, key: key.name(), value, expected });
        }
        self.values.insert(key, (value, origin));
        Ok(())
    }

    /// All keys with their values and where these came from, in the order of the documentation.
    pub fn effective(&self) -> Vec<Setting> {
        Key::ALL
            .iter()
            .map(|&key| {
                let (value, origin) = &self.values[&key];
                Setting { key: key.name(), value: value.clone(), origin: origin.clone(), help: key.help() }
            })
            .collect()
    }

    fn text(&self, key: Key) -> &str {
        &self.values[&key].0
    }

    fn path(&self, key: Key) -> Option<PathBuf> {
        Some(self.text(key)).filter(|text| !text.is_empty()).map(PathBuf::from)
    }

    /// Parses what [`Key::check`] accepted when it was set.
    fn size(&self, key: Key) -> u64 {
        parse_size(self.text(key)).unwrap_or_default()
    }

    fn number<T: std::str::FromStr + Default>(&self, key: Key) -> T {
        self.text(key).parse().unwrap_or_default()
    }

    /// Which machine to use.
    pub fn isolation(&self) -> Isolation {
        self.text(Key::Isolation).parse().unwrap_or_default()
    }

    /// A sandbox's memory in bytes when `--memory` does not say.
    pub fn memory(&self) -> u64 {
        self.size(Key::Memory)
    }

    /// A sandbox's virtual CPUs when `--cpus` does not say.
    pub fn cpus(&self) -> u32 {
        self.number(Key::Cpus)
    }

    /// Another kernel than Debian's.
    pub fn kernel(&self) -> Option<PathBuf> {
        self.path(Key::Kernel)
    }

    /// More words for the kernel's command line.
    pub fn kernel_args(&self) -> &str {
        self.text(Key::KernelArgs)
    }

    /// The QEMU program, a name in `PATH` or a path; `None`: the best that is installed.
    pub fn qemu(&self) -> Option<PathBuf> {
        self.path(Key::Qemu)
    }

    /// Where `containerd-shim-kapsel-v2`, `kapsel-fsd` and `kapsel-agent` are, when not beside `kapsel`.
    pub fn libexec(&self) -> Option<PathBuf> {
        self.path(Key::Libexec)
    }

    /// Whether sandboxes start from templates.
    pub fn templates(&self) -> bool {
        self.text(Key::Templates) == "true"
    }

    /// How many machines [stand by](crate::standby) at most.
    pub fn standby(&self) -> usize {
        self.number(Key::Standby)
    }

    /// At most this many processes in a container; 0 = no limit.
    pub fn pids_limit(&self) -> i64 {
        self.number(Key::PidsLimit)
    }

    /// `default`, `unconfined` or a file.
    pub fn seccomp(&self) -> &str {
        self.text(Key::Seccomp)
    }

    /// The most bytes that a container's output log takes on disk.
    pub fn log_size(&self) -> u64 {
        self.size(Key::LogSize)
    }

    /// Seconds for a machine to start and its agent to answer.
    pub fn start_timeout(&self) -> std::time::Duration {
        std::time::Duration::from_secs(self.number(Key::StartTimeout))
    }

    /// Seconds between a container's stop signal and SIGKILL.
    pub fn stop_timeout(&self) -> std::time::Duration {
        std::time::Duration::from_secs(self.number(Key::StopTimeout))
    }

    /// When `run` pulls: `missing`, `always` or `never`.
    pub fn pull(&self) -> &str {
        self.text(Key::Pull)
    }

    /// Which of kapsel's annotations an engine may set, without their prefix.
    pub fn engine_annotations(&self) -> impl Iterator<Item = &str> {
        list(self.text(Key::EngineAnnotations))
    }

    /// The network of kapsel's bridge.
    ///
    /// # Panics
    /// Never: the value was checked when it was set.
    pub fn bridge_subnet(&self) -> kapsel_network::bridge::Subnet {
        self.text(Key::BridgeSubnet).parse().expect("checked when it was set")
    }

    /// What goes to the log: a `tracing` filter.
    pub fn log_level(&self) -> &str {
        self.text(Key::LogLevel)
    }
}

/// The items of a value that is a list.
fn list(value: &str) -> impl Iterator<Item = &str> {
    value.split(',').map(str::trim).filter(|item| !item.is_empty())
}

fn standard_dirs() -> Vec<PathBuf> {
    let mut dirs = vec![PathBuf::from("/etc/kapsel")];
    if !rustix::process::geteuid().is_root() {
        let home = std::env::var_os("XDG_CONFIG_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".config")));
        dirs.extend(home.map(|dir| dir.join("kapsel")));
    }
    dirs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, Error> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        fs::write(&file, text).unwrap();
        let mut config = Config::default();
        config.add_file(&file, true)?;
        config.add_drop_ins(&dir.path().join("config.d"))?;
        Ok(config)
    }

    #[test]
    fn every_default_is_valid_and_there_are_at_most_twenty_keys() {
        assert!(Key::ALL.len() <= 20);
        for key in Key::ALL {
            key.check(key.default_value()).unwrap_or_else(|e| panic!("{}: {e}", key.name()));
        }
    }

    #[test]
    fn unknown_key_names_the_nearest() {
        let error = load("memroy = \"1G\"").unwrap_err().to_string();
        assert!(error.contains("\"memroy\"") && error.contains("\"memory\""), "{error}");
    }

    #[test]
    fn bad_values_say_what_is_accepted() {
        for (text, word) in [
            ("memory = \"lots\"", "256M"),
            ("memory = \"1M\"", "at least"),
            ("cpus = 0", "1 to"),
            ("isolation = \"chroot\"", "auto"),
            ("templates = \"perhaps\"", "true or false"),
            ("bridge_subnet = \"10.0.0.0/8\"", "10.213.0.0/22"),
            ("pull = \"daily\"", "missing"),
            ("engine_annotations = [\"memory\", \"colour\"]", "stop-signal"),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn broken_toml_names_file_and_line() {
        let error = load("memory = ").unwrap_err().to_string();
        assert!(error.contains("config.toml") && error.contains("line 1"), "{error}");
    }

    #[test]
    fn later_drop_ins_win_and_the_origin_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let drop_ins = dir.path().join("config.d");
        fs::create_dir(&drop_ins).unwrap();
        fs::write(drop_ins.join("20-b.toml"), "cpus = 4").unwrap();
        fs::write(drop_ins.join("10-a.toml"), "cpus = 2\nmemory = \"1G\"").unwrap();
        fs::write(drop_ins.join("README"), "not toml").unwrap();
        let mut config = Config::default();
        config.add_drop_ins(&drop_ins).unwrap();
        assert_eq!((config.cpus(), config.memory()), (4, 1 << 30));
        let effective = config.effective();
        let cpus = effective.iter().find(|s| s.key == "cpus").unwrap();
        assert_eq!(cpus.origin, Origin::File(drop_ins.join("20-b.toml")));
    }

    #[test]
    fn environment_beats_files_and_unrelated_variables_do_not_matter() {
        let mut config = load("cpus = 2").unwrap();
        let vars = [("KAPSEL_CPUS", "3"), ("KAPSEL_KERNEL_SOURCE", "x"), ("PATH", "/bin")];
        config.add_environment(vars.iter().map(|(k, v)| (k.into(), v.into()))).unwrap();
        assert_eq!(config.cpus(), 3);
        let bad = [("KAPSEL_CPUS", "many")];
        let error = config.add_environment(bad.iter().map(|(k, v)| (k.into(), v.into()))).unwrap_err();
        assert!(error.to_string().starts_with("KAPSEL_CPUS:"), "{error}");
    }
}
