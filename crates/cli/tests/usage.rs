//! What kapsel says and with what it exits, without any machine: help, usage errors, empty lists, bad names.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// kapsel with a data root of its own and an environment that is the same everywhere.
fn kapsel(root: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kapsel"))
        .args(args)
        .env_clear()
        .env("KAPSEL_ROOT", root)
        .env("KAPSEL_CONFIG", root.join("config.toml"))
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null())
        .output()
        .expect("kapsel starts")
}

/// A short directory: sockets' paths are limited.
fn root() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("kt").tempdir_in("/tmp").expect("a temporary directory");
    std::fs::write(dir.path().join("config.toml"), "").expect("a configuration");
    dir
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Runs kapsel, which must fail with the code, and gives what it said on standard error.
fn fails(args: &[&str], code: i32) -> String {
    let root = root();
    let output = kapsel(root.path(), args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert_eq!(text(&output.stdout), "", "{args:?}");
    assert!(!stderr.contains('\x1b'), "colours where there is no terminal: {stderr:?}");
    stderr
}

const COMMANDS: [&str; 31] = [
    "run",
    "do",
    "exec",
    "cp",
    "ps",
    "logs",
    "inspect",
    "stats",
    "attach",
    "wait",
    "stop",
    "kill",
    "pause",
    "resume",
    "rm",
    "pull",
    "images",
    "import",
    "rmi",
    "template",
    "template ls",
    "template build",
    "template rm",
    "prune",
    "doctor",
    "config",
    "install",
    "version",
    "man",
    "completions",
    "",
];

#[test]
fn help_of_every_command() {
    let root = root();
    for command in COMMANDS {
        let words: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let output = kapsel(root.path(), &words);
        assert!(output.status.success(), "{command}");
        let name = format!("help {command}").trim().replace(' ', "-");
        insta::assert_snapshot!(name, text(&output.stdout));
    }
    let said = |args: &[&str]| text(&kapsel(root.path(), args).stdout);
    assert_eq!(said(&["help"]), said(&["--help"]));
    assert_eq!(said(&["help", "exec"]), said(&["exec", "--help"]));
}

#[test]
fn usage_errors_exit_with_125_and_say_what_is_wrong() {
    for (args, said) in [
        (&["run", "--no-such-flag", "busybox"][..], "--no-such-flag"),
        (&["run", "--memory", "1g", "--memory", "2g", "busybox"], "cannot be used multiple times"),
        (&["run"], "required"),
        (&["run", "--memory", "lots", "busybox"], "expected a size"),
        (&["run", "--cpus", "0", "busybox"], "0.01 to 64"),
        (&["run", "-v", "/a:b", "busybox"], "DST absolute"),
        (&["run", "--tmpfs", "/a:colour=red", "busybox"], "DST absolute"),
        (&["run", "--ulimit", "files=3", "busybox"], "nofile=1024"),
        (&["run", "--isolation", "chroot", "busybox"], "kvm"),
        (&["run", "--pull", "daily", "busybox"], "missing"),
        (&["run", "--stop-signal", "NONSENSE", "busybox"], "expected a signal"),
        (&["run", "--timings=poem", "busybox"], "json"),
        (&["run", "-e", "=x", "busybox"], "KEY=VALUE"),
        (&["exec", "c"], "kapsel exec"),
        (&["exec", "-d", "-i", "c", "true"], "cannot be used with"),
        (&["do"], "required"),
        (&["do", "--no-such-flag", "true"], "--no-such-flag"),
        (&["kill", "-s", "65", "c"], "expected a signal"),
        (&["ps", "-q", "--json"], "cannot be used with"),
        (&["template", "rm"], "KEY"),
        (&["template", "rm", "--all", "abc"], "cannot be used with"),
        (&["frobnicate"], "frobnicate"),
        (&[], "Usage"),
    ] {
        let stderr = fails(args, 125);
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }
}

#[test]
fn failures_are_one_line_and_a_hint() {
    for (args, failed, hint) in [
        (&["rm", "nobody"][..], "there is no sandbox \"nobody\"", "kapsel ps -a"),
        (&["stop", "nobody"], "there is no sandbox \"nobody\"", "kapsel ps -a"),
        (&["exec", "nobody", "true"], "there is no sandbox \"nobody\"", "kapsel ps -a"),
        (&["logs", "nobody"], "there is no sandbox \"nobody\"", "kapsel ps -a"),
        (&["cp", "nobody:/etc", "/tmp"], "there is no sandbox \"nobody\"", "kapsel ps -a"),
        (&["cp", "/etc", "/tmp"], "neither SRC nor DST is in a container", "CONTAINER:PATH"),
        (&["cp", "a:/x", "b:/x"], "from one container to another", "pipe"),
        (&["template", "rm", "abc"], "there is no template \"abc\"", "kapsel template ls"),
        (&["prune"], "there is no terminal to ask on", "--force"),
    ] {
        let stderr = fails(args, 125);
        let lines: Vec<&str> = stderr.lines().collect();
        assert_eq!(lines.len(), 2, "{args:?}: {stderr}");
        assert!(lines[0].starts_with("kapsel: ") && lines[0].contains(failed), "{args:?}: {stderr}");
        assert!(lines[1].starts_with("hint: ") && lines[1].contains(hint), "{args:?}: {stderr}");
    }
}

#[test]
fn each_of_several_names_is_tried_and_told() {
    let stderr = fails(&["rm", "one", "two"], 125);
    assert!(stderr.contains("\"one\"") && stderr.contains("\"two\""), "{stderr}");
    let root = root();
    assert!(kapsel(root.path(), ["rm", "-f", "one", "two"]).status.success(), "-f does not mind");
}

#[test]
fn lists_are_empty_but_well_formed() {
    let root = root();
    for args in [&["ps", "--json"][..], &["ps", "-a", "--json"], &["template", "ls", "--json"]] {
        let output = kapsel(root.path(), args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "[]\n", "{args:?}");
    }
    let output = kapsel(root.path(), ["ps"]);
    assert_eq!(text(&output.stdout), "CONTAINER  IMAGE  COMMAND  CREATED  STATUS  PORTS  NAME\n");
}

#[test]
fn the_configuration_tells_where_its_values_come_from() {
    let root = root();
    let file = root.path().join("config.toml");
    std::fs::write(&file, "memory = \"512M\"\n").expect("a configuration");
    let output = kapsel(root.path(), ["config", "--json"]);
    let settings: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let find = |key: &str| settings.as_array().and_then(|all| all.iter().find(|s| s["key"] == key)).cloned();
    let memory = find("memory").expect("a key");
    assert_eq!((memory["value"].as_str(), memory["origin"]["at"].as_str()), (Some("512M"), file.to_str()));
    assert_eq!(find("cpus").expect("a key")["origin"]["kind"], "default");

    std::fs::write(&file, "memroy = \"512M\"\n").expect("a configuration");
    let output = kapsel(root.path(), ["config"]);
    assert_eq!(output.status.code(), Some(125));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("memroy") && stderr.contains("did you mean \"memory\""), "{stderr}");
}

#[test]
fn an_output_that_is_closed_ends_kapsel_as_sigpipe_would() {
    let root = root();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let status = Command::new(env!("CARGO_BIN_EXE_kapsel"))
        .args(["completions", "bash"])
        .env("KAPSEL_ROOT", root.path())
        .stdout(writer)
        .stderr(Stdio::null())
        .status()
        .expect("kapsel starts");
    assert_eq!(status.code(), Some(141));
}

#[test]
fn man_pages_and_completions_come_from_the_definition() {
    let root = root();
    let pages = root.path().join("man");
    assert!(kapsel(root.path(), [OsStr::new("man"), pages.as_os_str()]).status.success());
    let page = std::fs::read_to_string(pages.join("kapsel-run.1")).expect("a page");
    assert!(page.contains("kapsel\\-run") && page.contains("\\-\\-entrypoint"), "{page}");
    for shell in ["bash", "zsh", "fish"] {
        let output = kapsel(root.path(), ["completions", shell]);
        assert!(output.status.success());
        assert!(text(&output.stdout).contains("entrypoint"), "{shell}");
    }
}

#[test]
fn doctor_gives_each_check_a_state_and_its_exit_code_says_whether_containers_can_run() {
    let root = root();
    let output = kapsel(root.path(), ["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = report["checks"].as_array().expect("checks");
    for name in ["monitor", "guest kernel", "programs", "cgroup", "user namespaces", "landlock", "seccomp"] {
        let check =
            checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{name}: {report}"));
        let state = check["state"].as_str().expect("a state");
        assert!(["ok", "warn", "fail"].contains(&state), "{check}");
        assert_eq!(state == "ok", check["hint"].is_null(), "what is not well comes with advice: {check}");
    }
    assert_eq!(output.status.code(), Some(i32::from(report["state"] == "fail")));
    // Without QEMU there is nothing to run machines with.
    std::fs::write(root.path().join("config.toml"), "qemu = \"/nowhere/qemu\"").expect("a configuration");
    let output = kapsel(root.path(), ["doctor"]);
    assert_eq!(output.status.code(), Some(1));
    let text = text(&output.stdout);
    assert!(text.contains("fail monitor") && text.contains("isolation: none"), "{text}");
}

#[test]
fn images_are_imported_listed_inspected_and_removed() {
    let root = root();
    let tar = root.path().join("rootfs.tar");
    let mut builder = tar::Builder::new(std::fs::File::create(&tar).expect("a file"));
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o755);
    builder.append_data(&mut header, "bin/sh", &b"hello"[..]).expect("an entry");
    builder.finish().expect("an archive");
    let file = tar.to_str().expect("UTF-8");

    let output = kapsel(root.path(), ["import", "tiny", file, "--cmd", "/bin/sh -c true", "--env", "A=b"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let listed = kapsel(root.path(), ["images", "--json"]);
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    assert_eq!(listed[0]["names"], serde_json::json!(["tiny:latest"]));
    let inspected = kapsel(root.path(), ["inspect", "tiny"]);
    let inspected: serde_json::Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
    assert_eq!(inspected[0]["kind"], "image");
    assert_eq!(inspected[0]["config"]["config"]["Cmd"], serde_json::json!(["/bin/sh", "-c", "true"]));
    let output = kapsel(root.path(), ["inspect", "nothing", "tiny"]);
    assert_eq!(output.status.code(), Some(125));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(found.as_array().map(Vec::len), Some(1), "the known one is shown all the same");
    let stderr = text(&output.stderr);
    assert!(stderr.contains("neither a container nor an image"), "{stderr}");
    let stderr = fails(&["run", "--pull", "never", "nothing"], 125);
    assert!(stderr.contains("nothing") && stderr.contains("hint: "), "{stderr}");
}

#[test]
fn the_version() {
    let root = root();
    let output = kapsel(root.path(), ["version", "--json"]);
    let about: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(about["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(
        text(&kapsel(root.path(), ["--version"]).stdout),
        text(&kapsel(root.path(), ["version"]).stdout)
    );
}
