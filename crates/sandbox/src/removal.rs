//! Removing a sandbox: nothing of it stays, whatever state it and its shim are in.

use std::time::{Duration, Instant};

use crate::{
    cleanup,
    client::Client,
    owner::{self, Owner},
    paths::{Bundle, Id},
    registry::{Error, Registry},
};

/// How long a shim may take to end in order before it is killed.
const ORDERLY: Duration = Duration::from_secs(5);
/// How long the system may take to end a killed shim.
const DEATH: Duration = Duration::from_secs(5);
/// How often to look whether it has.
const LOOK: Duration = Duration::from_millis(5);

/// Ends a sandbox by its shim, or without it, and removes its bundle. `id` is `None` when its record cannot be read: that must
/// not make a sandbox immortal.
///
/// # Errors
/// When something of it stays.
pub async fn remove(registry: &Registry, bundle: &Bundle, id: Option<&Id>) -> Result<(), Error> {
    if let Some(id) = id
        && matches!(owner::of(bundle), Owner::Shim(_))
    {
        let asked = async { Client::connect(bundle, id).await?.shutdown(true).await };
        // A shim that does not answer, or answers nonsense, is ended by force below.
        if let Ok(Ok(())) = tokio::time::timeout(ORDERLY, asked).await {
            gone(bundle, ORDERLY).await;
        }
    }
    if let Owner::Shim(pid) = owner::of(bundle) {
        // The lock says that the process lives: the number cannot be another's.
        if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
    if !gone(bundle, DEATH).await {
        return Err(Error::Stuck(bundle.dir().into()));
    }
    if bundle.dir().exists() {
        cleanup::resources(registry.paths(), bundle)?;
        registry.remove(bundle)?;
    }
    Ok(())
}

/// Waits until a bundle has no owner, nor anybody who clears it; false when it still has one.
async fn gone(bundle: &Bundle, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    while matches!(owner::of(bundle), Owner::Shim(_) | Owner::Clearing) {
        if Instant::now() > until {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
    true
}
