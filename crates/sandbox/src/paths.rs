//! Where kapsel keeps things, and how sandboxes are called.
//!
//! Two roots: *state* (gone after a reboot: sandboxes that run or ran) and *data* (images, kernels, templates).

use std::{
    fmt, fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// The longest path that fits a Unix socket address, without its NUL (`sun_path`, unix(7)).
const SOCKET_PATH_MAX: usize = 107;
/// The longest name below a bundle that becomes a socket.
const LONGEST_SOCKET: &str = "/m/fsd-00.sock";

/// Why the directories cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither `--root` nor the environment says where to keep things.
    #[error(
        "cannot tell where to keep {what}: neither {variable} nor HOME is set; set one of them or use --root DIR"
    )]
    Nowhere {
        /// `state` or `data`.
        what: &'static str,
        /// The XDG variable that is missing.
        variable: &'static str,
    },
    /// Sockets would not fit into `sun_path`.
    #[error("the state directory {0} is too long for Unix sockets (at most {max} bytes); choose a shorter --root", max = SOCKET_PATH_MAX - 28 - LONGEST_SOCKET.len())]
    TooLong(PathBuf),
    /// A directory belongs to somebody else or is open to others.
    #[error("{path} {problem}; kapsel does not trust it: remove it or choose another --root")]
    Untrusted {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Making or reading a directory failed.
    #[error("cannot prepare directory {path}: {source}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Not an identity.
    #[error("{0:?} is no sandbox id: expected 64 hexadecimal digits")]
    BadId(String),
}

/// The directories of one installation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    data: PathBuf,
    state: PathBuf,
}

impl Paths {
    /// Finds the directories: below `root` when it is given, else where the system keeps such things
    /// (`/var/lib/kapsel` and `/run/kapsel` for root, the XDG directories for others).
    ///
    /// # Errors
    /// When there is no place, or its path is too long for the sockets in it.
    pub fn discover(root: Option<&Path>) -> Result<Self, Error> {
        let env = |name: &'static str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let paths = match root {
            Some(root) => {
                let root =
                    std::path::absolute(root).map_err(|source| Error::Io { path: root.into(), source })?;
                Self { state: root.join("run"), data: root }
            }
            None if rustix::process::geteuid().is_root() => {
                Self { data: "/var/lib/kapsel".into(), state: "/run/kapsel".into() }
            }
            None => Self {
                data: env("XDG_DATA_HOME")
                    .or_else(|| Some(env("HOME")?.join(".local/share")))
                    .ok_or(Error::Nowhere { what: "data", variable: "XDG_DATA_HOME" })?
                    .join("kapsel"),
                state: env("XDG_RUNTIME_DIR")
                    .or_else(|| Some(env("HOME")?.join(".cache/run")))
                    .ok_or(Error::Nowhere { what: "state", variable: "XDG_RUNTIME_DIR" })?
                    .join("kapsel"),
            },
        };
        let longest = paths.sandboxes().as_os_str().len() + 1 + Id::SHORT + LONGEST_SOCKET.len() + "/".len();
        if longest > SOCKET_PATH_MAX {
            return Err(Error::TooLong(paths.state));
        }
        Ok(paths)
    }

    /// Creates both roots and the folders in them, mode 0700.
    ///
    /// # Errors
    /// When a directory cannot be made, is not ours, or is writable for others.
    pub fn prepare(&self) -> Result<(), Error> {
        let folders = [self.sandboxes(), self.names(), self.standbys(), self.templates(), self.engines()];
        for dir in [&self.data, &self.state].into_iter().chain(&folders) {
            private_dir(dir)?;
        }
        Ok(())
    }

    /// Durable data.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// State that a reboot may clear.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The OCI layout with its root file systems (`kapsel-image`).
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// Templates by key.
    pub fn templates(&self) -> PathBuf {
        self.data.join("templates")
    }

    /// The scratch disk of the sandbox with this short id, while it is on its way to the machine.
    pub fn scratch_disk(&self, short: &str) -> PathBuf {
        self.data.join("scratch").join(format!("{short}.img"))
    }

    /// Compiled seccomp filters by hash.
    pub fn seccomp_cache(&self) -> PathBuf {
        self.data.join("seccomp")
    }

    /// All bundles.
    pub fn sandboxes(&self) -> PathBuf {
        self.state.join("sandboxes")
    }

    /// One symbolic link per name in use, to the short id.
    pub fn names(&self) -> PathBuf {
        self.state.join("names")
    }

    /// One file for each [machine that stands by](crate::standby).
    pub fn standbys(&self) -> PathBuf {
        self.state.join("standby")
    }

    fn engines(&self) -> PathBuf {
        self.state.join("engines")
    }

    /// Where the shim listens that an engine started for a container or pod, which it names by several words.
    pub fn engine_socket(&self, name: &[&str]) -> PathBuf {
        use sha2::{Digest, Sha256};
        let mut hash = Sha256::new();
        name.iter().for_each(|word| hash.update(format!("{}:{word}", word.len())));
        self.engines().join(format!("{}.sock", &hex::encode(hash.finalize())[..32]))
    }

    /// The bundle of one sandbox.
    pub fn bundle(&self, id: &Id) -> Bundle {
        Bundle(self.sandboxes().join(id.short()))
    }
}

/// Creates `dir` (and what is above it) for us alone, or checks that it is so.
pub(crate) fn private_dir(dir: &Path) -> Result<(), Error> {
    let io = |source| Error::Io { path: dir.into(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
    let meta = fs::symlink_metadata(dir).map_err(io)?;
    let untrusted = |problem: String| Error::Untrusted { path: dir.into(), problem };
    let us = rustix::process::geteuid().as_raw();
    if !meta.is_dir() {
        return Err(untrusted("is not a directory".into()));
    }
    if meta.uid() != us {
        return Err(untrusted(format!("belongs to user {}, not to {us}", meta.uid())));
    }
    if meta.permissions().mode() & 0o022 != 0 {
        return Err(untrusted("can be written by others".into()));
    }
    Ok(())
}

/// A sandbox's identity: 64 hexadecimal digits, shown as 12.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(String);

impl Id {
    /// How many digits people see; also the name of the directory.
    pub const SHORT: usize = 12;

    /// A new random identity.
    ///
    /// # Panics
    /// Never on Linux ≥ 3.17: getrandom(2) without flags does not fail for 32 bytes.
    #[must_use]
    pub fn random() -> Self {
        Self(hex::encode(random_bytes::<32>()))
    }

    /// The first [`Id::SHORT`] digits.
    pub fn short(&self) -> &str {
        &self.0[..Self::SHORT]
    }

    /// All digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// `N` bytes from the kernel's generator.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0u8; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            // No identity or key may ever be predictable: stopping is the only safe answer.
            Err(e) => panic!("the kernel gives no random numbers: {e}"),
        }
    }
    bytes
}

impl FromStr for Id {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        let digits = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        if s.len() == 64 && s.bytes().all(digits) { Ok(Self(s.into())) } else { Err(Error::BadId(s.into())) }
    }
}

impl TryFrom<String> for Id {
    type Error = Error;

    fn try_from(s: String) -> Result<Self, Error> {
        s.parse()
    }
}

impl From<Id> for String {
    fn from(id: Id) -> String {
        id.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A bundle directory: what is known of one sandbox while it exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle(PathBuf);

impl Bundle {
    /// A bundle at a path that somebody else chose (containerd).
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// The OCI runtime spec.
    pub fn spec(&self) -> PathBuf {
        self.0.join("config.json")
    }

    /// The sandbox's [record](crate::record::Record).
    pub fn record(&self) -> PathBuf {
        self.0.join("sandbox.json")
    }

    /// The Task API.
    pub fn shim_socket(&self) -> PathBuf {
        self.0.join("shim.sock")
    }

    /// The shim's pid; locked as long as the shim lives.
    pub fn shim_pid(&self) -> PathBuf {
        self.0.join("shim.pid")
    }

    /// What the shim has to say.
    pub fn shim_log(&self) -> PathBuf {
        self.0.join("shim.log")
    }

    /// What the guest's kernel and agent print.
    pub fn console_log(&self) -> PathBuf {
        self.0.join("console.log")
    }

    /// What the container printed ([format](crate::logs)).
    pub fn output_log(&self) -> PathBuf {
        self.0.join("output.log")
    }

    /// Streams to and from the container's processes ([protocol](crate::attach)).
    pub fn attach_socket(&self) -> PathBuf {
        self.0.join("attach.sock")
    }

    /// Where a machine that [stands by](crate::standby) is taken.
    pub fn standby_socket(&self) -> PathBuf {
        self.0.join("standby.sock")
    }

    /// The start's phases ([`crate::timings`]).
    pub fn timings(&self) -> PathBuf {
        self.0.join("timings.json")
    }

    /// What must be undone in a network namespace ([`kapsel_network::release`]).
    pub fn network(&self) -> PathBuf {
        self.0.join("network.json")
    }

    /// What a pod's containers share with the host ([`crate::life`]).
    pub fn pod_dir(&self) -> PathBuf {
        self.0.join("pod")
    }

    /// The monitor's and fsd's directory: their sockets.
    pub fn machine_dir(&self) -> PathBuf {
        self.0.join("m")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_holds_both() {
        let paths = Paths::discover(Some(Path::new("/x"))).unwrap();
        assert_eq!(paths.data(), Path::new("/x"));
        assert_eq!(paths.sandboxes(), Path::new("/x/run/sandboxes"));
    }

    #[test]
    fn a_root_too_long_for_sockets_is_refused_early() {
        let long = format!("/{}", "x".repeat(80));
        let error = Paths::discover(Some(Path::new(&long))).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }

    #[test]
    fn ids_are_64_lower_hex_digits() {
        let id = Id::random();
        assert_eq!(id.as_str().parse::<Id>().unwrap(), id);
        assert_ne!(id, Id::random());
        for bad in ["", "abc", &"g".repeat(64), &"A".repeat(64), &"a".repeat(65)] {
            assert!(bad.parse::<Id>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_directory_open_to_others_is_not_trusted() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("d");
        private_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(private_dir(&dir), Err(Error::Untrusted { .. })));
    }
}
