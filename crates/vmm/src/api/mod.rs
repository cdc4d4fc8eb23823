//! Firecracker's API: REST over a Unix socket, as far as it is built. A resource that is not built is an unknown path.
//!
//! The API's thread reads a request ([`connection`], [`http`]) and finds out what it asks for ([`request`]); the machine's thread does
//! it ([`control`]). Before the start and after it are two types, each with the requests that it can do.

mod connection;
pub mod control;
mod fault;
pub(crate) mod http;
pub mod request;
mod server;

pub use fault::Fault;
pub use http::BODY_MAX;
pub use server::{Call, Server};
