//! `kapsel ps`: all sandboxes at once, and none of them can hold it up.

use std::time::Duration;

use crate::{
    client::{Client, ProcessStatus},
    owner::{self, Owner},
    paths::{Bundle, Id},
    record::{Error as RecordError, Exit, Record, Status},
    registry::{Error, Registry},
};

/// How long one sandbox may take to answer before it is listed as stuck.
pub const DEADLINE: Duration = Duration::from_secs(1);

/// One sandbox in a list.
#[derive(Debug)]
pub struct Entry {
    /// Where it is.
    pub bundle: Bundle,
    /// What is known of it; an error when its record cannot be read.
    pub record: Result<Record, RecordError>,
    /// How its shim does.
    pub health: Health,
}

/// How a sandbox's shim does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It answers, or has nothing left to do.
    Well,
    /// It does not answer in time.
    Stuck,
    /// It is gone though the container had not ended.
    Gone,
}

impl Entry {
    /// Its status, as far as it can be told.
    pub fn status(&self) -> Option<Status> {
        let record = self.record.as_ref().ok()?;
        Some(if self.health == Health::Gone { Status::Exited } else { record.status })
    }
}

/// Lists all sandboxes, asking all shims in parallel, each within `deadline`. Newest first.
///
/// # Errors
/// When the directory of sandboxes cannot be read.
pub async fn list(registry: &Registry, deadline: Duration) -> Result<Vec<Entry>, Error> {
    let asking: Vec<_> =
        registry.bundles()?.into_iter().map(|bundle| tokio::spawn(look(bundle, deadline))).collect();
    let mut entries = Vec::with_capacity(asking.len());
    for entry in asking {
        // A task fails only by a panic of ours, which is no reason to hide the others.
        entries.extend(entry.await.ok().flatten());
    }
    entries.retain(|entry| {
        !entry.record.as_ref().is_ok_and(|record| registry.is_leaving(&entry.bundle, record))
    });
    entries
        .sort_by_key(|entry| std::cmp::Reverse(entry.record.as_ref().map_or(0, |record| record.created_at)));
    Ok(entries)
}

/// Looks at one sandbox; `None` when it went away meanwhile.
pub async fn look(bundle: Bundle, deadline: Duration) -> Option<Entry> {
    let record = Record::read(&bundle);
    // Not there yet, about to go, or that of a machine that stands by.
    if record.is_err() && !bundle.record().exists() {
        return None;
    }
    let health = match (&record, owner::of(&bundle)) {
        (Ok(record), Owner::Shim(_)) => ask(&bundle, &record.id, deadline).await,
        (Ok(record), Owner::Gone | Owner::Clearing) if record.status != Status::Exited => Health::Gone,
        _ => Health::Well,
    };
    Some(Entry { bundle, record, health })
}

async fn ask(bundle: &Bundle, id: &Id, deadline: Duration) -> Health {
    let asked = async {
        let client = Client::connect(bundle, id).await?;
        client.state("", deadline).await
    };
    match tokio::time::timeout(deadline, asked).await {
        Err(_) | Ok(Err(crate::client::Error::Timeout { .. })) => Health::Stuck,
        // It has ended, or refuses: in both cases it lives and its record says the rest.
        Ok(Ok(_) | Err(_)) => Health::Well,
    }
}

/// The exit that a sandbox gets whose shim was killed.
pub(crate) fn lost(now: u64) -> Exit {
    Exit { code: 255, at: now, oom: false, reason: Some("the shim of the sandbox was killed".into()) }
}

impl From<ProcessStatus> for Status {
    fn from(status: ProcessStatus) -> Self {
        match status {
            ProcessStatus::Created => Self::Created,
            ProcessStatus::Running => Self::Running,
            ProcessStatus::Paused => Self::Paused,
            ProcessStatus::Stopped => Self::Exited,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::paths::Paths;

    #[test]
    fn what_goes_with_its_end_is_not_listed_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(&Paths::discover(Some(dir.path())).unwrap()).unwrap();
        let mut record = Record::new(Id::random(), "brief".into(), vec![]);
        record.status = Status::Running;
        record.remove = true;
        let bundle = registry.create(&mut record).unwrap();
        let _shim = owner::claim(&bundle).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let listed = || runtime.block_on(list(&registry, DEADLINE)).unwrap().len();
        assert_eq!(listed(), 1);
        crate::registry::release_name(&registry.paths().names(), &bundle, "brief");
        assert_eq!(listed(), 0);
    }

    #[test]
    fn a_stuck_shim_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(&Paths::discover(Some(dir.path())).unwrap()).unwrap();
        let mut kept = Vec::new();
        let mut make = |status: Status| {
            let mut record = Record::new(Id::random(), String::new(), vec![]);
            record.status = status;
            let bundle = registry.create(&mut record).unwrap();
            // A shim that lives and listens, but never answers.
            kept.push((
                std::os::unix::net::UnixListener::bind(bundle.shim_socket()).unwrap(),
                owner::claim(&bundle).unwrap().unwrap(),
            ));
            record.id
        };
        let stuck: Vec<Id> = (0..5).map(|_| make(Status::Running)).collect();
        let mut dead = Record::new(Id::random(), "dead".into(), vec![]);
        dead.status = Status::Running;
        let bundle = registry.create(&mut dead).unwrap();
        drop(owner::claim(&bundle).unwrap());
        let mut ended = Record::new(Id::random(), "ended".into(), vec![]);
        ended.status = Status::Exited;
        registry.create(&mut ended).unwrap();
        let damaged = registry.create(&mut Record::new(Id::random(), "damaged".into(), vec![])).unwrap();
        std::fs::write(damaged.record(), "{").unwrap();
        let leaving = registry.create(&mut Record::new(Id::random(), "leaving".into(), vec![])).unwrap();
        std::fs::remove_file(leaving.record()).unwrap();

        let begun = Instant::now();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let entries = runtime.block_on(list(&registry, Duration::from_millis(200))).unwrap();
        assert!(begun.elapsed() < Duration::from_millis(900), "five stuck shims cost one deadline, not five");
        assert_eq!(entries.len(), 8);
        for entry in &entries {
            let expected = match &entry.record {
                Ok(record) if stuck.contains(&record.id) => Health::Stuck,
                Ok(record) if record.name == "dead" => Health::Gone,
                _ => Health::Well,
            };
            assert_eq!(entry.health, expected, "{:?}", entry.record);
        }
    }
}
