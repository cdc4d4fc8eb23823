//! The 512-byte header block (POSIX.1-1988 ustar, and its GNU variant).

use super::Timestamp;

pub(super) const BLOCK: usize = 512;

/// A header block whose checksum is right.
pub(super) struct Header<'a>(&'a [u8; BLOCK]);

impl<'a> Header<'a> {
    /// Checks the checksum. Some old writers summed signed bytes, so both sums are accepted, as everybody does.
    pub(super) fn parse(block: &'a [u8; BLOCK]) -> Result<Header<'a>, String> {
        let stored = number(&block[148..156]).ok_or("its header has no checksum")?;
        let (mut unsigned, mut signed) = (0i64, 0i64);
        for (i, &byte) in block.iter().enumerate() {
            let byte = if (148..156).contains(&i) { b' ' } else { byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        if stored != unsigned && stored != signed {
            return Err("its header's checksum is wrong".into());
        }
        Ok(Header(block))
    }

    pub(super) fn typeflag(&self) -> u8 {
        self.0[156]
    }

    /// The path: `prefix/name` in a ustar header, `name` alone otherwise (GNU uses the prefix field for other things).
    pub(super) fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.0[0..100]);
        let prefix = until_nul(&self.0[345..500]);
        if self.is_ustar() && !prefix.is_empty() { [prefix, b"/", name].concat() } else { name.to_vec() }
    }

    pub(super) fn link_target(&self) -> Vec<u8> {
        until_nul(&self.0[157..257]).to_vec()
    }

    pub(super) fn mode(&self) -> Option<i64> {
        number(&self.0[100..108])
    }

    pub(super) fn uid(&self) -> Option<i64> {
        number(&self.0[108..116])
    }

    pub(super) fn gid(&self) -> Option<i64> {
        number(&self.0[116..124])
    }

    pub(super) fn size(&self) -> Option<u64> {
        number(&self.0[124..136])?.try_into().ok()
    }

    pub(super) fn mtime(&self) -> Option<Timestamp> {
        Some(Timestamp { seconds: number(&self.0[136..148])?, nanoseconds: 0 })
    }

    pub(super) fn device(&self) -> Option<(u32, u32)> {
        let field = |range| number(&self.0[range]).and_then(|n| u32::try_from(n).ok());
        Some((field(329..337)?, field(337..345)?))
    }

    /// The four sparse descriptors of an old GNU sparse header.
    pub(super) fn gnu_sparse(&self) -> &'a [u8] {
        &self.0[386..482]
    }

    /// Whether extension blocks follow with more sparse descriptors.
    pub(super) fn gnu_is_extended(&self) -> bool {
        self.0[482] != 0
    }

    /// The apparent size of an old GNU sparse file.
    pub(super) fn gnu_real_size(&self) -> Option<u64> {
        number(&self.0[483..495])?.try_into().ok()
    }

    fn is_ustar(&self) -> bool {
        self.0[257..263] == *b"ustar\0"
    }
}

/// A numeric field: octal digits between spaces, ended by NUL or space; or, with the top bit set, big-endian base 256
/// in two's complement (GNU). An empty field is 0.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        // The sign is bit 6 of the first byte, since bit 7 only marks the encoding.
        let mut value = i128::from(first & 0x7f);
        if first & 0x40 != 0 {
            value -= 0x80;
        }
        for &byte in &field[1..] {
            value = value.checked_mul(256)?.checked_add(i128::from(byte))?;
        }
        return value.try_into().ok();
    }
    let text = until_nul(field).trim_ascii();
    let mut value = 0i64;
    for &byte in text {
        if !(b'0'..=b'7').contains(&byte) {
            return None;
        }
        value = value.checked_mul(8)?.checked_add(i64::from(byte - b'0'))?;
    }
    Some(value)
}

pub(super) fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&b| b == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_octal_and_base_256() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0"), Some(0));
        assert_eq!(number(b"0000648\0"), None);
        assert_eq!(number(&[0x80, 0, 0, 1, 0, 0, 0, 0]), Some(1 << 32));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(&[0xff, 0xff, 0xff, 0xfe]), Some(-2));
        let mut huge = [0xffu8; 12];
        huge[0] = 0xbf;
        assert_eq!(number(&huge), None, "larger than i64");
    }
}
