//! `kapsel-fsd`: serves one shared directory to the guest over virtio-fs.

fn main() {}
