//! An engine's bundle, made into what a sandbox is launched with. All that cannot be had in a machine of its own is refused
//! here, by name and with the reason, before anything starts.

mod features;
mod machine;
mod mounts;
mod pod;
mod program;
mod refusal;

use std::{
    collections::HashMap,
    fs,
    io::Read,
    path::{Path, PathBuf},
};

pub use features::{OCI_MAX, OCI_MIN, features};
pub use kapsel_jail::cgroup::Named;
use oci_spec::runtime::{Hooks, LinuxNamespaceType, Spec};
pub use pod::Role;
pub use refusal::{Error, Refusal};
use refusal::{Why, refuse};
use serde::{Deserialize, Serialize};

use crate::{annotations::NETWORK, client::RootfsMount, config::Config};

/// A larger config.json is none.
const CONFIG_MAX: u64 = 8 << 20;

/// The container's network namespace on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// One that the stand-in makes.
    New,
    /// One that the engine made.
    At(PathBuf),
}

/// What a bundle asks for, once it is known that it can be had.
#[derive(Debug)]
pub struct Bundle {
    /// Its directory.
    pub dir: PathBuf,
    /// For the sandbox: without what this command line does itself.
    pub spec: Spec,
    /// `ociVersion`.
    pub oci_version: String,
    /// The root file system.
    pub rootfs: RootfsMount,
    /// The container's network namespace on the host; a pod's is its first container's.
    pub network: Network,
    /// It is in the pid namespace of its pod's first container.
    pub shares_pids: bool,
    /// Those that run on the host.
    pub hooks: Hooks,
    /// All that the engine gave.
    pub annotations: HashMap<String, String>,
    /// Where its processes are on the host.
    pub cgroup: Option<Named>,
    /// Whether the container's process has a terminal.
    pub terminal: bool,
    /// What is left out, to be told.
    pub warnings: Vec<String>,
}

impl Bundle {
    /// Gives the sandbox the interfaces of this network namespace: what the engine and its hooks have put there by now.
    ///
    /// # Errors
    /// When the engine asks for another network by an annotation.
    pub fn connect(spec: &mut Spec, namespace: &Path) -> Result<(), Refusal> {
        let mut annotations = spec.annotations().clone().unwrap_or_default();
        let wish = crate::network::Network::Namespace(namespace.into());
        if annotations.insert(NETWORK.into(), wish.to_string()).is_some() {
            refuse!(
                "the annotation {NETWORK} is not for engines: they say with their own network settings what a container gets"
            );
        }
        spec.set_annotations(Some(annotations));
        Ok(())
    }

    /// Reads and checks a bundle.
    ///
    /// # Errors
    /// When it cannot be read, is not what the specification says, or asks for something that a machine cannot give.
    pub fn read(dir: &Path, role: Role, config: &Config) -> Result<Self, Error> {
        let dir = fs::canonicalize(dir).map_err(|source| Error::Read { path: dir.into(), source })?;
        let path = dir.join("config.json");
        let json = read_config(&path)?;
        Self::parse(dir, &json, role, config).map_err(|refusal| Error::Refused { path, refusal })
    }

    fn parse(dir: PathBuf, json: &[u8], role: Role, config: &Config) -> Result<Self, Refusal> {
        let mut value: serde_json::Value = serde_json::from_slice(json).why("it is not JSON")?;
        let Some(object) = value.as_object_mut() else { refuse!("it is not a JSON object") };
        // By hand: the specification crate knows `vm` as it was before version 1.3.
        let hardware = object.remove("vm").map(machine::Hardware::of).transpose()?.unwrap_or_default();
        refuse_parts(object)?;
        let mut spec: Spec = serde_json::from_value(value).why("it is not an OCI specification")?;
        let version: Vec<&str> = spec.version().splitn(3, '.').collect();
        if version.len() != 3 || version[0] != "1" {
            refuse!("ociVersion {:?} is not 1.x.y", spec.version());
        }
        let mut warnings = Vec::new();
        let shares_pids = pod::leave_shared_namespaces(&mut spec, role)?;
        let network = namespaces(&mut spec)?;
        let rootfs = rootfs(&spec, &dir)?;
        let terminal = role != Role::Pod && process(&mut spec, &mut warnings)?;
        devices(&spec)?;
        mounts::translate(&mut spec, &dir, role)?;
        if rootfs.source.is_dir() {
            program::check(&spec, &rootfs.source)?;
        }
        let hooks = hooks(&mut spec)?;
        let annotations = spec.annotations().clone().unwrap_or_default();
        let mut wishes = machine::wishes(&spec, &hardware, &annotations, config)?;
        wishes.pod = matches!(role, Role::PodSandbox | Role::Pod);
        spec.set_annotations(Some(wishes.to_annotations()));
        let cgroup = crate::cgroup::named(&spec).why("linux.cgroupsPath")?;
        match &cgroup {
            Some(cgroup) => cgroup.check().why("linux.cgroupsPath")?,
            None => no_processors(&spec)?,
        }
        let oci_version = spec.version().clone();
        Ok(Self {
            dir,
            spec,
            oci_version,
            rootfs,
            network,
            shares_pids,
            hooks,
            annotations,
            cgroup,
            terminal,
            warnings,
        })
    }
}

/// Reads a `config.json` within its bound.
///
/// # Errors
/// When it cannot be read, or is larger than any specification.
pub fn read_config(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Read { path: path.into(), source };
    let mut json = Vec::new();
    fs::File::open(path).map_err(failed)?.take(CONFIG_MAX + 1).read_to_end(&mut json).map_err(failed)?;
    match json.len() as u64 > CONFIG_MAX {
        true => Err(Error::TooLarge { path: path.into(), limit: CONFIG_MAX >> 20 }),
        false => Ok(json),
    }
}

/// Parts that no Linux container in a guest can have.
fn refuse_parts(object: &serde_json::Map<String, serde_json::Value>) -> Result<(), Refusal> {
    let is_set = |value: Option<&serde_json::Value>| match value {
        None | Some(serde_json::Value::Null) => false,
        Some(serde_json::Value::Object(map)) => !map.is_empty(),
        Some(serde_json::Value::Array(list)) => !list.is_empty(),
        Some(serde_json::Value::String(text)) => !text.is_empty(),
        Some(_) => true,
    };
    for platform in ["windows", "solaris", "zos"] {
        if is_set(object.get(platform)) {
            refuse!("it is for {platform}, and a kapsel guest runs Linux");
        }
    }
    let Some(linux) = object.get("linux").and_then(|linux| linux.as_object()) else {
        refuse!("it has no `linux` part; `kapsel-runtime spec` writes one to begin with");
    };
    for (key, why) in [
        (
            "uidMappings",
            "user namespaces of the host end at the guest's kernel; leave out --userns and --uidmap",
        ),
        (
            "gidMappings",
            "user namespaces of the host end at the guest's kernel; leave out --userns and --gidmap",
        ),
        ("netDevices", "devices of the host's kernel cannot be moved into the guest's"),
        ("intelRdt", "its resources are the host's"),
        ("personality", "the guest runs 64-bit programs as they are"),
        ("timeOffsets", "the guest has a clock of its own"),
    ] {
        if is_set(linux.get(key)) {
            refuse!("it asks for linux.{key}, which a sandbox cannot give: {why}");
        }
    }
    Ok(())
}

/// Takes the network namespace out, which stays on the host, and refuses those of the host.
fn namespaces(spec: &mut Spec) -> Result<Network, Refusal> {
    use LinuxNamespaceType as T;
    let mut linux = spec.linux().clone().why("it has no `linux` part")?;
    let mut list = linux.namespaces().clone().unwrap_or_default();
    let has = |typ| list.iter().any(|namespace| namespace.typ() == typ);
    if has(T::User) {
        refuse!(
            "it asks for a user namespace, which a sandbox cannot give: user ids of the host end at the guest's \
             kernel; leave out --userns (the machine confines the container's root)"
        );
    }
    for (typ, flag) in [
        (T::Network, "--network=host"),
        (T::Pid, "--pid=host"),
        (T::Ipc, "--ipc=host"),
        (T::Uts, "--uts=host"),
    ] {
        if !has(typ) {
            refuse!(
                "it asks for the host's {typ} namespace ({flag}), which a container with a kernel of its own cannot \
                 be in; leave that out, or run this container with runc"
            );
        }
    }
    for namespace in &list {
        if let Some(path) = namespace.path()
            && !matches!(namespace.typ(), T::Network)
        {
            refuse!(
                "it asks for the {} namespace at {}, which is of the host's kernel or of another container's: each \
                 container here has a kernel of its own (--{}=container:… needs runc; a pod's share theirs by containerd's CRI plug-in)",
                namespace.typ(),
                path.display(),
                namespace.typ()
            );
        }
    }
    let network = list.iter().find(|namespace| namespace.typ() == T::Network);
    let network = match network.and_then(|namespace| namespace.path().clone()) {
        Some(path) if path.as_os_str().is_empty() => Network::New,
        Some(path) => Network::At(not_the_hosts(path)?),
        None => Network::New,
    };
    list.retain(|namespace| namespace.typ() != T::Network);
    linux.set_namespaces(Some(list));
    spec.set_linux(Some(linux));
    Ok(network)
}

/// Docker names the host's network namespace as it names any other. The frames of the host's interfaces would go to the guest.
fn not_the_hosts(path: PathBuf) -> Result<PathBuf, Refusal> {
    use std::os::unix::fs::MetadataExt;
    let place = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let there = place(&path).why(&format!("cannot use the network namespace {}", path.display()))?;
    // Whoever calls this, and the whole machine: an engine may have been started in a namespace of its own.
    let hosts = ["/proc/self/ns/net", "/proc/1/ns/net"].map(|own| place(Path::new(own)).ok());
    if hosts.contains(&Some(there)) {
        refuse!(
            "it asks for the host's network namespace, {} (--network=host), which a container with a kernel of its own \
             cannot be in; leave that out, or run this container with runc",
            path.display()
        );
    }
    Ok(path)
}

/// Without a cgroup of the engine's nothing would keep them.
fn no_processors(spec: &Spec) -> Result<(), Refusal> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone());
    if crate::cgroup::take_hosts(&mut resources.unwrap_or_default()) {
        refuse!(
            "it names processors or memory nodes of the host (linux.resources.cpu.cpus or mems) and no cgroup; give \
             linux.cgroupsPath too"
        );
    }
    Ok(())
}

fn rootfs(spec: &Spec, dir: &Path) -> Result<RootfsMount, Refusal> {
    /// Of an EROFS file, at byte 1024.
    const EROFS: [u8; 4] = 0xE0F5_E1E2_u32.to_le_bytes();
    let root = spec.root().as_ref().why("it has no `root`")?;
    let path = dir.join(root.path());
    let path = fs::canonicalize(&path).why(&format!("cannot use root.path {}", path.display()))?;
    if path.is_dir() {
        // A read-only root gets an overlay in the guest: mount points are made in it, and nothing on the host.
        let access = if root.readonly().unwrap_or(false) { "ro" } else { "rw" };
        return Ok(RootfsMount { kind: "bind".into(), source: path, options: vec![access.into()] });
    }
    let magic = || -> std::io::Result<[u8; 4]> {
        use std::os::unix::fs::FileExt;
        let mut magic = [0; 4];
        fs::File::open(&path)?.read_exact_at(&mut magic, 1024)?;
        Ok(magic)
    };
    if path.is_file() && magic().is_ok_and(|magic| magic == EROFS) {
        return Ok(RootfsMount::erofs(path));
    }
    refuse!(
        "root.path {} is neither a directory nor an EROFS image, which a sandbox could have",
        path.display()
    )
}

/// Checks the process, and takes out the labels of security modules that the guest's kernel does not have.
fn process(spec: &mut Spec, warnings: &mut Vec<String>) -> Result<bool, Refusal> {
    let mut process = spec.process().clone().why("it has no `process`")?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        refuse!("process.args is empty: there is nothing to run");
    }
    check_process(&mut process, warnings)?;
    let terminal = process.terminal().unwrap_or(false);
    spec.set_process(Some(process));
    let mut linux = spec.linux().clone().unwrap_or_default();
    linux.set_mount_label(None);
    spec.set_linux(Some(linux));
    Ok(terminal)
}

/// What holds for each process, also one that is added. What is left out of it is told in `warnings`.
///
/// # Errors
/// When a guest cannot run it.
pub fn check_process(
    process: &mut oci_spec::runtime::Process,
    warnings: &mut Vec<String>,
) -> Result<(), Refusal> {
    if !process.cwd().is_absolute() {
        refuse!("process.cwd {:?} is not an absolute path", process.cwd());
    }
    for (name, label) in [("AppArmor", process.apparmor_profile()), ("SELinux", process.selinux_label())] {
        if label.as_ref().is_some_and(|label| !label.is_empty()) {
            warnings.push(format!(
                "{name} is the host's; in the sandbox the machine confines the process instead"
            ));
        }
    }
    process.set_apparmor_profile(None).set_selinux_label(None);
    Ok(())
}

/// A node of the same number would be another device in the guest.
fn devices(spec: &Spec) -> Result<(), Refusal> {
    /// null, zero, full, random, urandom, tty, console, ptmx, tun, fuse: the same in every kernel.
    const EVERYWHERE: [(i64, i64); 10] =
        [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (10, 200), (10, 229)];
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().clone()).unwrap_or_default();
    match devices.iter().find(|device| !EVERYWHERE.contains(&(device.major(), device.minor()))) {
        Some(device) => refuse!(
            "it asks for the host's device {}, which the guest's kernel does not have; leave out --device (and \
             --privileged, which asks for all devices)",
            device.path().display()
        ),
        None => Ok(()),
    }
}

/// Takes out the hooks that run on the host.
#[allow(deprecated, reason = "Docker still uses prestart")]
fn hooks(spec: &mut Spec) -> Result<Hooks, Refusal> {
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    if hooks.create_container().as_ref().is_some_and(|list| !list.is_empty()) {
        refuse!(
            "it has createContainer hooks, programs of the host that run in the container's namespaces: those are in \
             the guest, where the host's programs are not; use createRuntime or startContainer hooks"
        );
    }
    let inside = hooks.start_container().clone().filter(|list| !list.is_empty());
    hooks.set_start_container(None);
    let mut guest = Hooks::default();
    guest.set_start_container(inside);
    spec.set_hooks(guest.start_container().is_some().then_some(guest));
    for hook in [hooks.prestart(), hooks.create_runtime(), hooks.poststart(), hooks.poststop()]
        .into_iter()
        .flatten()
        .flatten()
    {
        if !hook.path().is_absolute() {
            refuse!("hook {} is not an absolute path", hook.path().display());
        }
    }
    Ok(hooks)
}

#[cfg(test)]
mod tests;
