//! `kapsel template`.

use kapsel_sandbox::annotations::Wishes;
use kapsel_sandbox::config::Isolation;
use kapsel_sandbox::spec::{self, ImageDefaults, Limits, RunOptions};
use kapsel_sandbox::standby::{self, Standby};
use kapsel_sandbox::template::{self, Template};
use serde::Serialize;

use super::host::{self, Host};
use super::many::each;
use crate::failure::{Failure, Outcome};
use crate::flags::system;
use crate::output::table::Table;
use crate::output::{self, size, time};

/// One template, as `template ls --json` lists it.
#[derive(Serialize)]
struct Listed {
    /// Of what it depends on: kernel, agent, monitor, shape.
    key: String,
    /// `kapsel-vmm`, `qemu-kvm` or `tcg`.
    isolation: String,
    /// Release of the guest's kernel.
    kernel: String,
    vcpus: u32,
    /// Bytes.
    memory: u64,
    /// It has a scratch disk.
    scratch: bool,
    /// The root file system of the container in it; null: it is empty.
    container: Option<String>,
    /// Machines that stand by, made from it.
    standby: usize,
    /// RFC 3339.
    created_at: String,
    /// Bytes on the disk.
    disk_usage: u64,
}

impl Listed {
    fn new(template: Template, standing: &[Standby]) -> Self {
        let Template { meta, disk_usage, .. } = template;
        Listed {
            standby: standing.iter().filter(|standby| standby.template == meta.key).count(),
            key: meta.key,
            isolation: meta.shape.isolation,
            kernel: meta.shape.kernel,
            vcpus: meta.shape.vcpus,
            memory: meta.shape.memory_mib << 20,
            scratch: meta.shape.scratch,
            container: meta.shape.container.map(|held| held.rootfs),
            created_at: time::rfc3339(meta.created_at),
            disk_usage,
        }
    }
}

/// Lists, makes or removes templates.
pub fn run(host: &Host, command: &system::Template) -> Outcome {
    match command {
        system::Template::Ls(flags) => list(host, flags.json),
        system::Template::Build(flags) => build(host, flags),
        system::Template::Rm(flags) => remove(host, flags),
    }
}

fn list(host: &Host, json: bool) -> Outcome {
    let standing = standby::list(&host.paths).map_err(unlisted)?;
    let mut listed = Vec::new();
    for found in template::list(&host.paths)? {
        match found {
            Ok(template) => listed.push(Listed::new(template, &standing)),
            Err(error) => Failure::from(error).warn(),
        }
    }
    if json {
        output::json(&listed);
        return Ok(0);
    }
    let mut table =
        Table::new(&["KEY", "MACHINE", "CPUS", "MEMORY", "KERNEL", "HOLDS", "STANDBY", "CREATED", "ON DISK"]);
    for template in listed {
        table.row([
            template.key.chars().take(12).collect(),
            template.isolation,
            template.vcpus.to_string(),
            size::bytes(template.memory),
            template.kernel,
            template.container.map_or_else(|| "-".into(), |rootfs| rootfs.chars().take(19).collect()),
            template.standby.to_string(),
            template.created_at,
            size::bytes(template.disk_usage),
        ]);
    }
    table.print();
    Ok(0)
}

fn remove(host: &Host, flags: &system::TemplateRm) -> Outcome {
    let print = |key: &str| output::print(format!("{key}\n").as_bytes());
    dismiss_standbys(host)?;
    if flags.standby {
        return Ok(0);
    }
    if flags.all {
        template::remove_all(&host.paths)?.iter().for_each(|key| print(key));
        return Ok(0);
    }
    each(&flags.keys, |key| {
        print(&template::remove(&host.paths, key)?);
        Ok(())
    })
}

/// Ends the machines that stand by: what they were made from goes.
pub fn dismiss_standbys(host: &Host) -> Result<(), Failure> {
    host::runtime()?.block_on(standby::dismiss_all(&host.paths)).map_err(unlisted)
}

fn unlisted(error: std::io::Error) -> Failure {
    Failure::new(format!("cannot list the machines that stand by: {error}"))
}

/// Makes the template for a machine, waits until it is there, and prints its key.
fn build(host: &Host, flags: &system::TemplateBuild) -> Outcome {
    host::ensure_kernel(host)?;
    let limits = Limits { memory: flags.memory, cpus: flags.cpus, pids: None };
    let isolation = flags.isolation.map(Isolation::from);
    // As for a container, whose machine has room for the guest's own needs beside its limit.
    let options = RunOptions { args: vec!["true".into()], limits, isolation, ..RunOptions::default() };
    let wishes = Wishes::of(&spec::build(&ImageDefaults::default(), &options)?)?;
    let template = host::runtime()?.block_on(template::build(&host.paths, &host.config, &wishes))?;
    output::print(format!("{}\n", template.meta.key).as_bytes());
    Ok(0)
}
