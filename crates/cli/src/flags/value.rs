//! The values that flags take: parsed and checked here, so that a command only ever sees sound ones.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// An amount of bytes, as people write it: `512m`, `1g`, `1.5GiB`, `1048576`.
///
/// Units are powers of 1024, as Docker's: `b`, `k`, `m`, `g`, `t`, each also with `b` or `ib` after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
        let (number, unit) = lower.split_at(digits);
        let shift = match unit.trim() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            other => return Err(format!("unknown unit '{other}'; write for example 512m or 2g")),
        };
        let bad = || format!("'{text}' is no amount of bytes; write for example 512m or 2g");
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(1 << shift).map(Bytes).ok_or_else(bad);
        }
        let amount = number.parse::<f64>().map_err(|_| bad())? * (1u64 << shift) as f64;
        // 2^53: above it a fraction of a byte is not what anybody means.
        if !amount.is_finite() || amount >= 9_007_199_254_740_992.0 {
            return Err(bad());
        }
        Ok(Bytes(amount as u64))
    }
}

/// A number of CPUs in thousandths: `--cpus 1.5` is 1500.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus(pub u32);

impl Cpus {
    /// The most CPUs that can be asked for.
    pub const MOST: u32 = 256;

    /// Virtual CPUs that the machine needs for this: rounded up, at least one.
    pub fn whole(self) -> u32 {
        self.0.div_ceil(1000).max(1)
    }
}

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number: f64 = text.trim().parse().map_err(|_| format!("'{text}' is no number of CPUs"))?;
        if !(0.01..=f64::from(Self::MOST)).contains(&number) {
            return Err(format!("CPUs must be from 0.01 to {}", Self::MOST));
        }
        Ok(Cpus((number * 1000.0).round() as u32))
    }
}

/// `SRC:DST[:ro|rw]`: a file or directory of the host at a place in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// On the host; made absolute against the current directory, not yet checked to exist.
    pub source: PathBuf,
    /// In the container; absolute.
    pub destination: PathBuf,
    /// The container cannot write there.
    pub read_only: bool,
}

impl FromStr for Volume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let (source, destination, mode) = match parts[..] {
            [source, destination] => (source, destination, "rw"),
            [source, destination, mode] => (source, destination, mode),
            _ => return Err("write SRC:DST or SRC:DST:ro".into()),
        };
        let read_only = match mode {
            "ro" => true,
            "rw" => false,
            other => return Err(format!("unknown mode '{other}'; it is ro or rw")),
        };
        if !destination.starts_with('/') || destination.len() == 1 {
            return Err(format!(
                "'{destination}' must be an absolute path in the container, and not / itself"
            ));
        }
        if !source.starts_with('/') && !source.starts_with('.') {
            return Err(format!(
                "there are no named volumes; for the directory '{source}' here write ./{source}:{destination}"
            ));
        }
        let source = std::path::absolute(source).map_err(|error| format!("'{source}': {error}"))?;
        Ok(Volume { source, destination: destination.into(), read_only })
    }
}

/// `DST[:OPTIONS]`: a file system in memory at a place in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tmpfs {
    /// In the container; absolute.
    pub destination: PathBuf,
    /// Mount options as `mount -t tmpfs -o` takes them, such as `size=64m`, `mode=1777`.
    pub options: Vec<String>,
}

impl FromStr for Tmpfs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (destination, options) = text.split_once(':').unwrap_or((text, ""));
        if !destination.starts_with('/') || destination.len() == 1 {
            return Err(format!(
                "'{destination}' must be an absolute path in the container, and not / itself"
            ));
        }
        let options: Vec<String> = options.split(',').filter(|o| !o.is_empty()).map(str::to_owned).collect();
        for option in &options {
            let name = option.split('=').next().unwrap_or(option);
            let known = [
                "ro",
                "rw",
                "exec",
                "noexec",
                "suid",
                "nosuid",
                "dev",
                "nodev",
                "size",
                "mode",
                "uid",
                "gid",
                "nr_inodes",
                "nr_blocks",
            ];
            if !known.contains(&name) {
                return Err(format!("unknown tmpfs option '{name}'; known are {}", known.join(", ")));
            }
        }
        Ok(Tmpfs { destination: destination.into(), options })
    }
}

/// `KEY=VALUE`, or `KEY` alone: then the value is the one in kapsel's own environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvVar {
    /// The variable's name: not empty, without `=`.
    pub key: String,
    /// `None`: take it from kapsel's own environment, and leave it out where it is not there either.
    pub value: Option<String>,
}

impl EnvVar {
    /// `KEY=VALUE` for the container; `None` when only a name was given and the host has no such variable.
    pub fn resolve(&self) -> Option<String> {
        let value = self.value.clone().or_else(|| std::env::var(&self.key).ok())?;
        Some(format!("{}={value}", self.key))
    }
}

impl FromStr for EnvVar {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (text, None),
        };
        if key.is_empty() {
            return Err("the name of the variable is empty; write KEY=VALUE or KEY".into());
        }
        Ok(EnvVar { key: key.to_owned(), value })
    }
}

/// `NAME=VALUE`, or `NAME` alone for an empty value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Not empty.
    pub key: String,
    /// May be empty.
    pub value: String,
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        if key.is_empty() {
            return Err("the name of the label is empty; write NAME=VALUE".into());
        }
        Ok(Label { key: key.to_owned(), value: value.to_owned() })
    }
}

/// `TYPE=SOFT[:HARD]`, such as `nofile=1024:4096`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ulimit {
    /// As the OCI specification names it: `RLIMIT_NOFILE`.
    pub name: String,
    /// What a process gets; `u64::MAX` for `unlimited` or -1.
    pub soft: u64,
    /// Up to which it may raise that.
    pub hard: u64,
}

impl FromStr for Ulimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const TYPES: [&str; 16] = [
            "as",
            "core",
            "cpu",
            "data",
            "fsize",
            "locks",
            "memlock",
            "msgqueue",
            "nice",
            "nofile",
            "nproc",
            "rss",
            "rtprio",
            "rttime",
            "sigpending",
            "stack",
        ];
        let (kind, limits) =
            text.split_once('=').ok_or("write TYPE=SOFT[:HARD], such as nofile=1024:4096")?;
        if !TYPES.contains(&kind) {
            return Err(format!("unknown type '{kind}'; known are {}", TYPES.join(", ")));
        }
        let limit = |text: &str| match text {
            "unlimited" | "-1" => Ok(u64::MAX),
            number => number.parse::<u64>().map_err(|_| format!("'{number}' is no limit")),
        };
        let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
        let (soft, hard) = (limit(soft)?, limit(hard)?);
        if soft > hard {
            return Err("the soft limit is above the hard one".into());
        }
        Ok(Ulimit { name: format!("RLIMIT_{}", kind.to_ascii_uppercase()), soft, hard })
    }
}

/// A signal by name (`TERM`, `SIGTERM`, `RTMIN+3`) or number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal(pub u32);

/// Linux's numbers on every architecture that kapsel runs on.
const SIGNALS: [(&str, u32); 33] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("RTMIN", 34),
];

impl FromStr for Signal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("unknown signal '{text}'; write for example TERM, SIGKILL, RTMIN+3 or 9");
        if let Ok(number) = text.parse::<u32>() {
            return if (1..=64).contains(&number) { Ok(Signal(number)) } else { Err(bad()) };
        }
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        if let Some((_, number)) = SIGNALS.iter().find(|(known, _)| *known == name) {
            return Ok(Signal(*number));
        }
        let real_time = match (name.strip_prefix("RTMIN+"), name.strip_prefix("RTMAX")) {
            (Some(above), _) => above.parse().ok().and_then(|n: u32| 34u32.checked_add(n)),
            (None, Some("")) => Some(64),
            (None, Some(below)) => {
                below.strip_prefix('-').and_then(|n| n.parse().ok()).and_then(|n: u32| 64u32.checked_sub(n))
            }
            (None, None) => None,
        };
        real_time.filter(|number| (34..=64).contains(number)).map(Signal).ok_or_else(bad)
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match SIGNALS.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => write!(f, "SIG{name}"),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Key presses that let go of a container's terminal: `ctrl-p,ctrl-q`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetachKeys(pub Vec<u8>);

impl FromStr for DetachKeys {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let key = |name: &str| match name.as_bytes() {
            [single] if single.is_ascii() => Some(*single),
            [b'c', b't', b'r', b'l', b'-', letter] => match letter {
                b'a'..=b'z' => Some(letter - b'a' + 1),
                b'@' => Some(0),
                b'[' | b'\\' | b']' | b'^' | b'_' => Some(letter - b'@'),
                _ => None,
            },
            _ => None,
        };
        if text.is_empty() {
            return Ok(DetachKeys(Vec::new()));
        }
        let keys: Option<Vec<u8>> = text.split(',').map(key).collect();
        keys.map(DetachKeys).ok_or_else(|| {
            "write keys separated by commas: a letter or ctrl-LETTER, such as ctrl-p,ctrl-q; empty for none".into()
        })
    }
}

/// One end of `kapsel cp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyPath {
    /// `CONTAINER:PATH`.
    Container {
        /// Its name or the beginning of its id.
        name: String,
        /// In the container, as written: a trailing slash or `/.` has a meaning.
        path: String,
    },
    /// A path on this machine, as written.
    Host(String),
    /// `-`: a tar archive on standard input or output.
    Stream,
}

impl FromStr for CopyPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "-" {
            return Ok(CopyPath::Stream);
        }
        // As Docker: what starts with / or . is a path here, so that names with a colon can be written.
        if text.starts_with('/') || text.starts_with('.') {
            return Ok(CopyPath::Host(text.into()));
        }
        match text.split_once(':') {
            None => Ok(CopyPath::Host(text.into())),
            Some(("", _)) => Err("the container's name before the colon is empty".into()),
            Some((_, "")) => Err("the path after the colon is empty".into()),
            Some((name, path)) => Ok(CopyPath::Container { name: name.into(), path: path.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bytes_as_docker_writes_them() {
        for (text, bytes) in [
            ("1048576", 1 << 20),
            ("512m", 512 << 20),
            ("1g", 1 << 30),
            ("1.5GiB", 3 << 29),
            ("64KB", 64 << 10),
            ("0", 0),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "m", "-1", "1x", "1 2", "99999999999999999999g", "1.2.3m", "nan", "inf", "16777216t"]
        {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn fractions_of_cpus_round_up_to_whole_ones() {
        assert_eq!("1.5".parse(), Ok(Cpus(1500)));
        assert_eq!(Cpus(1500).whole(), 2);
        assert_eq!(Cpus(10).whole(), 1);
        for text in ["0", "-1", "257", "nan", "two"] {
            assert!(text.parse::<Cpus>().is_err(), "{text}");
        }
    }

    #[test]
    fn volumes() {
        let volume: Volume = "/a:/b:ro".parse().unwrap();
        assert_eq!(volume, Volume { source: "/a".into(), destination: "/b".into(), read_only: true });
        assert!(!"/a:/b".parse::<Volume>().unwrap().read_only);
        assert!("./a:/b".parse::<Volume>().unwrap().source.is_absolute());
        for text in ["/a", "/a:b", "/a:/", "/a:/b:no", "data:/b", ":/b", "/a:/b:ro:x"] {
            assert!(text.parse::<Volume>().is_err(), "{text}");
        }
    }

    #[test]
    fn signals_by_name_and_number() {
        for (text, number) in
            [("TERM", 15), ("sigkill", 9), ("9", 9), ("RTMIN+3", 37), ("SIGRTMAX-1", 63), ("rtmin", 34)]
        {
            assert_eq!(text.parse(), Ok(Signal(number)), "{text}");
        }
        for text in ["0", "65", "FOO", "RTMIN+31", "RTMAX+1", "RTMAX-99", ""] {
            assert!(text.parse::<Signal>().is_err(), "{text}");
        }
        assert_eq!(Signal(15).to_string(), "SIGTERM");
        assert_eq!(Signal(37).to_string(), "37");
    }

    #[test]
    fn limits_and_keys() {
        let limit: Ulimit = "nofile=1024:unlimited".parse().unwrap();
        assert_eq!(limit, Ulimit { name: "RLIMIT_NOFILE".into(), soft: 1024, hard: u64::MAX });
        assert!("nofile=5:4".parse::<Ulimit>().is_err());
        assert!("files=5".parse::<Ulimit>().is_err());
        assert_eq!("ctrl-p,ctrl-q".parse(), Ok(DetachKeys(vec![16, 17])));
        assert_eq!("".parse(), Ok(DetachKeys(vec![])));
        assert!("ctrl-1".parse::<DetachKeys>().is_err());
    }

    #[test]
    fn ends_of_a_copy() {
        let inside = CopyPath::Container { name: "web".into(), path: "/etc/".into() };
        assert_eq!("web:/etc/".parse(), Ok(inside));
        assert_eq!("./a:b".parse(), Ok(CopyPath::Host("./a:b".into())));
        assert_eq!("-".parse(), Ok(CopyPath::Stream));
        assert!(":/x".parse::<CopyPath>().is_err());
        assert!("web:".parse::<CopyPath>().is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC{0,40}") {
            let _ = text.parse::<Bytes>();
            let _ = text.parse::<Cpus>();
            let _ = text.parse::<Volume>();
            let _ = text.parse::<Tmpfs>();
            let _ = text.parse::<EnvVar>();
            let _ = text.parse::<Ulimit>();
            let _ = text.parse::<Signal>();
            let _ = text.parse::<DetachKeys>();
            let _ = text.parse::<CopyPath>();
        }

        #[test]
        fn a_plain_number_is_itself(number in any::<u64>()) {
            prop_assert_eq!(number.to_string().parse(), Ok(Bytes(number)));
        }
    }
}
