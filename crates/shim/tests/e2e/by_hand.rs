//! The shim's own command line, as newer and older containerds call it.

use std::process::{Command, Stdio};

use crate::world::{engine, eventually};

#[test]
fn a_shim_that_nobody_wants_any_more_ends() {
    let engine = engine!();
    let bundle = engine.dir.join("bundle");
    std::fs::create_dir(&bundle).expect("a directory");
    let address = engine.dir.join("c.sock");
    let shim = |action: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-shim-kapsel-v2"));
        command.args(["-namespace", "default", "-publish-binary", "/usr/bin/containerd", "-id", "x"]);
        command.arg("-address").arg(&address).arg("-bundle").arg(&bundle).arg(action);
        command.env("KAPSEL_ROOT", engine.world.root()).env("MAX_SHIM_VERSION", "3");
        command.current_dir(&bundle).stdin(Stdio::null()).output().expect("the shim starts")
    };
    let started = shim("start");
    assert!(started.status.success() && started.stderr.is_empty(), "{started:?}");
    let told: serde_json::Value = serde_json::from_slice(&started.stdout).expect("JSON");
    assert_eq!((&told["version"], &told["protocol"]), (&3.into(), &"ttrpc".into()));
    let written = std::fs::read_to_string(bundle.join("address")).expect("an address");
    assert_eq!(told["address"], written.as_str());
    assert_eq!(engine.shims().len(), 1);
    let again = shim("start");
    assert!(!again.status.success() && again.stdout.is_empty(), "one shim for a container: {again:?}");
    let deleted = shim("delete");
    assert!(deleted.status.success() && !deleted.stdout.is_empty(), "{deleted:?}");
    eventually("it ends by itself", || engine.shims().is_empty());
    engine.nothing_is_left();
}
