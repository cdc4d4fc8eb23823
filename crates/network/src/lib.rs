//! A sandbox's connection to the network.
//!
//! [`Taken`] is a network namespace that an engine has set up, taken as it is found: each Ethernet interface in it gets a
//! tap beside it, and every frame that comes in on one of the two goes out on the other. The guest has the interface's
//! addresses then, and the host's kernel sees the frames only on their way. What is needed to make the same interface in
//! the guest is an [`Interface`]; the monitor gets the tap's descriptor. Interfaces that come later are taken as well ([`Taken::update`]).
//!
//! [`bridge`] is a bridge of kapsel's own, for those who have no namespace prepared.
//!
//! Taps vanish with their last descriptor. What else is changed in a namespace is noted in a file first ([`release`]), so that
//! it can be undone by another process.

pub mod bridge;
mod error;
mod events;
mod interface;
mod namespace;
mod read;
mod redirect;
mod taken;
mod tap;

pub use error::Error;
pub use events::Events;
pub use interface::{Address, Interface, Mac, Neighbour, Route};
pub use namespace::refuse_own;
pub use taken::{Changes, Port, Taken, release};

/// `Result` with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;
