//! Images as a person handles them: the real `kapsel pull`, `import`, `images`, `rmi` and `prune`, with a registry on
//! this machine, as processes that are killed, race each other, and run out of disk.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kapsel_testkit::image::{BuiltImage, digest};
use kapsel_testkit::registry::base64;
use kapsel_testkit::{Fault, ImageBuilder, Layer, Registry, TarBuilder};
use serde_json::{Value, json};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A person's machine: a data root, a home, and a folder of programs before all others.
struct Machine {
    dir: tempfile::TempDir,
    root: PathBuf,
    env: Vec<(&'static str, String)>,
}

impl Machine {
    fn new() -> Machine {
        let dir = tempfile::Builder::new().prefix("ki").tempdir_in("/tmp").expect("a directory");
        for sub in ["bin", "home/.docker"] {
            std::fs::create_dir_all(dir.path().join(sub)).expect("a directory");
        }
        std::fs::write(dir.path().join("config.toml"), "").expect("a configuration");
        Machine { root: dir.path().join("root"), dir, env: Vec::new() }
    }

    fn env(mut self, name: &'static str, value: impl Into<String>) -> Machine {
        self.env.push((name, value.into()));
        self
    }

    fn command(&self, args: &[&str]) -> Command {
        self.program(env!("CARGO_BIN_EXE_kapsel"), args)
    }

    fn program(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(args)
            .env_clear()
            .env("KAPSEL_ROOT", &self.root)
            .env("KAPSEL_CONFIG", self.dir.path().join("config.toml"))
            .env("HOME", self.dir.path().join("home"))
            .env("PATH", format!("{}:{path}", self.dir.path().join("bin").display()))
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        command
    }

    fn spawn(&self, args: &[&str]) -> Child {
        self.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("kapsel starts")
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("kapsel starts")
    }

    /// Runs kapsel, which must succeed, and gives its output.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs kapsel, which must succeed and print JSON.
    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).expect("JSON")
    }

    /// Runs kapsel, which must fail as itself; gives what it said: what failed, and what to do.
    fn fails(&self, args: &[&str]) -> (String, String) {
        let output = self.output(args);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{args:?}: {stderr}");
        assert_eq!(text(&output.stdout), "", "{args:?}");
        let lines: Vec<&str> = stderr.lines().collect();
        assert_eq!(lines.len(), 2, "what failed, and a hint: {stderr}");
        let hint = lines[1].strip_prefix("hint: ").expect("a hint");
        (lines[0].strip_prefix("kapsel: ").expect("a message").to_owned(), hint.to_owned())
    }

    fn docker_config(&self, config: &Value) {
        std::fs::write(self.dir.path().join("home/.docker/config.json"), config.to_string()).expect("a file");
    }

    /// Installs a program that is this script.
    fn install(&self, name: &str, script: &str) {
        let path = self.dir.path().join("bin").join(name);
        // By another process: one that another test forks meanwhile would keep the file open for writing, and then it
        // could not be run.
        let mut tee =
            Command::new("tee").arg(&path).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("tee");
        tee.stdin
            .take()
            .expect("a pipe")
            .write_all(format!("#!/bin/sh\n{script}\n").as_bytes())
            .expect("written");
        assert!(tee.wait().expect("tee ends").success());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("executable");
    }

    fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// Everything in the store has the digest that is its name, and every image that it lists is whole.
    fn check(&self) {
        for blob in std::fs::read_dir(self.images().join("blobs/sha256")).expect("blobs") {
            let path = blob.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            assert_eq!(digest(&std::fs::read(&path).expect("a blob")), format!("sha256:{name}"));
        }
        let output = self.output(&["images", "--json"]);
        assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
        let listed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        for image in listed.as_array().expect("a list") {
            self.ok(&["inspect", image["digest"].as_str().expect("a digest")]);
        }
        let temporary: Vec<_> = std::fs::read_dir(self.images().join("tmp")).expect("tmp").collect();
        assert!(temporary.is_empty(), "{temporary:?}");
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for a process, which is killed when it takes too long.
fn finish(mut child: Child) -> Output {
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().expect("it can be waited for").is_none() {
        if Instant::now() > deadline {
            child.kill().expect("killed");
            panic!("it hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("its output")
}

/// Bytes that do not compress.
fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(next).collect()
}

/// Three layers, in the three ways that they can be compressed.
fn image() -> BuiltImage {
    ImageBuilder::new()
        .layer(Layer::gzip(TarBuilder::new().file("lower", noise(1, 200_000)).build()))
        .layer(Layer::zstd(TarBuilder::new().file("middle", noise(2, 200_000)).build()))
        .layer(Layer::plain(TarBuilder::new().file("upper", noise(3, 200_000)).build()))
        .build()
}

fn registry() -> Registry {
    let registry = Registry::start();
    registry.push("tool", "latest", &image());
    registry
}

#[test]
fn pull_prints_a_line_a_digest_or_json() {
    let (machine, registry) = (Machine::new(), registry());
    let name = registry.reference("tool:latest");
    let output = machine.output(&["pull", &registry.reference("tool")]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), format!("{name} {}\n", image().digest()));
    assert_eq!(text(&output.stderr), "", "no bars where there is no terminal");
    assert_eq!(machine.ok(&["pull", "-q", &name]), format!("{}\n", image().digest()));
    let pulled = machine.json(&["pull", "--json", &name]);
    assert_eq!((&pulled["names"], &pulled["digest"]), (&json!([name]), &json!(image().digest())));
    assert_eq!(machine.json(&["images", "--json"]), json!([pulled]));
    machine.check();
    assert_eq!(machine.ok(&["rmi", &name]), format!("{name}\n"));
    assert_eq!(machine.json(&["images", "--json"]), json!([]));
}

#[test]
fn pull_chooses_the_platform() {
    let (machine, registry) = (Machine::new(), Registry::start());
    let other = |content: &str| {
        ImageBuilder::new().layer(Layer::plain(TarBuilder::new().file("f", content).build())).build()
    };
    let (v6, v7) = (other("six"), other("seven"));
    registry.push_index(
        "multi",
        "v1",
        &[("linux/arm/v6", &v6), ("linux/amd64", &image()), ("linux/arm/v7", &v7)],
    );
    let name = registry.reference("multi:v1");
    for (platform, expected) in [("linux/amd64", image()), ("linux/arm/v7", v7), ("linux/arm", v6)] {
        let digest = machine.ok(&["pull", "-q", "--platform", platform, &name]);
        assert_eq!(digest.trim(), expected.digest(), "{platform}");
    }
    let (message, hint) = machine.fails(&["pull", "--platform", "linux/s390x", &name]);
    assert!(message.contains("linux/s390x") && hint.contains("linux/arm/v7"), "{message}: {hint}");
    let output = machine.output(&["pull", "--platform", "linux", &name]);
    assert!(text(&output.stderr).contains("OS/ARCH/VARIANT"), "{}", text(&output.stderr));
}

/// Runs kapsel with its output on a terminal; gives its exit code and all that it showed.
fn on_terminal(mut command: Command, meanwhile: impl FnOnce(&dyn Fn() -> String)) -> (Option<i32>, String) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
    grantpt(&master).and_then(|()| unlockpt(&master)).expect("usable");
    let size = rustix::termios::Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&master, size).expect("a size");
    let name = ptsname(&master, Vec::new()).expect("a name");
    let slave = File::options().read(true).write(true).open(name.to_str().expect("UTF-8")).expect("opened");
    command.stdout(slave.try_clone().expect("a copy")).stderr(slave).env("TERM", "xterm");
    let child = command.spawn().expect("kapsel starts");
    // The command has copies of the terminal, by which its reader would never see an end.
    drop(command);
    let screen = Arc::new(Mutex::new(Vec::new()));
    let (mut reader, shown) = (File::from(master), screen.clone());
    let reading = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            shown.lock().expect("the screen").extend_from_slice(&buffer[..count]);
        }
    });
    let look = || String::from_utf8_lossy(&screen.lock().expect("the screen")).into_owned();
    meanwhile(&look);
    let code = finish(child).status.code();
    reading.join().expect("the reader ends");
    (code, look())
}

#[test]
fn pull_shows_its_progress_on_a_terminal() {
    let (machine, registry) = (Machine::new(), registry());
    let layer = digest(&image().layers[2].blob);
    registry.fault(&layer, Fault::Stall(100_000));
    let name = registry.reference("tool");
    let (code, shown) = on_terminal(machine.command(&["pull", &name]), |shown| {
        let bar = format!("download  {}", &layer[7..19]);
        eventually("the stalled layer has a bar that says how far it is", || {
            shown().contains(&bar) && shown().contains(" KiB / ")
        });
        registry.heal(&layer);
    });
    assert_eq!(code, Some(0), "{shown:?}");
    let last = shown.trim_end().rsplit('\n').next().unwrap_or_default();
    assert!(
        last.ends_with(&format!("{name}:latest {}", image().digest())),
        "bars go when all is done: {shown:?}"
    );
    // Nothing but the digest where that was asked for, also on a terminal.
    let (_, shown) = on_terminal(machine.command(&["pull", "-q", &name]), |_| {});
    assert_eq!(shown, format!("{}\r\n", image().digest()));
}

#[test]
fn a_pull_that_was_killed_goes_on_where_it_stopped() {
    let (machine, registry) = (Machine::new(), registry());
    let layer = digest(&image().layers[2].blob);
    registry.fault(&layer, Fault::Stall(150_000));
    let name = registry.reference("tool");
    let mut child = machine.command(&["pull", &name]).stdout(Stdio::null()).spawn().expect("kapsel starts");
    let partial = machine.images().join("partial").join(&layer[7..]);
    eventually("a part of the layer is there", || {
        std::fs::metadata(&partial).is_ok_and(|metadata| metadata.len() == 150_000)
    });
    child.kill().expect("killed");
    child.wait().expect("it ends");
    assert_eq!(machine.json(&["images", "--json"]), json!([]));
    registry.heal(&layer);
    machine.ok(&["pull", &name]);
    let starts: Vec<_> = registry.requests(&layer).iter().map(|request| request.range_start).collect();
    assert_eq!(starts, [None, Some(150_000)]);
    machine.check();
}

#[test]
fn a_connection_that_breaks_is_taken_up_again() {
    let (machine, registry) = (Machine::new(), registry());
    let layer = digest(&image().layers[2].blob);
    registry.fault(&layer, Fault::Disconnect { after: 90_000, times: 2 });
    machine.ok(&["pull", &registry.reference("tool")]);
    assert_eq!(registry.requests(&layer).len(), 3);
    machine.check();
}

#[test]
fn logins_of_the_docker_configuration_are_used() {
    let (machine, registry) = (Machine::new(), registry());
    let (name, host) = (registry.reference("tool"), registry.host());
    let login = |user_and_password: &str| {
        machine
            .docker_config(&json!({ "auths": { &host: { "auth": base64(user_and_password.as_bytes()) } } }));
    };
    registry.require_token("user", "sesame");
    let (message, hint) = machine.fails(&["pull", &name]);
    assert!(message.contains("401") && hint.contains("docker login"), "{message}: {hint}");
    login("user:wrong");
    machine.fails(&["pull", &name]);
    login("user:sesame");
    machine.ok(&["pull", &name]);
    registry.require_basic("user", "sesame");
    machine.ok(&["pull", &name]);
    machine.docker_config(&json!({ "auths": { &host: { "identitytoken": "who-i-am" } } }));
    registry.require_identity("who-i-am");
    machine.ok(&["pull", &name]);
    assert!(registry.requests("who-i-am").is_empty(), "it is in no URL");
    // A configuration that is elsewhere, and one that is none: what it says may be secret.
    let elsewhere =
        Machine::new().env("DOCKER_CONFIG", machine.dir.path().join("home/.docker").display().to_string());
    elsewhere.ok(&["pull", &name]);
    machine.docker_config(&json!({ "auths": "sesame" }));
    let (message, hint) = machine.fails(&["pull", &name]);
    assert!(hint.contains("config.json") && !message.contains("sesame"), "{message}: {hint}");
}

#[test]
fn credential_helpers_are_used() {
    let (machine, registry) = (Machine::new(), registry());
    let (name, host) = (registry.reference("tool"), registry.host());
    registry.require_token("user", "sesame");
    // Writes down what everybody could see of it.
    let log = machine.dir.path().join("log");
    let answer = r#"{"ServerURL":"x","Username":"user","Secret":"sesame"}"#;
    let script = format!("echo \"$0 $*\" >> {0}; cat >> {0}; echo '{answer}'", log.display());
    machine.install("docker-credential-one", &script);
    machine.install("docker-credential-all", &script);
    for (config, helper) in [
        (json!({ "credHelpers": { &host: "one" }, "credsStore": "all" }), "one"),
        (json!({ "credHelpers": { "other.test": "one" }, "credsStore": "all" }), "all"),
    ] {
        machine.docker_config(&config);
        machine.ok(&["pull", &name]);
        let seen = std::fs::read_to_string(&log).expect("the helper ran");
        assert!(seen.ends_with(&format!("docker-credential-{helper} get\n{host}")), "{seen}");
        std::fs::remove_file(&log).expect("removed");
    }
    // One that has nothing leaves it to the rest of the configuration.
    machine.install("docker-credential-none", "echo credentials not found in native keychain; exit 1");
    let auths = json!({ &host: { "auth": base64(b"user:sesame") } });
    machine.docker_config(&json!({ "credsStore": "none", "auths": auths }));
    machine.ok(&["pull", &name]);
    // What goes wrong is said, but never what the helper knows.
    machine.install("docker-credential-broken", "echo sesame");
    machine.install("docker-credential-endless", "exec cat /dev/zero");
    for (helper, said) in
        [("broken", "protocol"), ("endless", "stop talking"), ("absent", "cannot run"), ("../x", "name")]
    {
        machine.docker_config(&json!({ "credsStore": helper }));
        let (message, hint) = machine.fails(&["pull", &name]);
        assert!(message.contains(said) && hint.contains("config.json"), "{message}: {hint}");
        assert!(!message.contains("sesame"), "{message}");
    }
}

/// A proxy that refuses everything, and the first lines of the requests that it got.
fn proxy() -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let requests = seen.clone();
    std::thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            let mut buffer = [0; 1024];
            let count = connection.read(&mut buffer).unwrap_or(0);
            let request = String::from_utf8_lossy(&buffer[..count]).into_owned();
            requests.lock().expect("the list").push(request.lines().next().unwrap_or_default().to_owned());
            let _ =
                connection.write_all(b"HTTP/1.1 502 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    (url, seen)
}

#[test]
fn a_registry_on_this_machine_is_not_looked_for_behind_a_proxy() {
    let registry = registry();
    let (url, seen) = proxy();
    let mut machine = Machine::new();
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        machine = machine.env(name, &url);
    }
    registry.require_token("", "");
    machine.ok(&["pull", &registry.reference("tool")]);
    assert_eq!(*seen.lock().expect("the list"), Vec::<String>::new());
    // Any other one is.
    let (message, _) = machine.fails(&["pull", "registry.invalid/tool"]);
    assert!(message.contains("registry.invalid"), "{message}");
    let seen = seen.lock().expect("the list");
    assert!(
        !seen.is_empty() && seen.iter().all(|request| request.starts_with("CONNECT registry.invalid:443")),
        "{seen:?}"
    );
}

#[test]
fn what_goes_wrong_with_a_pull_is_told_with_what_to_do() {
    let (machine, registry) = (Machine::new(), registry());
    let name = registry.reference("tool");
    let layer = digest(&image().layers[0].blob);
    let (message, hint) = machine.fails(&["pull", &registry.reference("absent")]);
    assert!(message.contains("404") && hint.contains("check the name"), "{message}: {hint}");
    let (message, _) = machine.fails(&["pull", "127.0.0.1:1/tool"]);
    assert!(message.contains("cannot be reached"), "{message}");
    let (message, hint) = machine.fails(&["pull", "Not/A/Name"]);
    assert!(message.contains("Not/A/Name") && !hint.is_empty(), "{message}");
    registry.fault(&layer, Fault::Corrupt);
    let (message, hint) = machine.fails(&["pull", &name]);
    assert!(
        message.contains(&layer) && message.contains("corrupt") && hint.contains("fetch it again"),
        "{message}: {hint}"
    );
    registry.fault(&layer, Fault::Truncated(1000));
    let (message, _) = machine.fails(&["pull", &name]);
    assert!(message.contains("truncated"), "{message}");
    registry.heal(&layer);
    machine.check();
    assert_eq!(machine.json(&["images", "--json"]), json!([]));
    machine.ok(&["pull", &name]);
}

#[test]
fn pulls_by_two_processes_at_once_download_once() {
    let (machine, registry) = (Machine::new(), registry());
    let name = registry.reference("tool");
    let layers: Vec<String> = image().layers.iter().map(|layer| digest(&layer.blob)).collect();
    for layer in &layers {
        registry.fault(layer, Fault::Slow(300));
    }
    let pull = || machine.spawn(&["pull", &name]);
    for child in [pull(), pull()] {
        let output = finish(child);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    for layer in &layers {
        assert_eq!(registry.requests(layer).len(), 1);
    }
    machine.check();
}

#[test]
fn one_of_two_pulls_that_is_killed_leaves_the_work_to_the_other() {
    let (machine, registry) = (Machine::new(), registry());
    let name = registry.reference("tool");
    let layer = digest(&image().layers[2].blob);
    registry.fault(&layer, Fault::Stall(120_000));
    let pull = || machine.spawn(&["pull", &name]);
    let mut first = pull();
    let partial = machine.images().join("partial").join(&layer[7..]);
    eventually("the first has begun", || std::fs::metadata(&partial).is_ok_and(|m| m.len() == 120_000));
    let second = pull();
    eventually("the second is there", || registry.requests("/manifests/").len() == 2);
    first.kill().expect("killed");
    first.wait().expect("it ends");
    registry.heal(&layer);
    let output = finish(second);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(registry.requests(&layer).last().and_then(|request| request.range_start), Some(120_000));
    machine.check();
}

#[test]
fn removing_images_while_they_are_pulled_leaves_a_sound_store() {
    let (machine, registry) = (Machine::new(), registry());
    let name = registry.reference("tool");
    let layer = digest(&image().layers[0].blob);
    machine.ok(&["pull", &name]);
    for round in 0..6u64 {
        // With blobs that come in quickly or slowly, so that removal meets the pull in different states.
        registry.fault(&layer, Fault::Slow(round * 40));
        let pull = &["pull", &*name][..];
        let commands = [pull, &["rmi", "-f", &name], &["prune", "--all", "--force"], pull];
        for child in commands.map(|command| machine.spawn(command)) {
            let output = finish(child);
            assert!(output.status.success(), "{}", text(&output.stderr));
        }
        machine.check();
        // Whether the image is there depends on who came last; that it can be had does not.
        machine.ok(&["pull", &name]);
        machine.check();
    }
}

/// A small file system of its own at a directory, until dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(dir: &Path, size: &str) -> Option<Tmpfs> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: mounting needs root");
            return None;
        }
        std::fs::create_dir_all(dir).expect("a directory");
        Tmpfs::mount(&["-t", "tmpfs", "-o", &format!("size={size},mode=700"), "none"], dir);
        Some(Tmpfs(dir.to_owned()))
    }

    fn grow(&self, size: &str) {
        Tmpfs::mount(&["-o", &format!("remount,size={size}")], &self.0);
    }

    fn mount(args: &[&str], dir: &Path) {
        assert!(Command::new("mount").args(args).arg(dir).status().expect("mount").success());
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        assert!(Command::new("umount").arg(&self.0).status().expect("umount").success());
    }
}

#[test]
fn a_disk_that_fills_up_during_a_pull_or_import_loses_nothing() {
    let (machine, registry) = (Machine::new(), registry());
    let Some(disk) = Tmpfs::new(&machine.root, "480k") else { return };
    let small = machine.dir.path().join("small.tar");
    std::fs::write(&small, TarBuilder::new().file("a", "b").build()).expect("a file");
    machine.ok(&["import", "small", small.to_str().expect("UTF-8")]);
    let (message, hint) = machine.fails(&["pull", &registry.reference("tool")]);
    let path = machine.images().display().to_string();
    assert!(message.contains("no space left") && message.contains(&path), "{message}");
    assert!(hint.contains("kapsel prune"), "{hint}");
    machine.check();
    assert_eq!(machine.json(&["images", "--json"])[0]["names"], json!(["small:latest"]));

    let big = machine.dir.path().join("big.tar.gz");
    let tar = TarBuilder::new().file("big", noise(4, 600_000)).build();
    std::fs::write(&big, kapsel_testkit::image::gzip(&tar)).expect("a file");
    let (message, hint) = machine.fails(&["import", "big", big.to_str().expect("UTF-8")]);
    assert!(message.contains("no space left") && message.contains(&path), "{message}");
    assert!(hint.contains("kapsel prune"), "{hint}");
    machine.check();

    // What the hint says works, and what was tried works when there is space.
    machine.ok(&["prune", "--all", "--force"]);
    assert_eq!(machine.json(&["images", "--json"]), json!([]));
    disk.grow("4m");
    machine.ok(&["pull", &registry.reference("tool")]);
    machine.ok(&["import", "big", big.to_str().expect("UTF-8")]);
    machine.check();
    drop(disk);
}

#[test]
fn archives_keep_their_names_unless_given_one() {
    let machine = Machine::new();
    let file = |name: &str, data: Vec<u8>| {
        let path = machine.dir.path().join(name);
        std::fs::write(&path, data).expect("a file");
        path.to_str().expect("UTF-8").to_owned()
    };
    let plain = ImageBuilder::new().layer(Layer::plain(TarBuilder::new().file("a", "b").build())).build();
    let docker = file("docker.tar", plain.docker_archive(&["one:v1", "two:v2"]));
    let imported = machine.json(&["import", "--json", &docker]);
    assert_eq!(imported.as_array().map(Vec::len), Some(1), "one image: {imported}");
    assert_eq!(imported[0]["names"], json!(["one:v1", "two:v2"]));
    let oci = file("oci.tar", image().oci_archive("three:v3"));
    assert_eq!(machine.ok(&["import", &oci]), format!("three:v3 {}\n", image().digest()));
    assert_eq!(machine.ok(&["import", "four", &oci]), format!("four:latest {}\n", image().digest()));
    let piped =
        format!("{} import five <(cat {oci}) && {0} import six - < {oci}", env!("CARGO_BIN_EXE_kapsel"));
    let output = machine.program("bash", &["-c", &piped]).output().expect("bash");
    assert_eq!(text(&output.stdout).lines().count(), 2, "{}", text(&output.stderr));
    let rootfs = file("rootfs.tar", TarBuilder::new().file("a", "b").build());
    let (message, hint) = machine.fails(&["import", &rootfs]);
    assert!(message.contains("rootfs.tar") && hint.contains("name"), "{message}: {hint}");
    let (message, hint) = machine.fails(&["import", "x", "/nowhere/archive.tar"]);
    assert!(message.contains("/nowhere/archive.tar") && hint.contains("check the path"), "{message}: {hint}");
    machine.check();
}
