//! `kapsel ps`.

use std::collections::BTreeMap;

use kapsel_sandbox::listing::{Entry, Health};
use kapsel_sandbox::publish::Publish;
use kapsel_sandbox::record::{self, Record, Status};
use serde::Serialize;

use super::host::Host;
use crate::failure::Outcome;
use crate::flags::container::Ps;
use crate::output::table::Table;
use crate::output::{self, time};

/// One container, as `ps --json` lists it.
#[derive(Serialize)]
pub struct Listed {
    /// All 64 digits; of a container whose record is damaged, the 12 of its directory.
    id: String,
    /// Empty when its record is damaged.
    name: String,
    /// As the person gave it; null for `kapsel do`.
    image: Option<String>,
    /// Program and arguments.
    command: Vec<String>,
    /// RFC 3339.
    created_at: Option<String>,
    /// RFC 3339, or null.
    started_at: Option<String>,
    /// `created`, `running`, `paused`, `exited`, or `unknown` when its record is damaged.
    status: String,
    /// `well`, `stuck` (does not answer) or `gone` (was killed).
    health: &'static str,
    /// 0 to 255 once it has ended.
    exit_code: Option<u32>,
    /// It ended since its memory ran out.
    oom: bool,
    /// Published ports.
    ports: Vec<Publish>,
    /// The person's own.
    labels: BTreeMap<String, String>,
}

/// Lists containers.
pub fn run(host: &Host, flags: &Ps) -> Outcome {
    let mut entries = host.list()?;
    entries.retain(|entry| flags.all || entry.status() != Some(Status::Exited));
    if flags.json {
        output::json(&entries.iter().map(listed).collect::<Vec<_>>());
    } else if flags.quiet {
        entries.iter().for_each(|entry| output::print(format!("{}\n", short(entry)).as_bytes()));
    } else {
        table(&entries).print();
    }
    Ok(0)
}

fn table(entries: &[Entry]) -> Table {
    let mut table = Table::new(&["CONTAINER", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAME"]);
    for entry in entries {
        let Ok(record) = &entry.record else {
            table.row([
                short(entry),
                "?".into(),
                "?".into(),
                "?".into(),
                "record is damaged".into(),
                "?".into(),
                "?".into(),
            ]);
            continue;
        };
        let command: String = output::table::harmless(&record.command.join(" "), 30);
        table.row([
            short(entry),
            record.image.clone().unwrap_or_else(|| "-".into()),
            command,
            time::ago(record.created_at, record::now()),
            status(entry, record),
            ports(record),
            record.name.clone(),
        ]);
    }
    table
}

fn short(entry: &Entry) -> String {
    let directory = entry.bundle.dir().file_name().unwrap_or_default();
    directory.to_string_lossy().into_owned()
}

/// As Docker words them.
fn ports(record: &Record) -> String {
    let each = |port: &Publish| format!("{}->{}/{}", port.host(), port.port, port.protocol);
    record.ports.iter().map(each).collect::<Vec<_>>().join(", ")
}

/// As Docker words it.
fn status(entry: &Entry, record: &Record) -> String {
    if entry.health == Health::Stuck {
        return "does not answer".into();
    }
    let up = || time::roughly(record::now().saturating_sub(record.started_at.unwrap_or(record.created_at)));
    match (entry.status(), &record.exit) {
        (Some(Status::Running), _) => format!("Up {}", up()),
        (Some(Status::Paused), _) => format!("Up {} (paused)", up()),
        (Some(Status::Exited), Some(exit)) => {
            let oom = if exit.oom { ", out of memory" } else { "" };
            format!("Exited ({}{oom}) {}", exit.code, time::ago(exit.at, record::now()))
        }
        (Some(Status::Exited), None) => "Exited".into(),
        _ => "Created".into(),
    }
}

fn listed(entry: &Entry) -> Listed {
    let record = entry.record.as_ref().ok();
    let exit = record.and_then(|record| record.exit.as_ref());
    Listed {
        id: record.map_or_else(|| short(entry), |record| record.id.to_string()),
        name: record.map(|record| record.name.clone()).unwrap_or_default(),
        image: record.and_then(|record| record.image.clone()),
        command: record.map(|record| record.command.clone()).unwrap_or_default(),
        created_at: record.map(|record| time::rfc3339(record.created_at)),
        started_at: record.and_then(|record| record.started_at).map(time::rfc3339),
        status: entry.status().map_or_else(|| "unknown".into(), |status| status.to_string()),
        health: health(entry.health),
        exit_code: exit.map(|exit| exit.code),
        oom: exit.is_some_and(|exit| exit.oom),
        ports: record.map(|record| record.ports.clone()).unwrap_or_default(),
        labels: record.map(|record| record.labels.clone()).unwrap_or_default(),
    }
}

/// The word for programs.
pub fn health(health: Health) -> &'static str {
    match health {
        Health::Well => "well",
        Health::Stuck => "stuck",
        Health::Gone => "gone",
    }
}
