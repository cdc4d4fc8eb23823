//! Hooks that run on the host: a program, the container's state on its standard input, and a bound on its time.

use std::{
    fs::File,
    io::{Read, Seek, Write},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use oci_spec::runtime::Hook;

use crate::state::Shown;

/// For hooks that name no bound: an engine's command must not hang for ever.
const LONGEST: Duration = Duration::from_secs(60);
/// The most of a hook's output that an error quotes.
const QUOTED: u64 = 4096;
/// How often to look whether it has ended.
const LOOK: Duration = Duration::from_millis(2);

/// Runs them one after the other; the first that fails ends the row.
pub fn run(kind: &str, hooks: Option<&Vec<Hook>>, state: &Shown<'_>) -> anyhow::Result<()> {
    let Some(hooks) = hooks.filter(|hooks| !hooks.is_empty()) else { return Ok(()) };
    let state = serde_json::to_vec(state)?;
    for hook in hooks {
        one(hook, &state).with_context(|| format!("{kind} hook {} failed", hook.path().display()))?;
    }
    Ok(())
}

fn one(hook: &Hook, state: &[u8]) -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(hook.path());
    let args = hook.args().clone().unwrap_or_default();
    if let Some((name, rest)) = args.split_first() {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        let (name, value) =
            variable.split_once('=').with_context(|| format!("its environment has {variable:?}"))?;
        command.env(name, value);
    }
    // Files, since with them nobody waits for the other: the hook may leave its input unread and say much, however long both are.
    let file = || rustix::fs::memfd_create("hook", rustix::fs::MemfdFlags::CLOEXEC).map(File::from);
    let (mut told, mut said) = (file()?, file()?);
    told.write_all(state)?;
    told.rewind()?;
    command.stdin(told).stdout(Stdio::null()).stderr(said.try_clone()?);
    let mut child = command.spawn().context("it cannot be started")?;
    let patience =
        hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).map_or(LONGEST, Duration::from_secs);
    let until = Instant::now() + patience;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > until {
            child.kill()?;
            child.wait()?;
            bail!("it took more than {} s and was killed", patience.as_secs());
        }
        std::thread::sleep(LOOK);
    };
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    said.rewind()?;
    let _ = said.take(QUOTED).read_to_string(&mut text);
    bail!("{status}: {}", text.trim())
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::HookBuilder;

    use super::*;

    fn shell(script: &str, timeout: Option<i64>) -> Hook {
        let args = ["sh", "-c", script].map(str::to_owned).to_vec();
        let hook = HookBuilder::default().path("/bin/sh").args(args).env(vec!["A=b".to_owned()]);
        let hook = timeout.into_iter().fold(hook, |hook, seconds| hook.timeout(seconds));
        hook.build().unwrap()
    }

    #[test]
    fn it_has_the_state_and_its_own_environment() {
        one(&shell("test \"$(cat)\" = state -a $A = b -a -z \"$HOME\"", None), b"state").unwrap();
    }

    #[test]
    fn it_may_leave_its_input_unread() {
        one(&shell("exit 0", None), &vec![b'x'; 1 << 20]).unwrap();
    }

    #[test]
    fn failure_and_slowness_are_told() {
        let error = one(&shell("echo reason >&2; exit 3", None), b"").unwrap_err().to_string();
        assert!(error.contains('3') && error.contains("reason"), "{error}");
        let error = one(&shell("exec sleep 20", Some(1)), b"").unwrap_err().to_string();
        assert!(error.contains("more than 1 s"), "{error}");
    }
}
