//! Which user a jailed process runs as.

/// The user and group of a jailed process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// Another user than ours; needs root. Supplementary groups are dropped.
    Ids {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// Our own user. Unless that is root, the child gets a user namespace in which only this user is mapped (to the same
    /// number), since the other namespaces cannot be made without one.
    Current,
}

/// First user id of the range that sandboxes take theirs from.
pub const FIRST_UID: u32 = 0x7000_0000;
/// Size of that range.
pub const UID_COUNT: u32 = 0x0fff_0000;

impl Identity {
    /// The identity of a sandbox's own: no lookup, no allocation, no lock, nothing to give back.
    ///
    /// The number is a hash of the sandbox's id into 1879048192..2147418111. That range is above those that systemd,
    /// LXC and shadow hand out (524288..1879048191), and below 2^31, which some file systems and old interfaces take for a
    /// sign bit. With n sandboxes at once the chance that any two share a number is about n² / 2^29: one in five million
    /// for 10, one in 500 for 1000. Sharing is harmless in itself: the two processes are in different pid, mount, ipc and
    /// user-visible file trees, so that neither can name, trace, signal or open anything of the other; the number is a
    /// second wall. Files on the host never belong to it, but for the sandbox's own runtime directory.
    #[must_use]
    pub fn of_sandbox(id: &str) -> Identity {
        let uid = FIRST_UID + fnv1a(id.as_bytes()) % UID_COUNT;
        Identity::Ids { uid, gid: uid }
    }

    /// What a sandbox's processes should run as: [`Identity::of_sandbox`] if we are root, else ourselves.
    #[must_use]
    pub fn for_sandbox(id: &str) -> Identity {
        if rustix::process::geteuid().is_root() { Identity::of_sandbox(id) } else { Identity::Current }
    }

    /// The user and group id as the host sees them: what a file must belong to for the process to own it.
    #[must_use]
    pub fn ids(self) -> (u32, u32) {
        match self {
            Identity::Ids { uid, gid } => (uid, gid),
            Identity::Current => (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
        }
    }
}

/// 64-bit FNV-1a, folded. Ids are random hex, so that any hash that uses all of its input spreads them evenly.
fn fnv1a(bytes: &[u8]) -> u32 {
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    let folded = (hash >> 32) ^ (hash & 0xffff_ffff);
    u32::try_from(folded).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sandbox_uids_stay_in_their_range_and_differ() {
        let uids: std::collections::BTreeSet<u32> =
            (0..2000).map(|n| Identity::of_sandbox(&format!("{n:064x}")).ids().0).collect();
        assert!(uids.iter().all(|uid| (FIRST_UID..FIRST_UID + UID_COUNT).contains(uid)));
        assert!(uids.len() >= 1998, "{} different of 2000", uids.len());
        assert_eq!(Identity::of_sandbox("a"), Identity::of_sandbox("a"));
    }
}
