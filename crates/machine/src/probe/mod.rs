//! Whether KVM is there and worth using: measured, not guessed.
//!
//! A host can offer `/dev/kvm` and yet emulate the guest's kernel mode instruction by instruction (a software KVM under a monitor
//! without nested virtualisation). Nothing that processors or kernels advertise tells; running a loop in a tiny guest does.

mod guest;
mod host;

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Version of the cached verdict.
const FORMAT: u32 = 2;

/// The part of this host's own speed from which KVM is worth having: about what QEMU's translator has. On hardware a guest has nearly
/// all of it, nested or not; under a software KVM less than a hundredth. In an emulated host, where every exit to KVM is emulated too,
/// it has an eighth. Compared with this very host, because one may be slow itself.
const NATIVE: f64 = 0.05;

/// What the measurement says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvmVerdict {
    /// Guest kernel code runs at the processor's speed.
    Native,
    /// KVM is there and emulates: QEMU's translator is faster. The reason, in words.
    Slow(String),
    /// There is no usable KVM. The reason, in words, and what to do.
    None(String),
}

impl KvmVerdict {
    /// Whether to use KVM.
    pub fn usable(&self) -> bool {
        *self == KvmVerdict::Native
    }

    /// The verdict in words.
    pub fn reason(&self) -> String {
        match self {
            KvmVerdict::Native => "KVM runs guest code at native speed".into(),
            KvmVerdict::Slow(reason) | KvmVerdict::None(reason) => reason.clone(),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Cached {
    version: u32,
    boot: String,
    verdict: KvmVerdict,
}

/// The verdict for this host, remembered in `state_dir` until the next boot.
///
/// Takes at most two seconds the first time, microseconds later. That KVM is missing or forbidden is not remembered, since a person can
/// change it.
pub fn kvm(state_dir: &Path) -> KvmVerdict {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let path = state_dir.join("kvm.json");
    let cached = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Cached>(&text).ok());
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return missing(&error);
    }
    if let Some(cached) = cached.filter(|cached| cached.version == FORMAT && cached.boot == boot) {
        return cached.verdict;
    }
    let verdict = measure();
    if !matches!(verdict, KvmVerdict::None(_)) {
        let cached = Cached { version: FORMAT, boot, verdict: verdict.clone() };
        // Without it the next one measures again.
        let _ = serde_json::to_vec(&cached).map_err(io::Error::from).and_then(|text| replace(&path, &text));
    }
    verdict
}

/// Writes a file whole or not at all.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let new = path.with_extension(format!("new-{}", std::process::id()));
    fs::write(&new, text)?;
    fs::rename(new, path)
}

fn measure() -> KvmVerdict {
    match guest::speed() {
        Ok(speed) => judge(speed, host::speed()),
        Err(error) => KvmVerdict::None(format!("KVM is there but cannot run a guest: {error}")),
    }
}

/// Compares the guest's speed with the host's, both in instructions a second.
fn judge(guest: f64, host: f64) -> KvmVerdict {
    if guest >= NATIVE * host {
        return KvmVerdict::Native;
    }
    KvmVerdict::Slow(format!(
        "KVM emulates guest code on this host ({:.2} million instructions a second where the host itself does {:.0}): \
         QEMU's translator is faster",
        guest / 1e6,
        host / 1e6
    ))
}

fn missing(error: &io::Error) -> KvmVerdict {
    KvmVerdict::None(match error.kind() {
        io::ErrorKind::NotFound => {
            "there is no /dev/kvm: the processor's virtualisation is off, or this is a virtual machine without nesting".into()
        }
        io::ErrorKind::PermissionDenied => {
            "this user may not open /dev/kvm: add them to the group kvm (usermod -aG kvm USER)".into()
        }
        _ => format!("/dev/kvm cannot be opened: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_is_remembered_for_this_boot_only() {
        let dir = tempfile::tempdir().unwrap();
        let first = kvm(dir.path());
        println!("{}", first.reason());
        let path = dir.path().join("kvm.json");
        if matches!(first, KvmVerdict::None(_)) {
            assert!(!path.exists());
            return println!("skipped: {}", first.reason());
        }
        let begun = std::time::Instant::now();
        assert_eq!(kvm(dir.path()), first);
        assert!(begun.elapsed().as_millis() < 50);
        let other =
            Cached { version: FORMAT, boot: "another".into(), verdict: KvmVerdict::Slow("stale".into()) };
        fs::write(&path, serde_json::to_vec(&other).unwrap()).unwrap();
        assert!(!kvm(dir.path()).reason().contains("stale"));
    }

    #[test]
    fn a_guest_is_measured_by_its_host() {
        assert_eq!(judge(3e9, 3.2e9), KvmVerdict::Native);
        assert_eq!(judge(90e6, 110e6), KvmVerdict::Native);
        let slow = judge(0.4e6, 3e9);
        assert!(
            !slow.usable() && slow.reason().contains("0.40 million") && slow.reason().contains("does 3000")
        );
    }

    #[test]
    fn what_is_missing_is_said_with_what_to_do() {
        assert!(missing(&io::ErrorKind::PermissionDenied.into()).reason().contains("group kvm"));
        assert!(missing(&io::ErrorKind::NotFound.into()).reason().contains("no /dev/kvm"));
    }
}
