//! Filters of the user's own.
//!
//! Firecracker takes compiled filters, in an encoding that changed between its versions. This monitor takes the JSON that
//! they are compiled from, which did not.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use seccompiler::{BpfMap, BpfProgram, TargetArch};

use super::{Error, Thread};

/// Lists of system calls are shorter than this, in bytes.
const SIZE_MAX: u64 = 1 << 20;

pub fn read(path: &Path) -> Result<BpfMap, Error> {
    let failed = |reason: String| Error::File { path: path.to_owned(), reason };
    let mut json = Vec::new();
    let file = File::open(path).map_err(|e| failed(e.to_string()))?;
    file.take(SIZE_MAX + 1).read_to_end(&mut json).map_err(|e| failed(e.to_string()))?;
    if json.len() as u64 > SIZE_MAX {
        return Err(failed(format!("it is larger than {SIZE_MAX} bytes")));
    }
    if !json.trim_ascii_start().starts_with(b"{") {
        let hint = "it is not JSON; compiled filters are not taken, only what they are compiled from";
        return Err(failed(hint.into()));
    }
    let filters =
        seccompiler::compile_from_json(&json[..], TargetArch::x86_64).map_err(|e| failed(e.to_string()))?;
    match Thread::ALL.iter().find(|thread| !filters.contains_key(thread.name())) {
        Some(thread) => Err(failed(format!("it has no filter for the {} threads", thread.name()))),
        None => Ok(filters),
    }
}

/// The kernel hands a trap's lower 16 bits to the handler, which learns from them whose filter it was.
pub fn marked(program: &BpfProgram, thread: Thread) -> BpfProgram {
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let mut program = program.clone();
    for instruction in &mut program {
        if (instruction.code, instruction.k) == (RETURN, libc::SECCOMP_RET_TRAP) {
            instruction.k |= thread as u32;
        }
    }
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &[u8]) -> Result<BpfMap, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn firecrackers_json_is_taken_and_nothing_else() {
        let filter = r#"{"default_action":"trap","filter_action":"allow","filter":[{"syscall":"read","comment":"c"},
            {"syscall":"ioctl","args":[{"index":1,"type":"dword","op":"eq","val":44672,"comment":"KVM_RUN"}]}]}"#;
        let all = format!(r#"{{"vmm":{filter},"api":{filter},"vcpu":{filter}}}"#);
        assert_eq!(read_text(all.as_bytes()).unwrap().len(), 3);
        for (text, reason) in [
            (format!(r#"{{"vmm":{filter},"api":{filter}}}"#), "no filter for the vcpu threads"),
            (all.replace("read", "no_such_call"), "no_such_call"),
            ("\u{1}\u{3}vmm".into(), "compiled filters are not taken"),
            (" ".repeat(SIZE_MAX as usize + 1), "larger than"),
        ] {
            let error = read_text(text.as_bytes()).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        assert!(read(Path::new("/nonexistent")).is_err());
    }
}
