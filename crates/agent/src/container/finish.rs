//! The last steps of every process of a container: from the agent's rights to its own, and its program.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, Gid, Mode};
use rustix::io::Errno;

use crate::sys;

use super::capabilities::Capabilities;
use super::child::ids;
use super::process::{ProcessPlan, Seccomp};
use super::report::{ChildError, During, Message, Step, Stopwatch};
use super::root::Root;
use super::user::{self, Accounts, Identity, UserError};

/// Where programs are looked for when the environment does not say.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Makes the working directory, as Docker does, while the root may still be written. When that fails, entering it will say why.
pub fn make_cwd(process: &ProcessPlan) {
    if process.cwd.as_c_str() != c"/"
        && let Ok(root) = Root::open(c"/")
    {
        let _ = root.directory(&process.cwd);
    }
}

/// Takes on the process's identity and rights and executes its program, with `accounts` if they were read already. Returns only on
/// failure.
///
/// # Errors
/// Whatever failed; the caller reports it.
pub fn execute(
    process: &ProcessPlan,
    accounts: Option<Accounts>,
    mut watch: Stopwatch,
    socket: &OwnedFd,
) -> Result<std::convert::Infallible, ChildError> {
    sys::cloexec_from(3).during(Step::Exec, || "closing descriptors".into())?;
    let mut env = process.env.clone();
    let identity = identity(process, accounts, &mut env)?;
    for (resource, limit) in &process.rlimits {
        rustix::process::setrlimit(*resource, *limit).during(Step::Rlimits, || {
            format!("setting the resource limit {resource:?} (above the guest's?)")
        })?;
    }
    watch.lap(Step::Rlimits);
    own_stdio(identity.uid);
    let entered = enter_cwd(&process.cwd);
    let capabilities = process.capabilities.unwrap_or_default();
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).during(Step::Seccomp, || "setting no_new_privs".into())?;
    } else {
        // Without no_new_privs a filter needs CAP_SYS_ADMIN, which is about to go.
        seccomp(&process.seccomp)?;
    }
    become_user(&identity, &capabilities)?;
    watch.lap(Step::User);
    rustix::process::umask(Mode::from_raw_mode(process.umask));
    // Some directories only their owner may enter, others only root.
    match entered {
        Ok(()) => {}
        Err(_) => enter_cwd(&process.cwd).during(Step::Cwd, || {
            format!("entering the working directory {}", process.cwd.to_string_lossy())
        })?,
    }
    set_capabilities(&capabilities)?;
    watch.lap(Step::Capabilities);
    let candidates = candidates(&process.args[0], ProcessPlan::variable(&env, "PATH"));
    let (argv, envp) = (pointers(&process.args), pointers(&env));
    sys::reset_signals();
    watch.lap(Step::Exec);
    // Not having been able to tell the time is no reason to stop.
    let _ = Message::Executing(watch.into_laps()).send(socket);
    if process.no_new_privileges {
        // The filter may forbid anything but execve(2) from here on.
        seccomp(&process.seccomp)?;
    }
    let error = search(&candidates, &argv, &envp);
    Err(error).during(Step::Exec, || process.args[0].to_string_lossy().into_owned())
}

/// Executes the first candidate that can be, as execvp(3). Returns why none was.
fn search(
    candidates: &[CString],
    argv: &[*const libc::c_char],
    envp: &[*const libc::c_char],
) -> std::io::Error {
    let mut denied = None;
    for path in candidates {
        let error = sys::execve(path, argv, envp);
        match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::NOTDIR) => {}
            Some(Errno::ACCESS) => denied = Some(error),
            _ => return error,
        }
    }
    denied.unwrap_or_else(|| Errno::NOENT.into())
}

/// A name with a slash is a path; any other is looked for in PATH, where an empty entry is the working directory.
fn candidates(name: &CStr, path: Option<&[u8]>) -> Vec<CString> {
    if name.to_bytes().contains(&b'/') {
        return vec![name.to_owned()];
    }
    let dirs = path.filter(|path| !path.is_empty()).unwrap_or(DEFAULT_PATH).split(|&b| b == b':');
    let join = |dir: &[u8]| {
        let dir = if dir.is_empty() { b"." } else { dir };
        CString::new([dir, b"/", name.to_bytes()].concat()).ok()
    };
    dirs.filter_map(join).collect()
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Who to become. Adds HOME to the environment when it has none.
fn identity(
    process: &ProcessPlan,
    accounts: Option<Accounts>,
    env: &mut Vec<CString>,
) -> Result<Identity, ChildError> {
    let accounts = || accounts.unwrap_or_else(Accounts::read);
    let has_home = ProcessPlan::variable(env, "HOME").is_some_and(|home| !home.is_empty());
    let mut identity = if !process.username.is_empty() {
        named(&process.username, &accounts())?
    } else {
        let home = if has_home { String::new() } else { user::home(process.uid, &accounts().passwd) };
        Identity { uid: process.uid, gid: process.gid, groups: vec![], home }
    };
    identity.groups.extend(&process.additional_gids);
    if !has_home {
        env.retain(|entry| !entry.to_bytes().starts_with(b"HOME="));
        // Neither a line of passwd nor "/" contains a NUL that would survive here.
        env.extend(CString::new(format!("HOME={}", identity.home)));
    }
    Ok(identity)
}

/// Whom the image's files know by a name.
fn named(name: &str, Accounts { passwd, group }: &Accounts) -> Result<Identity, ChildError> {
    let unknown =
        |error: UserError| ChildError { step: Step::User, errno: Errno::NOENT, detail: error.to_string() };
    let mut identity = user::resolve(name, passwd, group).map_err(unknown)?;
    // The primary group too, so that a set-group-id program cannot shed a group that a file denies access to
    // (CVE-2022-36109).
    if !identity.groups.contains(&identity.gid) {
        identity.groups.insert(0, identity.gid);
    }
    Ok(identity)
}

/// Lets a user who is not root open /dev/stdout and its like again. Only pipes and terminals are the process's own; a failure
/// costs nothing but that.
fn own_stdio(uid: u32) {
    if uid == 0 {
        return;
    }
    let streams = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    for stream in streams {
        let Ok(stat) = rustix::fs::fstat(stream) else { continue };
        let null = stat.st_rdev == rustix::fs::makedev(1, 3);
        let kind = FileType::from_raw_mode(stat.st_mode);
        if !null && matches!(kind, FileType::Fifo | FileType::CharacterDevice | FileType::Socket) {
            let _ = rustix::fs::fchown(stream, Some(ids(uid, 0).0), None);
        }
    }
}

/// Enters the working directory, and makes sure that it is inside the root: a path through /proc/self/fd could lead to a
/// descriptor of the agent's that is still open.
fn enter_cwd(cwd: &CStr) -> rustix::io::Result<()> {
    rustix::process::chdir(cwd)?;
    match rustix::process::getcwd(Vec::new()) {
        Ok(path) if path.to_bytes().starts_with(b"/") => Ok(()),
        _ => Err(Errno::NOENT),
    }
}

/// Puts a filter in force, for good; an empty one is none.
///
/// # Errors
/// Those of seccomp(2).
pub fn seccomp(filter: &Seccomp) -> Result<(), ChildError> {
    match filter.program.is_empty() {
        true => Ok(()),
        false => sys::seccomp_filter(&filter.program, filter.flags)
            .during(Step::Seccomp, || "installing the seccomp filter".into()),
    }
}

fn become_user(identity: &Identity, capabilities: &Capabilities) -> Result<(), ChildError> {
    capabilities.drop_bounding().during(Step::Capabilities, || "dropping from the bounding set".into())?;
    rustix::thread::set_keep_capabilities(true).during(Step::User, || "keeping capabilities".into())?;
    set_ids(identity.uid, identity.gid, &identity.groups)
        .during(Step::User, || format!("becoming user {} and group {}", identity.uid, identity.gid))
}

/// Group, supplementary groups and user, real, effective and saved.
///
/// # Errors
/// Those of the system calls.
pub fn set_ids(uid: u32, gid: u32, groups: &[u32]) -> rustix::io::Result<()> {
    let (uid, gid) = ids(uid, gid);
    let groups: Vec<Gid> = groups.iter().map(|&g| Gid::from_raw(g)).collect();
    rustix::thread::set_thread_groups(&groups)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
}

fn set_capabilities(capabilities: &Capabilities) -> Result<(), ChildError> {
    rustix::thread::set_keep_capabilities(false)
        .during(Step::Capabilities, || "no longer keeping capabilities".into())?;
    capabilities.apply().during(Step::Capabilities, || "setting the capabilities".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_as_a_shell_does() {
        let of = |name: &CStr, path: Option<&[u8]>| -> Vec<String> {
            candidates(name, path).into_iter().map(|c| c.into_string().expect("utf-8")).collect()
        };
        assert_eq!(of(c"./x", Some(b"/bin")), ["./x"]);
        assert_eq!(of(c"x", Some(b"/a::/b")), ["/a/x", "./x", "/b/x"]);
        assert_eq!(of(c"x", None).len(), 6);
        assert_eq!(of(c"x", Some(b"")).len(), 6);
    }
}
