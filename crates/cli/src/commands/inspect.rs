//! `kapsel inspect`: all that is known, for programs. The field names are part of kapsel's interface.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use kapsel_image::Inspection;
use kapsel_sandbox::annotations::Wishes;
use kapsel_sandbox::listing::Health;
use kapsel_sandbox::publish::Publish;
use kapsel_sandbox::record::{Exit, MachineInfo, Record};
use kapsel_sandbox::registry::Error as RegistryError;
use kapsel_sandbox::timings::Timings;
use oci_spec::runtime::Spec;
use serde::Serialize;

use super::host::{Host, Sandbox};
use super::many::each;
use super::ps;
use crate::failure::{Failure, Outcome};
use crate::flags::container::Inspect;
use crate::output::{self, time};

/// Either kind of thing that has a name.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Found {
    Container(Box<Container>),
    Image(Box<Inspection>),
}

#[derive(Serialize)]
struct Container {
    id: String,
    name: String,
    image: Option<String>,
    image_digest: Option<String>,
    /// The image's root file system on this machine.
    rootfs: Option<PathBuf>,
    created_at: String,
    started_at: Option<String>,
    status: String,
    health: &'static str,
    /// `{code, at, oom, reason}` once it has ended.
    exit: Option<Exited>,
    /// On this machine; null before it has one.
    pids: Option<Pids>,
    /// What keeps it apart; null before it has a machine.
    isolation: Option<Isolation>,
    machine: Option<Machine>,
    /// It is removed when it ends.
    remove: bool,
    terminal: bool,
    stdin: bool,
    labels: std::collections::BTreeMap<String, String>,
    network: Option<Network>,
    mounts: Vec<Mount>,
    /// The OCI runtime specification.
    config: Option<Spec>,
    /// Where its start's milliseconds went.
    timings: Option<Timings>,
    bundle: PathBuf,
    log: PathBuf,
}

#[derive(Serialize)]
struct Exited {
    code: u32,
    at: String,
    oom: bool,
    reason: Option<String>,
}

#[derive(Serialize)]
struct Pids {
    shim: u32,
    monitor: u32,
    fsd: Vec<u32>,
    /// What carries published ports.
    forward: Option<u32>,
}

#[derive(Serialize)]
struct Isolation {
    /// `kapsel-vmm`, `qemu-kvm` or `tcg`.
    kind: String,
    /// `kvm` or `tcg`.
    accelerator: String,
    /// Why that.
    reason: String,
    /// It was cloned from a template.
    template: bool,
}

#[derive(Serialize)]
struct Machine {
    kernel: String,
    vcpus: u32,
    /// Bytes.
    memory: u64,
}

#[derive(Serialize)]
struct Network {
    /// As `--network` takes it.
    kind: String,
    /// On kapsel's bridge.
    address: Option<Ipv4Addr>,
    /// The same of IPv6.
    address6: Option<Ipv6Addr>,
    /// Published ports.
    ports: Vec<Publish>,
}

#[derive(Serialize)]
struct Mount {
    destination: PathBuf,
    kind: String,
    source: Option<PathBuf>,
    options: Vec<String>,
}

/// Prints what is known of each name; containers win over images.
pub fn run(host: &Host, flags: &Inspect) -> Outcome {
    let registry = host.sandboxes()?;
    let entries = host.list()?;
    let mut found = Vec::new();
    let code = each(&flags.names, |name| {
        found.push(match registry.resolve(name) {
            Ok(bundle) => {
                let record = Record::read(&bundle)?;
                let entry = entries.iter().find(|entry| entry.bundle == bundle);
                let health = entry.map_or(Health::Well, |entry| entry.health);
                Found::Container(Box::new(container(&Sandbox { bundle, record }, health)))
            }
            Err(RegistryError::NotFound(_)) => Found::Image(Box::new(image(host, name)?)),
            Err(error) => return Err(error.into()),
        });
        Ok(())
    })?;
    output::json(&found);
    Ok(code)
}

fn image(host: &Host, name: &str) -> Result<Inspection, Failure> {
    let store = host.images()?;
    let neither = |_| {
        Failure::new(format!("there is neither a container nor an image {name:?}"))
            .hint("'kapsel ps -a' and 'kapsel images' list them")
    };
    let image = store.find(name).map_err(neither)?;
    Ok(store.inspect(&image)?)
}

fn container(sandbox: &Sandbox, health: Health) -> Container {
    let Sandbox { bundle, record } = sandbox;
    let spec = sandbox.spec().ok();
    let machine = record.machine.as_ref();
    Container {
        id: record.id.to_string(),
        name: record.name.clone(),
        image: record.image.clone(),
        image_digest: record.image_digest.clone(),
        rootfs: record.rootfs.clone(),
        created_at: time::rfc3339(record.created_at),
        started_at: record.started_at.map(time::rfc3339),
        status: if health == Health::Gone { "exited".into() } else { record.status.to_string() },
        health: ps::health(health),
        exit: record.exit.as_ref().map(exited),
        pids: machine.map(|m| Pids {
            shim: m.shim,
            monitor: m.monitor,
            fsd: m.fsd.clone(),
            forward: m.forward,
        }),
        isolation: machine.map(isolation),
        machine: machine.map(|m| Machine { kernel: m.kernel.clone(), vcpus: m.vcpus, memory: m.memory }),
        remove: record.remove,
        terminal: record.terminal,
        stdin: record.stdin,
        labels: record.labels.clone(),
        network: spec.as_ref().and_then(|spec| network(record, spec)),
        mounts: spec.as_ref().map(mounts).unwrap_or_default(),
        config: spec,
        timings: Timings::read(bundle).ok(),
        bundle: bundle.dir().to_owned(),
        log: bundle.output_log(),
    }
}

fn exited(exit: &Exit) -> Exited {
    Exited { code: exit.code, at: time::rfc3339(exit.at), oom: exit.oom, reason: exit.reason.clone() }
}

fn isolation(machine: &MachineInfo) -> Isolation {
    Isolation {
        kind: machine.isolation.clone(),
        accelerator: machine.accelerator.clone(),
        reason: machine.reason.clone(),
        template: machine.template,
    }
}

fn network(record: &Record, spec: &Spec) -> Option<Network> {
    let asked = Wishes::of(spec).ok()?.network;
    let kind = asked.unwrap_or_else(|| kapsel_sandbox::network::Network::of(spec)).to_string();
    Some(Network { kind, address: record.address, address6: record.address6, ports: record.ports.clone() })
}

fn mounts(spec: &Spec) -> Vec<Mount> {
    let mounts = spec.mounts().iter().flatten();
    mounts
        .map(|mount| Mount {
            destination: mount.destination().clone(),
            kind: mount.typ().clone().unwrap_or_default(),
            source: mount.source().clone(),
            options: mount.options().clone().unwrap_or_default(),
        })
        .collect()
}
