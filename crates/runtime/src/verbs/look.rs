//! `ps`, `list` and `events`.

use std::time::Duration;

use anyhow::{Context, bail};
use kapsel_sandbox::client::{Client, Fate};
use serde_json::json;

use super::{Call, print, wait};
use crate::{
    args::{self, TableFormat},
    state::Status,
};

/// States in which there are processes.
const ALIVE: [Status; 3] = [Status::Created, Status::Running, Status::Paused];

impl Call<'_> {
    /// `ps`.
    pub fn ps(&self, flags: &args::Ps) -> anyhow::Result<()> {
        let container = self.container_in(&flags.id, &ALIVE, "list processes of")?;
        match flags.format {
            // Engines look these up on the host, where the guest's numbers are those of others.
            TableFormat::Json => print::json(&[container.pid]),
            TableFormat::Table => {
                let pids = wait(async { Ok(self.connect(&container).await?.pids().await?) })?;
                let lines: String = pids.iter().map(|pid| format!("{pid}\n")).collect();
                print::text(&format!("PID\n{lines}"))
            }
        }
    }

    /// `list`.
    pub fn list(&self, flags: &args::List) -> anyhow::Result<()> {
        let (containers, bad) = self.containers.all()?;
        bad.iter().for_each(|problem| self.report.warn(problem));
        let shown: Vec<_> =
            containers.iter().map(|container| container.shown(container.status(&self.host.paths))).collect();
        if flags.quiet {
            return print::text(
                &containers.iter().map(|container| format!("{}\n", container.id)).collect::<String>(),
            );
        }
        match flags.format {
            TableFormat::Json => print::json(&shown),
            TableFormat::Table => print::text(&print::table(&shown)),
        }
    }

    /// `events`.
    pub fn events(&self, flags: &args::Events) -> anyhow::Result<()> {
        let interval = humantime::parse_duration(&flags.interval)
            .ok()
            .filter(|interval| *interval > Duration::ZERO)
            .with_context(|| format!("--interval {:?} is no time such as 5s", flags.interval))?;
        let container = self.container_in(&flags.id, &ALIVE, "watch")?;
        wait(async {
            let client = self.connect(&container).await?;
            if flags.stats {
                return print::line(&stats(&client, &flags.id).await?);
            }
            let exited = client.wait("");
            tokio::pin!(exited);
            loop {
                tokio::select! {
                    _ = &mut exited => {
                        if let Fate::OutOfMemory(_) = client.fate().await {
                            print::line(&json!({ "type": "oom", "id": flags.id }))?;
                        }
                        return Ok(());
                    }
                    () = tokio::time::sleep(interval) => print::line(&stats(&client, &flags.id).await?)?,
                }
            }
        })
    }
}

/// What the container uses, as runc says it.
async fn stats(client: &Client, id: &str) -> anyhow::Result<serde_json::Value> {
    let metrics = client.stats().await?;
    if metrics.cpu.is_none() && metrics.memory.is_none() {
        bail!("the guest told nothing of container {id:?}");
    }
    const MICROSECOND: u64 = 1000;
    let (cpu, memory, pids) = (&metrics.cpu, &metrics.memory, &metrics.pids);
    Ok(json!({
        "type": "stats",
        "id": id,
        "data": {
            "cpu": {
                "usage": {
                    "total": cpu.usage_usec.saturating_mul(MICROSECOND),
                    "kernel": cpu.system_usec.saturating_mul(MICROSECOND),
                    "user": cpu.user_usec.saturating_mul(MICROSECOND),
                },
                "throttling": {
                    "periods": cpu.nr_periods,
                    "throttledPeriods": cpu.nr_throttled,
                    "throttledTime": cpu.throttled_usec.saturating_mul(MICROSECOND),
                },
            },
            "memory": {
                "usage": { "usage": memory.usage, "limit": memory.usage_limit, "failcnt": metrics.memory_events.max },
            },
            "pids": { "current": pids.current, "limit": pids.limit },
        },
    }))
}
