//! The table of keys: the one definition behind parsing, checking, help and documentation.

use super::value::{Isolation, MIN_MEMORY, parse_size};

macro_rules! keys {
    ($($variant:ident $name:literal = $default:literal, $check:expr, $help:literal;)*) => {
        /// A configuration key.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Key {
            $(#[doc = $help] $variant,)*
        }

        impl Key {
            /// All keys, in the order of the documentation.
            pub const ALL: &'static [Key] = &[$(Key::$variant,)*];

            /// The key as written in the file.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The built-in value.
            pub const fn default_value(self) -> &'static str {
                match self { $(Self::$variant => $default,)* }
            }

            /// One line of explanation.
            pub const fn help(self) -> &'static str {
                match self { $(Self::$variant => $help,)* }
            }

            /// Checks a value, or says what is accepted.
            pub(super) fn check(self, value: &str) -> Result<(), String> {
                let check: fn(&str) -> Result<(), String> = match self { $(Self::$variant => $check,)* };
                check(value)
            }
        }
    };
}

keys! {
    Isolation "isolation" = "auto", |v| v.parse::<Isolation>().map(drop),
        "which machine runs a sandbox: auto, kvm, kapsel-vmm, qemu-kvm or tcg";
    Memory "memory" = "256M", memory, "memory of a sandbox when --memory does not say";
    Cpus "cpus" = "1", |v| number(v, 1, 64), "virtual CPUs of a sandbox when --cpus does not say";
    Kernel "kernel" = "", any, "path of a guest kernel (vmlinux); empty: Debian's cloud kernel";
    KernelArgs "kernel_args" = "", any, "words added to the guest kernel's command line";
    Qemu "qemu" = "", any, "QEMU program, a name or a path; empty: the best that is installed";
    Libexec "libexec" = "", any, "directory of the helper programs; empty: beside kapsel";
    Templates "templates" = "true", |v| one_of(v, &["true", "false"]).map_err(|_| "expected true or false".into()),
        "start sandboxes from a saved booted machine";
    Standby "standby" = "0", |v| number(v, 0, 64),
        "restored machines that stand by for sandboxes like the last ones, each holding some 100 MiB";
    PidsLimit "pids_limit" = "4096", |v| number(v, 0, 4_194_304), "most processes in a container; 0: no limit";
    Seccomp "seccomp" = "default", any, "system call filter of containers: default, unconfined or a file";
    LogSize "log_size" = "16M", |v| size(v, 64 << 10), "most bytes of a container's output log";
    StartTimeout "start_timeout" = "60", |v| number(v, 1, 3600), "seconds for a sandbox to start";
    StopTimeout "stop_timeout" = "10", |v| number(v, 0, 3600), "seconds between stop signal and SIGKILL";
    Pull "pull" = "missing", |v| one_of(v, &["missing", "always", "never"]), "when run pulls an image";
    EngineAnnotations "engine_annotations" = "", annotations,
        "io.kapsel.* annotations that engines may set, without the prefix, such as memory,cpus; empty: none";
    BridgeSubnet "bridge_subnet" = "10.213.0.0/22", |v| v.parse::<kapsel_network::bridge::Subnet>().map(drop),
        "addresses of sandboxes with --network bridge, a private network that nothing here uses";
    LogLevel "log_level" = "info", any, "what is logged: error, warn, info, debug, trace or a tracing filter";
}

impl Key {
    /// Finds a key by its name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|key| key.name() == name)
    }

    /// The name most like `wrong`.
    pub(super) fn nearest(wrong: &str) -> &'static str {
        Self::ALL.iter().map(|key| key.name()).min_by_key(|name| distance(wrong, name)).unwrap_or("isolation")
    }
}

/// Levenshtein's edit distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    // Nobody's key is longer; a hostile one must not cost time.
    for (i, x) in a.chars().take(64).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn any(_: &str) -> Result<(), String> {
    Ok(())
}

fn one_of(value: &str, accepted: &[&str]) -> Result<(), String> {
    if accepted.contains(&value) { Ok(()) } else { Err(format!("expected one of {}", accepted.join(", "))) }
}

fn number(value: &str, min: u64, max: u64) -> Result<(), String> {
    match value.parse::<u64>() {
        Ok(n) if (min..=max).contains(&n) => Ok(()),
        _ => Err(format!("expected a number, {min} to {max}")),
    }
}

fn size(value: &str, min: u64) -> Result<(), String> {
    match parse_size(value)? {
        n if n >= min => Ok(()),
        _ => Err(format!("expected at least {}", super::format_size(min))),
    }
}

fn annotations(value: &str) -> Result<(), String> {
    let known = crate::annotations::names();
    match super::list(value).find(|name| !known.contains(name)) {
        Some(unknown) => Err(format!("{unknown:?} is none of {}", known.join(", "))),
        None => Ok(()),
    }
}

fn memory(value: &str) -> Result<(), String> {
    size(value, MIN_MEMORY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_edits() {
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("memory", "memory"), 0);
    }

    #[test]
    fn names_are_unique() {
        let names: std::collections::BTreeSet<_> = Key::ALL.iter().map(|k| k.name()).collect();
        assert_eq!(names.len(), Key::ALL.len());
    }
}
