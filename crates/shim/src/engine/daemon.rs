//! The life of the process that answers for containers of containerd's: from `start` until the last of them is deleted.

use std::{collections::HashMap, sync::Arc, time::Duration};

use anyhow::Context;
use containerd_shim_protos::{sandbox_async::create_sandbox, shim_async::create_task};
use tokio::time::timeout;
use ttrpc::asynchronous::{Server, Service as Methods};

use super::{
    Host,
    events::Events,
    flags::Daemon,
    sandbox,
    service::Service,
    start,
    tasks::{Count, Tasks},
};
use crate::{
    clients::Clients,
    serve::{asked_to_end, counted, listener, terminated},
};

/// How long containerd may take for its first container, when it is not connected, and to be done with the last.
const UNWANTED: Duration = Duration::from_secs(30);
/// How long an answer that is on its way may take.
const ANSWERS: Duration = Duration::from_secs(2);

/// Answers for containers until there is none left.
pub async fn serve(host: Host, daemon: Daemon) -> anyhow::Result<()> {
    let Daemon { flags, socket } = daemon;
    let path = start::socket_path(&host, &flags, &flags.id);
    let listener = listener(socket).context("cannot use -socket-fd")?;
    let ttrpc = std::env::var(start::TTRPC_ADDRESS).ok().filter(|address| !address.is_empty());
    let (events, telling) = Events::to(&flags, ttrpc.as_deref());
    let tasks = Tasks::new(host, flags, events);
    let clients = Clients::default();
    let mut server = Server::new()
        .register_service(methods(&tasks))
        .register_service(create_sandbox(Arc::new(sandbox::Service::new(tasks.clone()))))
        .add_listener(counted(listener, clients.clone()));
    server.start().await.context("cannot serve the Task API")?;
    tokio::select! {
        () = unneeded(&tasks, &clients) => {}
        () = asked_to_end()? => {
            for task in tasks.all() {
                task.sandbox.end(terminated()).await;
            }
        }
    }
    // First the name: a successor must not find a shim that is about to end.
    let _ = std::fs::remove_file(&path);
    let _ = timeout(ANSWERS, clients.none()).await;
    let _ = server.shutdown().await;
    drop(server);
    drop(tasks);
    telling.finish().await;
    Ok(())
}

/// The Task API under the names of its two versions, which differ in nothing else.
fn methods(tasks: &Arc<Tasks>) -> HashMap<String, Methods> {
    let named = |version: &str| {
        let services = create_task(Arc::new(Service::new(tasks.clone())));
        let version = format!("containerd.task.{version}.Task");
        services.into_values().map(move |methods| (version.clone(), methods)).collect::<Vec<_>>()
    };
    named("v2").into_iter().chain(named("v3")).collect()
}

/// Waits until nobody needs this process any more.
async fn unneeded(tasks: &Arc<Tasks>, clients: &Clients) {
    let mut counts = tasks.count();
    let empty = |count: &Count| count.now == 0;
    loop {
        // The sender lives as long as `tasks`.
        let Ok(count) = counts.wait_for(empty).await.map(|count| *count) else { return };
        if count.begun && count.dismissed {
            return;
        }
        // containerd may be away, or still on its way.
        let changed = timeout(UNWANTED, counts.changed()).await;
        if changed.is_err() && timeout(Duration::ZERO, clients.none()).await.is_ok() {
            return;
        }
    }
}
