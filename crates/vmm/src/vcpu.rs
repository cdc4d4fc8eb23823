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

    /// Whether the processor may go on running.
    fn is_open(&self) -> bool {
        lock(&self.state).wanted == Wanted::Run
    }
}

/// All processors of a machine.
pub struct Processors {
    gate: Arc<Gate>,
    vcpus: Vec<Arc<Mutex<VcpuFd>>>,
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
        let mut processors = Processors { gate, vcpus: Vec::new(), threads: Vec::new() };
        // Threads inherit it, so there is no moment at which a kick would end the process.
        block_signal(kick()).map_err(|e| io::Error::other(e.to_string()))?;
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            open_to_kicks(&vcpu)?;
            let vcpu = Arc::new(Mutex::new(vcpu));
            processors.vcpus.push(vcpu.clone());
            let (gate, bus, filter) = (processors.gate.clone(), bus.clone(), filter.clone());
            let thread = std::thread::Builder::new().name(format!("vcpu {index}")).stack_size(128 * 1024);
            processors.threads.push(thread.spawn(move || main(&vcpu, &gate, &bus, &filter))?);
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
        drop(state);
        for vcpu in &self.vcpus {
            // Its watchdog shall not take the pause for a hang. A guest without KVM's clock has no use for this.
            let _ = lock(vcpu).kvmclock_ctrl();
        }
    }

    /// Has `look` look at every processor. They have to be held.
    pub fn each<T, E>(&self, look: impl Fn(&VcpuFd) -> Result<T, E>) -> Result<Vec<T>, E> {
        self.vcpus.iter().map(|vcpu| look(&lock(vcpu))).collect()
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

fn main(vcpu: &Mutex<VcpuFd>, gate: &Gate, bus: &Bus, filter: &Filter) {
    if let Err(error) = filter.apply() {
        return bus.stop.because(End::Failure(error.to_string()));
    }
    while gate.pass() {
        // While it waits at the gate, others may look at the processor's state.
        let mut vcpu = lock(vcpu);
        let mut left = Left::Interrupted;
        while gate.is_open() && !matches!(left, Left::End(_)) {
            left = run(&mut vcpu, bus);
        }
        if let Left::End(end) = finish(&mut vcpu, bus, left) {
            bus.stop.because(end);
            // Nothing more can be done with this processor; the machine's owner ends the others.
            return;
        }
    }
}

/// The guest's last access is complete only when KVM has been entered again (KVM's API, section 5, `KVM_EXIT_IO`). That
/// must not be left for later, when the processor may be another one that continues a snapshot.
fn finish(vcpu: &mut VcpuFd, bus: &Bus, mut left: Left) -> Left {
    vcpu.set_kvm_immediate_exit(1);
    while let Left::Access = left {
        left = run(vcpu, bus);
    }
    vcpu.set_kvm_immediate_exit(0);
    left
}

/// Why the guest's code does not run.
enum Left {
    /// It used a port or a device's memory, which was served.
    Access,
    /// Somebody wants something of the processor.
    Interrupted,
    /// It cannot go on.
    End(End),
}

/// Runs the guest's code until it leaves, and does what it left for.
fn run(vcpu: &mut VcpuFd, bus: &Bus) -> Left {
    match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => bus.read_port(port, data),
        Ok(VcpuExit::IoOut(port, data)) => bus.write_port(port, data),
        Ok(VcpuExit::MmioRead(address, data)) => bus.read_memory(address, data),
        Ok(VcpuExit::MmioWrite(address, data)) => bus.write_memory(address, data),
        // A triple fault. Linux resets itself like this when nothing else works.
        Ok(VcpuExit::Shutdown) => return Left::End(End::Reset),
        Ok(VcpuExit::Intr) => return Left::Interrupted,
        Ok(other) => return Left::End(End::Failure(format!("the guest did what KVM cannot do: {other:?}"))),
        Err(error) => {
            return match error.errno() {
                libc::EINTR => {
                    // The kick is still pending, because it is blocked here.
                    let _ = clear_signal(kick());
                    Left::Interrupted
                }
                libc::EAGAIN => Left::Interrupted,
                _ => Left::End(End::Failure(format!("KVM cannot run the guest: {error}"))),
            };
        }
    }
    Left::Access
}
