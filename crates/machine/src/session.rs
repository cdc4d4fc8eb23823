//! The session with a machine's agent.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kapsel_channel::Channel;
use kapsel_channel::mux::Mux;

use crate::process::Process;
use crate::{Error, Phase, Result};

/// How long the end of a process may take to be seen after the channel broke.
const ENDING: Duration = Duration::from_secs(1);
/// Between two attempts to reach an agent that does not listen yet.
const PAUSE: Duration = Duration::from_millis(5);

/// The session of a machine, of which there is one at a time, and the phases of its start, of which the first session is the last.
pub(crate) struct Session {
    mux: Mutex<Option<Mux>>,
    phases: Mutex<Vec<Phase>>,
}

impl Session {
    /// None yet, after these phases.
    pub fn new(phases: Vec<(&str, Duration)>) -> Session {
        let phases = phases.into_iter().map(|(name, took)| Phase { name: name.to_owned(), took }).collect();
        Session { mux: Mutex::new(None), phases: Mutex::new(phases) }
    }

    /// What took how long.
    pub fn phases(&self) -> Vec<Phase> {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it, if there is one.
    pub fn end(&self) {
        if let Some(mux) = self.mux.lock().unwrap_or_else(PoisonError::into_inner).take() {
            mux.close();
        }
    }

    /// Ends it, and begins another: `knock` is called with the time that is left until it does not find the door closed.
    pub async fn begin<Knocking>(
        &self,
        process: &Process,
        deadline: Duration,
        knock: impl Fn(Duration) -> Knocking,
    ) -> Result<Arc<dyn Channel>>
    where
        Knocking: Future<Output = Result<Mux, kapsel_channel::Error>>,
    {
        let begun = Instant::now();
        self.end();
        let knocking = async {
            loop {
                let left = deadline.saturating_sub(begun.elapsed());
                match knock(left).await {
                    Err(kapsel_channel::Error::Closed) if !left.is_zero() => tokio::time::sleep(PAUSE).await,
                    result => return result,
                }
            }
        };
        let mux = tokio::select! {
            biased;
            mux = knocking => mux,
            exit = process.exit() => return Err(process.ended(exit)),
        };
        let mux = match mux {
            Ok(mux) => mux,
            Err(kapsel_channel::Error::Deadline(_)) => {
                return Err(process.late("the guest's agent to answer", deadline));
            }
            // The channel goes with the monitor, a moment before its end is seen: why it ended says more.
            Err(source) => match tokio::time::timeout(ENDING, process.exit()).await {
                Ok(exit) => return Err(process.ended(exit)),
                Err(_) => return Err(Error::Channel { name: process.name().to_owned(), source }),
            },
        };
        *self.mux.lock().unwrap_or_else(PoisonError::into_inner) = Some(mux.clone());
        let mut phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner);
        if !phases.iter().any(|phase| phase.name == "agent") {
            phases.push(Phase { name: "agent".into(), took: begun.elapsed() });
        }
        Ok(Arc::new(mux))
    }
}
