//! Firecracker's API: REST over a Unix socket, as far as it is built. A resource that is not built is an unknown path.
//!
//! A connection's thread reads a request ([`http`]) and finds out what it asks for ([`request`]); the machine's thread does
//! it ([`control`]). Before the start and after it are two types, each with the requests that it can do.

pub mod control;
mod http;
pub mod request;
mod server;

pub use server::{Call, Server};
