//! kapsel-vmm as a monitor.
//!
//! It is told what to be by a file and what to do by its API. All that it may have is in its jail under fixed names ([`paths`]), so
//! that a saved machine and its clones describe themselves in the same words: a clone's disk is another file under the same name.

mod api;
mod config;
mod machine;
mod process;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;

use crate::snapshot::Meta;
use crate::{
    Accel, Capabilities, Error, Machine, MachineSpec, Monitor, Probe, Result, Snapshot, fingerprint,
};
use machine::VmmMachine;
use process::{From, start};

/// The monitor's name in messages.
const NAME: &str = "kapsel-vmm";

/// What it can do.
const CAPABILITIES: Capabilities = Capabilities {
    snapshot: true,
    attach: false,
    places: PLACES,
    tcg: false,
    vcpus: 32,
    memory_mib: 64 * 1024,
};

/// The most shares and network interfaces together. The guest knows of a place for each, and finds it empty unless there is one. A
/// machine has 18; disks, channel, balloon and entropy take five.
const PLACES: usize = 13;

/// The descriptor of the first interface's tap in the jail; the others follow.
const TAPS: i32 = 10;
/// The descriptor of the connection to the first share's server; the others follow.
const SHARES: i32 = TAPS + PLACES as i32;

/// Paths in the jail.
mod paths {
    pub const KERNEL: &str = "/kernel";
    pub const INITRAMFS: &str = "/initramfs";
    pub const CONFIG: &str = "/config";
    /// The only directory in which it can make files: sockets.
    pub const SOCKETS: &str = "/run";
    pub const API: &str = "/run/api";
    pub const VSOCK: &str = "/run/vsock";
    /// What it continues.
    pub const SAVED_STATE: &str = "/saved/state";
    pub const SAVED_MEMORY: &str = "/saved/memory";
    /// Where it saves itself.
    pub const STATE: &str = "/save/state";
    pub const MEMORY: &str = "/save/memory";

    /// The disk of a serial number.
    pub fn disk(serial: &str) -> String {
        format!("/disks/{serial}")
    }
}

/// kapsel-vmm, at a place on this host.
#[derive(Debug, Clone)]
pub struct KapselVmm {
    program: PathBuf,
}

impl KapselVmm {
    /// The program at this place.
    pub fn at(program: impl Into<PathBuf>) -> KapselVmm {
        KapselVmm { program: program.into() }
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }
}

#[async_trait::async_trait]
impl Monitor for KapselVmm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self) -> Probe {
        let mut probe = Probe { path: Some(self.program.clone()), version: None, problems: Vec::new() };
        match std::process::Command::new(&self.program).arg("--version").output() {
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stdout);
                probe.version = text.split_whitespace().nth(1).map(str::to_owned);
            }
            Err(error) => probe.problems.push(format!("{} cannot be run: {error}", self.program.display())),
        }
        probe
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn fingerprint(&self, spec: &MachineSpec) -> Result<String> {
        fingerprint::of(&self.program, spec, [config::of(spec).to_string()])
    }

    async fn boot(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        check(spec)?;
        let begun = Instant::now();
        let fingerprint = self.fingerprint(spec)?;
        let (process, api) = start(&self.program, spec, From::Kernel).await?;
        let spawned = begun.elapsed();
        // It answers when the machine is built and runs.
        machine::ask(&process, &api, "start", api::Request::get("/")).await?;
        let phases = vec![("spawn", spawned), ("monitor", begun.elapsed() - spawned)];
        Ok(Arc::new(VmmMachine::new(process, api, spec, fingerprint, phases)))
    }

    async fn restore(&self, snapshot: &Snapshot, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        check(spec)?;
        let begun = Instant::now();
        let fingerprint = self.fingerprint(spec)?;
        Meta::read(&snapshot.dir, spec, &fingerprint)?;
        let (process, api) = start(&self.program, spec, From::Snapshot(&snapshot.dir)).await?;
        let spawned = begun.elapsed();
        machine::ask(&process, &api, "start", api::Request::get("/")).await?;
        let up = begun.elapsed();
        let load = json!({
            "snapshot_path": paths::SAVED_STATE,
            "mem_backend": { "backend_type": "File", "backend_path": paths::SAVED_MEMORY },
            "resume_vm": true,
            "network_additions": config::nics(spec),
            "share_additions": config::shares(spec),
        });
        machine::ask(&process, &api, "load the saved machine", api::Request::put("/snapshot/load", load))
            .await?;
        let phases = vec![("spawn", spawned), ("monitor", up - spawned), ("restore", begun.elapsed() - up)];
        Ok(Arc::new(VmmMachine::new(process, api, spec, fingerprint, phases)))
    }
}

/// Refuses what such a machine cannot be.
fn check(spec: &MachineSpec) -> Result<()> {
    let unsupported = |what: &str| Err(Error::Unsupported { monitor: NAME, what: what.to_owned() });
    let invalid = |what: String| Err(Error::Invalid { name: spec.name.clone(), what });
    let (shares, nics) = (spec.shares.len(), spec.nics.len());
    if shares + nics > PLACES {
        let what = "shared directories and network interfaces";
        return invalid(format!("{shares} and {nics} {what}; it can have {PLACES} of both together"));
    }
    if spec.template && shares + nics > 0 {
        let what = "a template cannot have shared directories or network interfaces: its clones bring them";
        return invalid(what.into());
    }
    if spec.accel != Accel::Kvm {
        return unsupported("do without KVM");
    }
    let Capabilities { vcpus, memory_mib, .. } = CAPABILITIES;
    if !(1..=vcpus).contains(&spec.vcpus) {
        return invalid(format!("{} processors; it can have 1 to {vcpus}", spec.vcpus));
    }
    if !(64..=memory_mib).contains(&spec.memory_mib) {
        return invalid(format!("{} MiB of memory; it can have 64 to {memory_mib}", spec.memory_mib));
    }
    let plain = |serial: &str| {
        (1..=20).contains(&serial.len()) && serial.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    match spec.disks.iter().find(|disk| !plain(&disk.serial)) {
        Some(disk) => {
            invalid(format!("the disk serial {:?}: letters, digits and '_', at most 20", disk.serial))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Disk, Identity, JailOptions, Nic, Share};

    pub(super) fn spec() -> MachineSpec {
        MachineSpec {
            name: "test".into(),
            dir: "/nowhere".into(),
            kernel: "/nowhere/vmlinux".into(),
            initramfs: "/nowhere/initramfs".into(),
            cmdline: "more".into(),
            vcpus: 2,
            memory_mib: 256,
            disks: vec![Disk { serial: "rootfs".into(), path: "/nowhere/a".into(), read_only: true }],
            shares: Vec::new(),
            nics: Vec::new(),
            accel: Accel::Kvm,
            console: None,
            template: false,
            memory_dir: None,
            jail: JailOptions { identity: Identity::Current, cgroup: None },
        }
    }

    #[tokio::test]
    async fn what_it_cannot_do_is_refused_before_anything_starts() {
        let monitor = KapselVmm::at("/nowhere/kapsel-vmm");
        let refused = async |change: &dyn Fn(&mut MachineSpec)| {
            let mut spec = spec();
            change(&mut spec);
            let booted = monitor.boot(&spec).await.err().unwrap();
            let restored = monitor.restore(&Snapshot { dir: "/nowhere".into() }, &spec).await.err().unwrap();
            assert_eq!(booted.to_string(), restored.to_string());
            booted
        };
        let socket = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let share = Share { tag: "tag0".into(), socket };
        let error = refused(&|spec| spec.shares = vec![share.clone(); 14]).await;
        assert!(error.to_string().contains("14 and 0 shared directories"), "{error}");
        let error = refused(&|spec| spec.accel = Accel::Tcg).await;
        assert!(matches!(error, Error::Unsupported { monitor: "kapsel-vmm", .. }));
        for change in [
            (&|spec: &mut MachineSpec| spec.vcpus = 33) as &dyn Fn(&mut MachineSpec),
            &|spec| spec.vcpus = 0,
            &|spec| spec.memory_mib = 65537,
            &|spec| spec.disks[0].serial = "../x".into(),
        ] {
            assert!(matches!(refused(change).await, Error::Invalid { .. }));
        }
        let nic = Nic { mac: [2; 6], tap: Arc::new(std::fs::File::open("/dev/null").unwrap().into()) };
        let many = |spec: &mut MachineSpec| {
            spec.nics = vec![nic.clone(); 8];
            spec.shares = vec![share.clone(); 6];
        };
        let error = refused(&many).await;
        assert!(error.to_string().contains("6 and 8 shared directories and network"), "{error}");
        let template = |spec: &mut MachineSpec| {
            spec.template = true;
            spec.nics.push(nic.clone());
        };
        assert!(matches!(refused(&template).await, Error::Invalid { .. }));
        let error = monitor.boot(&spec()).await.err().unwrap();
        assert!(error.to_string().contains("/nowhere/kapsel-vmm"), "{error}");
    }

    #[test]
    fn only_what_a_saved_machine_depends_on_is_in_its_fingerprint() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, name).unwrap();
            path
        };
        let monitor = KapselVmm::at(file("kapsel-vmm"));
        let spec = MachineSpec { kernel: file("kernel"), initramfs: file("initramfs"), ..spec() };
        let first = monitor.fingerprint(&spec).unwrap();
        let mut clone = MachineSpec { name: "clone".into(), dir: "/other".into(), ..spec.clone() };
        clone.disks[0].path = "/other/disk".into();
        clone.template = true;
        assert_eq!(monitor.fingerprint(&clone).unwrap(), first);
        assert_ne!(monitor.fingerprint(&MachineSpec { vcpus: 1, ..spec.clone() }).unwrap(), first);
        assert_ne!(monitor.fingerprint(&MachineSpec { cmdline: "x".into(), ..spec.clone() }).unwrap(), first);
        assert_ne!(KapselVmm::at(file("another")).fingerprint(&spec).unwrap(), first);
    }
}
