//! `kapsel-agent`: process 1 in the guest; creates and watches the containers.

fn main() {}
