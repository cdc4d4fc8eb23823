//! Terminals that the engine holds the other end of.

use std::{
    fs::File,
    io::{IoSliceMut, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixListener},
    sync::mpsc,
    time::Duration,
};

use rustix::{
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags},
    termios::Winsize,
};
use serde_json::json;

use crate::world::{PATIENCE, reap, world};

/// Takes a terminal's master from whoever connects.
fn receive(listener: &UnixListener) -> OwnedFd {
    let (stream, _) = listener.accept().expect("a connection");
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    rustix::net::recvmsg(&stream, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::empty())
        .expect("a message");
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    fds.next().and_then(|mut fds| fds.next()).expect("a terminal")
}

/// Everything that comes from a terminal, in pieces.
fn reader(master: &File) -> mpsc::Receiver<String> {
    let mut master = master.try_clone().expect("a copy");
    let (sender, pieces) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        // EIO is the end of a terminal.
        while let Ok(count @ 1..) = master.read(&mut buffer) {
            let _ = sender.send(String::from_utf8_lossy(&buffer[..count]).into_owned());
        }
    });
    pieces
}

fn expect(pieces: &mpsc::Receiver<String>, words: &str) {
    let mut seen = String::new();
    while !seen.contains(words) {
        match pieces.recv_timeout(PATIENCE) {
            Ok(piece) => seen.push_str(&piece),
            Err(_) => panic!("no {words:?} in {seen:?}"),
        }
    }
}

fn resize(master: &File, columns: u16, rows: u16) {
    let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(master, size).expect("a size");
}

#[test]
fn a_container_and_an_added_process_have_terminals() {
    let world = world!();
    let engine = world.engine();
    // Process 1 gets only signals that it has set a trap for.
    let script =
        "trap 'exit 130' INT; tty; read line; echo got $line; stty size; while :; do sleep 0.1; done";
    let bundle = engine.bundle(script, |spec| spec["process"]["terminal"] = json!(true));
    let bundle = bundle.to_str().unwrap();
    let ran = engine.run(&["create", "--bundle", bundle, "terminal"]);
    assert!(ran.code != 0 && ran.stderr.contains("--console-socket"), "{}", ran.stderr);

    let socket = engine.dir.join("console.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let (socket, pid_file) = (socket.to_str().unwrap(), engine.dir.join("pid"));
    let create = [
        "create",
        "--bundle",
        bundle,
        "--console-socket",
        socket,
        "--pid-file",
        pid_file.to_str().unwrap(),
        "terminal",
    ];
    let master = std::thread::scope(|scope| {
        let master = scope.spawn(|| File::from(receive(&listener)));
        engine.ok(&create);
        master.join().unwrap()
    });
    let pid = engine.pid();
    let pieces = reader(&master);
    engine.ok(&["start", "terminal"]);
    expect(&pieces, "/dev/");
    resize(&master, 91, 33);
    // The size goes by another way than the line.
    std::thread::sleep(Duration::from_millis(500));
    (&master).write_all(b"hello\n").unwrap();
    expect(&pieces, "got hello");
    expect(&pieces, "33 91");

    let process = json!({
        "terminal": true, "user": { "uid": 0, "gid": 0 }, "args": ["sh", "-c", "tty && exit 8"], "cwd": "/",
        "env": ["PATH=/bin"],
    });
    let (file, exec_pid) = (engine.dir.join("process.json"), engine.dir.join("exec-pid"));
    std::fs::write(&file, process.to_string()).unwrap();
    let exec = [
        "exec",
        "--process",
        file.to_str().unwrap(),
        "--console-socket",
        socket,
        "--detach",
        "--pid-file",
        exec_pid.to_str().unwrap(),
        "terminal",
    ];
    let second = std::thread::scope(|scope| {
        let second = scope.spawn(|| File::from(receive(&listener)));
        engine.ok(&exec);
        second.join().unwrap()
    });
    expect(&reader(&second), "/dev/");
    assert_eq!(reap(std::fs::read_to_string(exec_pid).unwrap().parse().unwrap()), 8);

    // A key, as the guest's terminal understands it.
    (&master).write_all(b"\x03").unwrap();
    assert_eq!(reap(pid), 130);
}
