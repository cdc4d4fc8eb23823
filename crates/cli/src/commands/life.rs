//! Commands that act on the life of containers: `wait`, `stop`, `kill`, `pause`, `resume`.

use std::time::Duration;

use kapsel_sandbox::annotations::Wishes;
use kapsel_sandbox::client::{Client, Error as ClientError};
use kapsel_sandbox::paths::Bundle;
use kapsel_sandbox::record::{Record, Status};

use super::host::{Host, Sandbox};
use super::many::each_at_once;
use crate::failure::{Failure, Outcome};
use crate::flags::container::{Kill, Names, Stop};

const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;
/// How long a killed container may take to end.
const DEATH: Duration = Duration::from_secs(10);

/// `kapsel wait`: prints the exit codes.
pub fn wait(host: &Host, flags: &Names) -> Outcome {
    each_at_once(host, &flags.names, |sandbox, _| async move {
        let code = match sandbox.record.status {
            Status::Exited => exit_code(&sandbox.record),
            _ => ended(&sandbox).await?,
        };
        Ok(code.to_string())
    })
}

/// Waits for the end of a container and gives its exit code.
async fn ended(sandbox: &Sandbox) -> Result<u32, Failure> {
    let waited = async { Client::connect(&sandbox.bundle, &sandbox.record.id).await?.wait("").await };
    match waited.await {
        Ok(status) => Ok(status.code),
        // It ended before it could be asked: the record tells.
        Err(error) => match reread(&sandbox.bundle) {
            Some(record) if record.status == Status::Exited => Ok(exit_code(&record)),
            _ => Err(error.into()),
        },
    }
}

fn reread(bundle: &Bundle) -> Option<Record> {
    Record::read(bundle).ok()
}

fn exit_code(record: &Record) -> u32 {
    record.exit.as_ref().map_or(0, |exit| exit.code)
}

/// `kapsel stop`.
pub fn stop(host: &Host, flags: &Stop) -> Outcome {
    let grace = flags.timeout.map_or_else(|| host.config.stop_timeout(), Duration::from_secs);
    let signal = flags.signal;
    each_at_once(host, &flags.containers.names, move |sandbox, name| async move {
        if sandbox.record.status != Status::Exited {
            stop_one(&sandbox, signal, grace).await?;
        }
        Ok(name)
    })
}

async fn stop_one(sandbox: &Sandbox, signal: Option<i32>, grace: Duration) -> Result<(), Failure> {
    let signal = match signal {
        Some(signal) => signal,
        None => Wishes::of(&sandbox.spec()?)?.stop_signal.unwrap_or(SIGTERM),
    };
    let client = sandbox.connect().await?;
    // A paused process would see the signal only when it goes on.
    if client
        .state("", DEATH)
        .await
        .is_ok_and(|state| state.status == kapsel_sandbox::client::ProcessStatus::Paused)
    {
        client.resume().await?;
    }
    let wait = client.wait("");
    tokio::pin!(wait);
    for (signal, patience, all) in [(signal, grace, false), (SIGKILL, DEATH, true)] {
        match client.kill("", signal, all).await {
            Ok(()) | Err(ClientError::NotFound(_) | ClientError::Gone { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        match tokio::time::timeout(patience, &mut wait).await {
            // Gone: its shim clears away and ends.
            Ok(Ok(_) | Err(ClientError::Gone { .. } | ClientError::NotFound(_))) => return Ok(()),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => {}
        }
    }
    Err(Failure::new(format!("container {} does not end, not even by SIGKILL", sandbox.record.name))
        .hint(format!("'kapsel rm -f {}' ends its machine", sandbox.record.name)))
}

/// `kapsel kill`.
pub fn kill(host: &Host, flags: &Kill) -> Outcome {
    let signal = flags.signal;
    each_at_once(host, &flags.containers.names, move |sandbox, name| async move {
        sandbox.connect().await?.kill("", signal, false).await?;
        Ok(name)
    })
}

/// `kapsel pause`.
pub fn pause(host: &Host, flags: &Names) -> Outcome {
    each_at_once(host, &flags.names, |sandbox, name| async move {
        sandbox.connect().await?.pause().await?;
        Ok(name)
    })
}

/// `kapsel resume`.
pub fn resume(host: &Host, flags: &Names) -> Outcome {
    each_at_once(host, &flags.names, |sandbox, name| async move {
        sandbox.connect().await?.resume().await?;
        Ok(name)
    })
}
