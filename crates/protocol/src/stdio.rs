//! How streams to [`crate::STDIO_PORT`] begin.
//!
//! The host makes a [`Token`], names it in Create, Exec or Copy, and opens one stream for each of the process's standard
//! streams, in any order, before or after the request. Each stream begins with one line, the [`Header`]; all that follows
//! is the process's data, binary.
//!
//! - stdin: the host's half-close is the process's end of file.
//! - stdout, stderr: the agent's half-close says that everything was delivered.
//! - tty: both directions on one stream.
//!
//! The agent reads from a stream, and from the process, only as fast as the other side takes: a process whose output
//! nobody reads blocks, and nothing else does.

use std::{fmt, str::FromStr};

/// Pairs a process's streams with the request that starts it: 128 bits, written as 32 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token([u8; Token::LEN]);

impl Token {
    /// The digits of a token.
    pub const LEN: usize = 32;

    /// A token from 128 random bits, which must come from the system's random number generator and be used once.
    pub fn from_random(bits: u128) -> Self {
        let mut digits = [0; Self::LEN];
        for (i, digit) in digits.iter_mut().enumerate() {
            let nibble = (bits >> (4 * (Self::LEN - 1 - i))) as usize & 0xf;
            *digit = b"0123456789abcdef"[nibble];
        }
        Self(digits)
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        // Only hexadecimal digits are ever stored.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl FromStr for Token {
    type Err = HeaderError;

    fn from_str(s: &str) -> Result<Self, HeaderError> {
        let digits: [u8; Self::LEN] = s.as_bytes().try_into().map_err(|_| HeaderError::Token)?;
        match digits.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            true => Ok(Self(digits)),
            false => Err(HeaderError::Token),
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The rest would let a reader of a log take over a stream.
        write!(f, "Token({}…)", self.as_str().get(..8).unwrap_or_default())
    }
}

/// Which of a process's streams one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Host to guest.
    Stdin,
    /// Guest to host.
    Stdout,
    /// Guest to host.
    Stderr,
    /// Both directions.
    Tty,
}

impl Kind {
    /// The word in the header.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Stdin => "stdin",
            Kind::Stdout => "stdout",
            Kind::Stderr => "stderr",
            Kind::Tty => "tty",
        }
    }
}

/// The first line of a stream: `"<token> <stdin|stdout|stderr|tty>\n"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Names the process or copy.
    pub token: Token,
    /// Names the stream of it.
    pub kind: Kind,
}

impl Header {
    /// The longest header, with its newline, in bytes. A reader gives up after that many.
    pub const MAX: usize = Token::LEN + 1 + "stdout".len() + 1;
    /// The shortest header, with its newline, in bytes. A reader may ask for that many at once.
    pub const MIN: usize = Token::LEN + 1 + "tty".len() + 1;

    /// Parses a header without its newline.
    ///
    /// # Errors
    /// When it is not exactly a token, one space and one of the four words.
    pub fn parse(line: &[u8]) -> Result<Self, HeaderError> {
        let line = std::str::from_utf8(line).map_err(|_| HeaderError::Shape)?;
        let (token, kind) = line.split_once(' ').ok_or(HeaderError::Shape)?;
        let kind = match kind {
            "stdin" => Kind::Stdin,
            "stdout" => Kind::Stdout,
            "stderr" => Kind::Stderr,
            "tty" => Kind::Tty,
            _ => return Err(HeaderError::Kind),
        };
        Ok(Self { token: token.parse()?, kind })
    }
}

impl fmt::Display for Header {
    /// With the newline.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.token.as_str(), self.kind.as_str())
    }
}

/// Why the first line of a stream is no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not two words, or no text.
    #[error("a stream must begin with \"<token> <stdin|stdout|stderr|tty>\"")]
    Shape,
    /// The first word.
    #[error("a stream token must be {} lower-case hexadecimal digits", Token::LEN)]
    Token,
    /// The second word.
    #[error("a stream must be stdin, stdout, stderr or tty")]
    Kind,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn debug_hides_most_of_a_token() {
        let token = Token::from_random(u128::MAX);
        assert_eq!(format!("{token:?}"), "Token(ffffffff…)");
    }

    proptest! {
        #[test]
        fn headers_survive_the_wire(bits: u128, kind in 0usize..4) {
            let kind = [Kind::Stdin, Kind::Stdout, Kind::Stderr, Kind::Tty][kind];
            let header = Header { token: Token::from_random(bits), kind };
            let line = header.to_string();
            prop_assert!((Header::MIN..=Header::MAX).contains(&line.len()));
            prop_assert_eq!(Header::parse(line.trim_end().as_bytes()), Ok(header));
            prop_assert_eq!(u128::from_str_radix(header.token.as_str(), 16), Ok(bits));
        }

        #[test]
        fn no_bytes_make_the_parser_panic(line in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(header) = Header::parse(&line) {
                let written = header.to_string();
                prop_assert_eq!(written.trim_end().as_bytes(), &line[..]);
            }
        }
    }
}
