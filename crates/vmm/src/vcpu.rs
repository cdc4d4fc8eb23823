//! Processors: one thread each, which runs the guest's code until somebody wants it to wait.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;
use vmm_sys_util::signal::{Killable, SIGRTMIN, block_signal, clear_signal};

use crate::bus::{Bus, End, lock};
use crate::confine::Filter;

/// What is wanted of all processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Wait,
    Run,
    End,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    waiting: usize,
}

/// Holds all processors or lets them go.
#[derive(Debug)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// Waits until the processor may run; false when it has to end.
    fn pass(&self) -> bool {
        let mut state = lock(&self.state);
        if state.wanted == Wanted::Wait {
            state.waiting += 1;
            self.changed.notify_all();
            while state.wanted == Wanted::Wait {
                state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            state.waiting -= 1;
        }
        state.wanted == Wanted::Run
    }
}

/// All processors of a machine.
pub struct Processors {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl Processors {
    /// Starts a thread for each processor, confined by `filter`. They wait until [`Processors::resume`].
    ///
    /// # Errors
    /// When the host has no more threads or KVM does not take the signal mask.
    pub fn start(vcpus: Vec<VcpuFd>, bus: &Arc<Bus>, filter: &Filter) -> io::Result<Self> {
        let gate = Arc::new(Gate {
            state: Mutex::new(State { wanted: Wanted::Wait, waiting: 0 }),
            changed: Condvar::new(),
        });
        let mut processors = Processors { gate, threads: Vec::new() };
        // Threads inherit it, so there is no moment at which a kick would end the process.
        block_signal(kick()).map_err(|e| io::Error::other(e.to_string()))?;
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            open_to_kicks(&vcpu)?;
            let (gate, bus, filter) = (processors.gate.clone(), bus.clone(), filter.clone());
            let thread = std::thread::Builder::new().name(format!("vcpu {index}")).stack_size(128 * 1024);
            processors.threads.push(thread.spawn(move || main(vcpu, &gate, &bus, &filter))?);
        }
        Ok(processors)
    }

    /// Lets the processors run.
    pub fn resume(&self) {
        self.want(Wanted::Run);
    }

    /// Holds the processors. Returns when none of them runs the guest's code any more.
    pub fn pause(&self) {
        self.want(Wanted::Wait);
        let mut state = lock(&self.gate.state);
        while state.waiting < self.threads.iter().filter(|thread| !thread.is_finished()).count() {
            let timeout = std::time::Duration::from_millis(10);
            let waited = self.gate.changed.wait_timeout(state, timeout);
            state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    fn want(&self, wanted: Wanted) {
        lock(&self.gate.state).wanted = wanted;
        self.gate.changed.notify_all();
        if wanted != Wanted::Run {
            for thread in &self.threads {
                // A thread that has ended needs no kick.
                let _ = thread.kill(kick());
            }
        }
    }
}

impl Drop for Processors {
    fn drop(&mut self) {
        self.want(Wanted::End);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The signal that makes a processor leave the guest.
fn kick() -> i32 {
    SIGRTMIN()
}

const KVMIO: u32 = 0xae;
ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, u32);

/// `struct kvm_signal_mask` with a set of 64 signals.
#[repr(C, packed)]
struct SignalMask {
    length: u32,
    set: u64,
}

/// While the guest's code runs no signal is blocked, and outside of it the kick is. So a kick that comes just
/// before the guest's code would run is not lost: KVM does not begin.
fn open_to_kicks(vcpu: &VcpuFd) -> io::Result<()> {
    let mask = SignalMask { length: 8, set: 0 };
    // SAFETY: the request reads 12 bytes behind the reference, which are all of `mask`, and keeps no pointer.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), &mask) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn main(mut vcpu: VcpuFd, gate: &Gate, bus: &Bus, filter: &Filter) {
    if let Err(error) = filter.apply() {
        return bus.stop.because(End::Failure(error.to_string()));
    }
    while gate.pass() {
        if let Some(end) = run(&mut vcpu, bus) {
            bus.stop.because(end);
            // Nothing more can be done with this processor; the machine's owner ends the others.
            return;
        }
    }
}

/// Runs the guest's code until it leaves, and does what it left for.
fn run(vcpu: &mut VcpuFd, bus: &Bus) -> Option<End> {
    match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => bus.read_port(port, data),
        Ok(VcpuExit::IoOut(port, data)) => bus.write_port(port, data),
        Ok(VcpuExit::MmioRead(address, data)) => bus.read_memory(address, data),
        Ok(VcpuExit::MmioWrite(address, data)) => bus.write_memory(address, data),
        // A triple fault. Linux resets itself like this when nothing else works.
        Ok(VcpuExit::Shutdown) => return Some(End::Reset),
        Ok(VcpuExit::Intr) => {}
        Ok(other) => return Some(End::Failure(format!("the guest did what KVM cannot do: {other:?}"))),
        Err(error) => match error.errno() {
            libc::EINTR => {
                // The kick is still pending, because it is blocked here.
                let _ = clear_signal(kick());
            }
            libc::EAGAIN => {}
            _ => return Some(End::Failure(format!("KVM cannot run the guest: {error}"))),
        },
    }
    None
}
