//! Which devices a container may open and make: OCI device rules as a BPF program on its cgroup.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::oci::DeviceRule;
use crate::sys::{self, BpfInsn};

/// Kinds of access, as the kernel's BPF_DEVCG_ACC_*.
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;
/// Kinds of device, as the kernel's BPF_DEVCG_DEV_*.
const BLOCK: u32 = 1;
const CHAR: u32 = 2;

/// More rules than a program could hold are refused. (The kernel's limit is 4096 instructions where it has one.)
const RULES_MAX: usize = 500;

/// One rule, ready to compile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// `None`: any.
    kind: Option<u32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: u32,
}

const fn allow(kind: u32, major: Option<i32>, minor: Option<i32>, access: u32) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// What every container may do, whatever its rules say, as runc has it: make any node (opening it is another matter), and use
/// the harmless devices that every `/dev` has.
const ALWAYS: [Rule; 11] = [
    allow(CHAR, None, None, MKNOD),
    allow(BLOCK, None, None, MKNOD),
    allow(CHAR, Some(1), Some(3), ALL),
    allow(CHAR, Some(1), Some(5), ALL),
    allow(CHAR, Some(1), Some(7), ALL),
    allow(CHAR, Some(1), Some(8), ALL),
    allow(CHAR, Some(1), Some(9), ALL),
    allow(CHAR, Some(5), Some(0), ALL),
    allow(CHAR, Some(5), Some(1), ALL),
    allow(CHAR, Some(5), Some(2), ALL),
    allow(CHAR, Some(136), None, ALL),
];

/// Rules that are in order, the last match wins, nothing matching is denied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules(Vec<Rule>);

/// A rule that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("linux.resources.devices is not valid: {0}")]
pub struct RuleError(String);

impl Rules {
    /// The rules of a specification followed by those that every container has.
    ///
    /// # Errors
    /// For unknown kinds of device or access, numbers out of range, and too many rules.
    pub fn parse(rules: &[DeviceRule]) -> Result<Self, RuleError> {
        if rules.len() > RULES_MAX {
            return Err(RuleError(format!("{} rules are more than {RULES_MAX}", rules.len())));
        }
        let own: Vec<Rule> = rules.iter().map(parse_rule).collect::<Result<_, _>>()?;
        // What comes before a rule about everything does not matter; and "deny everything" is where we start.
        let general =
            |r: &Rule| r.kind.is_none() && r.access == ALL && r.major.is_none() && r.minor.is_none();
        let start = own.iter().rposition(general).unwrap_or(0);
        let mut own: Vec<Rule> =
            own[start..].iter().copied().skip_while(|r| general(r) && !r.allow).collect();
        if own.iter().all(|r| r.allow) {
            // Then order does not matter, and what is always there need not be there twice.
            own.retain(|r| !ALWAYS.contains(r));
        }
        Ok(Self(own.into_iter().chain(ALWAYS).collect()))
    }

    /// Whether these are the rules that every container has, and no others.
    pub fn is_default(&self) -> bool {
        self.0 == ALWAYS
    }

    /// Whether everything is allowed, so that no program is needed.
    pub fn allow_all(&self) -> bool {
        let general = |r: &Rule| r.allow && r.kind.is_none() && r.access == ALL && r.major.is_none();
        self.0.first().is_some_and(general) && self.0.iter().all(|r| r.allow)
    }

    /// Compiles the rules: the last one is looked at first.
    pub fn compile(&self) -> Vec<BpfInsn> {
        // The context (R1): u32 access << 16 | kind, u32 major, u32 minor. R2 kind, R3 access, R4 major, R5 minor.
        let mut code = vec![
            load(2, 0),
            alu(0x54, 2, 0xffff), // R2 &= 0xffff
            load(3, 0),
            alu(0x74, 3, 16), // R3 >>= 16
            load(4, 4),
            load(5, 8),
        ];
        for rule in self.0.iter().rev() {
            compile_rule(rule, &mut code);
        }
        code.extend([alu(0xb7, 0, 0), EXIT]);
        code
    }

    /// Compiles and loads.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn load(&self) -> io::Result<OwnedFd> {
        sys::bpf_load_device(&self.compile())
    }

    /// Loads and attaches to `cgroup`, replacing `old`. Returns the program, to replace it later.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn attach(&self, cgroup: BorrowedFd<'_>, old: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
        let program = self.load()?;
        sys::bpf_attach_device(cgroup, program.as_fd(), old)?;
        Ok(program)
    }
}

fn parse_rule(rule: &DeviceRule) -> Result<Rule, RuleError> {
    let kind = match rule.kind.as_str() {
        "" | "a" => None,
        "c" | "u" => Some(CHAR),
        "b" => Some(BLOCK),
        other => return Err(RuleError(format!("type {other:?} is none of a, b, c"))),
    };
    let number = |n: Option<i64>| match n {
        Some(n) if n >= 0 => {
            i32::try_from(n).map(Some).map_err(|_| RuleError(format!("number {n} is too large")))
        }
        _ => Ok(None),
    };
    let bit = |access, letter| match letter {
        'r' => Ok(access | READ),
        'w' => Ok(access | WRITE),
        'm' => Ok(access | MKNOD),
        other => Err(RuleError(format!("access {other:?} is none of r, w, m"))),
    };
    let access =
        if kind.is_none() && rule.access.is_empty() { ALL } else { rule.access.chars().try_fold(0, bit)? };
    Ok(Rule { allow: rule.allow, kind, major: number(rule.major)?, minor: number(rule.minor)?, access })
}

/// One test after the other; the first that fails jumps past the rule.
fn compile_rule(rule: &Rule, code: &mut Vec<BpfInsn>) {
    let mut tests = Vec::with_capacity(6);
    if let Some(kind) = rule.kind {
        tests.push(vec![jump(0x55, 2, kind as i32)]); // if R2 != kind
    }
    if rule.access != ALL {
        // Allow only when the rule covers all that is wanted; deny when it covers any.
        let (mask, leave) = match rule.allow {
            true => (!rule.access & ALL, 0x55), // if R1 != 0
            false => (rule.access, 0x15),       // if R1 == 0
        };
        let move_register = BpfInsn { code: 0xbc, regs: 3 << 4 | 1, off: 0, imm: 0 };
        tests.push(vec![move_register, alu(0x54, 1, mask as i32), jump(leave, 1, 0)]);
    }
    if let Some(major) = rule.major {
        tests.push(vec![jump(0x55, 4, major)]);
    }
    if let Some(minor) = rule.minor {
        tests.push(vec![jump(0x55, 5, minor)]);
    }
    let end: usize = tests.iter().map(Vec::len).sum::<usize>() + 2;
    let mut at = 0;
    for mut test in tests {
        at += test.len();
        if let Some(last) = test.last_mut() {
            last.off = (end - at) as i16;
        }
        code.append(&mut test);
    }
    code.extend([alu(0xb7, 0, i32::from(rule.allow)), EXIT]);
}

const EXIT: BpfInsn = BpfInsn { code: 0x95, regs: 0, off: 0, imm: 0 };

/// R`to` = *(u32 *)(R1 + off)
fn load(to: u8, off: i16) -> BpfInsn {
    BpfInsn { code: 0x61, regs: 1 << 4 | to, off, imm: 0 }
}

fn alu(code: u8, to: u8, imm: i32) -> BpfInsn {
    BpfInsn { code, regs: to, off: 0, imm }
}

fn jump(code: u8, register: u8, imm: i32) -> BpfInsn {
    BpfInsn { code, regs: register, off: 0, imm }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rule(allow: bool, kind: &str, major: Option<i64>, minor: Option<i64>, access: &str) -> DeviceRule {
        DeviceRule { allow, kind: kind.into(), major, minor, access: access.into() }
    }

    /// Interprets the few instructions that the compiler uses.
    fn run(code: &[BpfInsn], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let mut regs = [0u64; 6];
        let mut pc = 0;
        loop {
            let insn = code[pc];
            let to = usize::from(insn.regs & 0xf);
            pc += 1;
            match insn.code {
                0x61 => regs[to] = [access << 16 | kind, major, minor][insn.off as usize / 4].into(),
                0x54 => regs[to] &= insn.imm as u32 as u64,
                0x74 => regs[to] >>= insn.imm,
                0xbc => regs[to] = regs[usize::from(insn.regs >> 4)],
                0xb7 => regs[to] = insn.imm as u64,
                0x55 if regs[to] != insn.imm as u64 => pc += insn.off as usize,
                0x15 if regs[to] == insn.imm as u64 => pc += insn.off as usize,
                0x55 | 0x15 => {}
                0x95 => return regs[0] == 1,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn dockers_default_rules() {
        let rules =
            Rules::parse(&[rule(false, "", None, None, "rwm"), rule(true, "c", Some(10), Some(229), "rw")]);
        let rules = rules.expect("valid");
        assert!(!rules.allow_all() && !rules.is_default());
        let code = rules.compile();
        assert!(run(&code, CHAR, READ | WRITE, 1, 3), "/dev/null");
        assert!(run(&code, CHAR, READ, 136, 77), "a pty");
        assert!(run(&code, CHAR, READ | WRITE, 10, 229), "/dev/fuse");
        assert!(run(&code, BLOCK, MKNOD, 254, 0), "mknod of a disk");
        assert!(!run(&code, BLOCK, READ, 254, 0), "reading a disk");
        assert!(!run(&code, CHAR, READ, 1, 1), "/dev/mem");
        assert!(run(&code, CHAR, MKNOD, 10, 229), "mknod is always allowed");
    }

    #[test]
    fn a_privileged_container_needs_no_program() {
        assert!(Rules::parse(&[rule(true, "a", None, None, "rwm")]).expect("valid").allow_all());
        assert!(!Rules::parse(&[]).expect("valid").allow_all());
        let but =
            Rules::parse(&[rule(true, "a", Some(-1), Some(-1), ""), rule(false, "b", Some(8), None, "w")]);
        let but = but.expect("valid");
        assert!(!but.allow_all() && !but.is_default());
        let code = but.compile();
        assert!(
            run(&code, BLOCK, READ, 8, 1)
                && !run(&code, BLOCK, READ | WRITE, 8, 1)
                && run(&code, BLOCK, WRITE, 9, 1)
        );
    }

    #[test]
    fn the_default_is_recognised_when_spelled_out() {
        assert!(Rules::parse(&[]).expect("valid").is_default());
        let spelled = [
            rule(false, "a", None, None, "rwm"),
            rule(true, "c", Some(1), Some(3), "rwm"),
            rule(true, "c", None, None, "m"),
            rule(true, "c", Some(136), None, "rwm"),
        ];
        assert!(Rules::parse(&spelled).expect("valid").is_default());
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Rules::parse(&[rule(true, "x", None, None, "r")]).is_err());
        assert!(Rules::parse(&[rule(true, "c", None, None, "rx")]).is_err());
        assert!(Rules::parse(&[rule(true, "c", Some(1 << 40), None, "r")]).is_err());
    }

    proptest! {
        /// The program agrees with the rules read one by one.
        #[test]
        fn compiled_is_as_read(
            rules in proptest::collection::vec((any::<bool>(), 0u32..3, -1i64..3, -1i64..3, 1u32..8), 0..6),
            kind in 1u32..3, access in 1u32..8, major in 0u32..3, minor in 0u32..3,
        ) {
            let letters = |a: u32| [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')].iter()
                .filter(|(bit, _)| a & bit != 0).map(|(_, c)| *c).collect::<String>();
            let spec: Vec<_> = rules.iter().map(|&(allow, kind, major, minor, access)|
                rule(allow, ["a", "b", "c"][kind as usize], Some(major), Some(minor), &letters(access))).collect();
            let parsed = Rules::parse(&spec).expect("valid");
            let mut expected = false;
            for r in &parsed.0 {
                let number = |wanted: Option<i32>, is: u32| wanted.is_none_or(|n| n as u32 == is);
                if r.kind.is_none_or(|k| k == kind) && number(r.major, major) && number(r.minor, minor)
                    && (if r.allow { access & !r.access == 0 } else { access & r.access != 0 }) {
                    expected = r.allow;
                }
            }
            prop_assert_eq!(run(&parsed.compile(), kind, access, major, minor), expected);
        }
    }
}
