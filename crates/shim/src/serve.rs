//! The life of this process around that of its sandbox.

use std::{
    os::fd::{AsFd, FromRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use containerd_shim_protos::shim_async::create_task;
use futures::stream;
use kapsel_sandbox::{
    cleanup,
    config::Config,
    life::{Cause, Sandbox, Spare},
    owner::{self, Ownership},
    paths::{Bundle, Id, Paths},
    record::{Exit, Record, Status, now},
    timings::Stopwatch,
};
use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
};
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::{
    args::Serve,
    attach,
    clients::{Clients, Counted},
    standby::Waiting,
    task::TaskService,
};

/// In which the names of kapsel's own sandboxes are unique.
const NAMESPACE: &str = "kapsel";
/// How long clients may take to fetch their answers once the sandbox is gone.
const LINGER: Duration = Duration::from_secs(10);
/// How long a shim waits for its first order when nobody is connected.
const UNWANTED: Duration = Duration::from_secs(30);

/// Owns the sandbox of one command until nothing of it is left.
pub async fn serve(paths: Paths, config: Config, args: Serve, watch: Stopwatch) -> anyhow::Result<()> {
    let sockets = Sockets {
        task: listener(args.socket).context("cannot use --socket-fd")?,
        attach: listener(args.attach).context("cannot use --attach-fd")?,
    };
    let leash = args.leash.map(connection).transpose().context("cannot use --leash-fd")?;
    let bundle = Bundle::at(&args.bundle);
    let ownership = own(&bundle)?;
    let (leash, spare, watch) = match args.standby {
        None => (leash, None, watch),
        Some(order) => {
            let waiting = Waiting { paths: &paths, config: &config, bundle: &bundle, id: &args.id };
            let Some((leash, spare)) = waiting.until_taken(order).await? else { return Ok(()) };
            (Some(leash), Some(spare), Stopwatch::default())
        }
    };
    let owned = Owned::take(paths, config, (bundle, ownership), args.id, sockets, watch, spare).await?;
    let (asked, sandbox) = (asked_to_end()?, owned.sandbox.clone());
    tokio::spawn(async move {
        asked.await;
        sandbox.end(terminated()).await;
    });
    if let Some(leash) = leash {
        tokio::spawn(hold(leash, owned.sandbox.clone()));
    }
    tokio::spawn(give_up(owned.sandbox.clone(), owned.clients.clone()));
    owned.gone().await;
    Ok(())
}

/// What a sandbox's clients connect to.
pub struct Sockets {
    /// The Task API.
    pub task: UnixListener,
    /// Streams.
    pub attach: UnixListener,
}

/// A sandbox that this process owns, and answers for to kapsel's commands.
pub struct Owned {
    /// Itself.
    pub sandbox: Arc<Sandbox>,
    clients: Clients,
    attaching: JoinHandle<()>,
    _server: Server,
    _ownership: Ownership,
}

impl Owned {
    /// Takes a bundle; nothing is started yet, but perhaps a machine stood by.
    pub async fn take(
        paths: Paths,
        config: Config,
        bundle: (Bundle, Ownership),
        id: Id,
        sockets: Sockets,
        watch: Stopwatch,
        spare: Option<Spare>,
    ) -> anyhow::Result<Self> {
        let (bundle, ownership) = bundle;
        let sandbox = match Sandbox::open(paths.clone(), config, bundle.clone(), id, watch, spare) {
            Ok(sandbox) => sandbox,
            Err(error) => {
                record_failure(&paths, &bundle, &error.to_string());
                return Err(error.into());
            }
        };
        let clients = Clients::default();
        let attaching = tokio::spawn(attach::accept(sockets.attach, sandbox.clone(), clients.clone()));
        let name = sandbox.id().as_str().to_owned();
        let mut server = Server::new()
            .register_service(create_task(Arc::new(TaskService::new(
                sandbox.main.clone(),
                name,
                NAMESPACE.into(),
            ))))
            .add_listener(counted(sockets.task, clients.clone()));
        server.start().await.context("cannot serve the Task API")?;
        Ok(Self { sandbox, clients, attaching, _server: server, _ownership: ownership })
    }

    /// Waits until nothing of the sandbox is left, and its clients have their answers.
    pub async fn gone(self) {
        self.sandbox.gone().await;
        // Whoever waits for the end has it within this time, or is not interested.
        let _ = tokio::time::timeout(LINGER, self.clients.none()).await;
        self.attaching.abort();
    }
}

/// Takes a bundle that is nobody's.
pub fn own(bundle: &Bundle) -> anyhow::Result<Ownership> {
    let claimed = owner::claim(bundle).with_context(|| format!("cannot own {}", bundle.dir().display()))?;
    claimed.with_context(|| format!("{} belongs to another shim", bundle.dir().display()))
}

/// A listening socket that was passed to this process.
pub fn listener(fd: RawFd) -> std::io::Result<UnixListener> {
    let listener = std::os::unix::net::UnixListener::from(passed(fd)?);
    // Refuses what is no socket, before anything else believes in it.
    listener.local_addr()?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

fn connection(fd: RawFd) -> std::io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(passed(fd)?);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// A descriptor that was passed to this process and not to its children: one that kept the leash would keep the sandbox.
pub fn passed(fd: RawFd) -> std::io::Result<OwnedFd> {
    // SAFETY: the parent passed `fd` to this process for one purpose alone (`kapsel_sandbox::launch`); nothing here has used it
    // before.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    owner::close_on_exec(fd.as_fd())?;
    Ok(fd)
}

/// The Task API's connections, counted.
pub fn counted(listener: UnixListener, clients: Clients) -> Listener {
    Listener::new(stream::unfold((listener, clients), |(listener, clients)| async move {
        let accepted = listener.accept().await.map(|(stream, _)| Counted::new(stream, &clients));
        Some((accepted, (listener, clients)))
    }))
}

/// Waits until this process is asked to end.
pub fn asked_to_end() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch signals")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Why a sandbox ends with the process that owns it.
pub fn terminated() -> Cause {
    Cause::Killed("the shim was asked to terminate".into())
}

/// Ends the sandbox with the process that holds the leash, unless that lets go.
async fn hold(mut leash: UnixStream, sandbox: Arc<Sandbox>) {
    let mut byte = [0];
    if !matches!(leash.read(&mut byte).await, Ok(1)) {
        sandbox.end(Cause::Killed("the command that ran the sandbox ended".into())).await;
    }
}

/// Ends a sandbox that nobody asks for anything: its maker died before it could.
async fn give_up(sandbox: Arc<Sandbox>, clients: Clients) {
    tokio::time::sleep(UNWANTED).await;
    clients.none().await;
    if !sandbox.has_begun() {
        sandbox.end(Cause::NotStarted("nobody asked for the container".into())).await;
    }
}

/// What cannot even be read is recorded as ended, so that it is neither started again nor in the way.
fn record_failure(paths: &Paths, bundle: &Bundle, reason: &str) {
    if let Ok(mut record) = Record::read(bundle) {
        record.status = Status::Exited;
        record.exit = Some(Exit { code: 125, at: now(), oom: false, reason: Some(reason.into()) });
        if let Err(error) = record.write(bundle) {
            tracing::warn!(%error, "cannot keep the record");
        }
    }
    if let Err(error) = cleanup::resources(paths, bundle) {
        tracing::warn!(%error, "something is left; the next command tries again");
    }
}
