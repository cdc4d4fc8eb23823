//! Learns from the library what Docker's normalisation adds to a short image name: the default registry and the folder
//! of official images. At build time, since the library's parser compiles a regular expression, which takes some 60 ms:
//! more than everything else that `kapsel run` does before it starts a machine.

use oci_spec::distribution::Reference;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let probe: Reference = "x".parse().expect("a name of one letter is an image reference");
    let official = probe.repository().strip_suffix('x').expect("the name is the end of the repository");
    println!("cargo::rustc-env=KAPSEL_DEFAULT_REGISTRY={}", probe.registry());
    println!("cargo::rustc-env=KAPSEL_OFFICIAL_PREFIX={official}");
}
