//! The Sandbox API as containerd 2 calls it, by a client of the test's own: Debian's containerd does not know it.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use containerd_shim_protos::{
    api::{CreateTaskRequest, StartRequest, WaitRequest},
    cgroups_v2::metrics::Metrics,
    protobuf::Message,
    sandbox_api::{
        CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
        ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
    },
    sandbox_async::SandboxClient,
    shim_async::TaskClient,
};
use serde_json::json;
use ttrpc::{asynchronous::Client, context};

use crate::{
    cri::{Dns, PodConfig},
    world::{Engine, PATIENCE, engine, eventually},
};

const POD: &str = "pod";

/// A network namespace that goes with the test.
struct Network(String);

impl Network {
    fn make() -> Self {
        let network = Self(format!("kapsel-sandbox-api-{}", std::process::id()));
        let made = Command::new("ip").args(["netns", "add", &network.0]).status();
        assert!(made.is_ok_and(|made| made.success()), "a network namespace");
        network
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

/// Starts the shim of the pod as containerd does; its address.
fn start(engine: &Engine, bundle: &Path) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-shim-kapsel-v2"));
    command.args(["-namespace", "default", "-publish-binary", "/usr/bin/containerd", "-id", POD]);
    command.arg("-address").arg(engine.dir.join("c.sock")).arg("-bundle").arg(bundle).arg("start");
    command.env("KAPSEL_ROOT", engine.world.root()).env("MAX_SHIM_VERSION", "3").current_dir(bundle);
    let started = command.stdin(Stdio::null()).output().expect("the shim starts");
    assert!(started.status.success(), "{started:?}");
    let told: serde_json::Value = serde_json::from_slice(&started.stdout).expect("JSON");
    told["address"].as_str().and_then(|address| address.strip_prefix("unix://")).expect("an address").into()
}

/// The bundle of a container of the pod, whose machine is the process `pid`.
fn member(dir: &Path, pid: u32, shares_pids: bool, script: &str) {
    fs::create_dir(dir).expect("a bundle");
    let bin = dir.join("rootfs/bin");
    for name in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(dir.join("rootfs").join(name)).expect("a root");
    }
    fs::copy("/bin/busybox", bin.join("busybox")).expect("busybox");
    std::os::unix::fs::symlink("busybox", bin.join("sh")).expect("a link");
    let pods = |kind: &str, name: &str| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{name}") });
    let pids = if shares_pids { pods("pid", "pid") } else { json!({ "type": "pid" }) };
    let spec = json!({
        "ociVersion": "1.0.2",
        "process": { "args": ["sh", "-c", script], "cwd": "/", "user": { "uid": 0, "gid": 0 }, "env": ["PATH=/bin"] },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm" },
        ],
        "annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": POD,
        },
        "linux": { "namespaces": [
            pods("network", "net"), pods("ipc", "ipc"), pods("uts", "uts"), { "type": "mount" }, pids,
        ] },
    });
    fs::write(dir.join("config.json"), spec.to_string()).expect("a specification");
}

/// Waits until a container has written this to a file.
async fn written(output: &Path, text: &str) {
    let until = std::time::Instant::now() + PATIENCE;
    while fs::read_to_string(output).unwrap_or_default() != text {
        assert!(std::time::Instant::now() < until, "{:?}", fs::read_to_string(output));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[test]
fn a_pod_is_there_before_its_containers_and_is_none_of_them() {
    let engine = engine!();
    let network = Network::make();
    let bundle = engine.dir.join("pod-bundle");
    fs::create_dir(&bundle).expect("a directory");
    let address = start(&engine, &bundle);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::connect(&address).await.expect("it listens");
        let client = Client::new(stream.into());
        let (pods, tasks) = (SandboxClient::new(client.clone()), TaskClient::new(client));
        let within = || context::with_duration(PATIENCE);
        let sandbox_id = || POD.to_owned();

        let dns = Dns { servers: vec!["192.0.2.53".into()] };
        let config = PodConfig { hostname: "podname".into(), dns: Some(dns), ..Default::default() };
        let options = containerd_shim_protos::protobuf::well_known_types::any::Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: prost::Message::encode_to_vec(&config),
            ..Default::default()
        };
        let mut request = CreateSandboxRequest {
            sandbox_id: sandbox_id(),
            bundle_path: bundle.display().to_string(),
            annotations: HashMap::from([("a".to_owned(), "b".to_owned())]),
            options: Some(options).into(),
            ..Default::default()
        };
        let refused = pods.create_sandbox(within(), &request).await.expect_err("the host's network");
        assert!(refused.to_string().contains("--network=host"), "{refused}");
        request.netns_path = format!("/run/netns/{}", network.0);
        pods.create_sandbox(within(), &request).await.expect("a pod");
        let request = StartSandboxRequest { sandbox_id: sandbox_id(), ..Default::default() };
        let started = pods.start_sandbox(within(), &request).await.expect("it runs");
        let monitor =
            fs::read_to_string(format!("/proc/{}/comm", started.pid)).expect("a process of this host");
        assert!(monitor.contains("qemu") || monitor.contains("kapsel-vmm"), "{monitor}");
        let request = PlatformRequest { sandbox_id: sandbox_id(), ..Default::default() };
        let platform = pods.platform(within(), &request).await.expect("a platform").platform;
        assert_eq!((platform.os.as_str(), platform.architecture.as_str()), ("linux", "amd64"));
        let ping = PingRequest { sandbox_id: sandbox_id(), ..Default::default() };
        pods.ping_sandbox(within(), &ping).await.expect("the guest answers");
        let status = SandboxStatusRequest { sandbox_id: sandbox_id(), ..Default::default() };
        let state = async || pods.sandbox_status(within(), &status).await.expect("a status").state;
        assert_eq!(state().await, "SANDBOX_READY");

        // The second one is in the pod's pid namespace, and leaves a process to the first one of that, which must not keep it as a zombie.
        let told = "busybox hostname; busybox cat /etc/resolv.conf; echo shared > /dev/shm/x; exec busybox sleep 1000";
        let orphan = "(busybox sleep 0.1 & echo $! > /tmp/pid); busybox cat /dev/shm/x; while [ -e /proc/$(busybox cat /tmp/pid) ]; \
                      do busybox sleep 0.1; done; echo gone; exec busybox sleep 1000";
        for (id, shares_pids, script, text) in [
            ("c1", false, told, "podname\nnameserver 192.0.2.53\n"),
            ("c2", true, orphan, "shared\ngone\n"),
        ] {
            let (dir, output) = (engine.dir.join(format!("{id}-bundle")), engine.dir.join(format!("{id}-output")));
            member(&dir, started.pid, shares_pids, script);
            let request = CreateTaskRequest {
                id: id.into(),
                bundle: dir.display().to_string(),
                stdout: format!("file://{}", output.display()),
                ..Default::default()
            };
            tasks.create(within(), &request).await.expect("a container");
            let request = StartRequest { id: id.into(), ..Default::default() };
            tasks.start(within(), &request).await.expect("it runs");
            written(&output, text).await;
        }
        let wrong = PingRequest { sandbox_id: "c1".into(), ..Default::default() };
        assert!(pods.ping_sandbox(within(), &wrong).await.is_err(), "a container is no pod");
        let request = SandboxMetricsRequest { sandbox_id: sandbox_id(), ..Default::default() };
        let metrics = pods.sandbox_metrics(within(), &request).await.expect("metrics").metrics;
        let metrics = Metrics::parse_from_bytes(&metrics.data.value).expect("metrics");
        assert!(metrics.memory.usage > 0 && metrics.pids.current >= 1, "{metrics:?}");

        let waiting = WaitSandboxRequest { sandbox_id: sandbox_id(), ..Default::default() };
        let request = StopSandboxRequest { sandbox_id: sandbox_id(), ..Default::default() };
        let (waited, stopped) =
            tokio::join!(pods.wait_sandbox(within(), &waiting), pods.stop_sandbox(within(), &request));
        stopped.expect("it stops");
        assert_eq!(waited.expect("an end").exit_status, 0);
        assert_eq!(state().await, "SANDBOX_NOTREADY");
        assert!(pods.ping_sandbox(within(), &ping).await.is_err(), "nobody is there any more");
        let request = WaitRequest { id: "c1".into(), ..Default::default() };
        assert_eq!(tasks.wait(within(), &request).await.expect("an end").exit_status, 137);
        let request = ShutdownSandboxRequest { sandbox_id: sandbox_id(), ..Default::default() };
        pods.shutdown_sandbox(within(), &request).await.expect("it goes");
    });
    eventually("the shim ends", || engine.shims().is_empty());
    engine.nothing_is_left();
}
