//! Memory that comes and goes.

use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::guest;
use crate::host::{Files, PATIENCE};
use crate::session::{Client, Session};

pub fn hotplug() -> Result<(), Failed> {
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let inside = |name: &str| directory.path().join(name);
    let mut first = Session::start(&files, &inside("first"), &[])?;
    let client = &mut first.client;
    let kernel = json!({
        "kernel_image_path": files.vmlinux,
        "initrd_path": files.initramfs,
        "boot_args": format!("{} memhp_default_state=online_movable", guest::arguments("memory")),
    });
    client.done("PUT", "/boot-source", &kernel)?;
    client.done("PUT", "/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": guest::MEMORY_MIB}))?;
    let odd = json!({"total_size_mib": 300});
    client.refused("PUT", "/hotplug/memory", &odd, "must be a multiple of slot size (128 MiB)")?;
    client.refused("PATCH", "/hotplug/memory", &json!({"requested_size_mib": 128}), "before starting")?;
    client.done("PUT", "/hotplug/memory", &json!({"total_size_mib": 2 * guest::PLUGGED_MIB}))?;
    client.done("PUT", "/actions", &json!({"action_type": "InstanceStart"}))?;
    // By then its driver is there.
    first.console.wait(0)?;
    let client = &mut first.client;
    for size in [3, 4 * guest::PLUGGED_MIB] {
        client.refused("PATCH", "/hotplug/memory", &json!({"requested_size_mib": size}), "is invalid")?;
    }
    client.done("PATCH", "/hotplug/memory", &json!({"requested_size_mib": guest::PLUGGED_MIB}))?;
    said(&first, guest::FILLED)?;
    plugged(&mut first.client, guest::PLUGGED_MIB)?;

    let (state, memory) = (inside("state"), inside("memory"));
    first.client.done("PATCH", "/vm", &json!({"state": "Paused"}))?;
    let create = json!({"snapshot_path": state, "mem_file_path": memory});
    first.client.done("PUT", "/snapshot/create", &create)?;
    drop(first);
    assert_eq!(memory.metadata()?.len(), ((guest::MEMORY_MIB + 2 * guest::PLUGGED_MIB) as u64) << 20);

    let mut second = Session::start(&files, &inside("second"), &[])?;
    let backend = json!({"backend_type": "File", "backend_path": memory});
    let load = json!({"snapshot_path": state, "mem_backend": backend, "resume_vm": true});
    second.client.done("PUT", "/snapshot/load", &load)?;
    said(&second, guest::FREED)?;
    plugged(&mut second.client, guest::PLUGGED_MIB)?;
    // The guest ends when it has given it back.
    second.client.done("PATCH", "/hotplug/memory", &json!({"requested_size_mib": 0}))?;
    second.finish_content().map(drop)
}

/// Waits until the guest has said so.
fn said(session: &Session, word: &str) -> Result<(), Failed> {
    let deadline = Instant::now() + PATIENCE;
    while !session.console.text().lines().any(|line| line == word) {
        if Instant::now() > deadline {
            return Err(format!("the guest has not {word}:\n{}", session.console.text()).into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn plugged(client: &mut Client, mib: usize) -> Result<(), Failed> {
    let (status, answer) = client.ask("GET", "/hotplug/memory", &Value::Null)?;
    let expected = json!({
        "total_size_mib": 2 * guest::PLUGGED_MIB,
        "slot_size_mib": 128,
        "block_size_mib": 2,
        "plugged_size_mib": mib,
        "requested_size_mib": mib,
    });
    if (status, &answer) == (200, &expected) { Ok(()) } else { Err(format!("{status}: {answer}").into()) }
}
