//! The life of containers on kapsel-vmm.

use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::host::{IMAGE, ok, run, run_with};

/// From the choice of the monitor to warm starts.
pub fn all() -> Result<(), Failed> {
    chosen();
    ok(&["import", "busybox", IMAGE, "--cmd", "sh"]);
    cold();
    warm();
    crate::network::all();
    crate::shares::all();
    refused();
    Ok(())
}

pub fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&ok(arguments)).unwrap()
}

/// The choice and its consequences are told.
fn chosen() {
    let report = json(&["doctor", "--json"]);
    assert_eq!(report["isolation"], "kapsel-vmm", "{report:#}");
    let check = |name: &str| {
        let checks = report["checks"].as_array().unwrap();
        checks.iter().find(|check| check["name"] == name).unwrap().clone()
    };
    assert_eq!(check("kvm")["state"], "ok");
    let monitor = check("monitor");
    assert!(monitor["detail"].as_str().unwrap().starts_with("kapsel-vmm "), "{monitor}");
}

/// A machine that boots: output, input, exit code.
fn cold() {
    let ran =
        run_with(&["run", "--rm", "-i", "--cold", "busybox", "sh", "-c", "cat; uname -n; exit 7"], b"in\n");
    assert_eq!(ran.code, Some(7), "{}\n{}", ran.stderr, crate::host::logs());
    assert!(ran.stdout.starts_with("in\n"), "{}", ran.stdout);
    assert!(!ran.stderr.contains("tcg"), "{}", ran.stderr);
}

/// Machines that continue a template; a process beside the first; a large stream both ways.
fn warm() {
    ok(&["template", "build"]);
    let templates = json(&["template", "ls", "--json"]);
    assert_eq!(templates[0]["isolation"], "kapsel-vmm", "{templates:#}");
    ok(&["run", "-d", "--name", "one", "busybox", "sleep", "1000"]);
    let told = &json(&["inspect", "one"])[0];
    assert_eq!(
        (&told["isolation"]["kind"], &told["isolation"]["template"]),
        (&"kapsel-vmm".into(), &true.into())
    );
    assert_eq!(run(&["exec", "one", "sh", "-c", "exit 3"]).code, Some(3));
    let bytes = pattern(1 << 20);
    let echoed = run_with(&["exec", "-i", "one", "md5sum"], &bytes);
    let expected = md5sum(&bytes);
    assert!(echoed.stdout.starts_with(&expected), "{} is not {expected}; {}", echoed.stdout, echoed.stderr);
    // Its clones are not one another.
    let random = |name: &str| ok(&["exec", name, "cat", "/proc/sys/kernel/random/uuid"]);
    ok(&["run", "-d", "--name", "two", "busybox", "sleep", "1000"]);
    assert_ne!(random("one"), random("two"));
    ok(&["rm", "-f", "one", "two"]);
    held();
    assert_eq!(ok(&["ps", "-aq"]), "");
}

/// The template that holds this image's container is built in the background, out of the empty one; then nothing is made any more.
fn held() {
    let begun = Instant::now();
    let holds = |template: &Value| !template["container"].is_null();
    while !json(&["template", "ls", "--json"]).as_array().unwrap().iter().any(holds) {
        assert!(begun.elapsed() < Duration::from_secs(300), "no template with a container was built");
        std::thread::sleep(Duration::from_millis(500));
    }
    let ran = run(&["run", "--name", "held", "busybox", "echo", "warm"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), "warm\n"), "{}", ran.stderr);
    let timings = json(&["inspect", "held"])[0]["timings"].to_string();
    println!("{timings}");
    assert!(timings.contains("guest: start") && !timings.contains("guest: create"), "{timings}");
    ok(&["rm", "held"]);
}

/// Bytes that are at no place the same as at the next sector's.
pub fn pattern(length: u32) -> Vec<u8> {
    (0..length).map(|n| (n * 7 + n / 512) as u8).collect()
}

/// As busybox computes it.
pub fn md5sum(bytes: &[u8]) -> String {
    let file = std::env::temp_dir().join("sum");
    std::fs::write(&file, bytes).unwrap();
    let output = std::process::Command::new("md5sum").arg(&file).output().unwrap();
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap().to_owned()
}

/// What kapsel-vmm cannot do is refused by name; `kvm` goes to QEMU for it.
fn refused() {
    let volume = |n: i32| {
        let dir = std::env::temp_dir().join(format!("many{n}"));
        std::fs::create_dir(&dir).unwrap();
        format!("-v={}:/shared{n}", dir.display())
    };
    let volumes: Vec<String> = (0..14).map(volume).collect();
    let shares: Vec<&str> = volumes.iter().map(String::as_str).chain(["busybox", "true"]).collect();
    let asked = run(&[&["run", "--rm", "--isolation", "kapsel-vmm"][..], &shares].concat());
    assert_ne!(asked.code, Some(0));
    assert!(asked.stderr.contains("13 places for shared directories"), "{}", asked.stderr);
    let kvm = run(&[&["run", "--rm", "--isolation", "kvm"][..], &shares].concat());
    assert!(kvm.stderr.contains("qemu-system-x86"), "{}", kvm.stderr);
}
