//! The kernel proper, out of a `vmlinuz`.
//!
//! Monitors that boot without firmware want the ELF file; distributions ship a `bzImage` that holds it compressed
//! (Documentation/arch/x86/boot.rst: `payload_offset`, `payload_length`).

use crate::archive;

const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// The ELF kernel in `bytes`, which are a bzImage or that ELF file itself.
///
/// # Errors
/// What is wrong with them.
pub fn vmlinux(bytes: &[u8]) -> Result<Vec<u8>, String> {
    if is_elf(bytes) {
        return Ok(bytes.to_vec());
    }
    let payload = payload(bytes).ok_or("neither an ELF file nor a bzImage of boot protocol 2.08 or later")?;
    let kernel =
        archive::unpack(payload).map_err(|error| format!("its payload cannot be unpacked: {error}"))?;
    if !is_elf(&kernel) {
        return Err(
            "its payload is not an x86-64 ELF file, or is packed in a way that is not known here".into()
        );
    }
    Ok(kernel)
}

/// What the kernel calls itself: the word after `Linux version ` in its banner.
pub(crate) fn release(vmlinux: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let after = |at: usize| {
        let word = vmlinux[at + BANNER.len()..].split(|byte| *byte == b' ').next()?;
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b".+-_~".contains(byte);
        (!word.is_empty() && word.len() <= 64 && word.iter().all(plain))
            .then(|| String::from_utf8_lossy(word).into_owned())
    };
    let starts = vmlinux.windows(BANNER.len()).enumerate().filter(|(_, window)| *window == BANNER);
    starts.filter_map(|(at, _)| after(at)).next()
}

fn is_elf(bytes: &[u8]) -> bool {
    // 64 bit, little endian, machine x86-64.
    bytes.starts_with(b"\x7fELF\x02\x01") && bytes.get(18..20) == Some(&[62, 0])
}

fn payload(bytes: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize);
    if bytes.get(MAGIC..MAGIC + 4)? != b"HdrS" || bytes.get(VERSION..VERSION + 2)? < &[8, 2][..] {
        return None;
    }
    let sectors = match *bytes.get(SETUP_SECTS)? {
        0 => 4,
        n => n as usize,
    };
    let start = (sectors + 1) * 512 + word(PAYLOAD_OFFSET)?;
    bytes.get(start..start.checked_add(word(PAYLOAD_LENGTH)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn elf() -> Vec<u8> {
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(18, 0);
        elf.extend([62, 0, 1, 2, 3]);
        elf
    }

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[SETUP_SECTS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&[15, 2]);
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend(payload);
        image
    }

    #[test]
    fn out_of_a_bzimage_and_as_it_is() {
        assert_eq!(vmlinux(&elf()).unwrap(), elf());
        let packed = zstd::encode_all(elf().as_slice(), 1).unwrap();
        assert_eq!(vmlinux(&bzimage(&packed)).unwrap(), elf());
    }

    #[test]
    fn what_is_no_kernel_is_told() {
        assert!(vmlinux(b"#!/bin/sh\n").unwrap_err().contains("neither"));
        assert!(vmlinux(&bzimage(b"BZh9")).unwrap_err().contains("not known"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..2000), header: bool) {
            if header && bytes.len() > 0x250 {
                bytes[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
                bytes[VERSION] = 15;
                bytes[VERSION + 1] = 2;
            }
            let _ = vmlinux(&bytes);
        }
    }
}
