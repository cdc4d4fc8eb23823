//! Running containers and processes, with their output.

use anyhow::{Result, bail};
use kapsel_protocol::api;
use kapsel_protocol::stdio::{Kind, Token};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::machine::{Machine, context, storages, token};

/// How a process ended and what it wrote.
#[derive(Debug)]
pub struct Done {
    pub code: u32,
    pub oom: bool,
    pub stdout: String,
    pub stderr: String,
}

/// Docker's usual specification for a command.
pub fn spec(id: &str, args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": format!("/run/kapsel/{id}/rootfs")},
        "hostname": "box",
        "process": process(args),
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["ro", "nosuid", "noexec", "nodev"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
        ],
        "linux": {
            "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                            "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

/// Docker's usual process for a command.
pub fn process(args: &[&str]) -> Value {
    let caps = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    json!({
        "args": args, "cwd": "/", "user": {"uid": 0, "gid": 0},
        "env": ["PATH=/usr/local/bin:/usr/bin:/bin"],
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        "noNewPrivileges": false,
    })
}

/// Changes parts of a specification.
pub fn patch(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                patch(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// All three streams on a new token.
pub fn piped() -> (Token, api::Stdio) {
    let token = token();
    let stdio = api::Stdio {
        token: token.to_string(),
        stdin: true,
        stdout: true,
        stderr: true,
        ..Default::default()
    };
    (token, stdio)
}

impl Machine {
    /// Creates a container from a specification, without starting it.
    pub async fn create(
        &self,
        id: &str,
        spec: &Value,
        stdio: api::Stdio,
    ) -> ttrpc::Result<api::CreateResponse> {
        self.create_with(api::CreateRequest {
            id: id.into(),
            spec: spec.to_string().into_bytes(),
            storages: storages(id),
            stdio: Some(stdio).into(),
            ..Default::default()
        })
        .await
    }

    /// Creates a container from a whole request.
    pub async fn create_with(&self, request: api::CreateRequest) -> ttrpc::Result<api::CreateResponse> {
        self.agent.create(context(), &request).await
    }

    /// Starts a container or an added process.
    pub async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<api::StartResponse> {
        let request = api::StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.agent.start(context(), &request).await
    }

    /// Waits for the end of a process.
    pub async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<api::WaitResponse> {
        let request = api::WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.agent.wait(context(), &request).await
    }

    /// Sends a signal.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: i32) -> ttrpc::Result<api::KillResponse> {
        let (id, exec_id) = (id.into(), exec_id.into());
        self.agent
            .kill(context(), &api::KillRequest { id, exec_id, signal: signal as u32, ..Default::default() })
            .await
    }

    /// Removes a container or an added process.
    pub async fn delete(&self, id: &str, exec_id: &str, force: bool) -> ttrpc::Result<api::DeleteResponse> {
        let (id, exec_id) = (id.into(), exec_id.into());
        self.agent.delete(context(), &api::DeleteRequest { id, exec_id, force, ..Default::default() }).await
    }

    /// Runs a container to its end, with `input`, and removes it.
    pub async fn run_spec(&self, id: &str, spec: &Value, input: &[u8]) -> Result<Done> {
        let (token, stdio) = piped();
        self.create(id, spec, stdio).await?;
        let done = self.talk(token, input, async { self.start(id, "").await.map(drop) }, id, "").await;
        self.delete(id, "", true).await?;
        done
    }

    /// Runs a container with a changed specification.
    pub async fn run_patched(&self, id: &str, args: &[&str], change: Value) -> Result<Done> {
        let mut spec = spec(id, args);
        patch(&mut spec, change);
        self.run_spec(id, &spec, b"").await
    }

    /// Runs a command in a shell in a container of its own.
    pub async fn sh(&self, id: &str, script: &str) -> Result<Done> {
        self.run_patched(id, &["sh", "-c", script], json!({})).await
    }

    /// Adds a process to a running container and runs it to its end.
    pub async fn exec(&self, id: &str, exec_id: &str, process: &Value, input: &[u8]) -> Result<Done> {
        let (token, stdio) = piped();
        self.add(id, exec_id, process, stdio, false).await?;
        let done =
            self.talk(token, input, async { self.start(id, exec_id).await.map(drop) }, id, exec_id).await;
        self.delete(id, exec_id, true).await?;
        done
    }

    /// Adds a process to a running container.
    pub async fn add(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        stdio: api::Stdio,
        terminal: bool,
    ) -> Result<()> {
        let request = api::ExecRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            process: process.to_string().into_bytes(),
            terminal,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.agent.exec(context(), &request).await?;
        Ok(())
    }

    /// Starts a process and carries its streams to their end.
    pub async fn talk(
        &self,
        token: Token,
        input: &[u8],
        start: impl Future<Output = ttrpc::Result<()>>,
        id: &str,
        exec_id: &str,
    ) -> Result<Done> {
        let mut stdin = self.stream(token, Kind::Stdin).await?;
        let (mut out, mut err) =
            (self.stream(token, Kind::Stdout).await?, self.stream(token, Kind::Stderr).await?);
        start.await?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let write = async {
            // The process may not want it all.
            let _ = stdin.write_all(input).await;
            let _ = stdin.shutdown().await;
        };
        let everything =
            async { tokio::join!(write, out.read_to_end(&mut stdout), err.read_to_end(&mut stderr)) };
        let ((), out, err) = match tokio::time::timeout(std::time::Duration::from_secs(60), everything).await
        {
            Ok(results) => results,
            Err(_) => bail!("the output of {id} {exec_id} did not end"),
        };
        out?;
        err?;
        let end = self.wait(id, exec_id).await?;
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Ok(Done { code: end.exit_code, oom: end.oom, stdout: text(&stdout), stderr: text(&stderr) })
    }
}
