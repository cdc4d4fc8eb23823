//! Linux capabilities as a set of bits.

/// A set of Linux capabilities (capabilities(7)); empty by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CapSet(u64);

/// One capability. Only those that a jailed process may ever keep have a name here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Cap {
    /// Change the owner of any file.
    Chown = 0,
    /// Ignore permission bits.
    DacOverride = 1,
    /// Ignore permission bits for reading and searching.
    DacReadSearch = 2,
    /// Act as the owner of any file.
    Fowner = 3,
    /// Keep set-id bits on a change of the file.
    Fsetid = 4,
    /// Become any group.
    Setgid = 6,
    /// Become any user.
    Setuid = 7,
}

impl CapSet {
    /// No capability.
    pub const NONE: CapSet = CapSet(0);

    /// The set of these.
    #[must_use]
    pub const fn of(caps: &[Cap]) -> CapSet {
        let mut bits = 0;
        let mut i = 0;
        while i < caps.len() {
            bits |= 1 << caps[i] as u8;
            i += 1;
        }
        CapSet(bits)
    }

    /// As a bit mask: bit n is capability number n.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether the set is empty.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}
