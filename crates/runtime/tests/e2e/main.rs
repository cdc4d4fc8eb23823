//! kapsel-runtime as engines call it, with real sandboxes: by hand first, then by Podman, buildah and Docker.

mod buildah;
mod by_hand;
mod cgroup;
mod docker;
mod faults;
mod hooks;
mod podman;
mod terminal;
mod world;
