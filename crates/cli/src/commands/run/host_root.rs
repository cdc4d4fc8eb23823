//! `kapsel do`: the host's own file system as a container's root, below a scratch layer.

use std::path::Path;

use kapsel_sandbox::client::RootfsMount;
use kapsel_sandbox::paths::Id;
use kapsel_sandbox::record::Record;
use kapsel_sandbox::spec::{ImageDefaults, RunOptions, Volume};

use super::{Manner, Plan, machine_options};
use crate::commands::host::Host;
use crate::failure::{Failure, Outcome};
use crate::flags::run::Do;
use crate::flags::value::EnvVar;
use crate::streams::Wanted;
use crate::terminal;
use crate::trace::Trace;

/// Variables that are passed on: what programs need to find their way, and nothing that is likely a secret.
const PASSED: [&str; 9] = ["PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "LANG", "LANGUAGE", "TZ"];

/// `kapsel do`.
pub fn run(host: &Host, flags: Do, trace: Trace) -> Outcome {
    let here = std::env::current_dir().map_err(|error| {
        Failure::new(format!("cannot find the current directory: {error}")).hint("cd to one that exists")
    })?;
    let workdir =
        here.to_str().ok_or_else(|| Failure::new(format!("the name of {} is not UTF-8", here.display())))?;
    let volumes = flags.writable.iter().map(|directory| shared(directory)).collect::<Result<Vec<_>, _>>()?;

    let mut record = Record::new(Id::random(), String::new(), Vec::new());
    record.remove = true;
    let interactive = terminal::is_interactive();
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let options = RunOptions {
        args: flags.command.clone(),
        // Commands of a host were not made to be process 1.
        init: true,
        env: environment(&flags.env),
        user: Some(format!("{uid}:{gid}")),
        workdir: Some(workdir.to_owned()),
        terminal: interactive,
        volumes,
        ..machine_options(host, &flags.machine)?
    };
    let manner = Manner {
        detach: false,
        wanted: Wanted { stdin: true, terminal: interactive },
        // Nobody can come back to a sandbox without a name that goes with its command.
        detach_keys: Vec::new(),
        timings: flags.machine.timings,
    };
    let rootfs = RootfsMount::directory("/");
    Plan { defaults: ImageDefaults::default(), options, record, rootfs, manner }.carry_out(host, trace)
}

/// A directory at its own place.
fn shared(directory: &Path) -> Result<Volume, Failure> {
    let cannot = |reason: String| {
        Failure::new(format!("cannot share {}: {reason}", directory.display()))
            .hint("give --rw a directory that exists")
    };
    let source = directory.canonicalize().map_err(|error| cannot(error.to_string()))?;
    if !source.is_dir() {
        return Err(cannot("not a directory".into()));
    }
    Ok(Volume { destination: source.clone(), source, read_only: false })
}

fn environment(added: &[EnvVar]) -> Vec<String> {
    let passed = |name: &str| PASSED.contains(&name) || name.starts_with("LC_");
    let own =
        std::env::vars().filter(|(name, _)| passed(name)).map(|(name, value)| format!("{name}={value}"));
    own.chain(added.iter().filter_map(EnvVar::resolve)).collect()
}
