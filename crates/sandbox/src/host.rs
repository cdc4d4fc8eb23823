//! What this host can run sandboxes with: the choice of isolation, said out loud.

use std::sync::Arc;

use kapsel_machine::{
    Accel, Capabilities, KapselVmm, Monitor, Qemu,
    probe::{self, KvmVerdict},
};

use crate::{
    config::{Config, Isolation},
    paths::Paths,
    programs,
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
    /// kapsel-vmm was asked for.
    #[error("kapsel-vmm cannot run this sandbox: {0}; `--isolation qemu-kvm` can")]
    Unfit(String),
}

/// What a machine shall be, as far as monitors differ in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// How many directories of the host it shares.
    pub shares: usize,
    /// It has a network, of one interface at least.
    pub network: bool,
    /// Virtual processors.
    pub vcpus: u32,
    /// MiB.
    pub memory_mib: u32,
}

impl Needs {
    /// What a monitor lacks of it, if anything.
    fn lacking(&self, can: &Capabilities) -> Result<(), String> {
        if self.shares + usize::from(self.network) > can.places {
            return Err(format!(
                "it has {} places for shared directories and network interfaces",
                can.places
            ));
        }
        if self.vcpus > can.vcpus {
            return Err(format!("it has at most {} processors", can.vcpus));
        }
        if self.memory_mib > can.memory_mib {
            return Err(format!("it has at most {} GiB of memory", can.memory_mib >> 10));
        }
        Ok(())
    }
}

/// The machine that a sandbox gets here.
#[derive(Clone)]
pub struct Choice {
    /// What runs it.
    pub monitor: Arc<dyn Monitor>,
    /// What to ask for to get the same again: never `auto` or `kvm`.
    pub isolation: Isolation,
    /// Why it is this one, in words.
    pub reason: String,
}

impl Choice {
    /// How its code is executed.
    pub fn accel(&self) -> Accel {
        if self.isolation == Isolation::Tcg { Accel::Tcg } else { Accel::Kvm }
    }
}

/// Takes the strongest isolation that works well here and does what is needed, or the one that is asked for.
///
/// # Errors
/// When there is none, or not the one that is asked for.
pub fn choose(paths: &Paths, config: &Config, wanted: Isolation, needs: &Needs) -> Result<Choice, Error> {
    let vmm = programs::find(programs::MONITOR, config).map(KapselVmm::at).map_err(|e| e.to_string());
    let fit = match &vmm {
        Ok(vmm) => needs.lacking(&vmm.capabilities()),
        Err(missing) => Err(missing.clone()),
    };
    let (isolation, reason) = decide(wanted, || probe::kvm(paths.state()), fit)?;
    let monitor: Arc<dyn Monitor> = match (isolation, vmm) {
        (Isolation::KapselVmm, Ok(vmm)) => Arc::new(vmm),
        _ => Arc::new(Qemu::find(config.qemu().as_deref())?),
    };
    Ok(Choice { monitor, isolation, reason })
}

/// Why KVM, which is asked for, makes machines slow here; `None` when it does not, or is not asked for.
pub fn slow_kvm(paths: &Paths, wanted: Isolation) -> Option<String> {
    match wanted {
        Isolation::Auto | Isolation::Tcg => None,
        Isolation::Kvm | Isolation::KapselVmm | Isolation::QemuKvm => match probe::kvm(paths.state()) {
            KvmVerdict::Slow(reason) => Some(reason),
            KvmVerdict::Native | KvmVerdict::None(_) => None,
        },
    }
}

/// One of `kapsel-vmm`, `qemu-kvm` and `tcg`, and why. `fit` says whether kapsel-vmm can do what is needed.
fn decide(
    wanted: Isolation,
    kvm: impl FnOnce() -> KvmVerdict,
    fit: Result<(), String>,
) -> Result<(Isolation, String), Error> {
    if wanted == Isolation::Tcg {
        return Ok((Isolation::Tcg, "asked for".into()));
    }
    let verdict = kvm();
    let reason = match (wanted, &verdict) {
        (Isolation::Auto, KvmVerdict::Native) => verdict.reason(),
        (Isolation::Auto, KvmVerdict::Slow(reason) | KvmVerdict::None(reason)) => {
            return Ok((Isolation::Tcg, reason.clone()));
        }
        (_, KvmVerdict::None(reason)) => return Err(Error::NoKvm(reason.clone())),
        // Asked for, so also where it is slow.
        (..) => format!("asked for; {}", verdict.reason()),
    };
    match (wanted, fit) {
        (Isolation::QemuKvm, _) => Ok((Isolation::QemuKvm, reason)),
        (_, Ok(())) => Ok((Isolation::KapselVmm, reason)),
        (Isolation::KapselVmm, Err(lack)) => Err(Error::Unfit(lack)),
        (_, Err(lack)) => Ok((Isolation::QemuKvm, format!("{reason}; QEMU instead of kapsel-vmm: {lack}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(wanted: Isolation, verdict: &KvmVerdict, fit: Result<(), String>) -> Option<Isolation> {
        decide(wanted, || verdict.clone(), fit).map(|(isolation, _)| isolation).ok()
    }

    #[test]
    fn the_strongest_that_works_well() {
        let (native, slow, absent) =
            (KvmVerdict::Native, KvmVerdict::Slow("s".into()), KvmVerdict::None("a".into()));
        let fits = |wanted, verdict| told(wanted, verdict, Ok(()));
        assert_eq!(fits(Isolation::Auto, &native), Some(Isolation::KapselVmm));
        assert_eq!(fits(Isolation::Auto, &slow), Some(Isolation::Tcg));
        assert_eq!(fits(Isolation::Auto, &absent), Some(Isolation::Tcg));
        assert_eq!(fits(Isolation::Tcg, &native), Some(Isolation::Tcg));
        for (wanted, got) in [
            (Isolation::Kvm, Isolation::KapselVmm),
            (Isolation::KapselVmm, Isolation::KapselVmm),
            (Isolation::QemuKvm, Isolation::QemuKvm),
        ] {
            assert_eq!(fits(wanted, &native), Some(got));
            assert_eq!(fits(wanted, &slow), Some(got));
            assert_eq!(fits(wanted, &absent), None);
        }
    }

    #[test]
    fn qemu_where_kapsel_vmm_does_not_fit_and_why_is_said() {
        let can = Capabilities {
            snapshot: true,
            attach: false,
            places: 2,
            tcg: false,
            vcpus: 32,
            memory_mib: 65536,
        };
        let needs = Needs { shares: 3, ..Needs::default() };
        let lack = needs.lacking(&can);
        for wanted in [Isolation::Auto, Isolation::Kvm] {
            let (isolation, reason) = decide(wanted, || KvmVerdict::Native, lack.clone()).unwrap();
            assert_eq!(isolation, Isolation::QemuKvm);
            assert!(reason.contains("kapsel-vmm: it has 2 places for shared directories"), "{reason}");
        }
        let error = decide(Isolation::KapselVmm, || KvmVerdict::Native, lack).unwrap_err();
        assert!(matches!(error, Error::Unfit(_)) && error.to_string().contains("2 places"));
        let fits = |vcpus, memory_mib| Needs { vcpus, memory_mib, ..Needs::default() }.lacking(&can).is_ok();
        let plugs = |shares, network| Needs { shares, network, ..Needs::default() }.lacking(&can).is_ok();
        assert!(plugs(2, false) && plugs(1, true) && !plugs(2, true));
        assert!(fits(32, 65536) && !fits(33, 64) && !fits(1, 65537));
    }
}
