//! OCI seccomp profiles compiled to BPF, on the host: the guest's agent then needs no libseccomp, and a profile is
//! compiled once for all sandboxes that use it.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    path::{Path, PathBuf},
};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};
use sha2::{Digest, Sha256};

/// Bytes of one BPF instruction (`struct sock_filter`).
const INSTRUCTION: usize = 8;
/// The kernel takes no longer filter (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;
/// Part of the cache's key: changes when the compilation does.
const CACHE_VERSION: &[u8] = b"kapsel-seccomp-1";
const EPERM: u32 = 1;

/// A profile that cannot be compiled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The profile asks for something that cannot be had in a guest.
    #[error("the seccomp profile uses {0}, which cannot work in a guest of its own")]
    Unsupported(String),
    /// A value that has no meaning.
    #[error("the seccomp profile is not valid: {0}")]
    Invalid(String),
    /// libseccomp said no.
    #[error("libseccomp cannot compile the seccomp profile: {0}")]
    Library(#[from] libseccomp::error::SeccompError),
    /// The compiled filter cannot be read back.
    #[error("cannot read the compiled seccomp filter: {0}")]
    Io(#[from] io::Error),
}

/// A filter for the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// `struct sock_filter`s, native endian.
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u32,
}

/// Compiles a profile, or takes it from `cache` when it was compiled before.
///
/// # Errors
/// When the profile cannot be compiled. A cache that cannot be used only costs time.
pub fn compile(profile: &LinuxSeccomp, cache: &Path) -> Result<Filter, Error> {
    let flags = flags(profile)?;
    let entry = cache_entry(profile, cache);
    if let Some(program) = entry.as_deref().and_then(read_cached) {
        return Ok(Filter { program, flags });
    }
    let program = program(profile)?;
    if let Some(entry) = entry
        && let Err(error) = crate::paths::private_dir(cache)
            .map_err(io::Error::other)
            .and_then(|()| crate::record::replace(&entry, &program))
    {
        tracing::warn!(%error, "cannot cache a seccomp filter");
    }
    Ok(Filter { program, flags })
}

fn cache_entry(profile: &LinuxSeccomp, cache: &Path) -> Option<PathBuf> {
    let mut hash = Sha256::new();
    hash.update(CACHE_VERSION);
    let version = libseccomp::ScmpVersion::current().ok()?;
    hash.update(format!("{}.{}.{}", version.major, version.minor, version.micro));
    hash.update(serde_json::to_vec(profile).ok()?);
    Some(cache.join(format!("{}.bpf", hex::encode(hash.finalize()))))
}

/// A cached program; the directory is ours alone, so only accidents are looked for.
fn read_cached(entry: &Path) -> Option<Vec<u8>> {
    let program = fs::read(entry).ok()?;
    is_program(&program).then_some(program)
}

fn is_program(bytes: &[u8]) -> bool {
    !bytes.is_empty()
        && bytes.len().is_multiple_of(INSTRUCTION)
        && bytes.len() / INSTRUCTION <= MAX_INSTRUCTIONS
}

fn program(profile: &LinuxSeccomp) -> Result<Vec<u8>, Error> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    if default == ScmpAction::Notify || profile.listener_path().is_some() {
        return Err(Error::Unsupported("a listener (SCMP_ACT_NOTIFY)".into()));
    }
    let mut context = ScmpFilterContext::new(default)?;
    // A tree instead of a list: the guest's kernel evaluates the filter for each number when it is installed.
    context.set_ctl_optimize(2)?;
    context.set_ctl_nnp(false)?;
    for &arch in profile.architectures().iter().flatten() {
        match scmp_arch(arch) {
            Some(arch) => drop(context.add_arch(arch)?),
            // The guest's processor has none of its system calls.
            None => continue,
        };
    }
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        if action == ScmpAction::Notify {
            return Err(Error::Unsupported("a listener (SCMP_ACT_NOTIFY)".into()));
        }
        // libseccomp refuses what changes nothing.
        if action == default {
            continue;
        }
        let args = rule.args().iter().flatten().map(compare).collect::<Result<Vec<_>, _>>()?;
        for name in rule.names() {
            // As runc: names that this libseccomp does not know are left to the default action.
            let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
            add_rule(&mut context, action, syscall, &args)?;
        }
    }
    let file = File::from(
        rustix::fs::memfd_create("seccomp", rustix::fs::MemfdFlags::CLOEXEC).map_err(io::Error::from)?,
    );
    context.export_bpf(&file)?;
    let mut program = Vec::new();
    let mut file = file;
    file.rewind()?;
    file.read_to_end(&mut program)?;
    if !is_program(&program) {
        return Err(Error::Invalid(format!(
            "it makes a filter of {} instructions, the kernel takes {MAX_INSTRUCTIONS}",
            program.len() / INSTRUCTION
        )));
    }
    Ok(program)
}

fn add_rule(
    context: &mut ScmpFilterContext,
    action: ScmpAction,
    syscall: ScmpSyscall,
    args: &[(u32, ScmpArgCompare)],
) -> Result<(), Error> {
    let mut seen = 0u8;
    let twice = args.iter().any(|(index, _)| {
        let bit = 1 << index;
        let again = seen & bit != 0;
        seen |= bit;
        again
    });
    if args.is_empty() {
        context.add_rule(action, syscall)?;
    } else if twice {
        // The specification: several comparisons of one argument are alternatives.
        for (_, arg) in args {
            context.add_rule_conditional(action, syscall, &[*arg])?;
        }
    } else {
        let all: Vec<ScmpArgCompare> = args.iter().map(|(_, arg)| *arg).collect();
        context.add_rule_conditional(action, syscall, &all)?;
    }
    Ok(())
}

fn compare(arg: &LinuxSeccompArg) -> Result<(u32, ScmpArgCompare), Error> {
    use LinuxSeccompOperator as Op;
    let index = u32::try_from(arg.index()).ok().filter(|index| *index < 6);
    let index = index.ok_or_else(|| Error::Invalid(format!("argument {} of a system call", arg.index())))?;
    let (op, datum) = match arg.op() {
        Op::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        Op::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        Op::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        Op::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        Op::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        Op::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // The specification calls the mask `value`, and what is compared `valueTwo`.
        Op::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(arg.value()), arg.value_two().unwrap_or(0)),
    };
    Ok((index, ScmpArgCompare::new(index, op, datum)))
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, Error> {
    use LinuxSeccompAction as A;
    let errno_value = errno.unwrap_or(EPERM);
    let small = || i32::try_from(errno_value).ok().filter(|e| *e < 4096);
    let errno_value = small().ok_or_else(|| Error::Invalid(format!("errnoRet {errno_value}")))?;
    Ok(match action {
        A::ScmpActKill | A::ScmpActKillThread => ScmpAction::KillThread,
        A::ScmpActKillProcess => ScmpAction::KillProcess,
        A::ScmpActTrap => ScmpAction::Trap,
        A::ScmpActErrno => ScmpAction::Errno(errno_value),
        A::ScmpActTrace => ScmpAction::Trace(u16::try_from(errno_value).unwrap_or(u16::MAX)),
        A::ScmpActAllow => ScmpAction::Allow,
        A::ScmpActLog => ScmpAction::Log,
        A::ScmpActNotify => ScmpAction::Notify,
    })
}

/// `SECCOMP_FILTER_FLAG_*` (linux/seccomp.h) of the flags that libseccomp would pass to the kernel.
fn flags(profile: &LinuxSeccomp) -> Result<u32, Error> {
    use LinuxSeccompFilterFlag as F;
    const TSYNC: u32 = 1;
    const LOG: u32 = 2;
    const SPEC_ALLOW: u32 = 4;
    profile.flags().iter().flatten().try_fold(0, |flags, flag| {
        Ok(flags
            | match flag {
                F::SeccompFilterFlagTsync => TSYNC,
                F::SeccompFilterFlagLog => LOG,
                F::SeccompFilterFlagSpecAllow => SPEC_ALLOW,
                // Means something only with a listener.
                F::SeccompFilterFlagWaitKillableRecv => {
                    return Err(Error::Unsupported("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV".into()));
                }
            })
    })
}

/// The architectures whose programs an x86-64 guest can run.
fn scmp_arch(arch: Arch) -> Option<ScmpArch> {
    match arch {
        Arch::ScmpArchNative => Some(ScmpArch::Native),
        Arch::ScmpArchX86_64 => Some(ScmpArch::X8664),
        Arch::ScmpArchX86 => Some(ScmpArch::X86),
        Arch::ScmpArchX32 => Some(ScmpArch::X32),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxSyscallBuilder;

    use super::*;
    use crate::spec::{ImageDefaults, RunOptions, build};

    fn default_profile() -> LinuxSeccomp {
        let options = RunOptions { args: vec!["x".into()], ..Default::default() };
        let spec = build(&ImageDefaults::default(), &options).unwrap();
        spec.linux().clone().unwrap().seccomp().clone().unwrap()
    }

    /// What a filter answers to one system call (struct seccomp_data: nr, arch, ip, args).
    fn evaluate(program: &[u8], arch: u32, nr: u32, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend_from_slice(&nr.to_ne_bytes());
        data.extend_from_slice(&arch.to_ne_bytes());
        data.extend_from_slice(&0u64.to_ne_bytes());
        args.iter().for_each(|arg| data.extend_from_slice(&arg.to_ne_bytes()));
        let word = |at: u32| u32::from_ne_bytes(data[at as usize..at as usize + 4].try_into().unwrap());
        let (mut pc, mut a) = (0usize, 0u32);
        loop {
            let i = &program[pc * 8..pc * 8 + 8];
            let code = u16::from_ne_bytes([i[0], i[1]]);
            let (jt, jf) = (usize::from(i[2]), usize::from(i[3]));
            let k = u32::from_ne_bytes(i[4..8].try_into().unwrap());
            pc += 1;
            match code {
                0x20 => a = word(k),
                0x54 => a &= k,
                0x05 => pc += k as usize,
                0x15 => pc += if a == k { jt } else { jf },
                0x25 => pc += if a > k { jt } else { jf },
                0x35 => pc += if a >= k { jt } else { jf },
                0x06 => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    const X86_64: u32 = 0xc000_003e;
    const I386: u32 = 0x4000_0003;
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;

    #[test]
    fn the_default_profile_answers_as_its_table_says() {
        let dir = tempfile::tempdir().unwrap();
        let filter = compile(&default_profile(), &dir.path().join("cache")).unwrap();
        let ask = |nr: libc::c_long, args: [u64; 6]| evaluate(&filter.program, X86_64, nr as u32, args);
        let none = [0; 6];
        assert_eq!(ask(libc::SYS_read, none), ALLOW);
        assert_eq!(ask(libc::SYS_execve, none), ALLOW);
        assert_eq!(ask(libc::SYS_mount, none), ERRNO | EPERM);
        assert_eq!(ask(libc::SYS_kexec_load, none), ERRNO | EPERM);
        assert_eq!(ask(9999, none), ERRNO | libc::ENOSYS as u32);
        assert_eq!(ask(libc::SYS_clone3, none), ERRNO | libc::ENOSYS as u32);
        assert_eq!(ask(libc::SYS_clone, none), ALLOW);
        assert_eq!(
            ask(libc::SYS_clone, [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0, 0]),
            ERRNO | libc::ENOSYS as u32
        );
        assert_eq!(ask(libc::SYS_socket, [libc::AF_INET as u64, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(
            ask(libc::SYS_socket, [libc::AF_VSOCK as u64, 0, 0, 0, 0, 0]),
            ERRNO | libc::ENOSYS as u32
        );
        assert_eq!(ask(libc::SYS_personality, [0xffff_ffff, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(ask(libc::SYS_personality, [0x40000, 0, 0, 0, 0, 0]), ERRNO | libc::ENOSYS as u32);
        // read(2) is number 3 for i386 programs.
        assert_eq!(evaluate(&filter.program, I386, 3, none), ALLOW);
    }

    #[test]
    fn the_second_time_comes_from_the_cache_unless_it_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let first = compile(&default_profile(), dir.path()).unwrap();
        let entry = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let other = [0x06u8, 0, 0, 0, 0, 0, 0xff, 0x7f];
        fs::write(&entry, other).unwrap();
        assert_eq!(compile(&default_profile(), dir.path()).unwrap().program, other);
        fs::write(&entry, b"odd").unwrap();
        assert_eq!(compile(&default_profile(), dir.path()).unwrap(), first);
    }

    #[test]
    fn profiles_that_cannot_work_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut notify = default_profile();
        notify.set_default_action(LinuxSeccompAction::ScmpActNotify);
        assert!(matches!(compile(&notify, dir.path()), Err(Error::Unsupported(_))));
        let mut wrong = default_profile();
        let rule = LinuxSyscallBuilder::default()
            .names(vec!["read".to_owned()])
            .action(LinuxSeccompAction::ScmpActAllow)
            .args(vec![
                serde_json::from_str::<LinuxSeccompArg>(r#"{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}"#)
                    .unwrap(),
            ])
            .build()
            .unwrap();
        wrong.set_syscalls(Some(vec![rule]));
        assert!(matches!(compile(&wrong, dir.path()), Err(Error::Invalid(_))));
    }

    #[test]
    fn unknown_names_and_foreign_architectures_do_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let mut profile = default_profile();
        profile.set_architectures(Some(vec![Arch::ScmpArchAarch64, Arch::ScmpArchX86_64]));
        let mut rules = profile.syscalls().clone().unwrap();
        rules.push(
            LinuxSyscallBuilder::default()
                .names(vec!["teleport".to_owned()])
                .action(LinuxSeccompAction::ScmpActAllow)
                .build()
                .unwrap(),
        );
        profile.set_syscalls(Some(rules));
        assert!(compile(&profile, dir.path()).is_ok());
    }
}
