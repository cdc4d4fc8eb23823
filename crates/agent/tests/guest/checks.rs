//! The checks. Each runs containers of its own and leaves none behind.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kapsel_protocol::api;
use kapsel_protocol::stdio::Kind;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

use crate::machine::{Machine, context, storages, token};
use crate::process::{piped, process, spec};

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Result<(Code, String)> {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => Ok((status.code(), status.message().to_owned())),
        other => anyhow::bail!("not refused: {other:?}"),
    }
}

pub async fn nothing_runs_before_configure(machine: &Machine) -> Result<()> {
    let refused = code(machine.create("early", &spec("early", &["true"]), api::Stdio::default()).await)?;
    ensure!(refused.0 == Code::FAILED_PRECONDITION, "{refused:?}");
    // Without a process they can be made, as a template has them.
    for id in ["early", "early-tty"] {
        let mut spec = spec(id, &[]);
        spec["process"] = Value::Null;
        machine.create(id, &spec, api::Stdio::default()).await?;
    }
    let refused = code(machine.start("early", "").await)?;
    ensure!(refused.0 == Code::FAILED_PRECONDITION, "{refused:?}");
    Ok(())
}

/// As the host has it rehearsed by a machine that stands by.
pub async fn the_agent_is_a_program_too(machine: &Machine) -> Result<()> {
    let mut spec = spec("rehearsal", &[]);
    spec["process"] = Value::Null;
    machine.create("rehearsal", &spec, api::Stdio::default()).await?;
    let (token, stdio) = piped();
    let mut program = process(&["/proc/self/exe", "rehearse"]);
    program["user"] = json!({ "uid": 1000, "gid": 1001 });
    machine.add("rehearsal", "", &program, stdio, false).await?;
    let start = async { machine.start("rehearsal", "").await.map(drop) };
    let done = machine.talk(token, b"", start, "rehearsal", "").await?;
    ensure!(done.code == 0 && done.stdout == "rehearsed\n", "{done:?}");
    machine.delete("rehearsal", "", false).await?;
    Ok(())
}

pub async fn a_guest_is_given_to_another_sandbox(machine: &Machine) -> Result<()> {
    crate::configure(machine, "second").await?;
    // In the guest's own name space for host names, as kapsel's containers are.
    let mut shared = spec("second", &["hostname"]);
    shared["hostname"] = Value::Null;
    shared["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "pid"}]);
    let done = machine.run_spec("second", &shared, b"").await?;
    ensure!(done.stdout == "second\n", "{done:?}");
    Ok(())
}

pub async fn a_process_comes_later(machine: &Machine) -> Result<()> {
    let refused = code(machine.start("early", "").await)?;
    ensure!(refused.0 == Code::FAILED_PRECONDITION, "started without a process: {refused:?}");
    let bad = machine.add("early", "", &process(&[]), api::Stdio::default(), false).await;
    ensure!(bad.is_err_and(|error| error.to_string().contains("args")), "a process without a program");
    let mut shell = process(&["sh", "-c", "id -un; pwd; echo $$; cat; exit 9"]);
    shell["user"] = json!({ "username": "web" });
    shell["cwd"] = json!("/tmp/made");
    let (token, stdio) = piped();
    machine.add("early", "", &shell, stdio, false).await?;
    let twice = machine.add("early", "", &shell, api::Stdio::default(), false).await;
    ensure!(twice.is_err_and(|error| error.to_string().contains("already")), "two first processes");
    let filtered = api::ExecRequest {
        id: "early".into(),
        exec_id: "x".into(),
        process: shell.to_string().into_bytes(),
        seccomp: vec![0; 8],
        ..Default::default()
    };
    let refused = code(machine.agent.exec(context(), &filtered).await)?;
    ensure!(refused.0 == Code::INVALID_ARGUMENT, "a filter of its own: {refused:?}");
    let start = async { machine.start("early", "").await.map(drop) };
    let done = machine.talk(token, b"typed\n", start, "early", "").await?;
    ensure!(done.code == 9 && done.stdout == "web\n/tmp/made\n1\ntyped\n", "{done:?}");
    machine.delete("early", "", false).await?;

    let token = crate::machine::token();
    let stdio = api::Stdio { token: token.to_string(), ..Default::default() };
    machine.add("early-tty", "", &process(&["sh", "-c", "tty; test -c /dev/console"]), stdio, true).await?;
    let mut tty = machine.stream(token, Kind::Tty).await?;
    machine.start("early-tty", "").await?;
    let mut text = String::new();
    tty.read_to_string(&mut text).await?;
    ensure!(text.starts_with("/dev/pts/0") || text.starts_with("/dev/console"), "{text:?}");
    ensure!(machine.wait("early-tty", "").await?.exit_code == 0);
    machine.delete("early-tty", "", false).await?;
    Ok(())
}

pub async fn phases_are_told(machine: &Machine) -> Result<()> {
    let created = machine.create("t", &spec("t", &["true"]), api::Stdio::default()).await?;
    let started = machine.start("t", "").await?;
    ensure!(machine.wait("t", "").await?.exit_code == 0, "true failed");
    machine.delete("t", "", false).await?;
    for phase in created.phases.iter().chain(&started.phases) {
        println!("    {:<24} {:>7} us", phase.name, phase.duration_us);
    }
    ensure!(!created.phases.is_empty() && created.phases.iter().any(|p| p.duration_us > 0), "no phases");
    Ok(())
}

pub async fn exit_codes_and_signals(machine: &Machine) -> Result<()> {
    ensure!(machine.sh("e", "exit 7").await?.code == 7);
    ensure!(
        machine.sh("e", "kill -9 $$; exit 0").await?.code == 0,
        "a first process is immune to its own SIGKILL"
    );
    machine.create("k", &spec("k", &["sleep", "1000"]), api::Stdio::default()).await?;
    machine.start("k", "").await?;
    let early = code(machine.delete("k", "", false).await)?;
    ensure!(early.0 == Code::FAILED_PRECONDITION, "a running container was deleted: {early:?}");
    machine.kill("k", "", libc::SIGKILL).await?;
    ensure!(machine.wait("k", "").await?.exit_code == 137);
    let late = code(machine.kill("k", "", libc::SIGTERM).await)?;
    ensure!(late.0 == Code::NOT_FOUND, "{late:?}");
    machine.delete("k", "", false).await?;
    let gone = code(machine.start("k", "").await)?;
    ensure!(gone.0 == Code::NOT_FOUND, "{gone:?}");
    Ok(())
}

pub async fn namespaces_are_its_own(machine: &Machine) -> Result<()> {
    let done = machine
        .sh("n", "hostname; echo $$; ls /proc | grep -c '^[0-9]'; ls /; cat /proc/self/cgroup")
        .await?;
    let lines: Vec<_> = done.stdout.lines().collect();
    ensure!(lines.first() == Some(&"box") && lines.get(1) == Some(&"1"), "{done:?}");
    ensure!(
        lines.get(2).is_some_and(|n| n.parse::<u32>().is_ok_and(|n| n <= 4)),
        "other processes are seen: {done:?}"
    );
    ensure!(!done.stdout.contains("init\n") && done.stdout.ends_with("0::/\n"), "{done:?}");
    Ok(())
}

pub async fn capabilities_are_the_named_ones(machine: &Machine) -> Result<()> {
    let change = json!({"process": {"noNewPrivileges": true, "capabilities": {
        "bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"],
        // Without being inheritable too it cannot be ambient, as in what `runc spec` writes.
        "ambient": ["CAP_CHOWN"]}}});
    let done = machine.run_patched("c", &["grep", "-E", "Cap|NoNew", "/proc/self/status"], change).await?;
    for line in [
        "CapInh:\t0000000000000000",
        "CapPrm:\t0000000000000001",
        "CapEff:\t0000000000000001",
        "CapBnd:\t0000000000000001",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
    ] {
        ensure!(done.stdout.contains(line), "{line} is missing in {done:?}");
    }
    Ok(())
}

pub async fn users_by_name(machine: &Machine) -> Result<()> {
    let change = json!({"process": {"user": {"username": "web"}}});
    let done = machine.run_patched("u", &["sh", "-c", "id; echo $HOME"], change).await?;
    let expected = "uid=1000(web) gid=1001(web) groups=1001(web),1005(media)\n/home/web\n";
    ensure!(done.stdout == expected, "{done:?}");
    let change = json!({"process": {"user": {"uid": 7, "gid": 8, "additionalGids": [9], "umask": 0o77}}});
    let done = machine.run_patched("u", &["sh", "-c", "id -u; id -g; id -G; umask"], change).await?;
    ensure!(done.stdout == "7\n8\n8 9\n0077\n", "{done:?}");
    let mut unknown = spec("u", &["true"]);
    unknown["process"]["user"] = json!({"username": "nobody-here"});
    let failed = machine.run_spec("u", &unknown, b"").await;
    ensure!(failed.is_err(), "an unknown user was taken: {failed:?}");
    let _ = machine.delete("u", "", true).await;
    Ok(())
}

pub async fn the_root_is_hardened(machine: &Machine) -> Result<()> {
    let script = "cat /proc/kcore | wc -c; echo 1 > /proc/sys/kernel/panic && echo wrote; touch /x && echo touched; \
        mount -t tmpfs none /tmp && echo mounted; ls /dev | tr '\\n' ' '; cat /dev/null; head -c 3 /dev/zero | wc -c";
    let done = machine.run_patched("r", &["sh", "-c", script], json!({"root": {"readonly": true}})).await?;
    ensure!(done.stdout.starts_with("0\n") && done.stdout.ends_with("3\n"), "{done:?}");
    ensure!(["wrote", "touched", "mounted"].iter().all(|word| !done.stdout.contains(word)), "{done:?}");
    for node in ["null", "zero", "full", "random", "urandom", "tty"] {
        ensure!(done.stdout.contains(node), "/dev/{node} is missing: {done:?}");
    }
    let done = machine.sh("r", "mknod /tmp/d b 254 0 && cat /tmp/d && echo read").await?;
    ensure!(!done.stdout.contains("read"), "a disk of the guest was read: {done:?}");
    Ok(())
}

pub async fn sysctls_and_limits(machine: &Machine) -> Result<()> {
    let change = json!({
        "linux": {"sysctl": {"kernel.msgmax": "4242"}},
        "process": {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}], "oomScoreAdj": 123},
    });
    let script = "cat /proc/sys/kernel/msgmax; ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj";
    let done = machine.run_patched("s", &["sh", "-c", script], change).await?;
    ensure!(done.stdout == "4242\n77\n99\n123\n", "{done:?}");
    Ok(())
}

/// One instruction of classic BPF, as `struct sock_filter` lies in memory.
fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> [u8; 8] {
    let (code, k) = (code.to_ne_bytes(), k.to_ne_bytes());
    [code[0], code[1], jt, jf, k[0], k[1], k[2], k[3]]
}

pub async fn a_seccomp_filter_holds(machine: &Machine) -> Result<()> {
    // if nr == mkdir { EPERM } else { allow }
    let filter = [
        instruction(0x20, 0, 0, 0),
        instruction(0x15, 0, 1, libc::SYS_mkdir as u32),
        instruction(0x06, 0, 0, 0x0005_0000 | libc::EPERM as u32),
        instruction(0x06, 0, 0, 0x7fff_0000),
    ]
    .concat();
    let (token, stdio) = piped();
    let request = api::CreateRequest {
        id: "f".into(),
        spec: spec("f", &["sh", "-c", "mkdir /tmp/x || echo refused"]).to_string().into_bytes(),
        storages: storages("f"),
        seccomp: filter,
        stdio: Some(stdio).into(),
        ..Default::default()
    };
    machine.create_with(request).await?;
    let mut stdout = machine.stream(token, Kind::Stdout).await?;
    let _others = (machine.stream(token, Kind::Stdin).await?, machine.stream(token, Kind::Stderr).await?);
    machine.start("f", "").await?;
    let mut text = String::new();
    stdout.read_to_string(&mut text).await?;
    machine.wait("f", "").await?;
    machine.delete("f", "", false).await?;
    ensure!(text == "refused\n", "{text:?}");
    Ok(())
}

pub async fn pids_are_limited(machine: &Machine) -> Result<()> {
    let change = json!({"linux": {"resources": {"pids": {"limit": 20}}}});
    let script = "i=0; while [ $i -lt 60 ]; do sleep 1000 & i=$((i+1)); done; echo all";
    let done = machine.run_patched("p", &["sh", "-c", script], change).await?;
    ensure!(!done.stdout.contains("all") && done.stderr.contains("fork"), "{done:?}");
    Ok(())
}

pub async fn memory_is_limited(machine: &Machine) -> Result<()> {
    let change = json!({"linux": {"resources": {"memory": {"limit": 16 << 20}}}});
    let done = machine.run_patched("m", &["sh", "-c", "tail /dev/zero"], change).await?;
    ensure!(done.oom && done.code == 137, "{done:?}");
    ensure!(machine.sh("m", "echo fine").await?.stdout == "fine\n", "the guest did not survive");
    // Whoever waits hears of a process that is killed beside the first, and of the end of the first.
    sleeper(machine, "w").await?;
    let limit = json!({ "memory": { "limit": 16 << 20 } }).to_string().into_bytes();
    let limit = api::UpdateRequest { id: "w".into(), resources: limit, ..Default::default() };
    machine.agent.update(context(), &limit).await?;
    let kills = async |seen| {
        let request = api::OomKillsRequest { id: "w".into(), seen, ..Default::default() };
        anyhow::Ok(machine.agent.oom_kills(context(), &request).await?.kills)
    };
    let greedy = process(&["tail", "/dev/zero"]);
    let (heard, done) = tokio::join!(kills(0), machine.exec("w", "x", &greedy, b""));
    ensure!(heard? == 1 && done?.oom, "no word of a killed process");
    let (heard, killed) = tokio::join!(kills(1), machine.kill("w", "", 9));
    killed?;
    ensure!(heard? == 1, "no word of the end");
    machine.wait("w", "").await?;
    machine.delete("w", "", false).await?;
    Ok(())
}

pub async fn input_ends_and_output_is_whole(machine: &Machine) -> Result<()> {
    let done = machine.run_spec("i", &spec("i", &["wc", "-c"]), &vec![b'x'; 3_000_000]).await?;
    ensure!(done.stdout.trim() == "3000000", "{done:?}");
    let done = machine.sh("i", "head -c 20000000 /dev/zero | tr '\\0' a; echo end >&2; exit 3").await?;
    ensure!(
        done.stdout.len() == 20_000_000 && done.stdout.bytes().all(|b| b == b'a'),
        "{} bytes",
        done.stdout.len()
    );
    ensure!(done.stderr == "end\n" && done.code == 3, "{:?}", done.stderr);
    Ok(())
}

pub async fn a_megabyte_of_arguments(machine: &Machine) -> Result<()> {
    let long = "a".repeat(100_000);
    let mut args = vec!["sh", "-c", "echo $# ${#10}", "sh"];
    args.extend([long.as_str(); 10]);
    let done = machine.run_spec("a", &spec("a", &args), b"").await?;
    ensure!(done.stdout == "10 100000\n", "{done:?}");
    Ok(())
}

pub async fn programs_that_cannot_run(machine: &Machine) -> Result<()> {
    for (program, expected, prefix) in [
        ("no-such-program", Code::NOT_FOUND, "not found:"),
        ("/bin/not-executable", Code::PERMISSION_DENIED, "not executable:"),
    ] {
        machine.create("x", &spec("x", &[program]), api::Stdio::default()).await?;
        let (code, message) = code(machine.start("x", "").await)?;
        ensure!(code == expected && message.starts_with(prefix), "{program}: {code:?} {message}");
        machine.delete("x", "", true).await?;
    }
    Ok(())
}

/// A container that sleeps until it is killed.
async fn sleeper(machine: &Machine, id: &str) -> Result<()> {
    machine.create(id, &spec(id, &["sleep", "1000"]), api::Stdio::default()).await?;
    machine.start(id, "").await?;
    Ok(())
}

pub async fn an_exec_joins_its_container(machine: &Machine) -> Result<()> {
    sleeper(machine, "j").await?;
    let done = machine
        .exec("j", "e1", &process(&["sh", "-c", "hostname; cat /proc/1/cmdline; cat; exit 5"]), b"in")
        .await?;
    ensure!(done.stdout == "box\nsleep\u{0}1000\u{0}in" && done.code == 5, "{done:?}");
    let request = api::PidsRequest { id: "j".into(), ..Default::default() };
    let pids = machine.agent.pids(context(), &request).await?;
    ensure!(pids.processes.len() == 1, "{pids:?}");
    let request = api::StatsRequest { id: "j".into(), ..Default::default() };
    let stats = machine.agent.stats(context(), &request).await?;
    ensure!(stats.memory_current > 0 && stats.pids_current == 1, "{stats:?}");
    machine.delete("j", "", true).await?;
    Ok(())
}

pub async fn a_stuck_reader_blocks_only_itself(machine: &Machine) -> Result<()> {
    sleeper(machine, "b").await?;
    let (token, stdio) = piped();
    machine.add("b", "stuck", &process(&["cat", "/dev/zero"]), stdio, false).await?;
    // Nobody reads this one.
    let _stuck = (
        machine.stream(token, Kind::Stdin).await?,
        machine.stream(token, Kind::Stdout).await?,
        machine.stream(token, Kind::Stderr).await?,
    );
    machine.start("b", "stuck").await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let hello = process(&["echo", "hello"]);
    let other = machine.exec("b", "other", &hello, b"");
    let done = tokio::time::timeout(Duration::from_secs(20), other)
        .await
        .context("an exec hangs behind a stuck one")??;
    ensure!(done.stdout == "hello\n", "{done:?}");
    machine.delete("b", "", true).await?;
    Ok(())
}

pub async fn a_terminal_is_one(machine: &Machine) -> Result<()> {
    let token = token();
    let request = api::CreateRequest {
        id: "y".into(),
        spec: spec("y", &["sh", "-c", "tty; stty size; read line; echo got $line; stty size"])
            .to_string()
            .into_bytes(),
        storages: storages("y"),
        terminal: true,
        width: 81,
        height: 25,
        stdio: Some(api::Stdio { token: token.to_string(), ..Default::default() }).into(),
        ..Default::default()
    };
    machine.create_with(request).await?;
    let mut tty = machine.stream(token, Kind::Tty).await?;
    machine.start("y", "").await?;
    let mut text = String::new();
    let mut bytes = [0; 4096];
    while !text.contains("25 81") {
        let n = tokio::time::timeout(Duration::from_secs(20), tty.read(&mut bytes)).await??;
        ensure!(n > 0, "the terminal ended after {text:?}");
        text += &String::from_utf8_lossy(&bytes[..n]);
    }
    let resize = api::ResizeRequest { id: "y".into(), width: 100, height: 30, ..Default::default() };
    machine.agent.resize(context(), &resize).await?;
    tty.write_all(b"typed\n").await?;
    tty.read_to_string(&mut text).await?;
    ensure!(text.starts_with("/dev/pts/0") || text.starts_with("/dev/console"), "{text:?}");
    ensure!(text.contains("got typed\r\n") && text.contains("30 100"), "{text:?}");
    ensure!(machine.wait("y", "").await?.exit_code == 0);
    machine.delete("y", "", false).await?;
    Ok(())
}

pub async fn pause_holds_everything(machine: &Machine) -> Result<()> {
    let mut counting = spec("h", &["sh", "-c", "while :; do :; done"]);
    counting["process"]["cwd"] = "/tmp".into();
    machine.create("h", &counting, api::Stdio::default()).await?;
    machine.start("h", "").await?;
    let usage = || async {
        let request = api::StatsRequest { id: "h".into(), ..Default::default() };
        anyhow::Ok(machine.agent.stats(context(), &request).await?.cpu_usage_us)
    };
    machine.agent.pause(context(), &api::PauseRequest { id: "h".into(), ..Default::default() }).await?;
    let before = usage().await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    ensure!(usage().await? == before, "it runs while it is paused");
    machine.agent.resume(context(), &api::ResumeRequest { id: "h".into(), ..Default::default() }).await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    ensure!(usage().await? > before, "it does not run again");
    machine.delete("h", "", true).await?;
    Ok(())
}

pub async fn copies_stay_in_the_root(machine: &Machine) -> Result<()> {
    sleeper(machine, "o").await?;
    // `escape` is a link to /../../../etc: the container's own.
    let request = api::StatRequest {
        id: "o".into(),
        path: "/escape/passwd".into(),
        follow: true,
        ..Default::default()
    };
    ensure!(machine.agent.stat(context(), &request).await?.size > 0);

    let token = token();
    let request = api::CopyRequest {
        id: "o".into(),
        path: "/escape/passwd".into(),
        direction: api::copy_request::Direction::OUT.into(),
        token: token.to_string(),
        ..Default::default()
    };
    let mut archive = Vec::new();
    let mut stream = machine.stream(token, Kind::Stdout).await?;
    let (copied, read) =
        tokio::join!(machine.agent.copy(context(), &request), stream.read_to_end(&mut archive));
    read?;
    ensure!(copied?.entries == 1);
    let mut archive = tar::Archive::new(archive.as_slice());
    let mut text = String::new();
    for entry in archive.entries()? {
        std::io::Read::read_to_string(&mut entry?, &mut text)?;
    }
    ensure!(text.contains("web:x:1000"), "the guest's own file came out: {text:?}");
    machine.delete("o", "", true).await?;
    Ok(())
}

pub async fn bad_specifications_are_refused(machine: &Machine) -> Result<()> {
    let changes: [(&str, Value); 6] = [
        ("root", json!({"root": {"path": "/"}})),
        ("args", json!({"process": {"args": []}})),
        ("capability", json!({"process": {"capabilities": {"bounding": ["CAP_NONSENSE"]}}})),
        ("limit", json!({"process": {"rlimits": [{"type": "RLIMIT_NONSENSE", "soft": 1, "hard": 1}]}})),
        ("apparmor", json!({"process": {"apparmorProfile": "x"}})),
        ("hooks", json!({"hooks": {"prestart": [{"path": "/bin/true"}]}})),
    ];
    for (what, change) in changes {
        let mut bad = spec("z", &["true"]);
        crate::process::patch(&mut bad, change);
        let refused = machine.create("z", &bad, api::Stdio::default()).await;
        ensure!(refused.is_err(), "{what} was taken");
        // Nothing is left of it: the same name can be used at once.
        ensure!(machine.sh("z", "echo fine").await?.stdout == "fine\n", "after {what}");
    }
    let garbage = api::CreateRequest { id: "z".into(), spec: vec![0xff; 1000], ..Default::default() };
    ensure!(code(machine.create_with(garbage).await)?.0 == Code::INVALID_ARGUMENT);
    let name = api::CreateRequest { id: "../z".into(), ..Default::default() };
    ensure!(code(machine.create_with(name).await)?.0 == Code::INVALID_ARGUMENT);
    Ok(())
}
