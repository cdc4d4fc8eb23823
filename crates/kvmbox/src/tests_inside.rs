//! Test binaries that run where KVM is.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

use crate::{KvmBox, Result};

/// Set for the command in the box.
const INSIDE: &str = "KAPSEL_KVMBOX_INSIDE";
/// Where the test binary is in the box.
const TESTS: &str = "/kvmbox/tests";

/// Whether this process runs in the box.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Whether tests of KVM can run on this machine itself: in the box, or where the processor runs guests.
///
/// A `/dev/kvm` without the processor's flag is an imitation in software (nested, on some clouds), which is neither
/// complete nor fast enough.
pub fn native_kvm() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let hardware = flags
        .lines()
        .find_map(|line| line.strip_prefix("flags"))
        .is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx"));
    hardware && std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// The `main` of a test binary (`harness = false`) whose tests need KVM. `prepare` says what they need in the box beside
/// the binary itself.
pub fn test_main(trials: Vec<Trial>, prepare: impl FnOnce(KvmBox) -> Result<KvmBox>) -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list || inside() || native_kvm() {
        let _awake = inside().then(keep_awake);
        return libtest_mimic::run(&arguments, trials).exit_code();
    }
    match run_inside(prepare) {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// A machine that does nothing, for as long as others come and go.
///
/// With the first machine KVM patches the scheduler's code, and with the end of the last one it patches it back. It does
/// the same to its own code when the first processor's APIC is off and when the last such one is switched on, as every
/// guest does while it boots; that of the processor here never is. The emulator's processors sometimes see such a patch
/// half done, and the box's kernel panics (int3 in `__schedule`, or in `kvm_arch_vcpu_ioctl_run`).
pub fn keep_awake() -> Option<(kvm_ioctls::VcpuFd, kvm_ioctls::VmFd)> {
    let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm()).ok()?;
    vm.create_irq_chip().ok()?;
    Some((vm.create_vcpu(0).ok()?, vm))
}

fn run_inside(prepare: impl FnOnce(KvmBox) -> Result<KvmBox>) -> Result<i32> {
    let program =
        std::env::current_exe().map_err(|e| crate::Error::io("find", Path::new("/proc/self/exe"), e))?;
    let prepared = prepare(KvmBox::new().program(program, TESTS)?.env(INSIDE, "1"))?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut command = vec![TESTS];
    command.extend(arguments.iter().map(String::as_str));
    let outcome = prepared.run_with(&command, &mut std::io::stdout())?;
    let _ =
        writeln!(std::io::stdout(), "(in the box; it was up after {:.1} s)", outcome.overhead.as_secs_f64());
    Ok(outcome.status)
}
