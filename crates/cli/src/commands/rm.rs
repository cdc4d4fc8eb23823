//! `kapsel rm`: nothing of a container stays, whatever state it and its shim are in.

use kapsel_sandbox::owner::{self, Owner};
use kapsel_sandbox::paths::{Bundle, Id};
use kapsel_sandbox::record::{Record, Status};
use kapsel_sandbox::registry::Error as RegistryError;
use kapsel_sandbox::removal;

use super::host::{self, Host};
use super::many;
use crate::failure::{Failure, Outcome};
use crate::flags::container::Rm;

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
        Err(_) => removal::remove(&host.registry()?, bundle, None).await?,
    }
    Ok(())
}

/// Ends a sandbox and removes its bundle.
///
/// # Errors
/// When something of it stays.
pub async fn end(host: &Host, bundle: &Bundle, id: &Id) -> Result<(), Failure> {
    Ok(removal::remove(&host.registry()?, bundle, Some(id)).await?)
}
