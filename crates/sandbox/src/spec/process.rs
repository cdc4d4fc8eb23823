//! The process part of a specification: for a container's first process and for those added later.

use std::collections::HashSet;

use kapsel_protocol::program;
use oci_spec::runtime::{
    BoxBuilder, Capability, LinuxCapabilities, PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process,
    User,
};

use super::{
    Error,
    defaults::{self, PATH},
    options::{ImageDefaults, RunOptions, Ulimit},
};

/// What comes before a command that has an init.
pub const INIT: [&str; 2] = [program::PATH, program::INIT];

/// What `kapsel exec` takes.
#[derive(Clone, Debug, Default)]
pub struct ExecOptions {
    /// Program and arguments.
    pub args: Vec<String>,
    /// Added to the container's, the later one wins.
    pub env: Vec<String>,
    /// Instead of the container's user.
    pub user: Option<String>,
    /// Instead of the container's working directory.
    pub workdir: Option<String>,
    /// Whether it gets a terminal.
    pub terminal: bool,
    /// Columns and rows of the terminal at the start.
    pub terminal_size: Option<(u16, u16)>,
}

pub(super) fn init_process(image: &ImageDefaults, options: &RunOptions) -> Result<Process, Error> {
    let mut process = Process::default();
    let init = options.init.then_some(INIT).into_iter().flatten().map(str::to_owned);
    let user = options.user.as_ref().or(image.user.as_ref());
    let workdir = options.workdir.as_ref().or(image.workdir.as_ref()).map_or("/", String::as_str);
    process
        .set_args(Some(init.chain(args(image, options)?).collect()))
        .set_env(Some(environment(&image.env, &options.env, options.terminal)?))
        .set_user(user_named(user.map_or("", String::as_str)))
        .set_cwd(absolute(workdir)?)
        .set_capabilities(Some(capabilities(options)?))
        .set_rlimits(rlimits(&options.ulimits)?)
        .set_no_new_privileges(Some(false))
        .set_apparmor_profile(None)
        .set_oom_score_adj(None);
    set_terminal(&mut process, options.terminal, options.terminal_size);
    Ok(process)
}

/// Builds the process to add to a container, from the container's own.
///
/// # Errors
/// When an option cannot be followed.
pub fn exec_process(container: &Process, options: &ExecOptions) -> Result<Process, Error> {
    if options.args.is_empty() {
        return Err(Error::NoCommand);
    }
    let mut process = container.clone();
    let inherited = container.env().clone().unwrap_or_default();
    process.set_args(Some(options.args.clone())).set_env(Some(environment(
        &inherited,
        &options.env,
        options.terminal,
    )?));
    if let Some(user) = &options.user {
        process.set_user(user_named(user));
    }
    if let Some(workdir) = &options.workdir {
        process.set_cwd(absolute(workdir)?);
    }
    set_terminal(&mut process, options.terminal, options.terminal_size);
    Ok(process)
}

fn args(image: &ImageDefaults, options: &RunOptions) -> Result<Vec<String>, Error> {
    let mut args = options.entrypoint.clone().unwrap_or_else(|| image.entrypoint.clone());
    if !options.args.is_empty() {
        args.extend_from_slice(&options.args);
    } else if options.entrypoint.is_none() {
        // As in Docker, an entrypoint given by the person also drops the image's command.
        args.extend_from_slice(&image.cmd);
    }
    match args.first() {
        Some(program) if !program.is_empty() => Ok(args),
        _ => Err(Error::NoCommand),
    }
}

/// Later values win and keep the place of the earlier one.
fn environment(base: &[String], added: &[String], terminal: bool) -> Result<Vec<String>, Error> {
    let mut env: Vec<String> = Vec::new();
    for item in base.iter().chain(added) {
        let name = match item.split_once('=') {
            Some((name, _)) if !name.is_empty() && !item.contains('\0') => name,
            _ => {
                return Err(Error::BadValue {
                    what: "environment",
                    value: item.clone(),
                    expected: "NAME=value",
                });
            }
        };
        match env.iter_mut().find(|old| old.split_once('=').is_some_and(|(old, _)| old == name)) {
            Some(old) => old.clone_from(item),
            None => env.push(item.clone()),
        }
    }
    let has = |env: &[String], name: &str| env.iter().any(|item| item.starts_with(name));
    if !has(&env, "PATH=") {
        env.insert(0, format!("PATH={PATH}"));
    }
    if terminal && !has(&env, "TERM=") {
        env.push("TERM=xterm".into());
    }
    Ok(env)
}

/// A number needs no look-up, but its group does: all forms go to the guest as they are.
fn user_named(user: &str) -> User {
    let mut named = User::default();
    if let Some((uid, gid)) = user.split_once(':')
        && let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse())
    {
        named.set_uid(uid).set_gid(gid);
    } else if let Ok(uid) = user.parse() {
        named.set_uid(uid);
    }
    // An empty name is root: the guest then still learns HOME and the supplementary groups of uid 0.
    named.set_username(Some(if user.is_empty() { "0".into() } else { user.into() }));
    named
}

fn absolute(workdir: &str) -> Result<std::path::PathBuf, Error> {
    if workdir.starts_with('/') && !workdir.contains('\0') {
        return Ok(workdir.into());
    }
    Err(Error::BadValue { what: "working directory", value: workdir.into(), expected: "an absolute path" })
}

fn set_terminal(process: &mut Process, terminal: bool, size: Option<(u16, u16)>) {
    let size = size.filter(|_| terminal).and_then(|(columns, rows)| {
        BoxBuilder::default().width(u64::from(columns)).height(u64::from(rows)).build().ok()
    });
    process.set_terminal(Some(terminal)).set_console_size(size);
}

fn capabilities(options: &RunOptions) -> Result<LinuxCapabilities, Error> {
    let mut set: HashSet<Capability> = defaults::capabilities();
    for name in &options.cap_drop {
        if name.eq_ignore_ascii_case("all") {
            set.clear();
        } else {
            set.remove(&capability(name)?);
        }
    }
    for name in &options.cap_add {
        if name.eq_ignore_ascii_case("all") {
            set.extend(defaults::all_capabilities());
        } else {
            set.insert(capability(name)?);
        }
    }
    let mut capabilities = LinuxCapabilities::default();
    capabilities
        .set_bounding(Some(set.clone()))
        .set_effective(Some(set.clone()))
        .set_permitted(Some(set))
        .set_inheritable(None)
        .set_ambient(None);
    Ok(capabilities)
}

fn capability(name: &str) -> Result<Capability, Error> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    defaults::all_capabilities()
        .into_iter()
        .find(|known| known.to_string().trim_start_matches("CAP_") == short)
        .ok_or_else(|| Error::UnknownCapability(name.into()))
}

fn rlimits(ulimits: &[Ulimit]) -> Result<Option<Vec<PosixRlimit>>, Error> {
    let mut limits = Vec::new();
    for ulimit in ulimits {
        let bad = || Error::BadValue {
            what: "ulimit",
            value: ulimit.name.clone(),
            expected: "a name of setrlimit(2)",
        };
        let typ: PosixRlimitType = ulimit.name.parse().map_err(|_| bad())?;
        limits.retain(|old: &PosixRlimit| old.typ() != typ);
        limits.push(
            PosixRlimitBuilder::default()
                .typ(typ)
                .soft(ulimit.soft)
                .hard(ulimit.hard)
                .build()
                .map_err(|_| bad())?,
        );
    }
    Ok(Some(limits).filter(|limits| !limits.is_empty()))
}
