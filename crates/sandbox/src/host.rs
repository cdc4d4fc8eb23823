//! What this host can run sandboxes with: the choice of isolation, said out loud.

use std::sync::Arc;

use kapsel_machine::{
    Accel, Monitor, Qemu,
    probe::{self, KvmVerdict},
};

use crate::{
    config::{Config, Isolation},
    paths::Paths,
};

/// Why there is no machine to be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No monitor.
    #[error(transparent)]
    Monitor(#[from] kapsel_machine::Error),
    /// KVM was asked for.
    #[error("KVM cannot be used: {0}; `--isolation tcg` works without it, `kapsel doctor` says more")]
    NoKvm(String),
}

/// The machine that sandboxes get here.
#[derive(Clone)]
pub struct Choice {
    /// What runs it.
    pub monitor: Arc<dyn Monitor>,
    /// How its code is executed.
    pub accel: Accel,
    /// Why it is this one, in words.
    pub reason: String,
}

/// Takes the strongest isolation that works well here, or the one that is asked for.
///
/// # Errors
/// When there is none, or not the one that is asked for.
pub fn choose(paths: &Paths, config: &Config, wanted: Isolation) -> Result<Choice, Error> {
    let monitor = Arc::new(Qemu::find(config.qemu().as_deref())?);
    let (accel, reason) = decide(wanted, || probe::kvm(paths.state()))?;
    Ok(Choice { monitor, accel, reason })
}

fn decide(wanted: Isolation, kvm: impl FnOnce() -> KvmVerdict) -> Result<(Accel, String), Error> {
    if wanted == Isolation::Tcg {
        return Ok((Accel::Tcg, "asked for".into()));
    }
    let verdict = kvm();
    let reason = verdict.reason();
    match (wanted, verdict) {
        (Isolation::Kvm, KvmVerdict::None(_)) => Err(Error::NoKvm(reason)),
        // Asked for, so also where it is slow.
        (Isolation::Kvm, _) => Ok((Accel::Kvm, format!("asked for; {reason}"))),
        (_, KvmVerdict::Native) => Ok((Accel::Kvm, reason)),
        (_, KvmVerdict::Slow(_) | KvmVerdict::None(_)) => Ok((Accel::Tcg, reason)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strongest_that_works_well() {
        let told = |wanted, verdict: KvmVerdict| decide(wanted, || verdict).map(|(accel, _)| accel).ok();
        let (native, slow, absent) =
            (KvmVerdict::Native, KvmVerdict::Slow("s".into()), KvmVerdict::None("a".into()));
        assert_eq!(told(Isolation::Auto, native.clone()), Some(Accel::Kvm));
        assert_eq!(told(Isolation::Auto, slow.clone()), Some(Accel::Tcg));
        assert_eq!(told(Isolation::Auto, absent.clone()), Some(Accel::Tcg));
        assert_eq!(told(Isolation::Kvm, slow), Some(Accel::Kvm));
        assert_eq!(told(Isolation::Kvm, absent), None);
        assert_eq!(told(Isolation::Tcg, native), Some(Accel::Tcg));
    }
}
