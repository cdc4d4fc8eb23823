//! Pods, as the kubelet makes them: containerd's CRI plug-in with a network of the test's own.

use std::{fs, path::PathBuf, thread, time::Instant};

use crate::{
    cri::{
        CONTAINER, Client, ContainerConfig, ContainerMetadata, ContainerSecurity, ContainerStatus,
        ContainerStatusResponse, CreateContainer, Dns, EXITED, ExecSync, Executed, Image, LinuxContainer,
        LinuxPod, Mount, NODE, Named, Namespaces, Nothing, POD, PodConfig, PodMetadata, PodSecurity,
        PodStatus, PodStatusResponse, RUNNING, Resources, RunPod, Stats, StatsResponse, StopContainer,
        UpdateContainer,
    },
    world::{Engine, IMAGE, eventually, pods},
};

/// Ends at once when it is asked to.
const WAIT: &str = "trap 'exit 0' TERM; while :; do sleep 0.1; done";

/// A pod and what a test says of it.
struct Pod<'a> {
    engine: &'a Engine,
    cri: Client,
    config: PodConfig,
    id: String,
    pid: i32,
}

impl<'a> Pod<'a> {
    fn config(engine: &Engine, name: &str) -> PodConfig {
        PodConfig {
            metadata: Some(PodMetadata { name: name.into(), uid: name.into(), namespace: "default".into() }),
            hostname: name.into(),
            log_directory: engine.dir.join("logs").join(name).display().to_string(),
            dns: Some(Dns { servers: vec!["192.0.2.53".into()] }),
            linux: Some(LinuxPod {
                security: Some(PodSecurity {
                    namespaces: Some(Namespaces { network: POD, pid: CONTAINER, ipc: POD }),
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn run(engine: &'a Engine, name: &str) -> Self {
        Self::run_with(engine, Self::config(engine, name))
    }

    fn run_with(engine: &'a Engine, config: PodConfig) -> Self {
        let cri = engine.cri();
        let pid = config.linux.as_ref().and_then(|linux| linux.security.as_ref()?.namespaces.as_ref());
        let pid = pid.map_or(CONTAINER, |namespaces| namespaces.pid);
        let request = RunPod { config: Some(config.clone()), runtime_handler: "kapsel".into() };
        let run = cri.call::<Named>("RunPodSandbox", request);
        let id = run.unwrap_or_else(|error| panic!("{error}\n{}", engine.log())).id;
        Self { engine, cri, config, id, pid }
    }

    fn status(&self) -> PodStatus {
        let status = self.cri.call::<PodStatusResponse>("PodSandboxStatus", Named { id: self.id.clone() });
        status.expect("a status").status.expect("a status")
    }

    fn ip(&self) -> String {
        self.status().network.expect("a network").ip
    }

    /// What makes a container that runs a script.
    fn container(&self, name: &str, script: &str) -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(Image { image: IMAGE.into() }),
            command: ["sh", "-c", script].map(String::from).to_vec(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainer {
                security: Some(ContainerSecurity {
                    namespaces: Some(Namespaces { network: POD, pid: self.pid, ipc: POD }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn create(&self, config: ContainerConfig) -> Result<String, tonic::Status> {
        let (pod, pod_config) = (self.id.clone(), Some(self.config.clone()));
        let request = CreateContainer { pod, config: Some(config), pod_config };
        Ok(self.cri.call::<Named>("CreateContainer", request)?.id)
    }

    fn start(&self, config: ContainerConfig) -> String {
        let created = self.create(config);
        let id = created.unwrap_or_else(|error| panic!("{error}\n{}", self.engine.log()));
        let started = self.cri.call::<Nothing>("StartContainer", Named { id: id.clone() });
        started.unwrap_or_else(|error| panic!("{error}\n{}", self.engine.log()));
        id
    }

    fn exec(&self, id: &str, script: &str) -> Executed {
        let cmd = ["sh", "-c", script].map(String::from).to_vec();
        let ran = self.cri.call("ExecSync", ExecSync { id: id.into(), cmd, timeout: 60 });
        ran.unwrap_or_else(|error| panic!("{error}\n{}", self.engine.log()))
    }

    /// What a script that succeeds says.
    fn says(&self, id: &str, script: &str) -> String {
        let ran = self.exec(id, script);
        assert_eq!(ran.code, 0, "{script}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8_lossy(&ran.stdout).trim().to_owned()
    }

    fn container_status(&self, id: &str) -> ContainerStatus {
        let status = self.cri.call::<ContainerStatusResponse>("ContainerStatus", Named { id: id.into() });
        status.expect("a status").status.expect("a status")
    }

    fn update(&self, id: &str, resources: Resources) -> Result<Nothing, tonic::Status> {
        let request = UpdateContainer { id: id.into(), linux: Some(resources) };
        self.cri.call("UpdateContainerResources", request)
    }

    fn stats(&self, id: &str) -> Stats {
        let stats = self.cri.call::<StatsResponse>("ContainerStats", Named { id: id.into() });
        stats.expect("stats").stats.expect("stats")
    }

    fn stop(&self, id: &str) {
        self.cri
            .call::<Nothing>("StopContainer", StopContainer { id: id.into(), timeout: 20 })
            .expect("a stop");
    }

    fn remove_container(&self, id: &str) {
        self.cri.call::<Nothing>("RemoveContainer", Named { id: id.into() }).expect("a removal");
    }

    fn remove(&self) {
        self.cri.call::<Nothing>("StopPodSandbox", Named { id: self.id.clone() }).expect("a stop");
        self.cri.call::<Nothing>("RemovePodSandbox", Named { id: self.id.clone() }).expect("a removal");
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(PathBuf::from(&self.config.log_directory).join(format!("{name}.log")))
            .unwrap_or_default()
    }
}

fn mount(host: impl Into<PathBuf>, at: &str, readonly: bool) -> Mount {
    Mount { container_path: at.into(), host_path: host.into().display().to_string(), readonly }
}

#[test]
fn two_containers_are_neighbours_in_one_machine() {
    let engine = pods!();
    let pod = Pod::run(&engine, "web");
    assert_eq!(pod.status().state, 0);
    let volume = engine.volume("shared");
    let secret = engine.volume("secret");
    fs::write(secret.join("token"), "s3cret").expect("a file");
    let termination = engine.dir.join("termination");
    fs::write(&termination, "").expect("a file");

    let server = "echo page > /www/index.html; echo serving; exec httpd -f -p 8080 -h /www";
    let mut config = pod.container("server", server);
    config.mounts = vec![mount(&volume, "/www", false), mount(&termination, "/dev/termination-log", false)];
    let server = pod.start(config);
    let mut config = pod.container("client", WAIT);
    config.mounts = vec![mount(&volume, "/seen", true), mount(&secret, "/var/run/secrets", true)];
    config.linux.get_or_insert_default().resources =
        Some(Resources { memory: 64 << 20, ..Default::default() });
    let client = pod.start(config);
    assert_eq!(engine.shims().len(), 1, "one shim, and one machine, for the pod");

    // They share network, host name, shared memory and volume; neither processes nor root.
    let fetch =
        |from: &str| format!("until wget -qO- {from}:8080/index.html 2>/dev/null; do sleep 0.2; done");
    assert_eq!(pod.says(&client, &fetch("127.0.0.1")), "page");
    assert_eq!(engine.in_network(&fetch(&pod.ip())), "page", "the host reaches the pod's address");
    assert_eq!(pod.says(&client, "hostname"), "web");
    assert_eq!(pod.says(&client, "cat /seen/index.html"), "page");
    assert_eq!(fs::read_to_string(volume.join("index.html")).expect("a file"), "page\n");
    assert_ne!(pod.exec(&client, "echo x > /seen/y").code, 0, "mounted read-only");
    assert_eq!(pod.says(&client, "cat /var/run/secrets/token"), "s3cret");
    assert_ne!(pod.exec(&client, "echo x > /var/run/secrets/token").code, 0);
    pod.says(&client, "echo there > /dev/shm/x");
    assert_eq!(pod.says(&server, "cat /dev/shm/x"), "there");
    let size = pod.says(&client, "df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d' ' -f2");
    assert_eq!(size, "65536");
    assert_eq!(
        pod.says(&client, "readlink /proc/self/ns/ipc"),
        pod.says(&server, "readlink /proc/self/ns/ipc")
    );
    assert_eq!(pod.says(&client, "ls /www 2>/dev/null | wc -l"), "0");
    assert!(!pod.says(&client, "ps").contains("httpd"));
    assert!(pod.says(&client, "cat /etc/resolv.conf").contains("192.0.2.53"));
    assert!(pod.says(&client, "cat /etc/hosts").contains("localhost"));
    assert_eq!(pod.says(&client, "cat /etc/hostname"), "web");
    pod.says(&server, "echo done > /dev/termination-log");
    assert_eq!(fs::read_to_string(&termination).expect("a file"), "done\n");

    eventually("the log", || pod.log("server").contains("stdout F serving"));
    let stats = pod.stats(&client);
    assert!(stats.cpu.and_then(|cpu| cpu.nanoseconds).is_some_and(|n| n.value > 0));
    let memory = stats.memory.and_then(|memory| memory.working_set).map_or(0, |n| n.value);
    assert!((1..64 << 20).contains(&memory), "{memory}");

    // As the kubelet resizes, and pins to processors, which are the host's.
    pod.update(&client, Resources { memory: 80 << 20, cpus: "0".into() }).expect("an update");
    assert_eq!(pod.says(&client, "cat /sys/fs/cgroup/memory.max"), (80 << 20).to_string());
    let refused = pod.update(&client, Resources { memory: 1 << 40, ..Default::default() });
    let error = refused.expect_err("more than the machine has").message().to_owned();
    assert!(error.contains("does not grow"), "{error}");

    pod.remove();
    engine.nothing_is_left();
}

#[test]
fn containers_end_and_begin_anew_while_the_pod_goes_on() {
    let engine = pods!();
    let pod = Pod::run(&engine, "anew");
    let volume = engine.volume("data");
    let with_volume =
        |config: ContainerConfig| ContainerConfig { mounts: vec![mount(&volume, "/data", false)], ..config };
    let stays = pod.start(with_volume(pod.container("stays", WAIT)));
    let rootfs = engine.dir.join("state/io.containerd.runtime.v2.task/k8s.io");
    for round in 0..3 {
        let script = format!("echo {round} >> /data/rounds; exec sleep 1000");
        let id = pod.start(with_volume(pod.container("fails", &script)));
        eventually("it wrote", || {
            fs::read_to_string(volume.join("rounds")).unwrap_or_default().lines().count() == round + 1
        });
        match round {
            // It is killed from inside, by its kernel's hand, and by its engine's.
            0 => assert_eq!(pod.exec(&id, "kill -9 1; true").code, 0, "its own init is not killed by it"),
            1 => drop(pod.exec(&id, "cat /dev/zero | head -c 1 >/dev/null")),
            _ => {}
        }
        pod.stop(&id);
        eventually("it has ended", || pod.container_status(&id).state == EXITED);
        assert_eq!(pod.container_status(&stays).state, RUNNING);
        pod.remove_container(&id);
        assert!(!rootfs.join(&id).exists());
        eventually("the machine lets go of its files", || engine.held_open() == 0);
    }
    let code = pod.start(with_volume(pod.container("code", "exit 7")));
    eventually("it has ended", || pod.container_status(&code).state == EXITED);
    assert_eq!(pod.container_status(&code).exit_code, 7);
    assert_eq!(pod.says(&stays, "cat /data/rounds | tr '\\n' ' '"), "0 1 2");
    let missing = pod.create(pod.container("missing", "true")).and_then(|id| {
        let nosuch = ContainerConfig { command: vec!["nosuch".into()], ..pod.container("nosuch", "") };
        pod.remove_container(&id);
        pod.create(nosuch).and_then(|id| pod.cri.call::<Nothing>("StartContainer", Named { id }))
    });
    let error = missing.expect_err("no such program").message().to_owned();
    assert!(error.contains("nosuch"), "{error}");
    let mut greedy = pod.container("greedy", "tail /dev/zero");
    greedy.linux.get_or_insert_default().resources =
        Some(Resources { memory: 16 << 20, ..Default::default() });
    let greedy = pod.start(greedy);
    eventually("it has ended", || pod.container_status(&greedy).state == EXITED);
    let status = pod.container_status(&greedy);
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    assert_eq!(pod.container_status(&stays).state, RUNNING);
    pod.remove();
    engine.nothing_is_left();
}

#[test]
fn a_pods_processes_see_each_other_when_it_says_so() {
    let engine = pods!();
    let mut config = Pod::config(&engine, "open");
    let linux = config.linux.get_or_insert_default();
    linux.security = Some(PodSecurity { namespaces: Some(Namespaces { network: POD, pid: POD, ipc: POD }) });
    linux.sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
    linux.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "0".into());
    let pod = Pod::run_with(&engine, config);
    let one = pod.start(pod.container("one", "exec sleep 4321"));
    let mut read_only = pod.container("two", WAIT);
    if let Some(security) = read_only.linux.as_mut().and_then(|linux| linux.security.as_mut()) {
        security.readonly_rootfs = true;
    }
    let two = pod.start(read_only);
    assert!(pod.says(&two, "ps").contains("sleep 4321"));
    assert_eq!(pod.says(&two, "cat /proc/sys/kernel/shm_rmid_forced"), "1");
    assert_eq!(pod.says(&two, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start"), "0");
    assert_ne!(pod.exec(&two, "echo x > /file").code, 0, "a read-only root");
    pod.says(&two, "kill -9 $(pidof sleep | tr ' ' '\\n' | while read p; do grep -q 4321 /proc/$p/cmdline && echo $p; done)");
    eventually("one has ended", || pod.container_status(&one).state == EXITED);
    assert_eq!(pod.container_status(&one).exit_code, 137);
    assert_eq!(pod.container_status(&two).state, RUNNING);
    pod.remove();
    engine.nothing_is_left();
}

#[test]
fn what_a_pod_cannot_have_is_refused_by_name() {
    let engine = pods!();
    let mut config = Pod::config(&engine, "host");
    let host = Namespaces { network: NODE, pid: CONTAINER, ipc: POD };
    config.linux.get_or_insert_default().security = Some(PodSecurity { namespaces: Some(host) });
    let request = RunPod { config: Some(config), runtime_handler: "kapsel".into() };
    let error = engine.cri().call::<Named>("RunPodSandbox", request).expect_err("the host's network");
    assert!(error.message().contains("--network=host"), "{error}");
    let pod = Pod::run(&engine, "fine");
    for (source, words) in
        [("/proc/sys", "interface of the host's kernel"), ("/dev/null", "a device of the host")]
    {
        let mut config = pod.container("bad", WAIT);
        config.mounts = vec![mount(source, "/mnt", false)];
        let started = pod.create(config).and_then(|id| {
            let started = pod.cri.call::<Nothing>("StartContainer", Named { id: id.clone() });
            pod.remove_container(&id);
            started
        });
        let error = started.expect_err(source);
        assert!(error.message().contains(words), "{error}");
    }
    pod.remove();
    engine.nothing_is_left();
}

#[test]
fn a_pod_outlives_containerd_and_is_found_again() {
    let mut engine = pods!();
    let (id, container) = {
        let pod = Pod::run(&engine, "found");
        (pod.id.clone(), pod.start(pod.container("c", WAIT)))
    };
    engine.kill();
    engine.start();
    let config = Pod::config(&engine, "found");
    let pod = Pod { engine: &engine, cri: engine.cri(), config, id, pid: CONTAINER };
    assert_eq!(pod.status().state, 0, "{}", engine.log());
    assert_eq!(pod.container_status(&container).state, RUNNING);
    assert_eq!(pod.says(&container, "echo back"), "back");
    let second = pod.start(pod.container("second", WAIT));
    assert_eq!(pod.says(&second, "hostname"), "found");
    pod.remove();
    engine.nothing_is_left();
}

#[test]
fn a_killed_shim_or_monitor_ends_the_pod_and_leaves_nothing() {
    let engine = pods!();
    for victim in ["shim", "monitor"] {
        let pod = Pod::run(&engine, victim);
        let container = pod.start(pod.container("c", WAIT));
        let pid = match victim {
            "shim" => engine.shims()[0],
            _ => engine.monitor(&container),
        };
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("a process");
        eventually("the container's end is seen", || pod.container_status(&container).state == EXITED);
        eventually("the pod's end is seen", || pod.status().state == 1);
        pod.remove();
        engine.nothing_is_left();
    }
}

/// KAPSEL_PODS sets how many: with ten it is a measurement.
#[test]
fn pods_in_parallel() {
    let engine = pods!();
    let count: usize = std::env::var("KAPSEL_PODS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    let begun = Instant::now();
    let pods: Vec<(Pod<'_>, f64)> = thread::scope(|scope| {
        let start = |n: usize| {
            let engine = &engine;
            scope.spawn(move || {
                let pod = Pod::run(engine, &format!("pod{n}"));
                for name in ["a", "b"] {
                    pod.start(pod.container(name, "exec sleep 10000"));
                }
                (pod, begun.elapsed().as_secs_f64())
            })
        };
        let all: Vec<_> = (0..count).map(start).collect();
        all.into_iter().map(|one| one.join().expect("a pod")).collect()
    });
    let mut times: Vec<f64> = pods.iter().map(|(_, took)| *took).collect();
    times.sort_by(f64::total_cmp);
    println!(
        "{count} pods of two containers: {:.1} s until the last is ready, median {:.1} s",
        times[count - 1],
        times[count / 2]
    );
    println!("memory: {}", engine.memory(count));
    if std::env::var_os("KAPSEL_PODS").is_some() {
        println!("idle: {:.1} ms of a processor a second for each pod", engine.idle(count));
    }
    let mut ips: Vec<String> = pods.iter().map(|(pod, _)| pod.ip()).collect();
    ips.sort();
    ips.dedup();
    assert_eq!(ips.len(), count, "{ips:?}");
    thread::scope(|scope| pods.iter().for_each(|(pod, _)| drop(scope.spawn(|| pod.remove()))));
    engine.nothing_is_left();
}
