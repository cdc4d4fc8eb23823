//! Which files a dynamically linked program needs to start: its loader and the closure of its libraries.
//!
//! The answer is exact, where `/lib` would be generous, and takes about a millisecond for QEMU's fifty libraries, without running
//! `ldd` (which executes what it is asked about).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What a program, or a library, needs besides itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Needs {
    /// The dynamic loader's path, as the program names it; none for a static program, or a library.
    pub loader: Option<PathBuf>,
    /// Libraries by the name under which they are asked for, with their place on the host.
    pub libraries: BTreeMap<String, PathBuf>,
}

/// The name under which libraries ask for the loader.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// Follows `DT_NEEDED` from `program` on. Fails with the name of the first library that is nowhere to be found.
pub(crate) fn needs(program: &Path) -> Result<Needs> {
    let failed = |path: &Path, source| Error::Prepare {
        name: program.display().to_string(),
        action: "find the libraries of",
        subject: path.display().to_string(),
        source,
    };
    let first = Dynamic::read(program).map_err(|e| failed(program, e))?;
    let mut needs = Needs { loader: first.interpreter.clone(), libraries: BTreeMap::new() };
    if first.needed.is_empty() {
        return Ok(needs);
    }
    let search = Search::new();
    // The C library asks for the loader, which is there before any library is.
    let mut seen = BTreeSet::from([LOADER.to_owned()]);
    let mut queue = VecDeque::from([(program.to_owned(), first)]);
    while let Some((object, dynamic)) = queue.pop_front() {
        for name in &dynamic.needed {
            if !seen.insert(name.clone()) {
                continue;
            }
            let path = search.find(name, &dynamic.directories(&object)).ok_or_else(|| {
                let message = format!("it needs {name}, which is not installed");
                failed(&object, io::Error::new(io::ErrorKind::NotFound, message))
            })?;
            let next = Dynamic::read(&path).map_err(|e| failed(&path, e))?;
            queue.push_back((path.clone(), next));
            needs.libraries.insert(name.clone(), path);
        }
    }
    Ok(needs)
}

/// The part of an ELF file's dynamic section that says what else is to be loaded.
#[derive(Debug, Default)]
struct Dynamic {
    interpreter: Option<PathBuf>,
    needed: Vec<String>,
    /// `DT_RUNPATH`, or its forerunner `DT_RPATH`.
    runpath: Option<String>,
}

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_RPATH: u64 = 15;
const DT_RUNPATH: u64 = 29;

/// Names in ELF files are C strings; none that we follow is longer.
const MAX_NAME: usize = 4096;

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    size: u64,
}

impl Dynamic {
    fn read(path: &Path) -> io::Result<Dynamic> {
        let file = File::open(path)?;
        let segments = segments(&file)?;
        let mut dynamic = Dynamic::default();
        if let Some(interp) = segments.iter().find(|s| s.kind == PT_INTERP) {
            dynamic.interpreter =
                Some(PathBuf::from(std::ffi::OsString::from_vec(string(&file, interp.offset)?)));
        }
        let Some(section) = segments.iter().find(|s| s.kind == PT_DYNAMIC) else { return Ok(dynamic) };
        let mut bytes = vec![0; usize::try_from(section.size.min(64 << 10)).unwrap_or(0)];
        file.read_exact_at(&mut bytes, section.offset)?;
        let entries: Vec<(u64, u64)> = bytes
            .as_chunks::<16>()
            .0
            .iter()
            .map(|e| (le64(e, 0), le64(e, 8)))
            .take_while(|(tag, _)| *tag != DT_NULL)
            .collect();
        let Some((_, table)) = entries.iter().find(|(tag, _)| *tag == DT_STRTAB) else { return Ok(dynamic) };
        let table = file_offset(&segments, *table).ok_or_else(malformed)?;
        let text = |offset: u64| {
            let bytes = string(&file, table.checked_add(offset).ok_or_else(malformed)?)?;
            String::from_utf8(bytes).map_err(|_| malformed())
        };
        for (tag, value) in &entries {
            match *tag {
                DT_NEEDED => dynamic.needed.push(text(*value)?),
                DT_RUNPATH => dynamic.runpath = Some(text(*value)?),
                DT_RPATH if dynamic.runpath.is_none() => dynamic.runpath = Some(text(*value)?),
                _ => {}
            }
        }
        Ok(dynamic)
    }

    /// The directories of its own that the object at `path` wants searched.
    fn directories(&self, path: &Path) -> Vec<PathBuf> {
        let origin = path.parent().unwrap_or(Path::new("/")).to_string_lossy();
        let paths = self.runpath.iter().flat_map(|r| r.split(':')).filter(|d| !d.is_empty());
        paths.map(|d| PathBuf::from(d.replace("${ORIGIN}", &origin).replace("$ORIGIN", &origin))).collect()
    }
}

fn segments(file: &File) -> io::Result<Vec<Segment>> {
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    // 64-bit, little-endian.
    if header[..6] != [0x7f, b'E', b'L', b'F', 2, 1] {
        return Err(malformed());
    }
    let (offset, count) = (le64(&header, 32), u16::from_le_bytes([header[56], header[57]]));
    let mut table = vec![0; usize::from(count) * 56];
    file.read_exact_at(&mut table, offset)?;
    let entry = |e: &[u8; 56]| Segment {
        kind: u32::from_le_bytes([e[0], e[1], e[2], e[3]]),
        offset: le64(e, 8),
        address: le64(e, 16),
        size: le64(e, 32),
    };
    Ok(table.as_chunks::<56>().0.iter().map(entry).collect())
}

fn file_offset(segments: &[Segment], address: u64) -> Option<u64> {
    let inside =
        |s: &&Segment| s.kind == PT_LOAD && address.checked_sub(s.address).is_some_and(|d| d < s.size);
    let segment = segments.iter().find(inside)?;
    segment.offset.checked_add(address - segment.address)
}

/// The C string at this offset.
fn string(file: &File, mut offset: u64) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    while text.len() < MAX_NAME {
        let mut chunk = [0; 128];
        let read = file.read_at(&mut chunk, offset)?;
        let chunk = chunk.get(..read).filter(|c| !c.is_empty()).ok_or_else(malformed)?;
        if let Some(end) = chunk.iter().position(|b| *b == 0) {
            text.extend(chunk.iter().take(end));
            return Ok(text);
        }
        text.extend(chunk);
        offset = offset.checked_add(read as u64).ok_or_else(malformed)?;
    }
    Err(malformed())
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not a 64-bit little-endian ELF file, or a damaged one")
}

/// Where the system's dynamic loader looks: its cache, then its built-in directories.
struct Search {
    cache: BTreeMap<String, PathBuf>,
}

impl Search {
    const BUILT_IN: [&str; 4] =
        ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64"];

    fn new() -> Search {
        let cache =
            std::fs::read("/etc/ld.so.cache").ok().map(|bytes| parse_cache(&bytes)).unwrap_or_default();
        Search { cache }
    }

    fn find(&self, name: &str, own: &[PathBuf]) -> Option<PathBuf> {
        let in_own = own.iter().map(|d| d.join(name)).find(|p| p.is_file());
        let cached = || self.cache.get(name).filter(|p| p.is_file()).cloned();
        let built_in = || Self::BUILT_IN.iter().map(|d| Path::new(d).join(name)).find(|p| p.is_file());
        in_own.or_else(cached).or_else(built_in)
    }
}

/// Reads ld.so.cache in glibc's "new" format (`struct cache_file_new`): the baseline x86-64 libraries in it.
fn parse_cache(bytes: &[u8]) -> BTreeMap<String, PathBuf> {
    const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
    const HEADER: usize = 48;
    const ENTRY: usize = 24;
    /// `FLAG_ELF_LIBC6 | FLAG_X8664_LIB64`.
    const X86_64: u32 = 0x0303;
    if !bytes.starts_with(MAGIC) {
        return BTreeMap::new();
    }
    let text = |offset: u32| {
        let tail = bytes.get(usize::try_from(offset).ok()?..)?;
        let end = tail.iter().take(MAX_NAME).position(|b| *b == 0)?;
        Some(String::from_utf8_lossy(&tail[..end]).into_owned())
    };
    let count = usize::try_from(le32(bytes, MAGIC.len())).unwrap_or(0).min(bytes.len() / ENTRY);
    let entries = (0..count).filter_map(|n| bytes.get(HEADER + n * ENTRY..HEADER + (n + 1) * ENTRY));
    // Entries with a hwcap are variants for newer processors; the baseline one runs everywhere.
    let usable = entries.filter(|e| le32(e, 0) == X86_64 && le64(e, 16) == 0);
    let mut found = BTreeMap::new();
    for entry in usable {
        if let (Some(name), Some(path)) = (text(le32(entry, 4)), text(le32(entry, 8))) {
            // The loader takes the first.
            found.entry(name).or_insert_with(|| PathBuf::from(path));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_the_loader_loads() {
        let needs = needs(Path::new("/bin/ls")).unwrap();
        let loader = needs.loader.unwrap();
        // The loader itself knows best; it lists `name => path (address)`.
        let listed = std::process::Command::new(&loader).args(["--list", "/bin/ls"]).output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let expected: BTreeSet<&str> =
            listed.lines().filter_map(|l| Some(l.split_once(" => ")?.0.trim())).collect();
        assert_eq!(needs.libraries.keys().map(String::as_str).collect::<BTreeSet<_>>(), expected);
    }

    #[test]
    fn static_programs_need_nothing_and_scripts_are_refused() {
        assert_eq!(needs(Path::new("/bin/busybox")).unwrap(), Needs::default());
        let script = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(script.path(), "#!/bin/sh\n".repeat(20)).unwrap();
        assert!(needs(script.path()).unwrap_err().to_string().contains("ELF"));
    }

    #[test]
    fn damaged_files_are_errors_not_panics() {
        let whole = std::fs::read("/bin/ls").unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut state = 1_u32;
        for _ in 0..300 {
            let mut bytes = whole.clone();
            for _ in 0..8 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let at = usize::try_from(state >> 8).unwrap() % 1024;
                bytes[at] = state.to_le_bytes()[0];
            }
            std::fs::write(file.path(), &bytes).unwrap();
            let _ = Dynamic::read(file.path());
        }
        for cut in [0, 10, 64, 200, 1000] {
            std::fs::write(file.path(), &whole[..cut]).unwrap();
            assert!(Dynamic::read(file.path()).is_err());
        }
        assert!(parse_cache(&[b'x'; 100]).is_empty());
        let cache = std::fs::read("/etc/ld.so.cache").unwrap();
        (0..cache.len()).step_by(97).for_each(|n| drop(parse_cache(&cache[..n])));
    }
}
