//! `kapsel rm`: nothing of a container stays, whatever state it and its shim are in.

use std::time::{Duration, Instant};

use kapsel_sandbox::client::Client;
use kapsel_sandbox::owner::{self, Owner};
use kapsel_sandbox::paths::{Bundle, Id};
use kapsel_sandbox::record::{Record, Status};
use kapsel_sandbox::registry::Error as RegistryError;

use super::host::{self, Host};
use super::many;
use crate::failure::{Failure, Outcome};
use crate::flags::container::Rm;

/// How long a shim may take to end in order before it is killed.
const ORDERLY: Duration = Duration::from_secs(5);
/// How long the system may take to end a killed shim.
const DEATH: Duration = Duration::from_secs(5);
/// How often to look whether it has.
const LOOK: Duration = Duration::from_millis(5);

/// Removes containers.
pub fn run(host: &Host, flags: &Rm) -> Outcome {
    let registry = host.sandboxes()?;
    let mut found = Vec::new();
    let resolved = many::each(&flags.containers.names, |name| match registry.resolve(name) {
        Ok(bundle) => {
            found.push((name.to_owned(), bundle));
            Ok(())
        }
        Err(RegistryError::NotFound(_)) if flags.force => Ok(()),
        Err(error) => Err(error.into()),
    });
    let force = flags.force;
    let removed = host::runtime()?.block_on(async {
        let mut tasks = Vec::new();
        for (name, bundle) in found {
            let host = host.clone();
            tasks
                .push(tokio::spawn(async move { remove(&host, &bundle, &name, force).await.map(|()| name) }));
        }
        many::print_all(tasks).await
    });
    Ok(resolved?.max(removed))
}

async fn remove(host: &Host, bundle: &Bundle, name: &str, force: bool) -> Result<(), Failure> {
    let record = Record::read(bundle);
    let runs = record.as_ref().is_ok_and(|record| record.status != Status::Exited)
        && matches!(owner::of(bundle), Owner::Shim(_));
    if runs && !force {
        return Err(Failure::new(format!("container {name} runs"))
            .hint(format!("'kapsel stop {name}' ends it first, 'kapsel rm -f {name}' kills it")));
    }
    match record {
        Ok(record) => end(host, bundle, &record.id).await?,
        // A record that cannot be read must not make a sandbox immortal.
        Err(_) => clear(host, bundle).await?,
    }
    Ok(())
}

/// Ends a sandbox by its shim, or without it, and removes its bundle.
///
/// # Errors
/// When something of it stays.
pub async fn end(host: &Host, bundle: &Bundle, id: &Id) -> Result<(), Failure> {
    if matches!(owner::of(bundle), Owner::Shim(_)) {
        let asked = async { Client::connect(bundle, id).await?.shutdown(true).await };
        // A shim that does not answer, or answers nonsense, is ended by force below.
        if let Ok(Ok(())) = tokio::time::timeout(ORDERLY, asked).await {
            gone(bundle, ORDERLY).await;
        }
    }
    clear(host, bundle).await
}

/// Kills a shim that is still there and removes what is left.
async fn clear(host: &Host, bundle: &Bundle) -> Result<(), Failure> {
    if let Owner::Shim(pid) = owner::of(bundle) {
        // The lock says that the process lives: the number cannot be another's.
        if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        if !gone(bundle, DEATH).await {
            return Err(Failure::new(format!("the shim of {} does not end", bundle.dir().display())));
        }
    }
    if bundle.dir().exists() {
        kapsel_sandbox::cleanup::resources(&host.paths, bundle)?;
        host.registry()?.remove(bundle)?;
    }
    Ok(())
}

/// Waits until a bundle has no owner; false when it still has one.
async fn gone(bundle: &Bundle, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    while matches!(owner::of(bundle), Owner::Shim(_)) {
        if Instant::now() > until {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
    true
}
