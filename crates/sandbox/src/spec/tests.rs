use super::*;
use crate::network::Network;

fn image() -> ImageDefaults {
    ImageDefaults {
        entrypoint: vec!["/entry".into()],
        cmd: vec!["serve".into()],
        env: vec!["PATH=/bin".into(), "A=1".into()],
        user: Some("www:data".into()),
        workdir: Some("/srv".into()),
        stop_signal: Some("SIGQUIT".into()),
        volumes: vec!["/data".into()],
    }
}

fn args(spec: &Spec) -> Vec<String> {
    spec.process().clone().unwrap().args().clone().unwrap()
}

fn env(spec: &Spec) -> Vec<String> {
    spec.process().clone().unwrap().env().clone().unwrap()
}

#[test]
fn image_alone() {
    let mut spec = build(&image(), &RunOptions::default()).unwrap();
    // Its table has tests of its own.
    let mut linux = spec.linux().clone().unwrap();
    linux.set_seccomp(None);
    spec.set_linux(Some(linux));
    insta::assert_json_snapshot!(sorted(&spec));
}

#[test]
fn everything_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let options = RunOptions {
        args: vec!["-v".into()],
        init: true,
        env: vec!["A=2".into(), "B=".into()],
        user: Some("7:8".into()),
        workdir: Some("/w".into()),
        hostname: Some("box".into()),
        terminal: true,
        terminal_size: Some((80, 24)),
        read_only: true,
        tmpfs: vec!["/tmp:size=1m,exec".parse().unwrap()],
        volumes: vec![Volume { source: dir.path().into(), destination: "/host".into(), read_only: true }],
        ulimits: vec!["nofile=10:20".parse().unwrap()],
        limits: Limits { memory: Some(64 << 20), cpus: Some(1.5), pids: Some(10) },
        shm_size: Some(1 << 20),
        cap_add: vec!["net_admin".into()],
        cap_drop: vec!["ALL".into()],
        seccomp: Seccomp::Unconfined,
        isolation: Some(crate::config::Isolation::Tcg),
        cold: true,
        storage: Some(1 << 30),
        network: Network::Namespace("/run/netns/a".into()),
        stop_signal: Some("HUP".into()),
        entrypoint: None,
        dns: vec!["192.0.2.1".parse().unwrap()],
        add_hosts: vec![("db".into(), "192.0.2.7".parse().unwrap())],
        publish: vec!["8080:80".parse().unwrap()],
    };
    let spec = build(&image(), &options).unwrap();
    let source = dir.path().canonicalize().unwrap();
    let text = serde_json::to_string(&sorted(&spec)).unwrap().replace(source.to_str().unwrap(), "/SOURCE");
    insta::assert_json_snapshot!(serde_json::from_str::<serde_json::Value>(&text).unwrap());
}

/// Sets are in no order; snapshots need one.
fn sorted(spec: &Spec) -> serde_json::Value {
    fn sort(value: &mut serde_json::Value, key: &str) {
        match value {
            serde_json::Value::Object(map) => map.iter_mut().for_each(|(k, v)| sort(v, k)),
            serde_json::Value::Array(items) if ["bounding", "effective", "permitted"].contains(&key) => {
                items.sort_by_key(ToString::to_string);
            }
            serde_json::Value::Array(items) => items.iter_mut().for_each(|v| sort(v, "")),
            _ => {}
        }
    }
    let mut value = serde_json::to_value(spec).unwrap();
    sort(&mut value, "");
    value
}

#[test]
fn commands_replace_as_in_docker() {
    let run = |entrypoint: Option<&[&str]>, command: &[&str]| {
        let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let options =
            RunOptions { entrypoint: entrypoint.map(owned), args: owned(command), ..Default::default() };
        build(&image(), &options).map(|spec| args(&spec))
    };
    assert_eq!(run(None, &[]).unwrap(), ["/entry", "serve"]);
    assert_eq!(run(None, &["x", "y"]).unwrap(), ["/entry", "x", "y"]);
    assert_eq!(run(Some(&["/other"]), &[]).unwrap(), ["/other"]);
    assert_eq!(run(Some(&[]), &["x"]).unwrap(), ["x"]);
    assert!(matches!(run(Some(&[]), &[]), Err(Error::NoCommand)));
    assert!(matches!(run(Some(&[""]), &[]), Err(Error::NoCommand)));
}

#[test]
fn the_last_value_of_a_variable_wins_in_its_first_place() {
    let options = RunOptions { env: vec!["A=2".into(), "A=3".into()], ..Default::default() };
    assert_eq!(env(&build(&image(), &options).unwrap()), ["PATH=/bin", "A=3"]);
    let bare = ImageDefaults { cmd: vec!["sh".into()], ..Default::default() };
    let spec = build(&bare, &RunOptions { terminal: true, ..Default::default() }).unwrap();
    assert_eq!(env(&spec), [format!("PATH={}", defaults::PATH), "TERM=xterm".into()]);
    for bad in ["", "=x", "NAME", "A=\0"] {
        let options = RunOptions { env: vec![bad.into()], ..Default::default() };
        assert!(build(&image(), &options).is_err(), "{bad:?}");
    }
}

#[test]
fn users_go_to_the_guest_as_they_are() {
    for (text, uid, gid) in
        [("", 0, 0), ("0", 0, 0), ("7", 7, 0), ("7:8", 7, 8), ("www", 0, 0), ("7:staff", 0, 0)]
    {
        let options = RunOptions { user: Some(text.into()), ..Default::default() };
        let user = build(&image(), &options).unwrap().process().clone().unwrap().user().clone();
        assert_eq!((user.uid(), user.gid()), (uid, gid), "{text}");
        assert_eq!(user.username().as_deref(), Some(if text.is_empty() { "0" } else { text }));
    }
}

#[test]
fn flags_with_values_are_checked() {
    for good in ["/a:/b", "./x:/b:ro", "a:/b/c:rw", "/a:/b//c/"] {
        good.parse::<Volume>().unwrap();
    }
    assert_eq!("/a:/b//c/".parse::<Volume>().unwrap().destination, PathBuf::from("/b/c"));
    for bad in ["", "/a", ":/b", "/a:b", "/a:/", "/a:/b:rx", "/a:/b:ro:x", "/a:/b/../c"] {
        assert!(bad.parse::<Volume>().is_err(), "{bad}");
    }
    for good in ["/t", "/t:size=10m,mode=1777", "/t:exec,size=50%"] {
        good.parse::<Tmpfs>().unwrap();
    }
    for bad in ["t", "/", "/t:size=x", "/t:mode=9", "/t:lowerdir=/", "/t/..", "/t:uid=-1"] {
        assert!(bad.parse::<Tmpfs>().is_err(), "{bad}");
    }
    for good in ["nofile=1", "nofile=1:2", "core=unlimited", "stack=-1"] {
        good.parse::<Ulimit>().unwrap();
    }
    for bad in ["nofile", "nofile=", "nofile=2:1", "files=1", "nofile=x"] {
        assert!(bad.parse::<Ulimit>().is_err(), "{bad}");
    }
}

#[test]
fn two_things_in_one_place_are_refused() {
    let options = RunOptions {
        tmpfs: vec!["/x".parse().unwrap()],
        volumes: vec!["/:/x/".parse().unwrap()],
        ..Default::default()
    };
    assert!(matches!(build(&image(), &options), Err(Error::DuplicateMount(_))));
}

#[test]
fn a_missing_volume_is_told_before_anything_starts() {
    let options = RunOptions { volumes: vec!["/no/such/dir:/x".parse().unwrap()], ..Default::default() };
    let error = build(&image(), &options).unwrap_err().to_string();
    assert!(error.contains("/no/such/dir") && error.contains("create it"), "{error}");
}

#[test]
fn deeper_mounts_come_later() {
    let options = RunOptions {
        tmpfs: vec!["/a/b/c".parse().unwrap(), "/a".parse().unwrap()],
        volumes: vec!["/:/a/b".parse().unwrap()],
        ..Default::default()
    };
    let spec = build(&image(), &options).unwrap();
    let mounts = spec.mounts().clone().unwrap();
    let at = |path: &str| mounts.iter().position(|m| m.destination().as_os_str() == path).unwrap();
    assert!(at("/a") < at("/a/b") && at("/a/b") < at("/a/b/c"));
}

#[test]
fn the_machine_has_room_beside_the_containers_limit() {
    let options = RunOptions {
        limits: Limits { memory: Some(100 << 20), cpus: Some(2.5), pids: None },
        ..Default::default()
    };
    let spec = build(&image(), &options).unwrap();
    let wishes = Wishes::of(&spec).unwrap();
    assert_eq!(wishes.memory, Some((100 << 20) + defaults::GUEST_RESERVE));
    assert_eq!(wishes.cpus, Some(3));
    let resources = spec.linux().clone().unwrap().resources().clone().unwrap();
    assert_eq!(resources.memory().unwrap().limit(), Some(100 << 20));
    assert_eq!(resources.cpu().clone().unwrap().quota(), Some(250_000));
}

#[test]
fn capabilities_by_name() {
    let with = |add: &[&str], drop: &[&str]| {
        let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let options = RunOptions { cap_add: owned(add), cap_drop: owned(drop), ..Default::default() };
        build(&image(), &options).map(|s| {
            s.process().clone().unwrap().capabilities().clone().unwrap().bounding().clone().unwrap().len()
        })
    };
    assert_eq!(with(&[], &[]).unwrap(), 14);
    assert_eq!(with(&["CAP_SYS_ADMIN"], &["chown"]).unwrap(), 14);
    assert_eq!(with(&[], &["all"]).unwrap(), 0);
    assert_eq!(with(&["ALL"], &[]).unwrap(), 41);
    assert!(matches!(with(&["CAP_FLY"], &[]), Err(Error::UnknownCapability(_))));
}

#[test]
fn an_added_process_is_like_the_first_one() {
    let spec = build(&image(), &RunOptions::default()).unwrap();
    let first = spec.process().clone().unwrap();
    let options = ExecOptions { args: vec!["ls".into()], env: vec!["C=3".into()], ..Default::default() };
    let added = exec_process(&first, &options).unwrap();
    assert_eq!(added.args().clone().unwrap(), ["ls"]);
    assert_eq!(added.env().clone().unwrap(), ["PATH=/bin", "A=1", "C=3"]);
    assert_eq!(added.user(), first.user());
    assert_eq!(added.cwd(), first.cwd());
    assert_eq!(added.capabilities(), first.capabilities());
    assert!(matches!(exec_process(&first, &ExecOptions::default()), Err(Error::NoCommand)));
}
