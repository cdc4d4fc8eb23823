//! What is put in front of a compiled seccomp filter.

use std::ffi::CStr;

use seccompiler::sock_filter;

use crate::sys;

const LD_W_ABS: u16 = 0x20;
const JEQ_K: u16 = 0x15;
const RET_K: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
const NR: u32 = 0;
const ARCH: u32 = 4;
const FIRST_ARG_LOW: u32 = 16;
const FIRST_ARG_HIGH: u32 = 20;

/// `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;

fn load(offset: u32) -> sock_filter {
    sock_filter { code: LD_W_ABS, jt: 0, jf: 0, k: offset }
}

/// Continues if the accumulator equals `k`, else skips `otherwise` instructions.
fn require(k: u32, otherwise: u8) -> sock_filter {
    sock_filter { code: JEQ_K, jt: 0, jf: otherwise, k }
}

fn ret(action: u32) -> sock_filter {
    sock_filter { code: RET_K, jt: 0, jf: 0, k: action }
}

/// Lets exactly the final `execve` through: the filter is installed before it, and ought not to allow it afterwards.
///
/// The call is recognised by the address of its path string. After the exec that address means nothing: a program
/// that wants to execute again must first map memory just there, and finds only what the jail's file tree lets it execute.
pub(crate) fn with_exec_gate(filter: &[sock_filter], program: &CStr) -> Vec<sock_filter> {
    let address = sys::ptr(program) as u64;
    let (low, high) = (address as u32, (address >> 32) as u32);
    let execve = u32::try_from(libc::SYS_execve).unwrap_or(u32::MAX);
    let gate = [
        load(ARCH),
        require(X86_64, 7),
        load(NR),
        require(execve, 5),
        load(FIRST_ARG_LOW),
        require(low, 3),
        load(FIRST_ARG_HIGH),
        require(high, 1),
        ret(libc::SECCOMP_RET_ALLOW),
    ];
    gate.into_iter().chain(filter.iter().cloned()).collect()
}

/// Answers these calls with an error instead of killing: calls that libraries try, and do without when they are not there.
pub(crate) fn with_errors(filter: &[sock_filter], errors: &[(libc::c_long, i32)]) -> Vec<sock_filter> {
    let mut program =
        vec![load(ARCH), require(X86_64, u8::try_from(errors.len() * 2 + 1).unwrap_or(u8::MAX)), load(NR)];
    for (nr, errno) in errors {
        program.push(require(u32::try_from(*nr).unwrap_or(u32::MAX), 1));
        program.push(ret(libc::SECCOMP_RET_ERRNO | (errno.unsigned_abs() & libc::SECCOMP_RET_DATA)));
    }
    program.extend(filter.iter().cloned());
    program
}
