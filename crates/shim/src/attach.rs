//! The server's side of `attach.sock` ([`kapsel_sandbox::attach`] has the protocol).

use std::{sync::Arc, time::Duration};

use kapsel_sandbox::{
    attach::{Reply, Request, VERSION, Want},
    life::Sandbox,
    stdio::Attacher,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

use crate::clients::Clients;

/// How long a client may take for its first line.
const REQUEST: Duration = Duration::from_secs(10);
const MAX_LINE: usize = 64 << 10;

/// Serves clients until it is aborted.
pub async fn accept(listener: UnixListener, sandbox: Arc<Sandbox>, clients: Clients) {
    loop {
        match listener.accept().await {
            Ok((connection, _)) => {
                let (sandbox, clients) = (sandbox.clone(), clients.clone());
                tokio::spawn(async move {
                    let _counted = clients.enter();
                    if let Err(error) = client(connection, &sandbox).await {
                        tracing::debug!(%error, "a client of attach.sock");
                    }
                });
            }
            // Descriptors ran out: those in use come back sooner or later.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn client(mut connection: UnixStream, sandbox: &Sandbox) -> std::io::Result<()> {
    let request = match tokio::time::timeout(REQUEST, read_request(&mut connection)).await {
        Ok(request) => request?,
        Err(_) => return Err(std::io::ErrorKind::TimedOut.into()),
    };
    match request {
        Ok(want) => serve(connection, sandbox, want).await,
        Err(why) => refuse(&mut connection, why).await,
    }
}

/// Reads one line and not a byte more: what follows belongs to the stream.
async fn read_request(connection: &mut UnixStream) -> std::io::Result<Result<Want, String>> {
    let mut line = Vec::new();
    loop {
        match connection.read_u8().await? {
            b'\n' => break,
            byte => line.push(byte),
        }
        if line.len() >= MAX_LINE {
            return Ok(Err("the request is too long".into()));
        }
    }
    Ok(match serde_json::from_slice::<Request>(&line) {
        Ok(request) if request.version == VERSION => Ok(request.want),
        Ok(request) => {
            Err(format!("this shim speaks version {VERSION} of its protocol, not {}", request.version))
        }
        Err(error) => Err(format!("the request is not understood: {error}")),
    })
}

async fn serve(mut connection: UnixStream, sandbox: &Sandbox, want: Want) -> std::io::Result<()> {
    match want {
        Want::Stream { exec_id, stream, lossless } => {
            let process = match sandbox.main.process(&exec_id) {
                Ok(process) if process.hub.accepts(stream) => process,
                Ok(_) => {
                    return refuse(&mut connection, "the process has no such stream, or it has ended".into())
                        .await;
                }
                Err(error) => return refuse(&mut connection, error.to_string()).await,
            };
            // Answered first: the stream's bytes may follow at once.
            answer(&mut connection, &Reply::default()).await?;
            if let Err(why) = process.hub.attach(stream, Attacher { connection, lossless }) {
                tracing::debug!(why, "a client came too late");
            }
            Ok(())
        }
        Want::Stat { path, follow } => match sandbox.main.stat(&path, follow).await {
            Ok(stat) => answer(&mut connection, &Reply { stat: Some(stat), ..Default::default() }).await,
            Err(error) => refuse(&mut connection, error.to_string()).await,
        },
        Want::CopyOut { path, follow } => match sandbox.main.copy_out(&path, follow).await {
            Ok(copy) => {
                answer(&mut connection, &Reply::default()).await?;
                // The archive's end marker tells the client whether it has all.
                if let Err(error) = copy.run(connection).await {
                    tracing::warn!(%error, path, "a copy out of the container failed");
                }
                Ok(())
            }
            Err(error) => refuse(&mut connection, error.to_string()).await,
        },
        Want::CopyIn { path, keep_owner } => match sandbox.main.copy_in(&path, keep_owner).await {
            Ok(copy) => {
                answer(&mut connection, &Reply::default()).await?;
                let (reader, mut writer) = connection.split();
                let reply = match copy.run(reader).await {
                    Ok((entries, bytes)) => Reply { entries, bytes, ..Default::default() },
                    Err(error) => Reply { error: Some(error.to_string()), ..Default::default() },
                };
                let mut line = serde_json::to_vec(&reply)?;
                line.push(b'\n');
                writer.write_all(&line).await
            }
            Err(error) => refuse(&mut connection, error.to_string()).await,
        },
    }
}

async fn refuse(connection: &mut UnixStream, why: String) -> std::io::Result<()> {
    answer(connection, &Reply { error: Some(why), ..Default::default() }).await
}

async fn answer(connection: &mut UnixStream, reply: &Reply) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    connection.write_all(&line).await
}
