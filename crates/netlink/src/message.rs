//! Messages: a header, a structure, attributes.

/// Bytes of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;

/// A request under construction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A request of a kind (`RTM_*`) with further flags (`NLM_F_*`) and the kind's structure as bytes.
    pub fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend(body);
        let mut message = Self { bytes };
        message.align();
        message
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(self, kind: u16, value: &[u8]) -> Self {
        self.nest(kind, |inner| {
            inner.bytes.extend(value);
        })
    }

    /// Adds an attribute with a number.
    #[must_use]
    pub fn with_number(self, kind: u16, value: u32) -> Self {
        self.with(kind, &value.to_ne_bytes())
    }

    /// Adds an attribute with a text that ends in NUL.
    #[must_use]
    pub fn with_text(self, kind: u16, text: &str) -> Self {
        self.nest(kind, |inner| {
            inner.bytes.extend(text.as_bytes());
            inner.bytes.push(0);
        })
    }

    /// Adds an attribute that holds attributes.
    #[must_use]
    pub fn with_nested(self, kind: u16, inside: impl FnOnce(Message) -> Message) -> Self {
        self.nest(kind, |inner| {
            let taken = Message { bytes: std::mem::take(&mut inner.bytes) };
            inner.bytes = inside(taken).bytes;
        })
    }

    fn nest(mut self, kind: u16, fill: impl FnOnce(&mut Message)) -> Self {
        let start = self.bytes.len();
        self.bytes.extend([0; 4]);
        fill(&mut self);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
        self.align();
        self
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The whole message, with its length and what the socket adds.
    pub(crate) fn finish(&self, flags: u16, sequence: u32) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        let flags = flags | u16::from_ne_bytes([bytes[6], bytes[7]]);
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes
    }
}

/// The attributes in `bytes`, by kind; ends at the first that is cut off.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    /// NLA_F_NESTED and NLA_F_NET_BYTEORDER.
    const FLAGS: u16 = 0xc000;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & !FLAGS;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let message = Message::new(16, 0, &[7; 5])
            .with_text(3, "eth0")
            .with_nested(18, |inner| inner.with_number(1, 1500).with(2, b"abc"))
            .with_number(4, 9);
        let bytes = message.finish(1, 77);
        assert_eq!(u32::from_ne_bytes(bytes[..4].try_into().unwrap()) as usize, bytes.len());
        assert_eq!(bytes.len() % 4, 0);
        let outer: Vec<_> = attributes(&bytes[HEADER + 8..]).collect();
        assert_eq!(outer[0], (3, &b"eth0\0"[..]));
        let inner: Vec<_> = attributes(outer[1].1).collect();
        assert_eq!(inner, [(1, &1500u32.to_ne_bytes()[..]), (2, &b"abc"[..])]);
        assert_eq!(outer[2], (4, &9u32.to_ne_bytes()[..]));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_run_for_ever(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            assert!(attributes(&bytes).count() <= bytes.len() / 4);
        }
    }
}
