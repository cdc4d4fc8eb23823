//! Signals by name and number, as Linux on x86-64 counts them.

const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
/// Where glibc's and musl's SIGRTMIN begins: they keep 32 and 33 (and musl 34) for themselves; Docker counts from 34.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// Reads `SIGTERM`, `term`, `15`, `RTMIN+3`, `SIGRTMAX-1`.
pub fn parse_signal(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(at) = NAMES.iter().position(|known| *known == name) {
        return i32::try_from(at + 1).ok();
    }
    let number = match name {
        "POLL" => 29,
        "RTMIN" => RTMIN,
        "RTMAX" => RTMAX,
        _ => match (name.strip_prefix("RTMIN+"), name.strip_prefix("RTMAX-")) {
            (Some(up), _) => RTMIN.checked_add(up.parse::<u8>().ok()?.into())?,
            (_, Some(down)) => RTMAX - i32::from(down.parse::<u8>().ok()?),
            _ => return None,
        },
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number).or((name == "POLL").then_some(29))
}

/// `SIGTERM` for 15.
pub fn signal_name(number: i32) -> String {
    let index = usize::try_from(number - 1).ok();
    index.and_then(|at| NAMES.get(at)).map_or_else(|| format!("signal {number}"), |name| format!("SIG{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("SIGIO", 29),
            ("POLL", 29),
            ("RTMIN+3", 37),
            ("SIGRTMAX", 64),
            ("rtmax-1", 63),
            ("WINCH", 28),
        ] {
            assert_eq!(parse_signal(text), Some(number), "{text}");
        }
        for text in ["", "0", "65", "-1", "SIG", "NONSENSE", "RTMIN+31", "RTMAX-40", "RTMIN-1"] {
            assert_eq!(parse_signal(text), None, "{text}");
        }
        assert_eq!(signal_name(15), "SIGTERM");
        assert_eq!(signal_name(40), "signal 40");
    }
}
