//! Hooks of the host, at their places.

use std::fs;

use serde_json::{Value, json};

use crate::world::{Engine, eventually, executable, reap, world};

/// A hook that keeps the state it is given.
fn keeping(engine: &Engine, name: &str) -> Value {
    let script = engine.dir.join(name);
    executable(&script, &format!("#!/bin/sh\ncat > {}.json\n", script.display()));
    json!([{ "path": script }])
}

fn kept(engine: &Engine, name: &str) -> Option<Value> {
    serde_json::from_slice(&fs::read(engine.dir.join(format!("{name}.json"))).ok()?).ok()
}

#[test]
fn each_runs_at_its_place() {
    let world = world!();
    let engine = world.engine();
    let (first, started, stopped) =
        (keeping(&engine, "first"), keeping(&engine, "started"), keeping(&engine, "stopped"));
    engine.bundle("test -e /inside && exit 6", |spec| {
        let inside = json!([{ "path": "/bin/touch", "args": ["touch", "/inside"], "env": ["PATH=/bin"] }]);
        spec["hooks"] =
            json!({ "createRuntime": first, "startContainer": inside, "poststart": started, "poststop": stopped });
    });
    let pid = engine.create("hooks");
    let first = kept(&engine, "first").expect("createRuntime ran before create ended");
    assert_eq!((first["id"].as_str(), first["pid"].as_u64()), (Some("hooks"), Some(pid.into())));
    assert_eq!(first["status"], "creating");
    assert!(kept(&engine, "started").is_none());
    engine.ok(&["start", "hooks"]);
    assert_eq!(kept(&engine, "started").expect("poststart ran")["status"], "running");
    assert_eq!(reap(pid), 6, "startContainer ran in the container before its program");
    eventually("it is stopped", || engine.status("hooks") == "stopped");
    assert!(kept(&engine, "stopped").is_none());
    engine.ok(&["delete", "hooks"]);
    assert_eq!(kept(&engine, "stopped").expect("poststop ran")["status"], "stopped");
}

#[test]
fn one_that_fails_fails_the_container() {
    let world = world!();
    let engine = world.engine();
    let failing = engine.dir.join("failing");
    executable(&failing, "#!/bin/sh\necho no network >&2\nexit 3\n");
    let bundle = engine.bundle("true", |spec| spec["hooks"] = json!({ "prestart": [{ "path": failing }] }));
    let ran = engine.run(&["create", "--bundle", bundle.to_str().unwrap(), "failing"]);
    assert!(ran.code != 0 && ran.stderr.contains("no network"), "{}", ran.stderr);
    assert_eq!((engine.ok(&["list", "-q"]).as_str(), world.sandboxes_of("failing")), ("", 0));
}
