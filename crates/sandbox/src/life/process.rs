//! One process of a sandbox, as the host sees it.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use oci_spec::runtime::Process as OciProcess;
use tokio::sync::{Notify, watch};

use crate::{
    record::Exit,
    stdio::{Hub, Plan, Streams},
};

/// Where a process is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Announced: clients may attach.
    New,
    /// Set up.
    Created,
    /// Its program runs.
    Running {
        /// In the guest.
        pid: u32,
    },
    /// Its program ended.
    Exited(Exit),
}

/// The container's first process or an added one.
#[derive(Debug)]
pub struct Process {
    /// Empty for the first process.
    pub exec_id: String,
    /// Where clients attach.
    pub hub: Hub,
    state: watch::Sender<State>,
    wanted: Mutex<Option<Wanted>>,
    streams: tokio::sync::Mutex<Option<Streams>>,
    input_closed: AtomicBool,
    abandoned: Notify,
    /// Nothing of its output is on its way any more.
    delivered: watch::Sender<bool>,
}

/// What a client asked for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Where its streams go.
    pub plan: Plan,
    /// The URIs as they came, for `State`.
    pub uris: [String; 3],
    /// For an added process: what to run.
    pub process: Option<OciProcess>,
}

impl Process {
    /// A process that is not there yet.
    pub fn new(exec_id: &str) -> Arc<Self> {
        Arc::new(Self {
            exec_id: exec_id.into(),
            hub: Hub::default(),
            state: watch::Sender::new(State::New),
            wanted: Mutex::default(),
            streams: tokio::sync::Mutex::default(),
            input_closed: AtomicBool::new(false),
            abandoned: Notify::new(),
            delivered: watch::Sender::new(false),
        })
    }

    /// What it is doing.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Moves on; an exited process stays so.
    pub(super) fn set(&self, next: State) {
        self.state.send_if_modified(|state| {
            let moves = !matches!(state, State::Exited(_));
            if moves {
                *state = next;
            }
            moves
        });
    }

    /// Waits until its program runs, or has ended.
    pub async fn started(&self) {
        let begun = |state: &State| matches!(state, State::Running { .. } | State::Exited(_));
        // The sender lives as long as `self`.
        let _ = self.state.subscribe().wait_for(begun).await;
    }

    /// Waits for its end. Any number may.
    pub async fn exited(&self) -> Exit {
        let mut states = self.state.subscribe();
        loop {
            if let State::Exited(exit) = &*states.borrow_and_update() {
                return exit.clone();
            }
            if states.changed().await.is_err() {
                // The sender lives as long as `self`.
                unreachable!("a process's state outlives its waiters");
            }
        }
    }

    pub(super) fn want(&self, wanted: Wanted) {
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = Some(wanted);
    }

    /// What was asked for, once it was.
    pub fn wanted(&self) -> Option<Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) async fn connected(&self, streams: Streams) {
        self.hub.close_unused();
        let mut held = self.streams.lock().await;
        if self.input_closed.load(Ordering::Relaxed) {
            streams.close_stdin().await;
        }
        *held = Some(streams);
    }

    /// Ends its input from outside; also that of a process whose streams are not connected yet.
    pub async fn close_stdin(&self) {
        let streams = self.streams.lock().await;
        self.input_closed.store(true, Ordering::Relaxed);
        if let Some(streams) = &*streams {
            streams.close_stdin().await;
        }
    }

    /// Its program ended: waits until all output is delivered.
    pub(super) async fn drain(&self) {
        let streams = self.streams.lock().await.take();
        if let Some(mut streams) = streams {
            streams.ended();
            tokio::select! {
                () = streams.drained() => {}
                () = self.abandoned.notified() => tracing::warn!("output was not delivered to its end"),
            }
            self.delivered.send_replace(true);
        }
    }

    /// Waits for whoever drains or cuts it.
    pub(super) async fn delivered(&self) {
        // The sender lives as long as `self`.
        let _ = self.delivered.subscribe().wait_for(|delivered| *delivered).await;
    }

    /// What it printed and nobody has read is dropped.
    pub(super) fn abandon(&self) {
        self.abandoned.notify_one();
    }

    /// Drops its streams as they are.
    pub(super) async fn cut(&self) {
        self.hub.close_unused();
        drop(self.streams.lock().await.take());
        self.delivered.send_replace(true);
    }
}
