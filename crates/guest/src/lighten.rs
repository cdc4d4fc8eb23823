//! Leaves out of a module what its kernel would read for nothing.
//!
//! - The types of its structures (`.BTF`), for programs in BPF that nobody runs there. Linux checks them against its own while it loads
//!   the module; with those of all modules this was the larger part of loading them.
//! - Its signature, which is computed and then found to be by a key that the kernel was told not to load. The modules come from
//!   the package that the kernel comes from, which apt has verified, and with the kernel.

/// What ends a signed module (include/linux/module_signature.h).
const MAGIC: &[u8] = b"~Module signature appended~\n";
/// Before it: `struct module_signature`, whose last four bytes are the length of the signature before that, big-endian.
const TRAILER: usize = 12;

/// ELF64: where the section headers are, their size and number, and which one is of the names.
const SECTIONS: usize = 0x28;
const ENTRY_SIZE: usize = 0x3a;
const ENTRIES: usize = 0x3c;
const NAMES: usize = 0x3e;
/// A section header: name and type, offset and size of the content, and its own length.
const TYPE: usize = 4;
const OFFSET: usize = 24;
const SIZE: usize = 32;
const HEADER: usize = 64;

/// The module without all that. What is no ELF file for x86-64 stays as it is.
pub(crate) fn lighten(mut module: Vec<u8>) -> Vec<u8> {
    if let Some(len) = unsigned_len(&module) {
        module.truncate(len);
    }
    for header in types(&module).unwrap_or_default() {
        // No name, no type, no content: an unused header.
        module[header..header + TYPE + 4].fill(0);
        module[header + SIZE..header + SIZE + 8].fill(0);
    }
    module
}

/// How much of a signed module is before its signature.
fn unsigned_len(module: &[u8]) -> Option<usize> {
    let rest = module.strip_suffix(MAGIC)?;
    let end = rest.len().checked_sub(TRAILER)?;
    let len = u32::from_be_bytes(rest[end + TRAILER - 4..].try_into().ok()?);
    end.checked_sub(len as usize)
}

/// Where the headers of the sections of types are.
fn types(module: &[u8]) -> Option<Vec<usize>> {
    if !module.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let half = |at: usize| Some(u16::from_le_bytes(module.get(at..at + 2)?.try_into().ok()?) as usize);
    let word =
        |at: usize| Some(u32::from_le_bytes(module.get(at..at.checked_add(4)?)?.try_into().ok()?) as usize);
    let long = |at: usize| {
        usize::try_from(u64::from_le_bytes(module.get(at..at.checked_add(8)?)?.try_into().ok()?)).ok()
    };
    if half(ENTRY_SIZE)? != HEADER {
        return None;
    }
    let first = long(SECTIONS)?;
    let header = |n: usize| first.checked_add(n * HEADER);
    let names = header(half(NAMES)?)?;
    let names = module.get(long(names.checked_add(OFFSET)?)?..)?.get(..long(names + SIZE)?)?;
    let mut found = Vec::new();
    for n in 0..half(ENTRIES)? {
        let header = header(n)?;
        let name = names.get(word(header)?..)?.split(|byte| *byte == 0).next()?;
        if matches!(name, b".BTF" | b".BTF.base") && module.len() - header >= HEADER {
            found.push(header);
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A module of two sections, `.BTF` and the names, and a signature of `signature` bytes.
    fn module(signature: u32) -> Vec<u8> {
        let names = b"\0.BTF\0.shstrtab\0";
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(64, 0);
        let content = elf.len();
        elf.extend(b"types");
        let at = elf.len();
        elf.extend(names);
        let sections = elf.len();
        for (name, kind, offset, size) in [(1u32, 1u32, content, 5usize), (6, 3, at, names.len())] {
            let mut header = [0; HEADER];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[TYPE..TYPE + 4].copy_from_slice(&kind.to_le_bytes());
            header[OFFSET..OFFSET + 8].copy_from_slice(&(offset as u64).to_le_bytes());
            header[SIZE..SIZE + 8].copy_from_slice(&(size as u64).to_le_bytes());
            elf.extend(header);
        }
        elf[SECTIONS..SECTIONS + 8].copy_from_slice(&(sections as u64).to_le_bytes());
        for (at, value) in [(ENTRY_SIZE, HEADER), (ENTRIES, 2), (NAMES, 1)] {
            elf[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
        }
        if signature > 0 {
            elf.extend(vec![7; signature as usize]);
            elf.extend([0; TRAILER - 4]);
            elf.extend(signature.to_be_bytes());
            elf.extend(MAGIC);
        }
        elf
    }

    #[test]
    fn types_and_signature_go_and_the_rest_stays() {
        let (plain, light) = (module(0), lighten(module(300)));
        assert_eq!(light.len(), plain.len());
        assert_eq!(types(&plain).unwrap().len(), 1);
        assert_eq!(types(&light).unwrap(), [0usize; 0]);
        let header = types(&plain).unwrap()[0];
        assert!(light[header + SIZE..header + SIZE + 8].iter().all(|byte| *byte == 0));
        assert_eq!(light[..header], plain[..header]);
        assert_eq!(light[header + HEADER..], plain[header + HEADER..]);
        assert_eq!(lighten(light.clone()), light);
    }

    #[test]
    fn what_is_no_module_stays_as_it_is() {
        for bytes in [&b""[..], b"module", b"\x7fELF\x02\x01", MAGIC] {
            assert_eq!(lighten(bytes.to_vec()), bytes);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(at in 0usize..300, value: u8, cut in 0usize..600) {
            let mut bytes = module(40);
            let len = bytes.len();
            bytes[at % len] = value;
            bytes.truncate(cut);
            let _ = lighten(bytes);
        }
    }
}
