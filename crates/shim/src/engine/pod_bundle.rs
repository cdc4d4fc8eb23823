//! The bundle of a pod that the Sandbox API asks for. Its caller may have written a specification; of what there is for a machine the rest is
//! made here, and what the pod's containers are given besides their own: names, and memory that they share.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use kapsel_sandbox::{
    engine::{OCI_MAX, read_config},
    life::Error,
};
use oci_spec::runtime::{Mount, Spec};
use serde_json::{Map, Value, json};

use super::{
    cri::{PodConfig, Resources},
    pod::{CONTAINER_TYPE, SANDBOX_ID},
    rootfs,
};

/// Where containers have the memory that they share.
const SHM: &str = "/dev/shm";
/// Bytes of it, as containerd gives a pod.
const SHM_SIZE: u64 = 64 << 20;
/// Files of the bundle, and where containers have them.
const FILES: [(&str, &str); 3] =
    [("resolv.conf", "/etc/resolv.conf"), ("hosts", "/etc/hosts"), ("hostname", "/etc/hostname")];

/// Writes what is missing: a specification without a process, with an empty root, and the files.
///
/// # Errors
/// When the request is not understood, or the directory cannot be written.
pub fn prepare(request: &CreateSandboxRequest) -> Result<(), Error> {
    let config = PodConfig::of(request)?;
    let bundle = Path::new(&request.bundle_path);
    for dir in [rootfs::directory(bundle), memory(bundle)] {
        fs::create_dir_all(&dir)
            .map_err(|e| Error::Resources(format!("cannot make {}: {e}", dir.display())))?;
    }
    let path = bundle.join("config.json");
    let given = path.exists().then(|| read(&path)).transpose()?;
    let write = |path: PathBuf, text: &str| {
        fs::write(&path, text).map_err(|e| Error::Resources(format!("cannot write {}: {e}", path.display())))
    };
    for (name, at) in FILES {
        if let Some(text) = config.as_ref().and_then(|config| file(config, at)) {
            write(bundle.join(name), &text)?;
        }
    }
    write(path, &specification(request, config, given.unwrap_or_else(|| json!({}))).to_string())
}

/// A specification, in which everything is of its type.
fn read(path: &Path) -> Result<Value, Error> {
    let json = read_config(path).map_err(|error| Error::Invalid(error.to_string()))?;
    let parsed = serde_json::from_slice(&json).and_then(|given: Map<String, Value>| {
        let mut known = given.clone();
        // Which the crate knows as it was before version 1.3.
        known.remove("vm");
        serde_json::from_value::<Spec>(known.into())?;
        Ok(given.into())
    });
    parsed.map_err(|e| Error::Invalid(format!("{} is no specification: {e}", path.display())))
}

/// What a pod's containers have as one of these files; `None` for their image's own.
fn file(config: &PodConfig, at: &str) -> Option<String> {
    match at {
        "/etc/hostname" => Some(config.hostname.clone() + "\n").filter(|_| !config.hostname.is_empty()),
        "/etc/resolv.conf" => {
            let said = config.dns.as_ref().map(|dns| dns.resolv_conf()).filter(|text| !text.is_empty());
            said.or_else(|| fs::read_to_string(at).ok())
        }
        _ => fs::read_to_string(at).ok(),
    }
}

fn memory(bundle: &Path) -> PathBuf {
    bundle.join("shm")
}

/// The pod's specification: what was given, which is an object whose parts are of their types, and what the request says.
fn specification(request: &CreateSandboxRequest, config: Option<PodConfig>, mut spec: Value) -> Value {
    let bundle = Path::new(&request.bundle_path);
    let (by_plug_in, config) = (config.is_some(), config.unwrap_or_default());
    if spec["ociVersion"].is_null() {
        spec["ociVersion"] = json!(OCI_MAX);
    }
    // Nothing runs in it: a machine needs no process to be there.
    spec["process"] = Value::Null;
    spec["root"] = json!({ "path": rootfs::directory(bundle), "readonly": true });
    spec["mounts"] = json!([{
        "destination": SHM, "type": "tmpfs", "source": memory(bundle),
        "options": ["nosuid", "noexec", "nodev", "mode=1777", format!("size={SHM_SIZE}")],
    }]);
    if !config.hostname.is_empty() {
        spec["hostname"] = json!(config.hostname);
    }
    for (key, value) in config.annotations.iter().chain(&request.annotations) {
        spec["annotations"][key] = json!(value);
    }
    spec["annotations"][CONTAINER_TYPE] = json!("sandbox");
    spec["annotations"][SANDBOX_ID] = json!(request.sandbox_id);
    network(&mut spec["linux"]["namespaces"], &request.netns_path, by_plug_in);
    let linux = config.linux.unwrap_or_default();
    for (key, value) in &linux.sysctls {
        spec["linux"]["sysctl"][key] = json!(value);
    }
    if let Some(path) = linux.cgroups_path(&request.sandbox_id) {
        spec["linux"]["cgroupsPath"] = json!(path);
    }
    let Resources { cpu_period, cpu_quota, cpu_shares, memory_limit } = linux.resources.unwrap_or_default();
    for (part, key, value) in [
        ("cpu", "period", cpu_period),
        ("cpu", "quota", cpu_quota),
        ("cpu", "shares", cpu_shares),
        ("memory", "limit", memory_limit),
    ] {
        // Zero says nothing.
        if value > 0 {
            spec["linux"]["resources"][part][key] = json!(value);
        }
    }
    spec
}

/// For a pod in the host's network the plug-in names none, and there is none here: that is refused where all specifications are.
fn network(namespaces: &mut Value, path: &str, by_plug_in: bool) {
    if namespaces.is_null() {
        *namespaces = ["ipc", "uts", "mount", "pid", "network"]
            .map(|kind| json!({ "type": kind }))
            .into_iter()
            .collect();
    }
    let Some(namespaces) = namespaces.as_array_mut() else { return };
    if by_plug_in || !path.is_empty() {
        namespaces.retain(|namespace| namespace["type"] != "network");
    }
    if !path.is_empty() {
        namespaces.push(json!({ "type": "network", "path": path }));
    }
}

/// Gives a container of the pod what the pod's bundle has for it, unless it has something of its own there.
pub fn lend(bundle: &Path, spec: &mut Spec) -> io::Result<()> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let bind = |source: PathBuf, at: &str, options: &[&str]| -> io::Result<Mount> {
        let mut mount = Mount::default();
        let options = options.iter().map(|&option| option.to_owned()).collect();
        mount.set_destination(at.into()).set_typ(Some("bind".into())).set_options(Some(options));
        mount.set_source(Some(fs::canonicalize(source)?));
        Ok(mount)
    };
    for mount in &mut mounts {
        // Each container's own, by containerd's defaults; a pod's is one.
        if mount.destination() == Path::new(SHM) && mount.typ().as_deref() == Some("tmpfs") {
            *mount = bind(memory(bundle), SHM, &["rbind", "nosuid", "noexec", "nodev"])?;
        }
    }
    let access = match spec.root().as_ref().and_then(|root| root.readonly()) {
        Some(true) => "ro",
        _ => "rw",
    };
    for (name, at) in FILES {
        let taken = mounts.iter().any(|mount| mount.destination() == Path::new(at));
        if !taken && bundle.join(name).exists() {
            mounts.push(bind(bundle.join(name), at, &["rbind", "rprivate", access])?);
        }
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::engine::cri::{Dns, Linux};

    fn request(dir: &Path) -> CreateSandboxRequest {
        CreateSandboxRequest {
            sandbox_id: "p".into(),
            bundle_path: dir.display().to_string(),
            netns_path: "/run/netns/p".into(),
            annotations: HashMap::from([("a".to_owned(), "b".to_owned())]),
            ..Default::default()
        }
    }

    #[test]
    fn what_the_plug_in_says_is_in_the_specification() {
        let resources = Resources { cpu_quota: 250_000, memory_limit: 1 << 30, ..Default::default() };
        let config = PodConfig {
            hostname: "web".into(),
            annotations: HashMap::from([("c".to_owned(), "d".to_owned())]),
            linux: Some(Linux {
                cgroup_parent: "/kubepods/x".into(),
                sysctls: HashMap::from([("net.core.somaxconn".to_owned(), "9".to_owned())]),
                resources: Some(resources),
            }),
            ..Default::default()
        };
        let spec = specification(&request(Path::new("/b")), Some(config), json!({}));
        assert_eq!(spec["hostname"], "web");
        assert_eq!(
            spec["annotations"],
            json!({ "a": "b", "c": "d", CONTAINER_TYPE: "sandbox", SANDBOX_ID: "p" })
        );
        let linux = &spec["linux"];
        assert_eq!(linux["cgroupsPath"], "/kubepods/x/p");
        assert_eq!(linux["sysctl"], json!({ "net.core.somaxconn": "9" }));
        assert_eq!(
            linux["resources"],
            json!({ "cpu": { "quota": 250_000 }, "memory": { "limit": 1 << 30 } })
        );
        assert_eq!(linux["namespaces"][4], json!({ "type": "network", "path": "/run/netns/p" }));
        serde_json::from_value::<Spec>(spec).unwrap();
        // In the host's network.
        let host = CreateSandboxRequest { netns_path: String::new(), ..request(Path::new("/b")) };
        let spec = specification(&host, Some(PodConfig::default()), json!({}));
        assert_eq!(spec["linux"]["namespaces"].as_array().unwrap().len(), 4);
        // Another client's pod has none.
        let spec = specification(&host, None, json!({}));
        assert_eq!(spec["linux"]["namespaces"][4], json!({ "type": "network" }));
    }

    #[test]
    fn a_specification_that_is_there_is_kept_but_for_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.json");
        let given = json!({
            "ociVersion": "1.0.2", "hostname": "h", "vm": { "hwConfig": { "vcpus": 3 } },
            "process": { "args": ["/pause"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "annotations": { "x": "y" },
            "linux": { "namespaces": [{ "type": "network" }, { "type": "ipc" }] },
        });
        fs::write(&config, given.to_string()).unwrap();
        prepare(&request(dir.path())).unwrap();
        let spec: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        assert_eq!((&spec["hostname"], &spec["process"]), (&json!("h"), &Value::Null));
        assert_eq!(spec["vm"], given["vm"]);
        assert_eq!((&spec["annotations"]["x"], &spec["annotations"]["a"]), (&json!("y"), &json!("b")));
        let namespaces = json!([{ "type": "ipc" }, { "type": "network", "path": "/run/netns/p" }]);
        assert_eq!(spec["linux"]["namespaces"], namespaces);
        for bad in
            ["[]", "{", r#"{"ociVersion":"1.0.2","linux":"x"}"#, r#"{"ociVersion":"1.0.2","annotations":[]}"#]
        {
            fs::write(&config, bad).unwrap();
            assert!(matches!(prepare(&request(dir.path())), Err(Error::Invalid(_))), "{bad}");
        }
    }

    #[test]
    fn a_container_has_its_pods_names_and_memory_unless_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let dns = Dns { servers: vec!["192.0.2.1".into()], ..Default::default() };
        let config = PodConfig { hostname: "web".into(), dns: Some(dns), ..Default::default() };
        let options = containerd_shim_protos::protobuf::well_known_types::any::Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: prost::Message::encode_to_vec(&config),
            ..Default::default()
        };
        prepare(&CreateSandboxRequest { options: Some(options).into(), ..request(dir.path()) }).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("resolv.conf")).unwrap(), "nameserver 192.0.2.1\n");
        let mounts = json!([
            { "destination": SHM, "type": "tmpfs", "source": "shm" },
            { "destination": "/etc/hostname", "type": "bind", "source": "/x" },
        ]);
        let spec =
            json!({ "ociVersion": "1.0.2", "root": { "path": "r", "readonly": true }, "mounts": mounts });
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        lend(dir.path(), &mut spec).unwrap();
        let mounts = spec.mounts().clone().unwrap();
        let source = |at: &str| {
            let mount = mounts.iter().find(|mount| mount.destination() == Path::new(at)).unwrap();
            mount.source().clone().unwrap()
        };
        assert_eq!(source(SHM), dir.path().canonicalize().unwrap().join("shm"));
        assert_eq!(source("/etc/hostname"), Path::new("/x"));
        assert!(source("/etc/resolv.conf").ends_with("resolv.conf"));
        let last = mounts.last().unwrap();
        assert!(last.options().iter().flatten().any(|option| option == "ro"), "as its root: {last:?}");
    }
}
