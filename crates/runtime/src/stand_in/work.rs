//! What a stand-in does: make its container or process, carry streams and signals, end as it ends.

use std::{os::fd::AsFd, path::PathBuf, time::Duration};

use anyhow::Context;
use kapsel_sandbox::{
    client::{Client, Error as ClientError, Fate, ProcessStatus},
    engine::{Bundle, Named, Network},
    launch,
    paths::Id,
    record::Record,
    registry::Registry,
    removal,
    signals::{Event, Signals},
    streams::Streams,
};
use oci_spec::runtime::Spec;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::{
    conmon,
    control::{Answer, Control, NewContainer, NewProcess},
    streams::{self, Running, Wanted},
};
use crate::verbs::Host;

/// How long a shim may take to clear up and tell that a start has failed.
const SHIM_TELLS: Duration = Duration::from_secs(10);
/// The exit of a process whose sandbox is lost: as if killed.
const KILLED: u8 = 137;

/// A current-thread runtime: all that is done is waiting.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot set up event handling")
}

/// Stands for a container.
pub fn container(control: &mut Control, order: NewContainer) -> anyhow::Result<u8> {
    // Cgroup and namespace are entered by a thread: it must be the only one. The shim and all that it starts follow.
    if let Some(cgroup) = &order.cgroup {
        cgroup.parse::<Named>()?.enter_new()?;
    }
    enter(&order.network)?;
    control.send(&Answer::Ready)?;
    let () = control.receive()?;
    let host = Host::of_environment()?;
    let signals = Signals::take_over().context("cannot take signals over")?;
    runtime()?.block_on(async {
        let (sandbox, streams) = launch(&host, &order).await?;
        control.send(&Answer::Done)?;
        control.close();
        let standing = Standing { client: &sandbox.client, exec_id: "", terminal: order.terminal, signals };
        let code = standing.stay(streams::run(streams)?).await;
        if let Fate::OutOfMemory(_) = sandbox.client.fate("").await
            && let Err(error) = conmon::tell()
        {
            eprintln!("kapsel-runtime: {error:#}");
        }
        Ok(code)
        // The leash goes here, when the sandbox has ended anyway.
    })
}

fn enter(network: &Network) -> anyhow::Result<()> {
    match network {
        // SAFETY: of what unshare(2) may take apart only the network namespace is named: no memory, no descriptors.
        Network::New => unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
            .context("cannot make a network namespace; kapsel-runtime must run as root"),
        Network::At(path) => {
            let failed = || format!("cannot enter the network namespace {}", path.display());
            let file = std::fs::File::open(path).with_context(failed)?;
            rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .with_context(failed)
        }
    }
}

/// Launches the sandbox and connects to its streams while the machine starts.
async fn launch(host: &Host, order: &NewContainer) -> anyhow::Result<(launch::Sandbox, Streams)> {
    let args = order.spec.process().as_ref().and_then(|process| process.args().clone()).unwrap_or_default();
    let mut record = Record::new(order.sandbox.clone(), String::new(), args);
    record.labels = order.labels.clone();
    record.rootfs = Some(order.rootfs.source.clone());
    record.terminal = order.terminal;
    let wanted = Wanted::of(order.terminal);
    record.stdin = true;
    let options = launch::Options { leash: true, root: host.root.as_deref(), ..launch::Options::default() };
    let spec = connected(order)?;
    let sandbox = launch::launch(&host.paths, &host.config, &mut record, &spec, options).await?;
    let bundle = sandbox.bundle.clone();
    let connecting =
        tokio::task::spawn_blocking(move || Streams::open(&bundle, "", wanted.stdin, wanted.terminal));
    // The shim gives up first: it can say why.
    let deadline = host.config.start_timeout() + SHIM_TELLS;
    let created = sandbox.client.create(&order.rootfs, &wanted.io(), deadline).await;
    let connected = connecting.await.context("connecting the streams failed");
    let result = match created {
        Ok(()) => connected.and_then(|streams| Ok(streams?)),
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(streams) => Ok((sandbox, streams)),
        Err(error) => {
            let registry = Registry::open(&host.paths)?;
            if let Err(left) = removal::remove(&registry, &sandbox.bundle, Some(&sandbox.id)).await {
                return Err(error.context(format!("and something of the sandbox is left: {left}")));
            }
            Err(error)
        }
    }
}

/// The specification with the namespace whose interfaces the sandbox shall have: what engine and hooks have put there by now.
fn connected(order: &NewContainer) -> anyhow::Result<Spec> {
    let path = match &order.network {
        Network::New => PathBuf::from(format!("/proc/{}/ns/net", std::process::id())),
        Network::At(path) => path.clone(),
    };
    let mut spec = order.spec.clone();
    Bundle::connect(&mut spec, &path)?;
    Ok(spec)
}

/// Stands for a process that is added to a container.
pub fn process(control: &mut Control, order: NewProcess) -> anyhow::Result<u8> {
    // As above. One that is gone went with the container, which is told below.
    if let Some(cgroup) = &order.cgroup
        && let Some(cgroup) = cgroup.parse::<Named>()?.open()
    {
        cgroup.enter()?;
    }
    let host = Host::of_environment()?;
    let signals = Signals::take_over().context("cannot take signals over")?;
    runtime()?.block_on(async {
        let bundle = host.paths.bundle(&order.sandbox);
        let client = Client::connect(&bundle, &order.sandbox).await?;
        let id = Id::random();
        let exec_id = id.as_str();
        let wanted = Wanted::of(order.terminal);
        client.exec(exec_id, &order.process, &wanted.io()).await?;
        let started = async {
            let streams = Streams::open(&bundle, exec_id, wanted.stdin, wanted.terminal)?;
            client.start(exec_id).await.map_err(explain)?;
            Ok::<_, anyhow::Error>(streams)
        };
        let streams = match started.await {
            Ok(streams) => streams,
            Err(error) => {
                let _ = client.delete(exec_id).await;
                return Err(error);
            }
        };
        control.send(&Answer::Done)?;
        control.close();
        let standing = Standing { client: &client, exec_id, terminal: order.terminal, signals };
        let code = standing.stay(streams::run(streams)?).await;
        // The shim would keep an ended process for whoever asks for its exit code. It may be gone with its container.
        let _ = client.delete(exec_id).await;
        Ok(code)
    })
}

/// Why a program does not start, in the words by which engines tell "not found" and "not executable" from other failures.
pub fn explain(error: ClientError) -> anyhow::Error {
    let words = match &error {
        ClientError::ProgramNotFound(_) => "executable file not found in $PATH",
        ClientError::NotExecutable(_) => "permission denied",
        _ => return error.into(),
    };
    anyhow::Error::from(error).context(words)
}

/// A process that runs in the guest, with this one for it on the host.
struct Standing<'a> {
    client: &'a Client,
    /// Empty for the container's first.
    exec_id: &'a str,
    terminal: bool,
    signals: Signals,
}

impl Standing<'_> {
    /// Stays until the process ends; its exit code.
    async fn stay(mut self, mut streams: Running) -> u8 {
        let exited = self.client.wait(self.exec_id);
        tokio::pin!(exited);
        if self.terminal {
            self.resize().await;
        }
        loop {
            tokio::select! {
                status = &mut exited => {
                    // Without a shim there is no sandbox.
                    let Ok(status) = status else { return KILLED };
                    streams.drain(self.exec_id.is_empty()).await;
                    return u8::try_from(status.code).unwrap_or(u8::MAX);
                }
                event = self.signals.next() => match event {
                    Event::Resized if self.terminal => self.resize().await,
                    Event::Resized => {}
                    Event::Forward(signal) => self.forward(signal).await,
                },
            }
        }
    }

    /// A signal for a process that was not started ends it, as it would end runc's: it has no handlers yet.
    async fn forward(&self, signal: i32) {
        let created = matches!(
            self.client.state(self.exec_id, kapsel_sandbox::client::CALL).await,
            Ok(state) if state.status == ProcessStatus::Created
        );
        let signal = if created { libc::SIGKILL } else { signal };
        // One that cannot be delivered finds a process that has ended, or a sandbox that is about to.
        let _ = self.client.kill(self.exec_id, signal, false).await;
    }

    /// A size that does not arrive is not worth ending for: the next one may.
    async fn resize(&self) {
        if let Some((columns, rows)) = streams::size() {
            let _ = self.client.resize(self.exec_id, columns, rows).await;
        }
    }
}
