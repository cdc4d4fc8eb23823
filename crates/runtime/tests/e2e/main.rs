//! kapsel-runtime as engines call it, with real sandboxes: by hand first, then by Podman.

mod by_hand;
mod faults;
mod hooks;
mod podman;
mod terminal;
mod world;
