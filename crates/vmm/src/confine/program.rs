//! A list of system calls as a program for the kernel (seccomp(2), linux/filter.h).
//!
//! Every start of a monitor assembles its programs, and the kernel checks and translates them: they are made as short as lists
//! allow, which seccompiler's general ones are not. That one stays for the filters of users, which are more than lists.

use std::mem::offset_of;

use kapsel_devices::calls::SystemCall;
use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, seccomp_data};
use seccompiler::{BpfProgram, sock_filter};

/// A jump goes no further than this.
const REACH: usize = u8::MAX as usize;
/// `AUDIT_ARCH_X86_64` (linux/audit.h).
const X86_64: u32 = 0xc000_003e;

/// The list has more calls than a jump can pass.
#[derive(Debug, thiserror::Error)]
#[error("a list of {0} system calls is too long")]
pub struct TooLong(usize);

/// Allows `calls` and traps all others, with `mark` for the handler.
///
/// # Errors
/// [`TooLong`].
pub fn assemble(calls: &[SystemCall], mark: u16) -> Result<BpfProgram, TooLong> {
    let mut always: Vec<u32> =
        calls.iter().filter(|call| call.only.is_none()).map(|call| call.number as u32).collect();
    always.sort_unstable();
    always.dedup();
    let refuse = || give(libc::SECCOMP_RET_TRAP | u32::from(mark));
    let allow = || give(libc::SECCOMP_RET_ALLOW);
    // System calls of the 32-bit kinds have other numbers; those of x32 have a bit that is in none of the list's.
    let mut program =
        vec![load(offset_of!(seccomp_data, arch)), equal(X86_64, 1, 0), refuse(), load_number()];
    for call in calls {
        let Some((index, value)) = call.only else { continue };
        // What may be called with any arguments may be called with these.
        if always.binary_search(&(call.number as u32)).is_err() {
            let argument = offset_of!(seccomp_data, args) + usize::from(index) * size_of::<u64>();
            program.extend([
                equal(call.number as u32, 0, 4),
                load(argument),
                equal(value, 0, 1),
                allow(),
                load_number(),
            ]);
        }
    }
    // Each passes those after it, and the refusal.
    for (index, number) in always.iter().enumerate() {
        let over = always.len() - index;
        let over = u8::try_from(over).map_err(|_| TooLong(REACH + over))?;
        program.push(equal(*number, over, 0));
    }
    program.extend([refuse(), allow()]);
    Ok(program)
}

fn load_number() -> sock_filter {
    load(offset_of!(seccomp_data, nr))
}

/// The 32 bits there; of an argument the lower ones, since the processor is little-endian.
fn load(offset: usize) -> sock_filter {
    sock_filter { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: offset as u32 }
}

/// Passes `yes` instructions when what was loaded is `value`, and otherwise `no`.
fn equal(value: u32, yes: u8, no: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | BPF_JEQ | BPF_K) as u16, jt: yes, jf: no, k: value }
}

fn give(action: u32) -> sock_filter {
    sock_filter { code: (BPF_RET | BPF_K) as u16, jt: 0, jf: 0, k: action }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kapsel_devices::calls::{any, only};
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
        TargetArch,
    };

    use super::*;
    use crate::confine;

    /// What seccompiler makes of the same list.
    fn reference(calls: &[SystemCall]) -> BpfProgram {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for call in calls {
            let Some((index, value)) = call.only else { continue };
            let (length, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
            let condition = SeccompCondition::new(index, length, equal, u64::from(value)).unwrap();
            rules.entry(call.number).or_default().push(SeccompRule::new(vec![condition]).unwrap());
        }
        for call in calls.iter().filter(|call| call.only.is_none()) {
            rules.insert(call.number, Vec::new());
        }
        let (refuse, allow) = (SeccompAction::Trap, SeccompAction::Allow);
        SeccompFilter::new(rules, refuse, allow, TargetArch::x86_64).unwrap().try_into().unwrap()
    }

    /// Runs a program as the kernel does, with the instructions that such programs have.
    fn answer(program: &[sock_filter], arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let field = |offset: usize| match offset {
            0 => number,
            4 => arch,
            _ => {
                let (index, upper) = ((offset - 16) / 8, offset % 8 == 4);
                (args[index] >> if upper { 32 } else { 0 }) as u32
            }
        };
        let (mut at, mut loaded) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match u32::from(code) {
                0x20 => loaded = field(k as usize),
                0x15 => at += usize::from(if loaded == k { jt } else { jf }),
                0x05 => at += k as usize,
                0x06 => return k,
                other => panic!("{other:#x} is not expected"),
            }
        }
    }

    #[test]
    fn programs_answer_as_seccompilers_do_and_are_shorter() {
        const TRAP: u32 = libc::SECCOMP_RET_TRAP;
        let machine = confine::machine(&[]);
        let twice = vec![
            any(libc::SYS_read),
            any(libc::SYS_read),
            only(libc::SYS_read, 0, 1),
            only(libc::SYS_mmap, 2, 3),
        ];
        for calls in [confine::api(), machine.event_loop, machine.processor, twice] {
            let (ours, theirs) = (assemble(&calls, 2).unwrap(), reference(&calls));
            assert!(ours.len() * 2 < theirs.len() + 16, "{} and {}", ours.len(), theirs.len());
            let values: Vec<_> =
                calls.iter().filter_map(|call| call.only).map(|(_, value)| u64::from(value)).collect();
            for number in (0..512).chain([0x4000_0000, u32::MAX]) {
                for value in values.iter().copied().chain([0, 1, 7]) {
                    // What is above the lower 32 bits does not count.
                    for args in [[value; 6], [value | 1 << 40; 6]] {
                        let expected = match answer(&theirs, X86_64, number, args) {
                            TRAP => TRAP | 2,
                            other => other,
                        };
                        assert_eq!(answer(&ours, X86_64, number, args), expected, "{number} {value:#x}");
                    }
                }
            }
            assert_eq!(answer(&ours, 0x4000_0003, libc::SYS_read as u32, [0; 6]), TRAP | 2);
        }
    }

    #[test]
    fn a_list_that_no_jump_passes_is_refused() {
        let calls: Vec<_> = (0..300).map(any).collect();
        assert!(assemble(&calls, 1).is_err());
        assert!(assemble(&calls[..200], 1).is_ok());
    }
}
