//! What a container gets, and how its end becomes kapsel's exit code.

use crate::world::world;

#[test]
fn it_has_a_kernel_of_its_own() {
    let world = world!();
    let guest = world.ok(["run", "--rm", "busybox", "cat", "/proc/version"]);
    let host = std::fs::read_to_string("/proc/version").expect("a version");
    assert!(guest.starts_with("Linux version"), "{guest}");
    assert_ne!(guest, host);
}

#[test]
fn exit_codes_are_dockers() {
    let world = world!();
    for (command, code) in [
        (&["true"][..], 0),
        (&["false"], 1),
        (&["sh", "-c", "exit 42"], 42),
        (&["/etc/notes"], 126),
        (&["/etc"], 126),
        (&["no-such-program"], 127),
        (&["/no/such/program"], 127),
    ] {
        let ran = world.run([&["run", "--rm", "busybox"], command].concat());
        assert_eq!(ran.code, code, "{command:?}: {}", ran.stderr);
    }
}

#[test]
fn environment_user_directory_entrypoint_and_hostname() {
    let world = world!();
    let file = std::env::temp_dir().join(format!("kapsel-env-{}", std::process::id()));
    std::fs::write(&file, "# comment\nA=from file\nB=kept\n").expect("a file");
    let file_name = file.to_str().expect("UTF-8");
    let flags =
        ["--env-file", file_name, "-e", "A=from flag", "-w", "/tmp", "-u", "joe:users", "--hostname", "box"];
    let script = "echo $A $B $HOME; pwd; id -un; id -gn; hostname";
    let out =
        world.ok([&["run", "--rm"], &flags[..], &["--entrypoint", "sh", "busybox", "-c", script]].concat());
    std::fs::remove_file(&file).expect("removed");
    assert_eq!(out, "from flag kept /home/joe\n/tmp\njoe\nusers\nbox\n");
    assert_eq!(world.ok(["run", "--rm", "-u", "1234:5", "busybox", "sh", "-c", "id -u; id -g"]), "1234\n5\n");
    let ran = world.run(["run", "--rm", "-u", "nobody-here", "busybox", "true"]);
    assert!(ran.code == 125 && ran.stderr.contains("nobody-here"), "{}", ran.stderr);
}

#[test]
fn a_megabyte_of_arguments_and_binary_safe_ones() {
    let world = world!();
    let pieces: Vec<String> = (0..16).map(|n| format!("{n:02}").repeat(32 << 10)).collect();
    let mut args = vec!["run", "--rm", "busybox", "sh", "-c", "echo $#; printf %s \"$@\" | md5sum", "sh"];
    args.extend(pieces.iter().map(String::as_str));
    let here = md5sum(pieces.concat().as_bytes());
    assert_eq!(world.ok(args), format!("16\n{here}  -\n"));
    let odd = "tab\t newline\n quote\" umlaut ü";
    assert_eq!(world.ok(["run", "--rm", "busybox", "printf", "%s", odd]), odd);
}

/// By the busybox of this machine, so that no second implementation is needed.
pub fn md5sum(bytes: &[u8]) -> String {
    use std::io::Write;
    let mut child = std::process::Command::new("/bin/busybox")
        .arg("md5sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("busybox");
    child.stdin.take().expect("a pipe").write_all(bytes).expect("written");
    let out = child.wait_with_output().expect("a sum");
    String::from_utf8_lossy(&out.stdout).split(' ').next().unwrap_or_default().to_owned()
}

#[test]
fn read_only_and_tmpfs() {
    let world = world!();
    let script = "touch /new 2>&1; echo x > /scratch/y && cat /scratch/y; mount | grep -c ' /scratch '";
    let out = world.ok([
        "run",
        "--rm",
        "--read-only",
        "--tmpfs",
        "/scratch:size=1m",
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    assert!(out.contains("Read-only file system") && out.ends_with("x\n1\n"), "{out}");
}

#[test]
fn a_scratch_disk_of_its_own_size() {
    let world = world!();
    let script = "dd if=/dev/zero of=/big bs=1M count=40 2>/dev/null && stat -c %s /big; dd if=/dev/zero of=/more bs=1M count=200 2>&1";
    let ran = world.run(["run", "--rm", "--storage", "128m", "busybox", "sh", "-c", script]);
    let out = ran.text();
    assert!(out.starts_with("41943040\n") && out.contains("No space left"), "{out}{}", ran.stderr);
}

#[test]
fn unknown_images_and_names_in_use_fail_with_advice() {
    let world = world!();
    let ran = world.run(["run", "--pull", "never", "no-such-image"]);
    assert!(
        ran.code == 125 && ran.stderr.contains("no-such-image") && ran.stderr.contains("hint: "),
        "{}",
        ran.stderr
    );
    let taken = world.container("e2e-taken", &[], &["sleep", "999"]);
    let ran = world.run(["run", "--name", taken.name, "busybox", "true"]);
    assert!(
        ran.code == 125 && ran.stderr.contains("in use") && ran.stderr.contains("hint: "),
        "{}",
        ran.stderr
    );
    assert_eq!(world.ok(["ps", "-a"]).matches(taken.name).count(), 1, "a refused container leaves nothing");
}

#[test]
fn timings_tell_where_the_time_went() {
    let world = world!();
    let ran = world.run(["run", "--rm", "--timings=json", "busybox", "true"]);
    let line = ran.stderr.lines().last().unwrap_or_default();
    let report: serde_json::Value = serde_json::from_str(line).expect("JSON");
    let total = report["total_ms"].as_f64().expect("a number");
    let phases = report["phases"].as_array().expect("phases");
    for who in ["cli", "sandbox"] {
        assert!(phases.iter().any(|phase| phase["who"] == who), "{report}");
    }
    assert!(phases.iter().all(|phase| phase["start_ms"].as_f64().is_some_and(|at| at <= total)), "{report}");
}

#[test]
fn do_sees_this_machines_files_and_changes_only_what_is_shared() {
    let world = world!();
    let dir = tempfile::tempdir().expect("a directory");
    let (shared, other) = (dir.path().join("shared"), dir.path().join("other"));
    std::fs::create_dir(&shared).expect("a directory");
    std::fs::write(&other, "before").expect("a file");
    let script = "cat ../other; echo; echo after > ../other; cat ../other; echo kept > new; exit 3";
    let ran = {
        let mut command =
            world.command(["do", "--rw", shared.to_str().expect("UTF-8"), "/bin/sh", "-c", script]);
        command.current_dir(&shared).output().expect("kapsel starts")
    };
    let stderr = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "before\nafter\n", "{stderr}");
    assert_eq!(ran.status.code(), Some(3));
    assert_eq!(std::fs::read_to_string(&other).expect("there"), "before");
    assert_eq!(std::fs::read_to_string(shared.join("new")).expect("there"), "kept\n");
}
