//! `kapsel attach`.

use kapsel_sandbox::client::Client;
use kapsel_sandbox::record::Status;

use super::host::{self, Host, Sandbox};
use crate::failure::{Failure, Outcome};
use crate::flags::container::Attach;
use crate::foreground::{Foreground, Left};
use crate::output;
use crate::streams::{self, Wanted};
use crate::terminal::{self, Raw};
use kapsel_sandbox::signals::Signals;
use kapsel_sandbox::streams::Streams;

/// Connects to the first process of a container, until that ends or the person lets go.
pub fn run(host: &Host, flags: &Attach) -> Outcome {
    let sandbox = host.find(&flags.name)?;
    if sandbox.record.status == Status::Exited {
        return Err(Failure::new(format!("container {} has ended", flags.name))
            .hint(format!("'kapsel logs {}' shows what it wrote", flags.name)));
    }
    let wanted = Wanted { stdin: sandbox.record.stdin && !flags.no_stdin, terminal: sandbox.record.terminal };
    if wanted.terminal && wanted.stdin && !terminal::stdin_is_terminal() {
        return Err(Failure::new(format!(
            "container {} has a terminal, and standard input is none",
            flags.name
        ))
        .hint("attach from a terminal, or with --no-stdin"));
    }
    host::runtime()?.block_on(attach(&sandbox, wanted, flags))
}

async fn attach(sandbox: &Sandbox, wanted: Wanted, flags: &Attach) -> Outcome {
    let client = Client::connect(&sandbox.bundle, &sandbox.record.id).await?;
    let mut signals = Signals::take_over()?;
    let streams = Streams::open(&sandbox.bundle, "", wanted.stdin, wanted.terminal)?;
    let raw = (wanted.terminal && wanted.stdin).then(Raw::enter).transpose()?;
    let running = streams::run(streams, wanted.terminal.then(|| flags.detach_keys.0.clone()))?;
    let foreground = Foreground { client: &client, exec_id: "", terminal: wanted.terminal };
    let left = foreground.stay(running, &mut signals).await;
    drop(raw);
    match left? {
        Left::Exited(code) => foreground.verdict(code).await,
        Left::GivenUp(code) => Ok(code),
        Left::Detached => Ok(0),
        Left::ReaderGone => output::die_of_broken_pipe(),
    }
}
