//! Interfaces that come to a sandbox's network namespace, or go, while it runs (`podman network connect`).

use std::{
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use kapsel_machine::Attachment;
use kapsel_network::{Changes, Events, Mac, Port, Taken};
use kapsel_protocol::limits;
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    Ended, Error, Guest, Sandbox, lock,
    network::{Connection, Plugs},
};

/// An interface is taken when nothing has changed in the namespace for so long: whoever adds one gives it addresses and routes next.
const QUIET: Duration = Duration::from_millis(300);
/// But a namespace in which something changes all the time is not waited for.
const BUSY: Duration = Duration::from_secs(5);

impl Sandbox {
    /// Has the guest follow its namespace, in the background, until the sandbox ends.
    pub(super) fn follow_network(self: &Arc<Self>) {
        let Connection::Taken(taken) = &lock(&self.host).network else { return };
        let (taken, sandbox) = (taken.clone(), Arc::downgrade(self));
        tokio::spawn(async move {
            if let Err(error) = follow(&taken, &sandbox).await {
                tracing::warn!(%error, "interfaces that are added or removed from here on are not followed");
            }
        });
    }
}

async fn follow(taken: &Arc<Mutex<Taken>>, sandbox: &Weak<Sandbox>) -> Result<(), Error> {
    let events = blocking(taken, |taken| taken.events()).await?;
    let Some(mut ended) = sandbox.upgrade().map(|sandbox| sandbox.ended.subscribe()) else { return Ok(()) };
    // SAFETY: `Events` owns one descriptor, which is the same for all of its life, and the `AsyncFd` owns it.
    let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) };
    let events = events.map_err(|e| Error::Resources(format!("cannot watch the network namespace: {e}")))?;
    loop {
        // Also at once: something may have changed before it was watched.
        let changes = blocking(taken, |taken| taken.update(limits::INTERFACES_MAX)).await?;
        let Some(sandbox) = sandbox.upgrade() else { return Ok(()) };
        let Ok(guest) = sandbox.guest() else { return Ok(()) };
        apply(taken, guest, changes).await?;
        drop(sandbox);
        tokio::select! {
            changed = changed(&events) => changed?,
            _ = ended.wait_for(|ended| *ended != Ended::No) => return Ok(()),
        }
    }
}

/// Waits for a change, and that no more follow.
async fn changed(events: &AsyncFd<Events>) -> Result<(), Error> {
    let failed = |e: std::io::Error| Error::Resources(format!("cannot watch the network namespace: {e}"));
    events.readable().await.map_err(failed)?.clear_ready();
    let settled = async {
        while events.get_ref().drain() {
            tokio::time::sleep(QUIET).await;
        }
    };
    // What comes after it is seen the next time.
    let _ = tokio::time::timeout(BUSY, settled).await;
    Ok(())
}

/// Plugs in what has come, and takes away what has gone.
async fn apply(taken: &Arc<Mutex<Taken>>, guest: &Guest, changes: Changes) -> Result<(), Error> {
    for Mac(mac) in changes.gone {
        if let Err(error) = guest.agent.disconnect(mac).await {
            tracing::info!(%error, "the guest does not let go of an interface that has gone");
        }
        if let Err(error) = guest.machine.detach(mac).await {
            tracing::warn!(%error, "an interface that has gone stays in the machine");
        }
    }
    for port in changes.added {
        let (interface, mac) = (port.interface.name.clone(), port.interface.mac);
        match plug(guest, port).await {
            Ok(()) => tracing::info!(interface, "the guest has an interface that was added"),
            Err(error) => {
                tracing::warn!(interface, %error, "an interface that was added is left out");
                let _ = guest.machine.detach(mac.0).await;
                blocking(taken, move |taken| taken.pass_over(mac)).await?;
            }
        }
    }
    Ok(())
}

async fn plug(guest: &Guest, port: Port) -> Result<(), Error> {
    let Plugs { nics, interfaces } = Plugs::of(vec![port])?;
    for nic in nics {
        guest.machine.attach(Attachment::Nic(nic)).await?;
    }
    guest.agent.connect(interfaces).await
}

/// The kernel is fast, but its locks are shared with all of the host.
async fn blocking<T: Send + 'static>(
    taken: &Arc<Mutex<Taken>>,
    work: impl FnOnce(&mut Taken) -> kapsel_network::Result<T> + Send + 'static,
) -> Result<T, Error> {
    let taken = taken.clone();
    let working = tokio::task::spawn_blocking(move || work(&mut lock(&taken))).await;
    Ok(working.map_err(|e| Error::Resources(format!("following the network failed: {e}")))??)
}
