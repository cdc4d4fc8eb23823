//! `ps`, `list` and `events`.

use std::time::Duration;

use anyhow::{Context, bail};
use kapsel_sandbox::client::{Client, Fate};
use serde_json::json;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::{Call, print, wait};
use crate::{
    args::{self, TableFormat},
    state::Status,
};

/// How often `events` looks whether memory ran out. The Task API does not tell; it answers who asks.
const LOOK: Duration = Duration::from_secs(1);
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
            let mut oom = Oom::new(&client, &flags.id).await?;
            let mut due = interval_at(Instant::now() + interval, interval);
            let mut look = tokio::time::interval(LOOK);
            look.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    _ = &mut exited => return oom.at_the_end(&client).await,
                    _ = due.tick() => print::line(&stats(&client, &flags.id).await?)?,
                    _ = look.tick() => oom.look(&client).await?,
                }
            }
        })
    }
}

/// Tells each time that the guest's kernel has killed for lack of memory.
struct Oom<'a> {
    id: &'a str,
    kills: u64,
    told: bool,
}

impl<'a> Oom<'a> {
    /// What happened before is no news.
    async fn new(client: &Client, id: &'a str) -> anyhow::Result<Self> {
        Ok(Self { id, kills: client.stats().await?.memory_events.oom_kill, told: false })
    }

    async fn look(&mut self, client: &Client) -> anyhow::Result<()> {
        // One that has ended meanwhile has its end told.
        let Ok(metrics) = client.stats().await else { return Ok(()) };
        let kills = metrics.memory_events.oom_kill;
        if kills > self.kills {
            self.kills = kills;
            self.tell()?;
        }
        Ok(())
    }

    async fn at_the_end(mut self, client: &Client) -> anyhow::Result<()> {
        match client.fate("").await {
            Fate::OutOfMemory(_) if !self.told => self.tell(),
            _ => Ok(()),
        }
    }

    fn tell(&mut self) -> anyhow::Result<()> {
        self.told = true;
        print::line(&json!({ "type": "oom", "id": self.id }))
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
