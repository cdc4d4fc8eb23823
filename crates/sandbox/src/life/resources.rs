//! Whether the host has what a sandbox asks for. Said before anything starts, and not by the kernel's OOM killer.

use super::Error;
use crate::config::format_size;

/// Less than this the host should keep for itself.
const HOST_RESERVE: u64 = 64 << 20;

/// Checks the machine's memory against the host's.
///
/// # Errors
/// Says what is asked, what is there, and what to do.
pub fn check_memory(asked: u64) -> Result<(), Error> {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    check(asked, &text)
}

fn check(asked: u64, meminfo: &str) -> Result<(), Error> {
    const MIN: u64 = crate::config::MIN_MEMORY;
    if asked < MIN {
        return Err(Error::Resources(format!(
            "{} of memory are too little for a guest kernel; ask for {} or more",
            format_size(asked),
            format_size(MIN)
        )));
    }
    let field = |name: &str| {
        let line = meminfo.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
    };
    let (Some(total), Some(available)) = (field("MemTotal:"), field("MemAvailable:")) else { return Ok(()) };
    if asked > total {
        return Err(Error::Resources(format!(
            "{} of memory are more than this host has ({}); ask for less with --memory",
            format_size(asked),
            format_size(total >> 20 << 20)
        )));
    }
    // A guest touches a part of its memory at first; what it then can grow to is the host's to overcommit.
    if available < HOST_RESERVE + asked / 4 {
        return Err(Error::Resources(format!(
            "this host has {} of memory left, too little for a sandbox of {}; stop something or ask for less with --memory",
            format_size(available >> 20 << 20),
            format_size(asked)
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_and_too_much_are_told_apart() {
        let host = "MemTotal:       2097152 kB\nMemFree: 1 kB\nMemAvailable:    200000 kB\n";
        let told = |asked: u64| check(asked, host).unwrap_err().to_string();
        assert!(check(256 << 20, host).is_ok());
        assert!(told(16 << 20).contains("too little for a guest kernel"));
        assert!(told(4 << 30).contains("more than this host has (2G)"));
        assert!(told(1 << 30).contains("memory left"));
        assert!(check(1 << 30, "").is_ok(), "a host that does not tell is not refused");
    }
}
