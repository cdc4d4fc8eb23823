//! `kapsel exec`.

use kapsel_sandbox::client::{Client, Io};
use kapsel_sandbox::paths::Id;
use kapsel_sandbox::record::Status;
use kapsel_sandbox::spec::{self, ExecOptions};

use super::host::{self, Host, Sandbox};
use super::run::started;
use crate::failure::{Failure, Outcome};
use crate::flags::container::Exec;
use crate::foreground::{Foreground, Left};
use crate::streams::{self, Wanted};
use crate::terminal::{self, Raw};
use crate::{env, output};
use kapsel_sandbox::signals::Signals;
use kapsel_sandbox::streams::Streams;

/// Runs a command in a container.
pub fn run(host: &Host, flags: &Exec) -> Outcome {
    if flags.terminal && flags.interactive && !terminal::stdin_is_terminal() {
        return Err(
            Failure::new("-t needs a terminal, and standard input is none").hint("leave -t out, and keep -i")
        );
    }
    let Some((name, command)) = flags.target.split_first() else {
        return Err(Failure::new("no container given"));
    };
    let sandbox = host.find(name)?;
    if sandbox.record.status == Status::Exited {
        return Err(
            Failure::new(format!("container {name} has ended")).hint("'kapsel ps' lists those that run")
        );
    }
    let options = ExecOptions {
        args: command.to_vec(),
        env: env::collect(&flags.process)?,
        user: flags.process.user.clone(),
        workdir: flags.process.workdir.clone(),
        terminal: flags.terminal,
        terminal_size: terminal::size().map(|size| (size.width, size.height)),
    };
    host::runtime()?.block_on(execute(&sandbox, &options, flags))
}

async fn execute(sandbox: &Sandbox, options: &ExecOptions, flags: &Exec) -> Outcome {
    let spec = sandbox.spec()?;
    let container =
        spec.process().as_ref().ok_or_else(|| Failure::new("the container has no process to be like"))?;
    let process = spec::exec_process(container, options)?;
    let client = Client::connect(&sandbox.bundle, &sandbox.record.id).await?;
    let id = Id::random();
    let exec_id = id.as_str();
    let wanted = Wanted { stdin: flags.interactive, terminal: flags.terminal };
    let mut signals = Signals::take_over()?;
    if flags.detach {
        client.exec(exec_id, &process, &Io::default()).await?;
        started(&client, exec_id).await?;
        return Ok(0);
    }
    client.exec(exec_id, &process, &Io::attached(wanted.stdin, wanted.terminal, false)).await?;
    let streams = Streams::open(&sandbox.bundle, exec_id, wanted.stdin, wanted.terminal)?;
    if let Err(failure) = started(&client, exec_id).await {
        forget(&client, exec_id).await;
        return Err(failure);
    }
    let raw = (wanted.terminal && wanted.stdin).then(Raw::enter).transpose()?;
    let running = streams::run(streams, wanted.terminal.then(|| flags.detach_keys.0.clone()))?;
    let foreground = Foreground { client: &client, exec_id, terminal: wanted.terminal };
    let left = foreground.stay(running, &mut signals).await;
    drop(raw);
    match left? {
        Left::Exited(code) => {
            let verdict = foreground.verdict(code).await;
            forget(&client, exec_id).await;
            verdict
        }
        Left::Detached => Ok(0),
        Left::GivenUp(code) => Ok(code),
        Left::ReaderGone => output::die_of_broken_pipe(),
    }
}

/// The shim would keep an ended process for whoever asks for its exit code; nobody will.
async fn forget(client: &Client, exec_id: &str) {
    if let Err(error) = client.delete(exec_id).await {
        // The container ended with the process, or is about to.
        let _ = error;
    }
}
