//! Throughput and latency of a session over a socket pair. Prints JSON.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use kapsel_channel::{Channel, GuestPort, connect};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const BULK: usize = 2 << 30;
const ROUNDS: u32 = 5000;

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let (host, guest) = std::os::unix::net::UnixStream::pair()?;
    host.set_nonblocking(true)?;
    guest.set_nonblocking(true)?;
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(serve(OwnedFd::from(guest)))
    });
    let host = connect(tokio::net::UnixStream::from_std(host)?, Duration::from_secs(5)).await?;

    let mut bulk = host.open(1).await?;
    let chunk = vec![0x5a; 64 * 1024];
    let begun = Instant::now();
    for _ in 0..BULK / chunk.len() {
        bulk.write_all(&chunk).await?;
    }
    bulk.shutdown().await?;
    assert_eq!(bulk.read_u64().await?, BULK as u64);
    let throughput = BULK as f64 / begun.elapsed().as_secs_f64() / 1e6;

    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let mut stream = host.open(2).await?;
        stream.write_all(b"question").await?;
        stream.shutdown().await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        times.push(begun.elapsed());
    }
    times.sort();
    let median = times[times.len() / 2].as_secs_f64() * 1e6;
    println!(
        "{{\"throughput_mb_per_s\": {throughput:.0}, \"open_ask_answer_close_us_median\": {median:.1}}}"
    );
    Ok(())
}

async fn serve(guest: OwnedFd) -> std::io::Result<()> {
    let session = GuestPort::from_file(guest.into())?.next_session().await?;
    loop {
        let (port, mut stream) = session.accept().await?;
        tokio::spawn(async move {
            let mut bytes = vec![0; 64 * 1024];
            let mut total = 0;
            loop {
                match stream.read(&mut bytes).await? {
                    0 => break,
                    n => total += n as u64,
                }
            }
            if port == 1 {
                stream.write_u64(total).await?;
            } else {
                stream.write_all(b"answer").await?;
            }
            stream.shutdown().await
        });
    }
}
