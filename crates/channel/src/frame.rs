//! Frames on the wire: yamux version 0 (<https://github.com/hashicorp/yamux/blob/master/spec.md>).

/// Bytes of a frame's header.
pub(crate) const HEADER: usize = 12;

/// Opens a stream.
pub(crate) const SYN: u16 = 1;
/// Acknowledges a stream.
pub(crate) const ACK: u16 = 2;
/// Half-closes a stream.
pub(crate) const FIN: u16 = 4;
/// Ends a stream at once.
pub(crate) const RST: u16 = 8;

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `length` bytes of a stream follow.
    Data,
    /// `length` more bytes may be sent on the stream.
    Window,
    /// `length` is an opaque value that the other side returns with ACK.
    Ping,
    /// The session ends.
    GoAway,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub kind: Kind,
    pub flags: u16,
    pub stream: u32,
    pub length: u32,
}

impl Header {
    pub(crate) fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[1] = match self.kind {
            Kind::Data => 0,
            Kind::Window => 1,
            Kind::Ping => 2,
            Kind::GoAway => 3,
        };
        bytes[2..4].copy_from_slice(&self.flags.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.stream.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// `None` when these bytes are no header of version 0.
    pub(crate) fn decode(bytes: &[u8; HEADER]) -> Option<Header> {
        let [version, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = *bytes;
        if version != 0 {
            return None;
        }
        let kind = match kind {
            0 => Kind::Data,
            1 => Kind::Window,
            2 => Kind::Ping,
            3 => Kind::GoAway,
            _ => return None,
        };
        Some(Header {
            kind,
            flags: u16::from_be_bytes([f0, f1]),
            stream: u32::from_be_bytes([s0, s1, s2, s3]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_encoding() {
        for kind in [Kind::Data, Kind::Window, Kind::Ping, Kind::GoAway] {
            let header = Header { kind, flags: SYN | FIN, stream: 0x0102_0304, length: 0xfffe_fdfc };
            assert_eq!(Header::decode(&header.encode()), Some(header));
        }
    }

    #[test]
    fn other_versions_and_kinds_are_refused() {
        assert_eq!(Header::decode(&[1; HEADER]), None);
        assert_eq!(Header::decode(&[0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }
}
