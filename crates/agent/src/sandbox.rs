//! The guest as a whole: its identity and its containers by name.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kapsel_protocol::{api, limits};
use rustix::fs::{Mode, OFlags};

use crate::container::lifecycle::{Container, Surroundings};
use crate::error::{Error, Result};
use crate::phases::Phases;
use crate::reaper::Reaper;
use crate::sys;

/// What is known under a container's name: locked while the container is being made, empty when that failed.
type Slot = Arc<tokio::sync::Mutex<Option<Arc<Container>>>>;

/// The guest.
#[derive(Debug)]
pub struct Sandbox {
    /// Watches children.
    pub reaper: Arc<Reaper>,
    /// The agent's own steps until it was ready.
    pub boot: Vec<api::Phase>,
    configured: AtomicBool,
    containers: Mutex<HashMap<String, Slot>>,
}

impl Sandbox {
    /// A guest without an identity and without containers.
    pub fn new(reaper: Arc<Reaper>, boot: Vec<api::Phase>) -> Self {
        Self { reaper, boot, configured: AtomicBool::new(false), containers: Mutex::default() }
    }

    /// Whether Configure has succeeded.
    pub fn is_configured(&self) -> bool {
        self.configured.load(Ordering::Relaxed)
    }

    /// Gives the guest a time, if one is told and it has none yet.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn hello(&self, unix_time_ns: u64) -> Result<()> {
        if unix_time_ns == 0 || self.is_configured() {
            return Ok(());
        }
        set_clock(unix_time_ns).map_err(|e| Error::Internal(format!("setting the clock: {e}")))
    }

    /// Gives the guest randomness, time, a name and a network of its own; one that stood by, again.
    ///
    /// # Errors
    /// When the request makes no sense, or the kernel refuses.
    pub async fn configure(&self, request: &api::ConfigureRequest, phases: &mut Phases) -> Result<()> {
        let len = request.entropy.len();
        if !(limits::ENTROPY_MIN..=limits::ENTROPY_MAX).contains(&len) {
            let (min, max) = (limits::ENTROPY_MIN, limits::ENTROPY_MAX);
            return Err(Error::Invalid(format!("{len} bytes of entropy are not between {min} and {max}")));
        }
        let hostname = if request.hostname.is_empty() { "kapsel" } else { &request.hostname };
        if hostname.len() > limits::HOSTNAME_MAX || hostname.contains('\0') {
            return Err(Error::Invalid(format!(
                "the host name is longer than {} bytes",
                limits::HOSTNAME_MAX
            )));
        }
        reseed(&request.entropy)
            .map_err(|e| Error::Internal(format!("reseeding the random number generator: {e}")))?;
        phases.lap("entropy");
        set_clock(request.unix_time_ns).map_err(|e| Error::Internal(format!("setting the clock: {e}")))?;
        rustix::system::sethostname(hostname.as_bytes()).map_err(io::Error::from)?;
        phases.lap("identity");
        if !request.interfaces.is_empty() {
            crate::net::configure(&request.interfaces).await?;
            phases.lap("network");
        }
        self.configured.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Reserves the name of a container that is being made. What comes later for that name waits for [`Slot`]'s lock.
    ///
    /// # Errors
    /// When the name is no name, is in use, or there are too many.
    pub fn reserve(&self, id: &str) -> Result<tokio::sync::OwnedMutexGuard<Option<Arc<Container>>>> {
        check_id(id)?;
        let mut containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        if containers.contains_key(id) {
            return Err(Error::Exists(format!("container {id} exists already")));
        }
        if containers.len() >= limits::CONTAINERS_MAX {
            return Err(Error::Exhausted(format!(
                "the sandbox has {} containers already",
                limits::CONTAINERS_MAX
            )));
        }
        let slot = Slot::default();
        // Nobody else has it yet.
        let guard =
            slot.clone().try_lock_owned().map_err(|_| Error::Internal("a new lock is taken".into()))?;
        containers.insert(id.to_owned(), slot);
        Ok(guard)
    }

    /// Forgets a name.
    pub fn forget(&self, id: &str) {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    fn slot(&self, id: &str) -> Result<Slot> {
        let containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        containers.get(id).cloned().ok_or_else(|| not_found(id))
    }

    /// Refuses what is for a guest that is a machine of its own.
    ///
    /// # Errors
    /// While it is not configured.
    pub fn must_be_configured(&self) -> Result<()> {
        match self.is_configured() {
            true => Ok(()),
            false => Err(Error::State("the guest is not configured yet".into())),
        }
    }

    /// A container by name; waits while it is being made.
    ///
    /// # Errors
    /// When there is none.
    pub async fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.must_be_configured()?;
        self.prepared(id).await
    }

    /// A container that was made before the guest is configured.
    ///
    /// # Errors
    /// When there is none.
    pub async fn prepared(&self, id: &str) -> Result<Arc<Container>> {
        self.slot(id)?.lock().await.clone().ok_or_else(|| not_found(id))
    }

    /// Makes a container whose name is reserved.
    ///
    /// # Errors
    /// Nothing of it is left then, nor its name.
    pub async fn create(
        &self,
        mut slot: tokio::sync::OwnedMutexGuard<Option<Arc<Container>>>,
        request: &api::CreateRequest,
        around: Surroundings<'_>,
        phases: &mut Phases,
    ) -> Result<u32> {
        match Container::create(request, self.is_configured(), around, phases).await {
            Ok(container) => {
                let pid = container.pid();
                *slot = Some(Arc::new(container));
                Ok(pid)
            }
            Err(error) => {
                self.forget(&request.id);
                Err(error)
            }
        }
    }

    /// Adds a process to a container, within the limits.
    ///
    /// # Errors
    /// When there are too many or the container refuses.
    pub async fn exec(&self, request: &api::ExecRequest) -> Result<()> {
        if !request.exec_id.is_empty() {
            check_id(&request.exec_id)?;
        }
        let container = self.container(&request.id).await?;
        let slots: Vec<Slot> =
            self.containers.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let count =
            |slot: &Slot| slot.try_lock().ok().and_then(|c| Some(c.as_ref()?.exec_count())).unwrap_or(0);
        if slots.iter().map(count).sum::<usize>() + slots.len() >= limits::PROCESSES_MAX {
            return Err(Error::Exhausted(format!(
                "the sandbox has {} processes already",
                limits::PROCESSES_MAX
            )));
        }
        container.exec(request)
    }

    /// Ends and removes every container, as well as can be.
    pub async fn clear(&self) {
        let slots: Vec<(String, Slot)> =
            self.containers.lock().unwrap_or_else(PoisonError::into_inner).drain().collect();
        for (id, slot) in slots {
            // One that is still being made dies with the guest.
            let container = slot.try_lock().ok().and_then(|c| c.clone());
            if let Some(container) = container
                && let Err(error) = container.delete(true).await
            {
                eprintln!("kapsel-agent: container {id}: {error}");
            }
        }
    }
}

fn not_found(id: &str) -> Error {
    Error::NotFound(format!("there is no container {id}"))
}

fn check_id(id: &str) -> Result<()> {
    match limits::valid_id(id) {
        true => Ok(()),
        false => Err(Error::Invalid(format!(
            "{id:?} is no name: it must be 1 to {} letters, digits, or _ . + - after the first",
            limits::ID_MAX
        ))),
    }
}

fn reseed(entropy: &[u8]) -> io::Result<()> {
    let random = rustix::fs::open(c"/dev/urandom", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    sys::reseed(std::os::fd::AsFd::as_fd(&random), entropy)
}

fn set_clock(unix_time_ns: u64) -> io::Result<()> {
    let time = rustix::time::Timespec {
        tv_sec: i64::try_from(unix_time_ns / 1_000_000_000).map_err(io::Error::other)?,
        tv_nsec: (unix_time_ns % 1_000_000_000) as i64,
    };
    Ok(rustix::time::clock_settime(rustix::time::ClockId::Realtime, time)?)
}
