//! Containers in machines of kapsel-vmm, on real KVM: in the host in a box, where that is not here.
//!
//! The box has kapsel's programs, the guest's kernel and an image in it, and is a host like any other: the command line is used as a
//! person uses it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod containers;
mod host;
mod network;
mod shares;

use std::process::ExitCode;

use libtest_mimic::Trial;

fn main() -> ExitCode {
    // One after the other, each upon what the one before left: the box is slow, and so is each machine's first boot in it.
    let trials = vec![Trial::test("containers_run_in_kapsel_vmm_cold_and_from_templates", containers::all)];
    kapsel_kvmbox::test_main(trials, host::prepare)
}
