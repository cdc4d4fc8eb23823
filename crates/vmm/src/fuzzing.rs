//! Entry points for fuzzers. Each takes any bytes, and must return: no panic, no request for memory or time that the bytes
//! choose, and what was accepted must hold what the rest of the monitor relies on.
//!
//! The tests run each over a checked-in corpus and a bounded number of its mutations, always the same ones;
//! `KAPSEL_FUZZ_SECONDS` makes them go on for so long, from a seed of the time of day that they print. Devices' queues and
//! packets, and the answers of vhost-user back ends, have such runs in their own crate.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use kapsel_devices::mmio::{Slot, Transport};
use kapsel_devices::net::metadata::{Metadata, Service};
use kapsel_devices::rate::Limits;
use kapsel_devices::state::Reader;
use kapsel_devices::{Memory, balloon, block, mem, rng};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::api::http::{self, Message, Progress};
use crate::api::request;
use crate::config::Config;
use crate::console::Console;
use crate::kernel::{self, Initrd};
use crate::keyboard::Keyboard;
use crate::mmds;
use crate::serial::Output;
use crate::snapshot::{self, Saved, format::State};
use crate::x86::boot;
use crate::x86::state::{MachineState, ProcessorState};

/// A file in memory, for code that opens paths.
struct MemoryFile(File);

impl MemoryFile {
    fn new(data: &[u8]) -> io::Result<Self> {
        let mut file = File::from(rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC)?);
        file.write_all(data)?;
        Ok(MemoryFile(file))
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

/// What a client of the API sends: the requests must be the same however the stream is cut into pieces.
pub fn fuzz_requests(data: &[u8]) {
    let whole = messages(data, data.len().max(1));
    for piece in [1, 7, 64] {
        assert_eq!(whole, messages(data, piece), "in pieces of {piece} bytes");
    }
    for message in whole {
        assert!(message.body.len() <= http::BODY_MAX);
        let _ = request::parse(&message.method, &message.path, &message.body);
        let _ = serde_json::from_slice::<snapshot::Load>(&message.body);
        let Ok(config) = Config::parse(&message.body) else { continue };
        let again = serde_json::to_vec(&config).unwrap_or_default();
        let again = Config::parse(&again).expect("what was written can be read");
        let without_settings = Config { logger: None, metrics: None, ..config };
        assert_eq!(again, without_settings, "a snapshot has the machine's configuration");
    }
}

/// The requests in a stream that comes in pieces, until its first error.
fn messages(data: &[u8], piece: usize) -> Vec<Message> {
    let (mut received, mut messages) = (Vec::new(), Vec::new());
    for piece in data.chunks(piece) {
        received.extend_from_slice(piece);
        loop {
            match http::parse(&received, http::BODY_MAX) {
                Ok(Progress::Incomplete { .. }) => break,
                Ok(Progress::Complete(message, used)) => {
                    received.drain(..used);
                    messages.push(message);
                }
                Err(_) => return messages,
            }
        }
    }
    messages
}

/// A kernel's file, ELF or bzImage: it is refused, or it is in the guest's memory and can be told where everything is.
pub fn fuzz_kernel(data: &[u8]) {
    const SIZE: usize = 4 << 20;
    let Ok(file) = MemoryFile::new(data) else { return };
    let Ok(memory) = Memory::from_ranges(&[(GuestAddress(0), SIZE)]) else { return };
    if let Ok(kernel) = kernel::load(&memory, &file.path()) {
        assert!(kernel.end <= SIZE as u64 && memory.address_in_range(kernel.entry));
        if let Ok(initrd) = kernel::load_initrd(&memory, &kernel, &file.path()) {
            let Initrd { address, size } = initrd;
            assert!(address >= kernel.end && address + size <= SIZE as u64);
            let _ = boot::describe(&memory, &kernel, Some(initrd), "console=ttyS0");
        }
        let _ = boot::describe(&memory, &kernel, None, "");
    }
}

/// A snapshot's state file. Everything is read and all that needs no KVM is taken up, and then used as a guest would.
pub fn fuzz_state(data: &[u8]) {
    let Ok(state) = State::parse(data.to_vec()) else { return };
    let Ok(mut saved) = Saved::find(&state) else { return };
    let _ = MachineState::read(saved.machine);
    for cpu in saved.cpus {
        let _ = ProcessorState::read(cpu);
    }
    let Ok((memory, disk)) = parts() else { return };
    let line = || EventFd::new(EFD_NONBLOCK).expect("the host has descriptors");
    if let Ok(mut console) = Console::restored(line(), line(), Output::nowhere(), saved.console) {
        console.input(b"x");
        for register in 0..8 {
            let value = console.read(register);
            console.write(register, value);
        }
    }
    let mut keyboard = Keyboard::new(line());
    if keyboard.restore(saved.keyboard).is_ok() {
        keyboard.press_ctrl_alt_del();
        while keyboard.status() & 1 != 0 {
            keyboard.data();
        }
    }
    for mut device in devices(&memory, &disk) {
        let Ok(section) = saved.devices.take("device") else { return };
        let mut reader = Reader::new(section);
        if device.restore(&mut reader).is_ok() {
            (0..device.queue_events().len()).for_each(|queue| device.notify(queue));
            (0..device.sources().len()).for_each(|source| device.source(source));
        }
    }
}

fn parts() -> io::Result<(Memory, MemoryFile)> {
    let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).map_err(io::Error::other)?;
    Ok((memory, MemoryFile::new(&[7; 4096])?))
}

/// A host that always has more memory.
struct Generous;

impl mem::Host for Generous {
    fn give(&mut self, _: usize, _: bool) -> io::Result<()> {
        Ok(())
    }
}

/// The devices of the machine that the corpus has.
fn devices(memory: &Memory, disk: &MemoryFile) -> Vec<Box<dyn Slot>> {
    let line = || EventFd::new(EFD_NONBLOCK).expect("the host has descriptors");
    let disk = block::Config {
        serial: "disk".into(),
        path: disk.path(),
        read_only: false,
        flush: true,
        limits: Default::default(),
    };
    let balloon = balloon::Config {
        mib: 1,
        deflate_on_oom: true,
        reporting: true,
        statistics: std::time::Duration::from_secs(1),
    };
    let disk = block::Block::new(disk).expect("the disk is there");
    let balloon = balloon::Balloon::new(balloon).expect("the host has descriptors");
    let region = mem::Config { address: 0x8_0000, size: 0x8_0000, block: 0x1000, slot: 0x1_0000 };
    let region = mem::Mem::new(region, Box::new(Generous));
    let no_descriptors = "the host has descriptors";
    vec![
        Box::new(Transport::new(disk, memory.clone(), line()).expect(no_descriptors)),
        Box::new(Transport::new(balloon, memory.clone(), line()).expect(no_descriptors)),
        Box::new(Transport::new(region, memory.clone(), line()).expect(no_descriptors)),
        Box::new(
            Transport::new(rng::Rng::new(Limits::default()).expect(no_descriptors), memory.clone(), line())
                .expect(no_descriptors),
        ),
    ]
}

/// What a guest sends to the metadata service: frames, each after its length in two bytes. Neither many nor odd ones
/// may make it grow.
pub fn fuzz_metadata(data: &[u8]) {
    let Ok(store) = metadata() else { return };
    let mut service = Metadata::new(mmds::DEFAULT_ADDRESS, Arc::new(Mutex::new(store)));
    let mut rest = data;
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let (frame, after) = after.split_at(after.len().min(u16::from_le_bytes(*length).into()));
        service.accept(frame.to_vec());
        rest = after;
    }
    let waiting = std::iter::from_fn(|| service.next_frame()).take(10_000).count();
    assert!(waiting < 10_000, "it talks without end");
}

/// What a guest asks the metadata service.
pub fn fuzz_metadata_requests(data: &[u8]) {
    let Ok(mut store) = metadata() else { return };
    let mut rest = data;
    while let Some(answer) = store.answer(rest) {
        assert!((1..=rest.len()).contains(&answer.used) && answer.bytes.len() < 4096 + data.len());
        rest = &rest[answer.used..];
        if answer.last {
            break;
        }
    }
}

fn metadata() -> io::Result<mmds::Store> {
    let mut store = mmds::Store::new(1024)?;
    let document = serde_json::json!({"name": {"first": "John"}, "age": 43, "list": [1, {"a": "b"}]});
    store.put(document).map_err(io::Error::other)?;
    Ok(store)
}

#[cfg(test)]
mod tests {
    use kapsel_devices::mmio::register;
    use kapsel_devices::state::Writer;
    use kapsel_testkit::fuzz::corpus;

    use super::*;
    use crate::snapshot::format::{Sections, seal};

    fn run(name: &str, words: &[&[u8]], target: fn(&[u8]), finish: fn(&mut Vec<u8>)) {
        kapsel_testkit::fuzz::run(env!("CARGO_MANIFEST_DIR"), name, words, target, finish);
    }

    #[test]
    fn requests() {
        let words: [&[u8]; 9] = [
            b"\r\n\r\n",
            b"Content-Length: 3\r\n",
            b"PUT /",
            b"18446744073709551615",
            b"{\"",
            b"null",
            b"-1",
            b"\\ud800",
            b"[[[[[[[[[[[[[[[[",
        ];
        run("requests", &words, fuzz_requests, |_| {});
    }

    #[test]
    fn metadata() {
        let words: [&[u8]; 6] = [
            &[169, 254, 169, 254],
            &[8, 0, 0x45, 0],
            &[0, 80, 0x50, 2],
            &[8, 6, 0, 1],
            &[0x50, 0x11],
            &[0x50, 0x04],
        ];
        run("metadata", &words, fuzz_metadata, |_| {});
        let words: [&[u8]; 7] = [
            b"\r\n\r\n",
            b"Content-Length: 3\r\n",
            b"X-metadata-token-ttl-seconds: 60\r\n",
            b"X-metadata-token: ",
            b"PUT /latest/api/token HTTP/1.1\r\n",
            b"http://",
            b"//~1~0",
        ];
        run("metadata-requests", &words, fuzz_metadata_requests, |_| {});
    }

    #[test]
    fn kernels() {
        run("kernel", &[b"\x7fELF", b"HdrS", b"Xen\0", &[0, 0, 0x10, 0]], fuzz_kernel, |_| {});
    }

    #[test]
    fn states() {
        run("state", &[b"device\0\0", b"cpu\0\0\0\0\0", b"{}"], fuzz_state, seal);
    }

    /// Otherwise mutations of it are refused for other reasons than those that they were made for. The file is what
    /// [`state`] gives; when the format changes, write it again.
    #[test]
    fn the_corpus_has_a_state_that_is_taken_up() {
        let corpus = corpus(env!("CARGO_MANIFEST_DIR"), "state");
        if !corpus.contains(&state()) {
            let today = std::env::temp_dir().join("kapsel-fuzz-corpus-state");
            std::fs::write(&today, state()).unwrap();
            panic!("the corpus has another state than would be saved today: {}", today.display());
        }
        let state = State::parse(state()).unwrap();
        let mut saved = Saved::find(&state).unwrap();
        MachineState::read(saved.machine).unwrap();
        ProcessorState::read(saved.cpus[0]).unwrap();
        let (memory, disk) = parts().unwrap();
        for mut device in devices(&memory, &disk) {
            device.restore(&mut Reader::new(saved.devices.take("device").unwrap())).unwrap();
        }
        saved.devices.finish().unwrap();
    }

    fn state() -> Vec<u8> {
        use kvm_bindings::*;
        let (memory, disk) = parts().unwrap();
        let mut sections = Sections::default();
        sections.add("config", &serde_json::to_vec(&Config::default()).unwrap());
        let mut machine = vec![0; size_of::<kvm_clock_data>()];
        for chip in 0..3u32 {
            machine.extend(chip.to_le_bytes());
            machine.resize(machine.len() + size_of::<kvm_irqchip>() - 4, 0);
        }
        sections.add("machine", &machine);
        let mut cpu = Writer::default();
        cpu.u32(1);
        cpu.raw(&[0; size_of::<kvm_cpuid_entry2>()]);
        cpu.u32(1_000_000);
        for size in [
            size_of::<kvm_mp_state>(),
            size_of::<kvm_regs>(),
            size_of::<kvm_sregs>(),
            size_of::<kvm_xsave>(),
            size_of::<kvm_xcrs>(),
            size_of::<kvm_debugregs>(),
            size_of::<kvm_lapic_state>(),
        ] {
            cpu.raw(&vec![0; size]);
        }
        cpu.u32(1);
        cpu.raw(&[0; size_of::<kvm_msr_entry>()]);
        cpu.raw(&[0; size_of::<kvm_vcpu_events>()]);
        sections.add("cpu", &cpu.finish());
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        sections.add("console", &Console::new(event(), event(), Output::nowhere()).save());
        sections.add("keyboard", &Keyboard::new(event()).save());
        for mut device in devices(&memory, &disk) {
            bring_up(device.as_mut());
            let mut writer = Writer::default();
            device.save(&mut writer);
            sections.add("device", &writer.finish());
        }
        sections.finish()
    }

    /// What a driver does (virtio 1.2, section 3.1), with queues at the beginning of memory.
    fn bring_up(device: &mut dyn Slot) {
        let mut write = |offset, value: u32| device.write(offset, &value.to_le_bytes());
        (0..2).for_each(|status| write(register::STATUS, status * 2 + 1));
        // Nothing but VERSION_1.
        write(register::DRIVER_FEATURES_SEL, 1);
        write(register::DRIVER_FEATURES, 1);
        write(register::STATUS, 11);
        for queue in 0..4 {
            write(register::QUEUE_SEL, queue);
            write(register::QUEUE_NUM, 16);
            write(register::QUEUE_DESC_LOW, queue * 0x1000);
            write(register::QUEUE_DRIVER_LOW, queue * 0x1000 + 0x400);
            write(register::QUEUE_DEVICE_LOW, queue * 0x1000 + 0x800);
            write(register::QUEUE_READY, 1);
        }
        write(register::STATUS, 15);
        let mut status = [0; 4];
        device.read(register::STATUS, &mut status);
        assert_eq!(status, [15, 0, 0, 0]);
    }
}
