//! One sandbox from its first instruction to its last: the one place where image, machine, file servers and agent meet.
//!
//! [`Sandbox::create`] is the start, one readable sequence. [`Sandbox::end`] is the end, whoever asks for it: the
//! main container itself, a client, the leash, or the death of a process that the sandbox needs. In between a pod's sandbox takes further
//! [containers](Container) ([`Sandbox::add`]).

pub mod agent;
pub mod blueprint;
mod container;
mod copy;
mod end;
mod error;
mod forward;
pub mod guest_spec;
mod interfaces;
mod members;
mod names;
mod network;
mod process;
mod resources;
mod shares;
mod spare;
mod start;
mod tree;
mod update;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

pub use container::Container;
pub use copy::{CopyIn, CopyOut};
pub use end::Cause;
pub use error::Error;
use kapsel_channel::Channel;
use kapsel_machine::Machine;
/// What a container uses.
pub use kapsel_protocol::api::StatsResponse as Stats;
use kapsel_protocol::limits;
pub use members::Member;
use oci_spec::runtime::{Process as OciProcess, Spec};
pub use process::{Process, State, Wanted};
pub use spare::Spare;
pub use start::{CreateRequest, IoRequest};
use tokio::sync::{Notify, OnceCell, watch};

use crate::{
    annotations::Wishes,
    config::Config,
    paths::{Bundle, Id, Paths},
    record::{Exit, Record},
    seccomp,
    stdio::{Log, Plan},
    template,
    timings::Stopwatch,
};

/// The exit code of processes whose machine failed under them, as containerd has it.
const LOST: u32 = 255;

/// One sandbox, owned by this process.
pub struct Sandbox {
    paths: Paths,
    config: Config,
    bundle: Bundle,
    id: Id,
    spec: Spec,
    wishes: Wishes,
    /// The container that the sandbox began with, and ends with.
    pub main: Arc<Container>,
    /// Those that were added to it, by their names in the guest; `None` while one is being made.
    members: Mutex<HashMap<String, Option<Arc<Container>>>>,
    record: Mutex<Record>,
    guest: OnceCell<Guest>,
    /// A machine that was made for it before it was known.
    spare: Mutex<Option<Spare>>,
    /// Whether `create` was called.
    begun: Mutex<bool>,
    /// What it has on the host, to be freed at the end.
    host: Mutex<Host>,
    ended: watch::Sender<Ended>,
    /// An end is under way and somebody wants it at once.
    insisted: Notify,
    watch: Stopwatch,
}

/// The guest, as long as it lives.
struct Guest {
    machine: Arc<dyn Machine>,
    channel: Arc<dyn Channel>,
    agent: agent::Agent,
    /// Whether the guest writes to directories of the host.
    writes_host: bool,
}

/// A process that is made after its container.
struct Later {
    /// OCI Process.
    process: OciProcess,
    seccomp: seccomp::Filter,
    plan: Plan,
    log: Option<Log>,
}

/// What a sandbox has on the host besides its bundle.
#[derive(Default)]
struct Host {
    machine: Option<Arc<dyn Machine>>,
    servers: shares::Servers,
    network: network::Connection,
    forwarder: Option<forward::Forwarder>,
    cgroup: Option<kapsel_jail::Cgroup>,
    /// What a pod's containers share with the host.
    tree: Option<tree::Tree>,
}

/// How far the end has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Ended {
    #[default]
    No,
    Ending,
    /// Nothing of the sandbox is left on the host but its bundle, or not even that.
    Done,
}

impl Sandbox {
    /// Reads a bundle. Nothing is started yet, but whoever wants may attach. With a machine that stood by for it, if it was made for
    /// this bundle.
    ///
    /// # Errors
    /// When the bundle's specification or record cannot be read or followed.
    pub fn open(
        paths: Paths,
        config: Config,
        bundle: Bundle,
        id: Id,
        watch: Stopwatch,
        spare: Option<Spare>,
    ) -> Result<Arc<Self>, Error> {
        let bad = |reason: String| Error::Spec { path: bundle.spec(), reason };
        let json = std::fs::read(bundle.spec()).map_err(|e| bad(e.to_string()))?;
        if json.len() > limits::SPEC_MAX {
            return Err(bad(format!(
                "it has {} bytes, at most {} go to a guest",
                json.len(),
                limits::SPEC_MAX
            )));
        }
        let spec: Spec = serde_json::from_slice(&json).map_err(|e| bad(e.to_string()))?;
        let wishes = Wishes::of(&spec)?;
        let record = match Record::read(&bundle) {
            Ok(record) => record,
            // A bundle that containerd made has none.
            Err(crate::record::Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let args = spec.process().as_ref().and_then(|p| p.args().clone()).unwrap_or_default();
                Record::new(id.clone(), String::new(), args)
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Arc::new_cyclic(|sandbox| Self {
            main: Container::main(sandbox.clone(), template::CONTAINER, &spec),
            members: Mutex::default(),
            paths,
            config,
            bundle,
            id,
            spec,
            wishes,
            record: Mutex::new(record),
            guest: OnceCell::new(),
            spare: Mutex::new(spare),
            begun: Mutex::default(),
            host: Mutex::default(),
            ended: watch::Sender::default(),
            insisted: Notify::new(),
            watch,
        }))
    }

    /// Its identity.
    pub fn id(&self) -> &Id {
        &self.id
    }

    /// Its directory.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// The process on the host that runs the machine; 0 before it is there.
    pub fn monitor(&self) -> u32 {
        lock(&self.record).machine.as_ref().map_or(0, |machine| machine.monitor)
    }

    /// Whether anybody asked for the container.
    pub fn has_begun(&self) -> bool {
        *lock(&self.begun)
    }

    fn guest(&self) -> Result<&Guest, Error> {
        if *self.ended.borrow() != Ended::No {
            return Err(self.why_ended());
        }
        self.guest.get().ok_or_else(|| Error::State("the container is not created yet".into()))
    }

    fn why_ended(&self) -> Error {
        match self.main.init.state() {
            State::Exited(Exit { oom: true, .. }) => Error::OutOfMemory,
            State::Exited(Exit { code: LOST, reason: Some(reason), .. }) => Error::Lost(reason),
            _ => Error::Ended("its machine is gone".into()),
        }
    }

    /// Changes the record, here and on disk.
    fn note(&self, change: impl FnOnce(&mut Record)) {
        let mut record = lock(&self.record);
        change(&mut record);
        // A bundle that was removed meanwhile stays so.
        if self.bundle.dir().exists()
            && let Err(error) = record.write(&self.bundle)
        {
            tracing::warn!(%error, "cannot keep the record");
        }
    }
}

fn size(process: &OciProcess) -> (u32, u32) {
    let clamp = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    process.console_size().as_ref().map_or((0, 0), |size| (clamp(size.width()), clamp(size.height())))
}

/// Data behind these locks is whole between statements, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
