//! The system calls that a device makes, from which a monitor puts together what its threads may do.

use std::ffi::c_long;

/// A system call, allowed with any arguments or only with one value of one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SystemCall {
    /// Its number.
    pub number: c_long,
    /// Index and value of the argument (its lower 32 bits) that it is limited to.
    pub only: Option<(u8, u32)>,
}

/// A call with any arguments.
#[must_use]
pub const fn any(number: c_long) -> SystemCall {
    SystemCall { number, only: None }
}

/// A call whose argument of that index has this value.
#[must_use]
pub const fn only(number: c_long, argument: u8, value: u32) -> SystemCall {
    SystemCall { number, only: Some((argument, value)) }
}

/// What a device calls, by the thread that does it. What every thread may do (memory, locks, events, messages) is not named.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemCalls {
    /// In [`Device::handle`](crate::Device::handle) and in changes while the machine runs: the event loop.
    pub events: &'static [SystemCall],
    /// In [`Device::activate`](crate::Device::activate), [`Device::reset`](crate::Device::reset) and
    /// [`Device::write_config`](crate::Device::write_config): a processor, and the event loop as well.
    pub registers: &'static [SystemCall],
}
