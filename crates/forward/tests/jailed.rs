//! The program as it runs beside a sandbox: in its jail, where a call that its filter does not know ends it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

use kapsel_jail::profiles;

#[test]
fn carries_both_kinds_from_within_its_jail() {
    let (tcp, udp) = (TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let guest_tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let guest_udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (tcp_at, udp_at) = (tcp.local_addr().unwrap(), udp.local_addr().unwrap());
    let mut child = profiles::forward(Path::new(env!("CARGO_BIN_EXE_kapsel-forward")), &"a".repeat(64))
        .unwrap()
        .arg(format!("tcp:3={}", guest_tcp.local_addr().unwrap()))
        .fd(tcp.into(), 3)
        .arg(format!("udp:4={}", guest_udp.local_addr().unwrap()))
        .fd(udp.into(), 4)
        .spawn()
        .unwrap();

    // Enough that each side has to wait for the other.
    let sent: Vec<u8> = (0..20_000_000_u32).map(|n| (n % 251) as u8).collect();
    let got = std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = guest_tcp.accept().unwrap();
            let mut echoed = Vec::new();
            stream.read_to_end(&mut echoed).unwrap();
            stream.write_all(&echoed).unwrap();
        });
        let mut client = TcpStream::connect(tcp_at).unwrap();
        client.write_all(&sent).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        got
    });
    assert!(got == sent, "{} bytes of {} came back whole", got.len(), sent.len());

    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut buffer = [0; 100];
    for socket in [&client, &guest_udp] {
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    }
    client.send_to(b"question", udp_at).unwrap();
    let (length, peer) = guest_udp.recv_from(&mut buffer).unwrap();
    guest_udp.send_to(&buffer[..length], peer).unwrap();
    let (length, _) = client.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"question");

    // Nobody is there any more: that is no reason to end.
    drop((guest_tcp, guest_udp));
    assert!(TcpStream::connect(tcp_at).unwrap().read(&mut [0]).is_err());
    client.send_to(b"question", udp_at).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "it lives");
}
