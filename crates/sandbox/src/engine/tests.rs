use crate::config::{Key, Origin};
use serde_json::{Value, json};

use super::*;

/// A bundle with an empty root, and a specification as podman writes it, changed by `change`.
fn read(config: &Config, change: impl FnOnce(&mut Value)) -> Result<Bundle, Error> {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("rootfs/bin")).unwrap();
    fs::write(dir.path().join("hosts"), "127.0.0.1 localhost").unwrap();
    let namespaces = ["pid", "network", "ipc", "uts", "mount"].map(|typ| json!({ "type": typ }));
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            // Behind a mount: whether it is there only the guest knows.
            "args": ["/dev/x"],
            "cwd": "/",
            "apparmorProfile": "containers-default",
        },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/etc/hosts", "type": "bind", "source": "hosts", "options": ["bind", "rprivate"] },
        ],
        "annotations": { "org.example": "x" },
        "linux": { "namespaces": namespaces },
    });
    change(&mut spec);
    fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
    Bundle::read(dir.path(), Role::Alone, config)
}

fn refused(word: &str, change: impl FnOnce(&mut Value)) {
    let error = format!("{:#}", read(&Config::default(), change).expect_err(word));
    assert!(error.contains(word), "expected {word:?} in: {error}");
}

fn allowing(annotations: &str) -> Config {
    let mut config = Config::default();
    config.set(Key::EngineAnnotations, annotations.into(), Origin::Flag).unwrap();
    config
}

#[test]
fn what_podman_writes_is_followed() {
    let bundle = read(&Config::default(), |_| ()).unwrap();
    assert_eq!(bundle.network, Network::New);
    assert_eq!(bundle.rootfs.options, ["rw"]);
    assert!(bundle.rootfs.source.is_absolute());
    let mounts = bundle.spec.mounts().clone().unwrap();
    assert!(mounts[1].source().as_ref().unwrap().is_absolute());
    assert_eq!(bundle.annotations["org.example"], "x");
    assert!(bundle.spec.annotations().as_ref().is_none_or(HashMap::is_empty));
    let namespaces = bundle.spec.linux().clone().unwrap().namespaces().clone().unwrap();
    assert!(namespaces.iter().all(|namespace| namespace.typ() != LinuxNamespaceType::Network));
    assert!(bundle.warnings[0].contains("AppArmor"), "what is left out is told");
}

#[test]
fn a_network_that_the_engine_made_is_entered() {
    // Anything that is not the host's does: what it is shows when it is entered.
    let namespace = tempfile::NamedTempFile::new().unwrap();
    let bundle = read(&Config::default(), |spec| {
        spec["linux"]["namespaces"][1]["path"] = json!(namespace.path());
    });
    assert_eq!(bundle.unwrap().network, Network::At(namespace.path().into()));
    refused("/run/netns/none", |spec| spec["linux"]["namespaces"][1]["path"] = json!("/run/netns/none"));
    // As Docker asks for it.
    refused("--network=host", |spec| spec["linux"]["namespaces"][1]["path"] = json!("/proc/self/ns/net"));
}

#[test]
fn each_namespace_of_the_host_is_refused_by_the_flag_that_asks_for_it() {
    for (at, flag) in [(0, "--pid=host"), (1, "--network=host"), (2, "--ipc=host"), (3, "--uts=host")] {
        refused(flag, |spec| drop(spec["linux"]["namespaces"].as_array_mut().unwrap().remove(at)));
    }
    refused("--userns", |spec| spec["linux"]["namespaces"][4]["type"] = json!("user"));
    refused("/proc/1/ns/ipc", |spec| spec["linux"]["namespaces"][2]["path"] = json!("/proc/1/ns/ipc"));
}

#[test]
fn each_class_of_bad_input_is_told_by_name() {
    refused("JSON object", |spec| *spec = json!([]));
    refused("not an OCI specification", |spec| spec["process"]["args"] = json!(7));
    refused("ociVersion", |spec| spec["ociVersion"] = json!("2.0.0"));
    refused("no `process`", |spec| spec["process"] = Value::Null);
    refused("process.args", |spec| spec["process"]["args"] = json!([]));
    refused("process.cwd", |spec| spec["process"]["cwd"] = json!("tmp"));
    refused("no `root`", |spec| spec["root"] = Value::Null);
    refused("root.path", |spec| spec["root"]["path"] = json!("elsewhere"));
    refused("EROFS", |spec| spec["root"]["path"] = json!("hosts"));
    refused("no `linux`", |spec| spec["linux"] = Value::Null);
    refused("windows", |spec| spec["windows"] = json!({ "layerFolders": ["x"] }));
    refused("--uidmap", |spec| {
        spec["linux"]["uidMappings"] = json!([{ "containerID": 0, "hostID": 1, "size": 1 }]);
    });
    refused("netDevices", |spec| spec["linux"]["netDevices"] = json!({ "eth0": {} }));
    refused("/dev/kvm", |spec| {
        spec["linux"]["devices"] = json!([{ "type": "c", "path": "/dev/kvm", "major": 10, "minor": 232 }]);
    });
    refused("no source", |spec| spec["mounts"][1]["source"] = json!(""));
    refused("cannot mount", |spec| spec["mounts"][1]["source"] = json!("nothing"));
    refused("device of the host", |spec| spec["mounts"][1]["source"] = json!("/dev/null"));
    refused("createContainer", |spec| {
        spec["hooks"] = json!({ "createContainer": [{ "path": "/bin/true" }] });
    });
    refused("absolute", |spec| spec["hooks"] = json!({ "poststop": [{ "path": "true" }] }));
}

#[test]
fn a_program_that_is_not_there_is_told_in_runcs_words() {
    refused("no such file or directory", |spec| spec["process"]["args"] = json!(["/bin/none"]));
    refused("executable file not found in $PATH", |spec| {
        spec["process"]["args"] = json!(["none"]);
        spec["process"]["env"] = json!(["PATH=/usr/bin:/bin"]);
    });
    refused("permission denied", |spec| spec["process"]["args"] = json!(["/bin"]));
}

#[test]
fn hooks_go_where_they_run() {
    let bundle = read(&Config::default(), |spec| {
        let hook = json!([{ "path": "/bin/true" }]);
        spec["hooks"] = json!({ "createRuntime": hook, "startContainer": hook });
    });
    let bundle = bundle.unwrap();
    assert_eq!(bundle.hooks.create_runtime().as_ref().map(Vec::len), Some(1));
    assert!(bundle.hooks.start_container().is_none());
    let inside = bundle.spec.hooks().clone().unwrap();
    assert_eq!(inside.start_container().as_ref().map(Vec::len), Some(1));
    assert!(inside.create_runtime().is_none());
}

#[test]
fn engines_may_set_only_what_the_administrator_allows() {
    let ask = |spec: &mut Value| spec["annotations"] = json!({ "io.kapsel.memory": "512M" });
    refused("not allowed", ask);
    let bundle = read(&allowing("memory, cpus"), ask).unwrap();
    let annotations = bundle.spec.annotations().clone().unwrap();
    assert_eq!(annotations["io.kapsel.memory"], (512u64 << 20).to_string());
    refused("unknown annotation", |spec| spec["annotations"] = json!({ "io.kapsel.colour": "red" }));
}

#[test]
fn the_machine_is_as_large_as_it_must_be() {
    let asked = |change: fn(&mut Value)| {
        read(&Config::default(), change).unwrap().spec.annotations().clone().unwrap_or_default()
    };
    let memory = asked(|spec| spec["linux"]["resources"] = json!({ "memory": { "limit": 512 << 20 } }));
    assert_eq!(memory["io.kapsel.memory"], ((512u64 + 96) << 20).to_string());
    // The default machine holds it, so the default's template serves it.
    let small = asked(|spec| spec["linux"]["resources"] = json!({ "memory": { "limit": 32 << 20 } }));
    assert!(small.is_empty(), "{small:?}");
    let cpus =
        asked(|spec| spec["linux"]["resources"] = json!({ "cpu": { "quota": 250_000, "period": 100_000 } }));
    assert_eq!(cpus["io.kapsel.cpus"], "3");
    let vm = asked(|spec| spec["vm"] = json!({ "hwConfig": { "vcpus": 2, "memory": 1u64 << 30 } }));
    assert_eq!((vm["io.kapsel.cpus"].as_str(), vm["io.kapsel.memory"].as_str()), ("2", "1073741824"));
    refused("vm.kernel", |spec| spec["vm"] = json!({ "kernel": { "path": "/vmlinux" } }));
    refused("vcpus and memory", |spec| spec["vm"] = json!({ "hwConfig": { "deviceTree": "/dt" } }));
    refused("1 to 64", |spec| spec["vm"] = json!({ "hwConfig": { "vcpus": 1000 } }));
}

#[test]
fn shared_memory_is_the_guests_own() {
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = shm.path().to_owned();
    let bundle = read(&Config::default(), |spec| {
        spec["mounts"][1] = json!({ "destination": "/dev/shm", "type": "bind", "source": path, "options": ["bind", "nosuid"] });
    });
    let mounts = bundle.unwrap().spec.mounts().clone().unwrap();
    assert_eq!(mounts[1].typ().as_deref(), Some("tmpfs"));
    let options = mounts[1].options().clone().unwrap();
    assert!(options.contains(&"nosuid".into()) && options.iter().any(|option| option.starts_with("size=")));
}
