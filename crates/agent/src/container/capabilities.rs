//! The five capability sets.

use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::oci;

const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The sets as bits, bit n for capability n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// See capabilities(7).
    pub bounding: u64,
    /// See capabilities(7).
    pub effective: u64,
    /// See capabilities(7).
    pub inheritable: u64,
    /// See capabilities(7).
    pub permitted: u64,
    /// See capabilities(7).
    pub ambient: u64,
}

/// A name that Linux does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown capability {0:?}")]
pub struct Unknown(pub String);

fn bits(names: &[String]) -> Result<u64, Unknown> {
    names.iter().try_fold(0, |set, name| {
        let bare = name.strip_prefix("CAP_").unwrap_or(name);
        let bit = NAMES.iter().position(|n| *n == bare).ok_or_else(|| Unknown(name.clone()))?;
        Ok(set | 1 << bit)
    })
}

impl Capabilities {
    /// The sets that a specification names.
    ///
    /// # Errors
    /// For a name that Linux does not have.
    pub fn parse(spec: &oci::Capabilities) -> Result<Self, Unknown> {
        Ok(Self {
            bounding: bits(&spec.bounding)?,
            effective: bits(&spec.effective)?,
            inheritable: bits(&spec.inheritable)?,
            permitted: bits(&spec.permitted)?,
            ambient: bits(&spec.ambient)?,
        })
    }

    /// Drops from the bounding set what is not in ours. Must come before the effective set loses CAP_SETPCAP.
    ///
    /// # Errors
    /// Those of prctl(2).
    pub fn drop_bounding(&self) -> rustix::io::Result<()> {
        for bit in (0..NAMES.len()).filter(|bit| self.bounding & (1 << bit) == 0) {
            match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(
                1 << bit,
            )) {
                // A kernel older than the capability has nothing to drop.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sets the other four. The kernel has no ambient capability that is not permitted and inheritable too: such ones, which `runc spec`
    /// names, are left out, as by runc.
    ///
    /// # Errors
    /// Those of capset(2) and prctl(2).
    pub fn apply(&self) -> rustix::io::Result<()> {
        rustix::thread::set_capabilities(
            None,
            CapabilitySets {
                effective: CapabilitySet::from_bits_retain(self.effective),
                permitted: CapabilitySet::from_bits_retain(self.permitted),
                inheritable: CapabilitySet::from_bits_retain(self.inheritable),
            },
        )?;
        let ambient = self.ambient & self.permitted & self.inheritable;
        for bit in (0..NAMES.len()).filter(|bit| ambient & (1 << bit) != 0) {
            rustix::thread::configure_capability_in_ambient_set(
                CapabilitySet::from_bits_retain(1 << bit),
                true,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_kernels_numbers() {
        let sets = oci::Capabilities {
            bounding: vec!["CAP_CHOWN".into(), "CAP_SYS_ADMIN".into(), "CAP_CHECKPOINT_RESTORE".into()],
            ambient: vec!["CAP_NET_BIND_SERVICE".into()],
            ..Default::default()
        };
        let parsed = Capabilities::parse(&sets).expect("known");
        assert_eq!(parsed.bounding, 1 | 1 << 21 | 1 << 40);
        assert_eq!(parsed.ambient, 1 << 10);
        let wrong = oci::Capabilities { effective: vec!["CAP_FLY".into()], ..Default::default() };
        assert_eq!(Capabilities::parse(&wrong), Err(Unknown("CAP_FLY".into())));
    }
}
