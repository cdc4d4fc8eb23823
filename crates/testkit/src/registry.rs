//! A local registry.

/// A registry.
pub struct Registry;
/// A fault.
pub enum Fault {}
