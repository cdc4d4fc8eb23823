//! A shim whose machine is there before its sandbox is known: it waits until a command takes it.

use std::time::{Duration, Instant};

use anyhow::Context;
use kapsel_sandbox::{
    cleanup,
    config::Config,
    life::{Sandbox, Spare},
    paths::{Bundle, Id, Paths},
    standby::{PATIENCE, Standby, TAKEN, mark_bad},
    timings::Stopwatch,
};
use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, UnixStream},
};

use crate::{
    args,
    serve::{asked_to_end, listener, passed},
};

/// How long a command that has taken a machine may take to say so.
const HANDING_OVER: Duration = Duration::from_secs(30);

/// A bundle whose machine stands by.
pub struct Waiting<'a> {
    /// Where things are.
    pub paths: &'a Paths,
    /// What is in force.
    pub config: &'a Config,
    /// Of the sandbox that is to be.
    pub bundle: &'a Bundle,
    /// Of the sandbox that is to be.
    pub id: &'a Id,
}

impl Waiting<'_> {
    /// Makes the machine and waits until it is taken: the leash of whoever took it, and the machine. `None`: nobody did, and nothing is
    /// left.
    ///
    /// # Errors
    /// When the machine cannot be made. Nothing is left then.
    pub async fn until_taken(&self, order: args::Standby) -> anyhow::Result<Option<(UnixStream, Spare)>> {
        let taken = self.stand_by(order).await;
        let cleared = match &taken {
            Ok(Some(_)) => {
                std::fs::remove_file(self.bundle.standby_socket()).context("cannot remove the socket")
            }
            Ok(None) | Err(_) => self.clear(),
        };
        // The first error is the one to tell.
        let taken = taken?;
        cleared.map(|()| taken)
    }

    fn clear(&self) -> anyhow::Result<()> {
        cleanup::resources(self.paths, self.bundle).context("something of the machine is left")?;
        std::fs::remove_dir_all(self.bundle.dir()).context("cannot remove the bundle")
    }

    async fn stand_by(&self, order: args::Standby) -> anyhow::Result<Option<(UnixStream, Spare)>> {
        let Self { paths, config, bundle, id } = *self;
        let socket = listener(order.socket).context("cannot use --standby-fd")?;
        let making = passed(order.making).context("cannot use --making-fd")?;
        let asked = asked_to_end()?;
        let watch = Stopwatch::default();
        let sandbox = Sandbox::open(paths.clone(), config.clone(), bundle.clone(), id.clone(), watch, None)?;
        let kind = sandbox.kind(&order.rootfs).context("no machine is to stand by for such a sandbox")?;
        let made = sandbox.stand_by(order.rootfs).await;
        let made = made.inspect_err(|error| mark_bad(paths, &kind, &error.to_string()));
        let spare = made.context("cannot make a machine that stands by")?;
        let published = Standby::publish(paths, config, &kind, id, &spare.key).await;
        let standby = published.context("cannot say that it stands by")?;
        drop(making);
        let leash = tokio::select! {
            leash = taken(&socket) => leash,
            () = given_up(&standby) => None,
            reason = spare.ended() => {
                tracing::warn!(%reason, "the machine that stood by ended");
                None
            }
            () = asked => None,
        };
        let Some(leash) = leash else {
            standby.take();
            spare.end().await;
            return Ok(None);
        };
        Ok(Some((leash, spare)))
    }
}

/// Waits until nobody can come any more: its time is over, or whoever took it died before saying so.
async fn given_up(standby: &Standby) {
    let since = Instant::now();
    loop {
        tokio::time::sleep(HANDING_OVER).await;
        if !standby.stands() {
            tokio::time::sleep(HANDING_OVER).await;
            return;
        }
        if since.elapsed() > PATIENCE && standby.take() {
            return;
        }
    }
}

/// Waits for whoever takes the machine; `None` when that ended before it had.
async fn taken(socket: &UnixListener) -> Option<UnixStream> {
    let (mut leash, _) = socket.accept().await.ok()?;
    let mut byte = [0];
    let read = tokio::time::timeout(HANDING_OVER, leash.read_exact(&mut byte)).await;
    (matches!(read, Ok(Ok(_))) && byte == [TAKEN]).then_some(leash)
}
