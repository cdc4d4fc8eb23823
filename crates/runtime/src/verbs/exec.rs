//! `exec`.

use anyhow::{Context, bail};
use kapsel_sandbox::engine;
use oci_spec::runtime::{Capability, Process, Spec, User};

use super::{
    Call,
    create::{Foreground, check_terminal, no_descriptors},
    read_json, write_pid,
};
use crate::{
    args, console,
    stand_in::{NewProcess, Order, StandIn},
    state::{Container, Status},
};

impl Call<'_> {
    /// `exec`.
    pub fn exec(&self, flags: &args::Exec) -> anyhow::Result<u8> {
        no_descriptors(flags.preserve_fds)?;
        let container = self.container_in(&flags.id, &[Status::Running], "exec in")?;
        let mut process: Process = match &flags.process {
            Some(path) => read_json(path)?,
            None => self.process_like(&container, flags)?,
        };
        if flags.tty {
            process.set_terminal(Some(true));
        }
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            bail!("process.args is empty: there is nothing to run");
        }
        let mut warnings = Vec::new();
        engine::check_process(&mut process, &mut warnings)?;
        warnings.iter().for_each(|warning| self.report.warn(warning));
        let terminal = process.terminal().unwrap_or(false);
        let foreground = if flags.detach { Foreground::Ends } else { Foreground::Stays };
        check_terminal(terminal, flags.console_socket.is_some(), foreground)?;
        let console = flags.console_socket.as_ref().map(|socket| console::make(socket, None)).transpose()?;
        let order = NewProcess {
            sandbox: container.sandbox.clone(),
            cgroup: container.cgroup.clone(),
            process,
            terminal,
        };
        let mut stand_in = StandIn::start(&Order::Process(Box::new(order)), console)?;
        let begun = stand_in.done().and_then(|()| match &flags.pid_file {
            Some(path) => write_pid(path, stand_in.pid()),
            None => Ok(()),
        });
        if let Err(error) = begun {
            stand_in.kill();
            return Err(error);
        }
        if flags.detach {
            return Ok(0);
        }
        stand_in.stay(terminal && flags.console_socket.is_none())
    }

    /// The container's own process with what the flags change.
    fn process_like(&self, container: &Container, flags: &args::Exec) -> anyhow::Result<Process> {
        let path = container.sandbox_bundle(&self.host.paths).spec();
        let spec: Spec = read_json(&path)?;
        let mut process = spec.process().clone().context("the container has no process to be like")?;
        process.set_args(Some(flags.command.clone())).set_terminal(Some(flags.tty)).set_console_size(None);
        let mut env = process.env().clone().unwrap_or_default();
        for variable in &flags.env {
            let Some((name, _)) = variable.split_once('=').filter(|(name, _)| !name.is_empty()) else {
                bail!("--env {variable:?} is not NAME=value");
            };
            env.retain(|old| old.split_once('=').is_none_or(|(old, _)| old != name));
            env.push(variable.clone());
        }
        process.set_env(Some(env));
        if let Some(cwd) = &flags.cwd {
            process.set_cwd(cwd.into());
        }
        if let Some(user) = &flags.user {
            process.set_user(parse_user(user)?);
        }
        if !flags.additional_gids.is_empty() {
            let mut user = process.user().clone();
            user.set_additional_gids(Some(flags.additional_gids.clone()));
            process.set_user(user);
        }
        if flags.no_new_privs {
            process.set_no_new_privileges(Some(true));
        }
        add_capabilities(&mut process, &flags.cap)?;
        Ok(process)
    }
}

fn parse_user(text: &str) -> anyhow::Result<User> {
    let wrong = || format!("--user {text:?} is not UID[:GID]");
    let (uid, gid) = text.split_once(':').unwrap_or((text, "0"));
    let mut user = User::default();
    user.set_uid(uid.parse().with_context(wrong)?).set_gid(gid.parse().with_context(wrong)?);
    Ok(user)
}

fn add_capabilities(process: &mut Process, names: &[String]) -> anyhow::Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let mut all = process.capabilities().clone().unwrap_or_default();
    for name in names {
        let short = name.trim_start_matches("CAP_");
        let capability: Capability = short
            .parse()
            .map_err(|_| anyhow::anyhow!("--cap {name:?} is no capability; see capabilities(7)"))?;
        let with = |set: &Option<std::collections::HashSet<Capability>>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(capability);
            Some(set)
        };
        let (bounding, effective, permitted) =
            (with(all.bounding()), with(all.effective()), with(all.permitted()));
        all.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
    }
    process.set_capabilities(Some(all));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers() {
        let user = parse_user("1000:100").unwrap();
        assert_eq!((user.uid(), user.gid()), (1000, 100));
        assert_eq!(parse_user("7").unwrap().gid(), 0);
        assert!(parse_user("joe").is_err());
    }

    #[test]
    fn capabilities_are_added_by_name() {
        let mut process = Process::default();
        add_capabilities(&mut process, &["CAP_SYS_ADMIN".into()]).unwrap();
        let all = process.capabilities().clone().unwrap();
        assert!(all.effective().as_ref().unwrap().contains(&Capability::SysAdmin));
        assert!(add_capabilities(&mut process, &["CAP_FLY".into()]).is_err());
    }
}
