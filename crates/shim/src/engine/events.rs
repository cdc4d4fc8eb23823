//! What containerd is told, in the order in which it happened.

use std::{path::PathBuf, process::Stdio, time::Duration};

use anyhow::Context;
use containerd_shim_protos::{
    events::task as message,
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim::event::Envelope,
    shim_async::EventsClient,
};
use kapsel_sandbox::record::now;
use tokio::{
    io::AsyncWriteExt,
    net::UnixStream,
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use ttrpc::asynchronous::Client;

use super::flags::Flags;
use crate::convert;

/// Events that wait for a containerd that is away. One that comes back looks for itself how its containers are.
const WAITING: usize = 1024;
/// How long an event is worth telling.
const FRESH: Duration = Duration::from_secs(60);
/// How long containerd may take for one.
const TOLD: Duration = Duration::from_secs(5);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(250);

/// What happened to a container.
#[derive(Debug)]
pub enum Event {
    /// It is there.
    Create(message::TaskCreate),
    /// Its first process runs.
    Start(message::TaskStart),
    /// A process ended.
    Exit(message::TaskExit),
    /// It is gone.
    Delete(message::TaskDelete),
    /// A process is about to be added.
    ExecAdded(message::TaskExecAdded),
    /// An added process runs.
    ExecStarted(message::TaskExecStarted),
    /// It is frozen.
    Paused(message::TaskPaused),
    /// It is thawed.
    Resumed(message::TaskResumed),
    /// A process of it was killed since memory ran out.
    Oom(message::TaskOOM),
}

impl Event {
    /// Topic, the message's name, and the message.
    fn parts(&self) -> (&'static str, &'static str, containerd_shim_protos::protobuf::Result<Vec<u8>>) {
        match self {
            Self::Create(m) => ("/tasks/create", "TaskCreate", m.write_to_bytes()),
            Self::Start(m) => ("/tasks/start", "TaskStart", m.write_to_bytes()),
            Self::Exit(m) => ("/tasks/exit", "TaskExit", m.write_to_bytes()),
            Self::Delete(m) => ("/tasks/delete", "TaskDelete", m.write_to_bytes()),
            Self::ExecAdded(m) => ("/tasks/exec-added", "TaskExecAdded", m.write_to_bytes()),
            Self::ExecStarted(m) => ("/tasks/exec-started", "TaskExecStarted", m.write_to_bytes()),
            Self::Paused(m) => ("/tasks/paused", "TaskPaused", m.write_to_bytes()),
            Self::Resumed(m) => ("/tasks/resumed", "TaskResumed", m.write_to_bytes()),
            Self::Oom(m) => ("/tasks/oom", "TaskOOM", m.write_to_bytes()),
        }
    }
}

/// Takes events and tells them in the background.
#[derive(Debug)]
pub struct Events {
    queue: mpsc::Sender<Envelope>,
    namespace: String,
}

/// Tells what is left, and ends.
#[derive(Debug)]
pub struct Telling(JoinHandle<()>);

impl Events {
    /// For containers in the namespace of `flags`, over containerd's ttrpc socket, or by its own command without one.
    pub fn to(flags: &Flags, ttrpc: Option<&str>) -> (Self, Telling) {
        let (queue, envelopes) = mpsc::channel(WAITING);
        let teller = Teller::new(flags, ttrpc);
        let telling = Telling(tokio::spawn(teller.run(envelopes)));
        (Self { queue, namespace: flags.namespace.clone() }, telling)
    }

    /// Never waits: what containerd does not take is dropped in the end, and the containers go on.
    pub fn tell(&self, event: &Event) {
        let (topic, name, value) = event.parts();
        let value = match value {
            Ok(value) => value,
            Err(error) => return tracing::error!(%error, topic, "an event cannot be written"),
        };
        let any = Any { type_url: format!("containerd.events.{name}"), value, ..Default::default() };
        let envelope = Envelope {
            timestamp: convert::timestamp(now()),
            namespace: self.namespace.clone(),
            topic: topic.into(),
            event: MessageField::some(any),
            ..Default::default()
        };
        if self.queue.try_send(envelope).is_err() {
            tracing::warn!(topic, "containerd takes no events; one is lost");
        }
    }
}

impl Telling {
    /// Waits until all events are told, once there is nobody any more who could add one, but not for ever.
    pub async fn finish(self) {
        let _ = timeout(TOLD, self.0).await;
    }
}

/// How containerd is told.
struct Teller {
    /// containerd's ttrpc socket.
    socket: Option<PathBuf>,
    client: Option<EventsClient>,
    publish_binary: PathBuf,
    address: String,
}

impl Teller {
    fn new(flags: &Flags, ttrpc: Option<&str>) -> Self {
        Self {
            socket: ttrpc.map(|address| address.strip_prefix("unix://").unwrap_or(address).into()),
            client: None,
            publish_binary: flags.publish_binary.clone(),
            address: flags.address.clone(),
        }
    }

    async fn run(mut self, mut envelopes: mpsc::Receiver<Envelope>) {
        while let Some(envelope) = envelopes.recv().await {
            let until = Instant::now() + FRESH;
            while let Err(error) = self.tell(&envelope).await {
                // The next attempt begins with a new connection: this one may be to a containerd that is no more.
                self.client = None;
                if Instant::now() > until {
                    tracing::warn!(topic = envelope.topic, "an event is not told: {error:#}");
                    break;
                }
                sleep(PAUSE).await;
            }
        }
    }

    async fn tell(&mut self, envelope: &Envelope) -> anyhow::Result<()> {
        let Some(socket) = &self.socket else { return self.publish(envelope).await };
        let client = match &mut self.client {
            Some(client) => client,
            none => {
                let connecting = timeout(TOLD, UnixStream::connect(socket)).await;
                let stream = connecting.context("containerd is busy")?;
                let stream = stream.with_context(|| format!("cannot reach {}", socket.display()))?;
                none.insert(EventsClient::new(Client::new(stream.into())))
            }
        };
        let request = containerd_shim_protos::api::ForwardRequest {
            envelope: MessageField::some(envelope.clone()),
            ..Default::default()
        };
        client.forward(ttrpc::context::with_duration(TOLD), &request).await?;
        Ok(())
    }

    /// By containerd's own command, which older ones rely on.
    async fn publish(&self, envelope: &Envelope) -> anyhow::Result<()> {
        let mut command = tokio::process::Command::new(&self.publish_binary);
        command.args(["--address", &self.address, "publish", "--topic", &envelope.topic]);
        command.args(["--namespace", &envelope.namespace]).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child =
            command.spawn().with_context(|| format!("cannot start {}", self.publish_binary.display()))?;
        let event = envelope.event.get_or_default().write_to_bytes()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&event).await?;
        }
        let status = timeout(TOLD, child.wait()).await.context("containerd publish hangs")??;
        anyhow::ensure!(status.success(), "containerd publish: {status}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn without_a_socket_containerds_command_tells_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let (program, told) = (dir.path().join("containerd"), dir.path().join("told"));
        let script = format!("#!/bin/sh\necho \"$*\" $(tr -cd 'a-zA-Z.') >> {}\n", told.display());
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let flags = Flags {
            namespace: "n".into(),
            address: "/a".into(),
            publish_binary: program,
            ..Default::default()
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (events, telling) = Events::to(&flags, None);
            events.tell(&Event::Paused(message::TaskPaused {
                container_id: "c1".into(),
                ..Default::default()
            }));
            events.tell(&Event::Resumed(message::TaskResumed {
                container_id: "c1".into(),
                ..Default::default()
            }));
            drop(events);
            telling.finish().await;
        });
        let told = std::fs::read_to_string(told).unwrap();
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(lines.len(), 2, "{told}");
        for (line, (topic, name)) in
            lines.iter().zip([("/tasks/paused", "TaskPaused"), ("/tasks/resumed", "TaskResumed")])
        {
            let call = format!("--address /a publish --topic {topic} --namespace n");
            assert!(line.starts_with(&call) && line.contains(&format!("containerd.events.{name}")), "{line}");
        }
    }
}
