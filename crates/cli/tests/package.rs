//! The Debian package: what is in it, and that its programs find each other when it is unpacked anywhere.

use std::path::Path;
use std::process::{Command, Output};

/// `make deb` of what is built already.
fn package() -> Option<String> {
    let beside = Path::new(env!("CARGO_BIN_EXE_kapsel")).parent().expect("a directory");
    let programs = [
        "kapsel-runtime",
        "containerd-shim-kapsel-v2",
        "kapsel-fsd",
        "kapsel-forward",
        "guest/kapsel-agent",
        "static/kapsel-vmm",
        "static/kapsel-jailer",
    ];
    if let Err(why) = kapsel_testkit::sandboxes::need(beside, &programs) {
        println!("skipped: {why}");
        return None;
    }
    if beside.file_name().is_none_or(|name| name != "release") {
        println!("skipped: packages are made of release builds");
        return None;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let made = run(Command::new("make")
        .args(["--no-print-directory", "--old-file=build", "deb"])
        .current_dir(root)
        .env("CARGO_TARGET_DIR", beside.parent().expect("a directory")));
    Some(made.lines().last().expect("a path").to_owned())
}

fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().expect("it starts");
    assert!(status.success(), "{command:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).expect("text")
}

#[test]
fn it_has_everything_and_works_where_it_is_unpacked() {
    let Some(package) = package() else { return };
    let fields = run(Command::new("dpkg-deb").args(["--field", &package]));
    for field in [
        "Package: kapsel",
        &format!("Version: {}", env!("CARGO_PKG_VERSION")),
        "qemu-system-x86, ",
        "Installed-Size: ",
    ] {
        assert!(fields.contains(field), "{field}: {fields}");
    }
    let list = run(Command::new("dpkg-deb").args(["--contents", &package]));
    let has = |path: &str, rights: &str| {
        let line = list.lines().find(|line| line.ends_with(&format!(" .{path}")));
        let line = line.unwrap_or_else(|| panic!("{path} is not in it: {list}"));
        assert!(line.starts_with(rights) && line.contains(" root/root "), "{line}");
    };
    for program in [
        "/usr/bin/kapsel",
        "/usr/bin/kapsel-runtime",
        "/usr/bin/containerd-shim-kapsel-v2",
        "/usr/libexec/kapsel/kapsel-agent",
        "/usr/libexec/kapsel/kapsel-forward",
        "/usr/libexec/kapsel/kapsel-fsd",
        "/usr/libexec/kapsel/kapsel-jailer",
        "/usr/libexec/kapsel/kapsel-vmm",
    ] {
        has(program, "-rwxr-xr-x");
    }
    for file in [
        "/usr/share/man/man1/kapsel.1.gz",
        "/usr/share/man/man1/kapsel-run.1.gz",
        "/usr/share/bash-completion/completions/kapsel",
        "/usr/share/zsh/vendor-completions/_kapsel",
        "/usr/share/fish/vendor_completions.d/kapsel.fish",
        "/usr/share/doc/kapsel/copyright",
        "/usr/share/doc/kapsel/changelog.gz",
        "/usr/share/doc/kapsel/README.md",
        "/usr/share/doc/kapsel/podman.md",
        "/usr/share/doc/kapsel/examples/50-kapsel.conf",
        "/usr/share/doc/kapsel/examples/daemon.json",
        "/usr/share/doc/kapsel/examples/config.toml",
    ] {
        has(file, "-rw-r--r--");
    }

    let root = tempfile::tempdir().expect("a directory");
    run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(root.path()));
    let kapsel = |args: &[&str]| {
        let mut command = Command::new(root.path().join("usr/bin/kapsel"));
        run(command.args(args).env("KAPSEL_ROOT", root.path().join("data")))
    };
    assert!(kapsel(&["version"]).contains(env!("CARGO_PKG_VERSION")));
    let runtime = run(Command::new(root.path().join("usr/bin/kapsel-runtime")).arg("--version"));
    assert!(runtime.contains(env!("CARGO_PKG_VERSION")), "{runtime}");
    let examples = root.path().join("usr/share/doc/kapsel/examples");
    let podman = std::fs::read_to_string(examples.join("50-kapsel.conf")).expect("a file");
    assert!(podman.contains("[\"/usr/bin/kapsel-runtime\"]"), "{podman}");
    let containerd = std::fs::read_to_string(examples.join("config.toml")).expect("a file");
    assert!(
        containerd.contains("io.containerd.kapsel.v2") && !containerd.contains("runtime_path"),
        "{containerd}"
    );
    // The helpers in libexec are found from where the package was unpacked.
    let doctor: serde_json::Value = serde_json::from_str(&kapsel(&["doctor", "--json"])).expect("JSON");
    assert!(!doctor.to_string().contains("cannot find"), "{doctor}");
    let sums =
        Command::new("dpkg-deb").args(["--control", &package]).arg(root.path().join("control")).status();
    assert!(sums.expect("dpkg-deb").success());
    run(Command::new("md5sum").args(["--check", "--quiet", "control/md5sums"]).current_dir(root.path()));
}
