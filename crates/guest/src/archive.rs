//! Decompression, bounded.

use std::io::{self, Read};

/// The largest file that is taken from a kernel package, in bytes.
const MAX: usize = 256 << 20;

const GZIP: &[u8] = &[0x1f, 0x8b];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// The frame that Linux uses for LZ4: the legacy one.
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
/// Uncompressed size of each block of a legacy LZ4 frame but the last.
const LZ4_BLOCK: usize = 8 << 20;

/// Unpacks `bytes`, whatever they are packed with; bytes that are not packed come back as they are.
pub(crate) fn unpack(bytes: &[u8]) -> io::Result<Vec<u8>> {
    if bytes.starts_with(GZIP) {
        read(flate2::read::GzDecoder::new(bytes))
    } else if bytes.starts_with(XZ) {
        read(lzma_rust2::XzReader::new(bytes, false))
    } else if bytes.starts_with(ZSTD) {
        read(zstd::Decoder::with_buffer(bytes)?.single_frame())
    } else if bytes.starts_with(LZ4_LEGACY) {
        lz4_legacy(&bytes[LZ4_LEGACY.len()..])
    } else {
        Ok(bytes.to_vec())
    }
}

fn read(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    reader.take(MAX as u64 + 1).read_to_end(&mut out)?;
    if out.len() > MAX {
        return Err(io::Error::other(format!("unpacks to more than {} MiB", MAX >> 20)));
    }
    Ok(out)
}

fn lz4_legacy(mut bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    // A block is its packed size and its bytes. Linux appends the kernel's size, which is no block.
    while let Some((size, rest)) = bytes.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        if size == 0 || size > rest.len() {
            break;
        }
        let block = lz4_flex::block::decompress(&rest[..size], LZ4_BLOCK).map_err(io::Error::other)?;
        if out.len() + block.len() > MAX {
            return Err(io::Error::other(format!("unpacks to more than {} MiB", MAX >> 20)));
        }
        out.extend_from_slice(&block);
        bytes = &rest[size..];
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn text() -> Vec<u8> {
        (0..100_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect()
    }

    #[test]
    fn gzip_and_zstd() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text()).unwrap();
        assert!(unpack(&gzip.finish().unwrap()).unwrap() == text());
        assert!(unpack(&zstd::encode_all(text().as_slice(), 1).unwrap()).unwrap() == text());
    }

    #[test]
    fn legacy_lz4_with_the_size_that_linux_appends() {
        let mut packed = LZ4_LEGACY.to_vec();
        for part in text().chunks(300_000) {
            let block = lz4_flex::block::compress(part);
            packed.extend((block.len() as u32).to_le_bytes());
            packed.extend(block);
        }
        packed.extend((text().len() as u32).to_le_bytes());
        assert!(unpack(&packed).unwrap() == text());
    }

    #[test]
    fn plain_bytes_stay() {
        assert_eq!(unpack(b"\x7fELF").unwrap(), b"\x7fELF");
    }

    #[test]
    fn a_bomb_is_refused() {
        let bomb = zstd::encode_all(io::repeat(0).take(MAX as u64 + 1), 1).unwrap();
        assert!(unpack(&bomb).is_err());
    }
}
