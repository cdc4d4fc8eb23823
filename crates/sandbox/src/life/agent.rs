//! Speaking to the guest's agent. Whatever it answers is hostile: every wait has a deadline, every text is cut, every
//! number is checked before it is believed.

use std::{future::Future, sync::Arc, time::Duration};

use kapsel_channel::Channel;
use kapsel_protocol::{
    AGENT_PORT, VERSION,
    api::{self, CopyRequest, CreateRequest, ExecRequest},
    limits,
    service::AgentClient,
};
use ttrpc::{
    Code,
    asynchronous::{Client, transport::Socket},
    context,
};

use super::Error;
use crate::{record::Exit, timings::Stopwatch};

/// A connection to one agent. Calls may overlap.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    watch: Stopwatch,
}

/// Until when a call may take.
fn within(deadline: Duration) -> context::Context {
    context::with_duration(deadline)
}

impl Agent {
    /// Opens the agent's stream. Nothing is sent yet. What the agent says about its time goes to `watch`.
    ///
    /// # Errors
    /// When the channel is closed.
    pub async fn open(channel: &Arc<dyn Channel>, watch: Stopwatch) -> Result<Self, Error> {
        let stream = channel.open(AGENT_PORT).await.map_err(|e| Error::Ended(e.to_string()))?;
        Ok(Self { client: AgentClient::new(Client::new(Socket::new(stream))), watch })
    }

    /// Waits for the agent and checks that it is of this build. Returns the guest kernel's release. Of a guest that has just booted
    /// the agent's own steps until then are noted.
    ///
    /// # Errors
    /// When it does not answer, or is another's.
    pub async fn hello(&self, booted: bool) -> Result<String, Error> {
        let reply = self.hello_reply(0).await?;
        if booted {
            self.time("boot", &reply.phases);
        }
        Ok(cut(&reply.kernel_release, 64))
    }

    /// Like [`Self::hello`], to a guest that is to make files before it is configured: tells it the time, in nanoseconds since
    /// 1970.
    ///
    /// # Errors
    /// When it does not answer, or is another's.
    pub async fn hello_at(&self, unix_time_ns: u64) -> Result<(), Error> {
        self.hello_reply(unix_time_ns).await.map(drop)
    }

    async fn hello_reply(&self, unix_time_ns: u64) -> Result<api::HelloResponse, Error> {
        let request = api::HelloRequest { version: VERSION.into(), unix_time_ns, ..Default::default() };
        let deadline = limits::HELLO_DEADLINE;
        let reply = call("Hello", deadline, self.client.hello(within(deadline), &request)).await?;
        if reply.version != VERSION {
            let reason = format!("its agent has version {:?}, not {VERSION}", cut(&reply.version, 32));
            return Err(Error::Nonsense { call: "Hello", reason });
        }
        Ok(reply)
    }

    /// Makes the guest a machine of its own, with these network interfaces.
    ///
    /// # Errors
    /// When the guest refuses or does not answer.
    pub async fn configure(&self, hostname: &str, interfaces: Vec<api::Interface>) -> Result<(), Error> {
        let request = api::ConfigureRequest {
            entropy: crate::paths::random_bytes::<256>().to_vec(),
            unix_time_ns: crate::record::now(),
            hostname: hostname.into(),
            interfaces,
            ..Default::default()
        };
        let deadline = limits::CALL_DEADLINE;
        let reply = call("Configure", deadline, self.client.configure(within(deadline), &request)).await?;
        self.time("configure", &reply.phases);
        Ok(())
    }

    /// Sets a network interface up that was plugged in.
    ///
    /// # Errors
    /// When the guest refuses or does not answer.
    pub async fn connect(&self, interfaces: Vec<api::Interface>) -> Result<(), Error> {
        let request = api::ConnectRequest { interfaces, ..Default::default() };
        let deadline = limits::CALL_DEADLINE;
        call("Connect", deadline, self.client.connect(within(deadline), &request)).await.map(drop)
    }

    /// Has the guest let go of a network interface.
    ///
    /// # Errors
    /// When it has none of that address, or does not answer.
    pub async fn disconnect(&self, mac: [u8; 6]) -> Result<(), Error> {
        let request = api::DisconnectRequest { mac: mac.to_vec(), ..Default::default() };
        let deadline = limits::CALL_DEADLINE;
        call("Disconnect", deadline, self.client.disconnect(within(deadline), &request)).await.map(drop)
    }

    /// Makes the guest small, to be saved; with what container `id`, if there is one, reads at its start in memory. Its program is at
    /// one of `programs`.
    ///
    /// # Errors
    /// When the guest is in use, or does not answer.
    pub async fn quiesce(&self, id: &str, programs: &[String]) -> Result<(), Error> {
        let deadline = limits::CALL_DEADLINE;
        let request =
            api::QuiesceRequest { id: id.into(), programs: programs.to_vec(), ..Default::default() };
        call("Quiesce", deadline, self.client.quiesce(within(deadline), &request)).await.map(drop)
    }

    /// Mounts the storages and sets the container up; returns its pid in the guest.
    ///
    /// # Errors
    /// When the guest refuses or does not answer.
    pub async fn create(&self, request: &CreateRequest) -> Result<u32, Error> {
        let deadline = limits::CALL_DEADLINE;
        let reply = call("Create", deadline, self.client.create(within(deadline), request)).await?;
        self.time("create", &reply.phases);
        Ok(reply.pid)
    }

    /// Adds a process.
    ///
    /// # Errors
    /// When the guest refuses or does not answer.
    pub async fn exec(&self, request: &ExecRequest) -> Result<(), Error> {
        let deadline = limits::CALL_DEADLINE;
        call("Exec", deadline, self.client.exec(within(deadline), request)).await.map(drop)
    }

    /// Executes the program; returns its pid in the guest.
    ///
    /// # Errors
    /// Those of the program keep the agent's prefix.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        let request = api::StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        let deadline = limits::CALL_DEADLINE;
        let reply = call("Start", deadline, self.client.start(within(deadline), &request)).await?;
        // Of all others nobody asks.
        if exec_id.is_empty() {
            self.time("start", &reply.phases);
        }
        Ok(reply.pid)
    }

    /// Notes the guest's steps, the last of which has just ended, by the guest's own clock: only their distances are of use here.
    fn time(&self, call: &str, phases: &[api::Phase]) {
        let phases = &phases[..phases.len().min(limits::PHASES_MAX)];
        let end =
            phases.iter().map(|phase| phase.start_us.saturating_add(phase.duration_us)).max().unwrap_or(0);
        for phase in phases {
            let name = format!("guest: {call}: {}", cut(&phase.name, 32));
            let ago = end.saturating_sub(phase.start_us) as f64 / 1e3;
            self.watch.add_past(name, ago, phase.duration_us as f64 / 1e3);
        }
    }

    /// Waits, for as long as it takes, for the end of a process.
    ///
    /// # Errors
    /// When there is no such process, the channel breaks, or the answer makes no sense.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let request = api::WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        let reply =
            call("Wait", Duration::MAX, self.client.wait(context::Context::default(), &request)).await?;
        if reply.exit_code > 255 {
            return Err(Error::Nonsense { call: "Wait", reason: format!("exit code {}", reply.exit_code) });
        }
        // The guest's clock is the guest's: the host says when it heard.
        Ok(Exit { code: reply.exit_code, at: crate::record::now(), oom: reply.oom, reason: None })
    }

    /// Waits, for as long as it takes, until the kernel has killed more than `seen` processes of a container for lack of memory, or
    /// the container has ended; how many there are.
    ///
    /// # Errors
    /// When there is no such container, or the channel breaks.
    pub async fn oom_kills(&self, id: &str, seen: u64) -> Result<u64, Error> {
        let request = api::OomKillsRequest { id: id.into(), seen, ..Default::default() };
        let waiting = self.client.oom_kills(context::Context::default(), &request);
        Ok(call("OomKills", Duration::MAX, waiting).await?.kills)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When there is no such process, or the guest does not answer within `deadline`.
    pub async fn kill(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
        deadline: Duration,
    ) -> Result<(), Error> {
        let request =
            api::KillRequest { id: id.into(), exec_id: exec_id.into(), signal, all, ..Default::default() };
        call("Kill", deadline, self.client.kill(within(deadline), &request)).await.map(drop)
    }

    /// Sets a terminal's size.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Result<(), Error> {
        let request = api::ResizeRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            width,
            height,
            ..Default::default()
        };
        let deadline = limits::CALL_DEADLINE;
        call("Resize", deadline, self.client.resize(within(deadline), &request)).await.map(drop)
    }

    /// Forgets an ended process.
    ///
    /// # Errors
    /// When it runs.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        let request = api::DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        let deadline = limits::CALL_DEADLINE;
        call("Delete", deadline, self.client.delete(within(deadline), &request)).await.map(drop)
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let request = api::PauseRequest { id: id.into(), ..Default::default() };
        let deadline = limits::CALL_DEADLINE;
        call("Pause", deadline, self.client.pause(within(deadline), &request)).await.map(drop)
    }

    /// Thaws a container.
    ///
    /// # Errors
    /// When it is not frozen.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let request = api::ResumeRequest { id: id.into(), ..Default::default() };
        let deadline = limits::CALL_DEADLINE;
        call("Resume", deadline, self.client.resume(within(deadline), &request)).await.map(drop)
    }

    /// Changes limits; `resources` is OCI JSON.
    ///
    /// # Errors
    /// When the guest cannot follow.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), Error> {
        let request = api::UpdateRequest { id: id.into(), resources, ..Default::default() };
        let deadline = limits::CALL_DEADLINE;
        call("Update", deadline, self.client.update(within(deadline), &request)).await.map(drop)
    }

    /// What a container uses.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn stats(&self, id: &str) -> Result<api::StatsResponse, Error> {
        let request = api::StatsRequest { id: id.into(), ..Default::default() };
        let deadline = limits::CALL_DEADLINE;
        call("Stats", deadline, self.client.stats(within(deadline), &request)).await
    }

    /// The processes of a container.
    ///
    /// # Errors
    /// When the guest does not answer, or names more than a guest can have.
    pub async fn pids(&self, id: &str) -> Result<Vec<(u32, String)>, Error> {
        let request = api::PidsRequest { id: id.into(), ..Default::default() };
        let deadline = limits::CALL_DEADLINE;
        let reply = call("Pids", deadline, self.client.pids(within(deadline), &request)).await?;
        if reply.processes.len() > limits::PIDS_MAX {
            let reason = format!("{} processes", reply.processes.len());
            return Err(Error::Nonsense { call: "Pids", reason });
        }
        Ok(reply
            .processes
            .into_iter()
            .map(|process| (process.pid, cut(&process.exec_id, limits::ID_MAX)))
            .collect())
    }

    /// Looks at a path of a container.
    ///
    /// # Errors
    /// When there is nothing.
    pub async fn stat(&self, id: &str, path: &str, follow: bool) -> Result<api::StatResponse, Error> {
        let request = api::StatRequest { id: id.into(), path: path.into(), follow, ..Default::default() };
        let deadline = limits::CALL_DEADLINE;
        let mut reply = call("Stat", deadline, self.client.stat(within(deadline), &request)).await?;
        reply.link_target = cut(&reply.link_target, limits::PATH_MAX);
        Ok(reply)
    }

    /// Copies a tar stream; returns when the copy is complete.
    ///
    /// # Errors
    /// When the guest cannot.
    pub async fn copy(&self, request: &CopyRequest) -> Result<api::CopyResponse, Error> {
        call("Copy", Duration::MAX, self.client.copy(context::Context::default(), request)).await
    }

    /// Writes files by which a container's programs find names and servers.
    ///
    /// # Errors
    /// When the guest refuses or does not answer.
    pub async fn names(&self, id: &str, files: Vec<api::NamesFile>) -> Result<(), Error> {
        if files.is_empty() {
            return Ok(());
        }
        let request = api::NamesRequest { id: id.into(), files, ..Default::default() };
        let deadline = limits::CALL_DEADLINE;
        call("Names", deadline, self.client.names(within(deadline), &request)).await.map(drop)
    }

    /// Ends all containers and writes everything to the disks and shares.
    ///
    /// # Errors
    /// When the guest does not answer in time.
    pub async fn shutdown(&self) -> Result<(), Error> {
        let deadline = limits::SHUTDOWN_DEADLINE;
        let request = api::ShutdownRequest::default();
        call("Shutdown", deadline, self.client.shutdown(within(deadline), &request)).await.map(drop)
    }
}

async fn call<T>(
    call: &'static str,
    deadline: Duration,
    reply: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T, Error> {
    match tokio::time::timeout(deadline, reply).await {
        Err(_) => Err(Error::Timeout { call, seconds: deadline.as_secs() }),
        Ok(Ok(reply)) => Ok(reply),
        Ok(Err(ttrpc::Error::RpcStatus(status))) => match status.code() {
            Code::DEADLINE_EXCEEDED => Err(Error::Timeout { call, seconds: deadline.as_secs() }),
            code => Err(Error::Guest { code, message: cut(status.message(), limits::ERROR_MESSAGE_MAX) }),
        },
        // Also what ttrpc's own timer says when it is a moment earlier than ours.
        Ok(Err(ttrpc::Error::Others(why))) if why.contains("deadline") => {
            Err(Error::Timeout { call, seconds: deadline.as_secs() })
        }
        Ok(Err(error)) => {
            Err(Error::Ended(format!("its agent closed the connection during {call} ({error})")))
        }
    }
}

/// Cuts a text of the guest's and takes what could confuse a terminal out of it.
fn cut(text: &str, max: usize) -> String {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_the_guest_are_cut_and_cleaned() {
        assert_eq!(cut("plain", 10), "plain");
        assert_eq!(cut("ääää", 3), "ä");
        assert_eq!(cut("\x1b[2Jgone\r\n", 100), "\u{fffd}[2Jgone\u{fffd}\n");
    }
}
