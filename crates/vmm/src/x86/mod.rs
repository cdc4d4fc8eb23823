//! What is x86 about the machine: where things are, what the firmware would have said, how a processor starts.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod processor;
pub mod state;
pub mod template;
