//! The guest's side: tries what the machine gives it and says on the console what came of it.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Makes this binary the guest's program.
pub const ARGUMENT: &str = "--guest";
/// Said when everything was as it should be.
pub const DONE: &str = "the guest is content";
/// Said when the guest reads its console.
pub const READY: &str = "the guest listens";
/// Said again and again by a guest that waits for its disk to grow.
pub const TICK: &str = "tick";
/// The size that the disk grows to.
pub const LARGE_SECTORS: usize = 128;
/// Said when the guest knows that it is another machine.
pub const FORKED: &str = "forked after tick";
/// The memory of a guest that is saved.
pub const MEMORY_MIB: usize = 256;
/// How much a guest that is saved writes with each tick.
const JOURNAL: usize = 2 << 20;
/// The size of a disk that is limited.
pub const SLOW_SECTORS: usize = 1024;
/// What the guest with services reads of the entropy device, which has to wait for most of it.
pub const RANDOM_BYTES: usize = 256;
/// Said with the number of milliseconds that reading it took.
pub const SLOW: &str = "the slow disk took";
/// The guest's network card.
pub const GUEST_MAC: &str = "06:00:ac:10:00:02";
/// The guest's address.
pub const GUEST_ADDRESS: &str = "172.16.0.2";
/// The host's.
pub const HOST_ADDRESS: &str = "172.16.0.1";
/// What the guest reads about itself, so many times: more than fits in the service's window.
pub const METADATA: &str = "something about the guest; ";
pub const METADATA_TIMES: usize = 1500;
/// Where it reads that.
const METADATA_ADDRESS: &str = "169.254.169.254";
/// Where the host echoes.
pub const NETWORK_PORT: u16 = 7;
/// How much goes to the host and back.
pub const STREAM: usize = 8 << 20;
/// How much memory is plugged while the guest runs.
pub const PLUGGED_MIB: usize = 128;
/// Said when the guest uses memory that it did not have before.
pub const FILLED: &str = "filled";
/// Said when it does not any more.
pub const FREED: &str = "freed";
/// How much memory the guest uses for a moment.
pub const FREED_MIB: usize = 96;
/// How much memory the balloon takes.
pub const BALLOON_MIB: usize = 32;
/// Where the host listens.
pub const HOST_PORT: u32 = 1024;
/// Where the guest listens.
pub const GUEST_PORT: u32 = 5000;
/// What is typed on the console: longer than the serial port's buffer of 64 bytes, so that the guest has to make room.
pub const LINE: &str = "a line that is longer than the sixty-four bytes that the serial port keeps for the guest until it reads them";

const ECHO: usize = 1 << 20;
const HOST_CID: u32 = 2;

/// Bytes that are at no place the same as at the next sector's.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(byte).collect()
}

fn byte(n: usize) -> u8 {
    (n * 7 + n / 512 * 3) as u8
}

/// The kernel's command line for a task.
pub fn arguments(task: &str) -> String {
    format!("console=ttyS0 quiet reboot=k panic=-1 mitigations=off rdinit=/init task={task}")
}

/// Does what the kernel's command line asks for, and ends the machine.
pub fn main() -> ! {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let task = line.split_whitespace().find_map(|word| word.strip_prefix("task=")).unwrap_or_default();
    let (result, end) = match task {
        "devices" => (devices(), libc::RB_POWER_OFF),
        "ticks" => (ticks(), libc::RB_POWER_OFF),
        "services" => (services(), libc::RB_POWER_OFF),
        "clone" => (clone(), libc::RB_POWER_OFF),
        "processor" => (processor(), libc::RB_POWER_OFF),
        "served" => (served(), libc::RB_POWER_OFF),
        "memory" => (memory(), libc::RB_POWER_OFF),
        "network" => (network(), libc::RB_POWER_OFF),
        "console" => (console(), libc::RB_AUTOBOOT),
        _ => (Err(io::Error::other("there is no such task")), libc::RB_POWER_OFF),
    };
    match result {
        Ok(()) => println!("{DONE}"),
        Err(error) => println!("the guest failed: {error}"),
    }
    // What the serial port has not sent yet would be lost with the machine.
    // SAFETY: the call has no pointers.
    unsafe { libc::tcdrain(libc::STDOUT_FILENO) };
    // SAFETY: the call ends the machine and does not return; nothing is to be written any more.
    unsafe { libc::reboot(end) };
    std::process::exit(1)
}

fn check(condition: bool, what: &str) -> io::Result<()> {
    if condition { Ok(()) } else { Err(io::Error::other(what.to_owned())) }
}

/// One without the flag that its template takes away.
fn processor() -> io::Result<()> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let flags = text.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|other| other == flag);
    check(has("fpu") && has("sse2") && !has("rdrand"), "the processor has all flags but one")
}

fn devices() -> io::Result<()> {
    let processors = fs::read_to_string("/proc/cpuinfo")?.matches("processor\t").count();
    check(processors == 2, "there are two processors")?;
    let timers = fs::read_to_string("/proc/timer_list")?;
    check(
        !timers.contains("tick_handle_periodic"),
        "a processor with nothing to do sleeps through its ticks",
    )?;
    disks()?;
    let source = fs::read_to_string("/sys/class/misc/hw_random/rng_current")?;
    check(source.trim() == "virtio_rng.0", "the entropy device is in use")?;
    let mut random = [0; 32];
    fs::File::open("/dev/hwrng")?.read_exact(&mut random)?;
    check(random.iter().any(|byte| *byte != random[0]), "the entropy device gives different bytes")?;
    // The host may call before the guest calls it.
    let listener = listen(GUEST_PORT)?;
    call_host()?;
    answer(&listener)
}

fn disks() -> io::Result<()> {
    let attribute =
        |name: &str| fs::read_to_string(format!("/sys/block/{name}")).map(|text| text.trim().to_owned());
    check(
        attribute("vda/serial")? == "first" && attribute("vdb/serial")? == "second",
        "disks have their names",
    )?;
    check(attribute("vda/ro")? == "1" && attribute("vdb/ro")? == "0", "the first disk is read-only")?;
    check(attribute("vdb/size")? == "64", "the second disk has its size")?;
    check(attribute("vda/queue/write_cache")? == "write through", "the first disk does not flush")?;
    check(attribute("vdb/queue/write_cache")? == "write back", "the second disk does")?;
    check(fs::read("/dev/vda")? == pattern(8 * 512), "the first disk has its contents")?;

    let mut disk = fs::File::options().read(true).write(true).open("/dev/vdb")?;
    disk.write_all(&pattern(4 * 512))?;
    disk.sync_all()?;
    let range: [u64; 2] = [16 * 512, 8 * 512];
    const BLKZEROOUT: libc::Ioctl = 0x127f;
    // SAFETY: the request reads two 64-bit numbers, which `range` has.
    check(unsafe { libc::ioctl(disk.as_raw_fd(), BLKZEROOUT, &range) } == 0, "a range can be zeroed")?;
    disk.sync_all()?;
    disk.seek(SeekFrom::Start(0))?;
    let mut read = vec![0; 4 * 512];
    disk.read_exact(&mut read)?;
    check(read == pattern(4 * 512), "what was written is read again")
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: the structure is integers only, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn socket() -> io::Result<fs::File> {
    // SAFETY: the call has no pointers; the descriptor that it gives is owned by nobody else.
    let descriptor = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }.into())
}

fn ok(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn listen(port: u32) -> io::Result<fs::File> {
    let (socket, address) = (socket()?, address(libc::VMADDR_CID_ANY, port));
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address and its length belong together.
    ok(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    // SAFETY: there is no pointer.
    ok(unsafe { libc::listen(socket.as_raw_fd(), 4) })?;
    Ok(socket)
}

fn stop_sending(socket: &fs::File) -> io::Result<()> {
    // SAFETY: there is no pointer.
    ok(unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_WR) })
}

/// Sends more than all buffers hold while the host sends it back.
/// A connection to a port of the host.
fn connect(port: u32) -> io::Result<fs::File> {
    let (socket, address) = (socket()?, address(HOST_CID, port));
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address and its length belong together.
    ok(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

fn call_host() -> io::Result<()> {
    let mut socket = connect(HOST_PORT)?;
    let mut reader = socket.try_clone()?;
    let echo = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map(|_| bytes)
    });
    socket.write_all(&pattern(ECHO))?;
    stop_sending(&socket)?;
    let bytes = echo.join().map_err(|_| io::Error::other("the reader panicked"))??;
    check(bytes == pattern(ECHO), "the host sends back what it was sent")
}

fn answer(listener: &fs::File) -> io::Result<()> {
    // SAFETY: no address is wanted; the descriptor is owned by nobody else.
    let descriptor =
        unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
    check(descriptor >= 0, "the host calls")?;
    // SAFETY: as above.
    let mut socket: fs::File = unsafe { OwnedFd::from_raw_fd(descriptor) }.into();
    let mut question = String::new();
    socket.read_to_string(&mut question)?;
    check(question == "ping", "the host says ping")?;
    socket.write_all(b"pong")?;
    stop_sending(&socket)?;
    // The answer is on its way when the host has closed as well.
    let _ = socket.read(&mut [0]);
    Ok(())
}

fn memory_mib() -> io::Result<usize> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    total
        .and_then(|kib| kib.parse::<usize>().ok())
        .map(|kib| kib / 1024)
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn wait() {
    println!("{TICK}");
    std::thread::sleep(std::time::Duration::from_millis(100));
}

/// Fills more memory than it had at first, and frees it when it is another machine.
fn memory() -> io::Result<()> {
    let before = memory_mib()?;
    while memory_mib()? < before + PLUGGED_MIB {
        wait();
    }
    let content = std::hint::black_box(pattern((before + PLUGGED_MIB / 4) << 20));
    println!("{FILLED}");
    let mut kernel = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
    let mut record = [0; 1024];
    loop {
        match kernel.read(&mut record) {
            Ok(length) if String::from_utf8_lossy(&record[..length]).contains("virtual machine fork") => {
                break;
            }
            Ok(_) => {}
            Err(_) => wait(),
        }
    }
    // There is no room for another one.
    let same = content.iter().enumerate().all(|(n, found)| *found == byte(n));
    check(same, "plugged memory has what was written to it")?;
    drop(std::hint::black_box(content));
    println!("{FREED}");
    while memory_mib()? > before + PLUGGED_MIB / 4 {
        wait();
    }
    Ok(())
}

/// Ticks until the disk has grown and the balloon has taken memory away.
fn ticks() -> io::Result<()> {
    let before = memory_mib()?;
    // Touched and free again, to be reported to the host.
    drop(std::hint::black_box(vec![1u8; FREED_MIB << 20]));
    let size = || fs::read_to_string("/sys/block/vda/size").map(|size| size.trim().to_owned());
    while size()? != LARGE_SECTORS.to_string() || before.saturating_sub(memory_mib()?) < BALLOON_MIB {
        println!("{TICK}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let content = fs::read("/dev/vda")?;
    check(content.len() == LARGE_SECTORS * 512, "the disk has its new size")?;
    check(content[64 * 512..].iter().all(|byte| *byte == 2), "the disk has its new contents")
}

/// Writes to a disk, ticks until it has grown, and then for good.
fn served() -> io::Result<()> {
    let size = || fs::read_to_string("/sys/block/vda/size").map(|size| size.trim().to_owned());
    check(size()? == "64", "the disk has its size")?;
    check(fs::read_to_string("/sys/block/vda/ro")?.trim() == "0", "the disk can be written to")?;
    let mut disk = fs::File::options().read(true).write(true).open("/dev/vda")?;
    disk.write_all(&pattern(4 * 512))?;
    disk.sync_all()?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    check(fs::read("/dev/vda")?[..4 * 512] == pattern(4 * 512), "what was written is read again")?;
    while size()? != LARGE_SECTORS.to_string() {
        println!("{TICK}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    check(
        fs::read("/dev/vda")?[64 * 512..] == [2; (LARGE_SECTORS - 64) * 512],
        "the disk has its new contents",
    )?;
    println!("{READY}");
    loop {
        println!("{TICK}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Ticks until the kernel says that this is another machine now, which must still have what the first one had.
fn clone() -> io::Result<()> {
    let secret = {
        let mut bytes = [0; 4096];
        fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        bytes
    };
    let memory = secret.to_vec();
    let (mut journal, mut entry) = (vec![0; JOURNAL], 0);
    let mut kernel = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
    let mut connection = connect(HOST_PORT)?;
    for tick in 0.. {
        // The machine may be another one since the last tick. Zeroes are a change, too.
        check(journal.iter().all(|byte| *byte == entry), "what was written last is there")?;
        entry = if tick % 2 == 0 { 0 } else { tick as u8 };
        std::hint::black_box(&mut journal).fill(entry);
        println!("{TICK} {tick}");
        let mut record = [0; 1024];
        while let Ok(length) = kernel.read(&mut record) {
            if String::from_utf8_lossy(&record[..length]).contains("virtual machine fork") {
                println!("{FORKED} {tick}");
                check(memory == secret, "memory is as it was")?;
                return after_fork(&mut connection);
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Ok(())
}

fn after_fork(connection: &mut fs::File) -> io::Result<()> {
    check(
        connection.read(&mut [0]).is_ok_and(|length| length == 0) || connection.write(b"x").is_err(),
        "the connection is gone",
    )?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    check(fs::read("/dev/vda")? == pattern(8 * 512), "the disk is as it was")?;
    fs::File::open("/dev/hwrng")?.read_exact(&mut [0; 16])?;
    let processors = fs::read_to_string("/proc/cpuinfo")?.matches("processor\t").count();
    check(processors == 2, "there are two processors")?;
    let timers = fs::read_to_string("/proc/timer_list")?;
    check(
        !timers.contains("tick_handle_periodic"),
        "a processor with nothing to do sleeps through its ticks",
    )?;
    for cpu in 0..2 {
        let command = format!("taskset {} true", 1 << cpu);
        check(
            std::process::Command::new("/bin/sh").args(["-c", &command]).status()?.success(),
            "each processor runs",
        )?;
    }
    call_host()
}

/// Reads a slow disk, says that it has booted, and waits for somebody to press Ctrl, Alt and Del.
fn services() -> io::Result<()> {
    let started = std::time::Instant::now();
    check(fs::read("/dev/vda")?.len() == SLOW_SECTORS * 512, "the disk has its size")?;
    println!("{SLOW} {}", started.elapsed().as_millis());
    fs::File::open("/dev/hwrng")?.read_exact(&mut [0; RANDOM_BYTES])?;
    say_booted()?;
    loop {
        println!("{TICK}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

fn say_booted() -> io::Result<()> {
    let memory = fs::File::options().read(true).write(true).open("/dev/mem")?;
    let (protection, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: a new mapping at an address that the kernel chooses.
    let page = unsafe {
        libc::mmap(std::ptr::null_mut(), 4096, protection, shared, memory.as_raw_fd(), 0xc000_0000)
    };
    check(page != libc::MAP_FAILED, "the boot timer is mapped")?;
    // SAFETY: the mapping is a page long and lives as long as the process.
    unsafe { page.cast::<u8>().write_volatile(123) };
    Ok(())
}

/// Sends a stream through the host and back, with a cable that is then cut.
fn network() -> io::Result<()> {
    let attribute = |name: &str| fs::read_to_string(format!("/sys/class/net/eth0/{name}"));
    check(attribute("address")?.trim() == GUEST_MAC, "the card has its address")?;
    check(attribute("mtu")?.trim() == "1400", "the card has its mtu")?;
    let run = |command: &str| std::process::Command::new("/bin/sh").args(["-c", command]).status();
    check(
        run(&format!("ip addr add {GUEST_ADDRESS}/24 dev eth0 && ip link set eth0 up"))?.success(),
        "the card is up",
    )?;
    check(run(&format!("ip route add {METADATA_ADDRESS} dev eth0"))?.success(), "there is a route")?;
    metadata()?;

    let mut stream = std::net::TcpStream::connect((HOST_ADDRESS, NETWORK_PORT))?;
    let mut reader = stream.try_clone()?;
    let echo = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map(|_| bytes)
    });
    stream.write_all(&pattern(STREAM))?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let bytes = echo.join().map_err(|_| io::Error::other("the reader panicked"))??;
    check(bytes == pattern(STREAM), "the stream comes back as it was")?;

    println!("{READY}");
    // The host cuts the cable meanwhile, and says when it is satisfied; what is sent then is lost, and nothing else happens.
    let told = std::thread::spawn(|| io::stdin().read_line(&mut String::new()));
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    for _ in 0..1200 {
        if told.is_finished() {
            break;
        }
        let _ = socket.send_to(b"hello", (HOST_ADDRESS, NETWORK_PORT));
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    Ok(())
}

/// Nobody reads without a token, and the one that a connection got is good on another.
fn metadata() -> io::Result<()> {
    let ask = |stream: &mut std::net::TcpStream, request: &str| -> io::Result<String> {
        write!(stream, "{request}\r\n\r\n")?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(0);
            let last = answer.len() - 1;
            stream.read_exact(&mut answer[last..])?;
        }
        let head = String::from_utf8_lossy(&answer).into_owned();
        let length =
            head.split("Content-Length: ").nth(1).and_then(|rest| rest.split('\r').next()?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut body)?;
        Ok(head + &String::from_utf8_lossy(&body))
    };
    let mut first = std::net::TcpStream::connect((METADATA_ADDRESS, 80))?;
    let refused = ask(&mut first, "GET /long HTTP/1.1")?;
    check(refused.starts_with("HTTP/1.1 401 "), "nobody reads without a token")?;
    let answer = ask(&mut first, "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60")?;
    let token = answer.lines().last().unwrap_or_default();
    let mut second = std::net::TcpStream::connect((METADATA_ADDRESS, 80))?;
    let read = ask(&mut second, &format!("GET /long HTTP/1.1\r\nX-metadata-token: {token}"))?;
    check(read.ends_with(&METADATA.repeat(METADATA_TIMES)), "the metadata are whole")?;
    let refused = std::net::TcpStream::connect((METADATA_ADDRESS, 81));
    check(refused.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused), "no other port is open")
}

fn console() -> io::Result<()> {
    println!("{READY}");
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    check(line.trim_end() == LINE, &format!("the console gave {line:?}"))
}
