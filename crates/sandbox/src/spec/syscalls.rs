//! The default seccomp profile: [`syscalls.txt`](./syscalls.txt) and the few calls that depend on their arguments.

use std::collections::HashSet;

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompOperator as Op, LinuxSyscall,
};

const TABLE: &str = include_str!("syscalls.txt");

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// All `CLONE_NEW*` flags of clone(2) that fit its first argument.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// `AF_VSOCK`: speaks to the host's side of a machine.
const AF_VSOCK: u64 = 40;
/// `PER_LINUX`, `PER_LINUX32`, both with `UNAME26`, and the query.
const PERSONALITIES: [u64; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// The profile for a container that has `capabilities`.
pub(super) fn default_profile(capabilities: &HashSet<Capability>) -> LinuxSeccomp {
    let has = |name: &str| capabilities.iter().any(|c| c.to_string().trim_start_matches("CAP_") == name);
    let mut allowed = Vec::new();
    let mut refused = Vec::new();
    for (word, names) in sections() {
        match word {
            "allow" => allowed.extend(names),
            "refuse" => refused.extend(names),
            capability if has(capability.trim_start_matches("CAP_")) => allowed.extend(names),
            _ => refused.extend(names),
        }
    }
    let mut rules = vec![
        rule(allowed, Action::ScmpActAllow, None, None),
        rule(refused, Action::ScmpActErrno, Some(EPERM), None),
    ];
    let allow_when = |name: &str, arg| rule(vec![name.into()], Action::ScmpActAllow, None, Some(arg));
    if has("SYS_ADMIN") {
        rules.push(rule(vec!["clone".into(), "clone3".into()], Action::ScmpActAllow, None, None));
    } else {
        rules.push(allow_when("clone", arg(0, Op::ScmpCmpMaskedEq, CLONE_NAMESPACES, Some(0))));
        // Its flags are behind a pointer that no filter can follow; libraries then use clone.
        rules.push(rule(vec!["clone3".into()], Action::ScmpActErrno, Some(ENOSYS), None));
    }
    rules.extend(PERSONALITIES.map(|value| allow_when("personality", arg(0, Op::ScmpCmpEq, value, None))));
    rules.push(allow_when("socket", arg(0, Op::ScmpCmpNe, AF_VSOCK, None)));

    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(Action::ScmpActErrno)
        .set_default_errno_ret(Some(ENOSYS))
        .set_architectures(Some(vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86]))
        .set_syscalls(Some(rules));
    profile
}

fn sections() -> Vec<(&'static str, Vec<String>)> {
    let mut sections: Vec<(&str, Vec<String>)> = Vec::new();
    for line in TABLE.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match (line.strip_suffix(':'), sections.last_mut()) {
            (Some(word), _) => sections.push((word, Vec::new())),
            (None, Some((_, names))) => names.extend(line.split_whitespace().map(str::to_owned)),
            (None, None) => unreachable!("the table, which is part of the program, begins with a word"),
        }
    }
    sections
}

fn rule(
    names: Vec<String>,
    action: Action,
    errno: Option<u32>,
    arg: Option<LinuxSeccompArg>,
) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names).set_action(action).set_errno_ret(errno).set_args(arg.map(|arg| vec![arg]));
    rule
}

fn arg(index: usize, op: Op, value: u64, value_two: Option<u64>) -> LinuxSeccompArg {
    let builder = LinuxSeccompArgBuilder::default().index(index).op(op).value(value);
    let built = match value_two {
        Some(second) => builder.value_two(second).build(),
        None => builder.build(),
    };
    built.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::defaults;

    #[test]
    fn no_call_has_two_answers() {
        let mut seen = HashSet::new();
        for (_, names) in sections() {
            for name in names {
                assert!(seen.insert(name.clone()), "{name} is listed twice");
                assert!(!["clone", "clone3", "personality", "socket"].contains(&name.as_str()), "{name}");
            }
        }
        assert!(seen.len() > 380);
    }

    #[test]
    fn sections_are_known_words() {
        let known: HashSet<String> = defaults::all_capabilities()
            .iter()
            .map(|c| format!("CAP_{}", c.to_string().trim_start_matches("CAP_")))
            .chain(["allow".into(), "refuse".into()])
            .collect();
        for (word, _) in sections() {
            assert!(known.contains(word), "{word}");
        }
    }

    #[test]
    fn mount_needs_its_capability() {
        let allowed = |capabilities: &HashSet<Capability>| {
            default_profile(capabilities).syscalls().as_ref().unwrap()[0]
                .names()
                .contains(&"mount".to_owned())
        };
        assert!(!allowed(&defaults::capabilities()));
        assert!(allowed(&defaults::all_capabilities()));
    }
}
