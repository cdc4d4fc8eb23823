//! The shim as containerd calls it: Debian's containerd with directories of its own, and real sandboxes.

mod by_hand;
mod cri;
mod faults;
mod life;
mod pods;
mod sandbox_api;
mod streams;
mod world;
