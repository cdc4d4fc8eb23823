//! The values that flags take: parsed and checked here, so that a command only ever sees sound ones.

use std::str::FromStr;

use kapsel_sandbox::spec;

/// The most CPUs that can be asked for.
const MOST_CPUS: f64 = 64.0;

/// A number of CPUs, also a fraction.
pub fn cpus(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (0.01..=MOST_CPUS).contains(&number) => Ok(number),
        _ => Err(format!("expected a number of CPUs, 0.01 to {MOST_CPUS}")),
    }
}

/// A signal by name (`TERM`, `SIGTERM`, `RTMIN+3`) or number.
pub fn signal(text: &str) -> Result<i32, String> {
    spec::parse_signal(text).ok_or_else(|| "expected a signal, such as TERM, SIGKILL, RTMIN+3 or 9".into())
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
    fn numbers_of_cpus() {
        assert_eq!(cpus("1.5"), Ok(1.5));
        for text in ["0", "-1", "65", "nan", "inf", "two", ""] {
            assert!(cpus(text).is_err(), "{text}");
        }
    }

    #[test]
    fn variables() {
        let variable: EnvVar = "A=b=c".parse().unwrap();
        assert_eq!(variable.resolve().as_deref(), Some("A=b=c"));
        assert_eq!("KAPSEL_TEST_UNSET".parse::<EnvVar>().unwrap().resolve(), None);
        assert!("=x".parse::<EnvVar>().is_err());
        assert!("".parse::<EnvVar>().is_err());
    }

    #[test]
    fn detach_keys() {
        assert_eq!("ctrl-p,ctrl-q".parse(), Ok(DetachKeys(vec![16, 17])));
        assert_eq!("ctrl-[,x".parse(), Ok(DetachKeys(vec![27, b'x'])));
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
            let _ = cpus(&text);
            let _ = signal(&text);
            let _ = text.parse::<EnvVar>();
            let _ = text.parse::<Label>();
            let _ = text.parse::<DetachKeys>();
            let _ = text.parse::<CopyPath>();
        }
    }
}
