//! Session tokens: the time at which one ends, and a code that only this monitor can make of it. So none has to be
//! remembered, however many a guest asks for.

use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// How long a token may be good, in seconds.
const TTL: std::ops::RangeInclusive<u32> = 1..=21_600;
/// The time's length, in bytes; the code follows.
const TIME: usize = 8;
/// The length of a token as text.
const TEXT: usize = 56;

/// Tokens are not good for so long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "Invalid time to live value provided for token: {0}. Please provide a value between {min} and {max}.",
    min = TTL.start(), max = TTL.end()
)]
pub struct InvalidTtl(pub u32);

/// Makes tokens and knows them again.
#[derive(Debug)]
pub struct Authority {
    code: Hmac<Sha256>,
    /// Times are counted from here.
    started: Instant,
}

impl Authority {
    /// One whose tokens no other knows.
    ///
    /// # Errors
    /// When the host gives no random key.
    pub fn new() -> std::io::Result<Self> {
        // A block of the hash, so that none of it is folded.
        let mut key = [0; 64];
        // So few bytes always come at once.
        rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())?;
        Ok(Authority { code: KeyInit::new(&key.into()), started: Instant::now() })
    }

    /// A token that is good for so many seconds.
    ///
    /// # Errors
    /// [`InvalidTtl`].
    pub fn issue(&self, seconds: u32) -> Result<String, InvalidTtl> {
        if !TTL.contains(&seconds) {
            return Err(InvalidTtl(seconds));
        }
        let end = self.now() + Duration::from_secs(seconds.into()).as_millis() as u64;
        let mut token = end.to_le_bytes().to_vec();
        token.extend(self.code.clone().chain_update(end.to_le_bytes()).finalize().into_bytes());
        Ok(STANDARD.encode(token))
    }

    /// Whether it is one of these, and still good.
    pub fn knows(&self, token: &str) -> bool {
        if token.len() != TEXT {
            return false;
        }
        let Ok(token) = STANDARD.decode(token) else { return false };
        let Some((time, code)) = token.split_first_chunk::<TIME>() else { return false };
        self.code.clone().chain_update(time).verify_slice(code).is_ok()
            && u64::from_le_bytes(*time) > self.now()
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_known_by_whoever_made_it_until_its_time_is_over() {
        let (authority, other) = (Authority::new().unwrap(), Authority::new().unwrap());
        let token = authority.issue(1).unwrap();
        assert_eq!(token.len(), TEXT);
        assert!(authority.knows(&token) && !other.knows(&token));
        let mut changed = token.clone().into_bytes();
        changed[3] = if changed[3] == b'A' { b'B' } else { b'A' };
        assert!(!authority.knows(std::str::from_utf8(&changed).unwrap()));
        for nonsense in ["", "x", &token[1..], &format!("{token}A"), &"=".repeat(TEXT)] {
            assert!(!authority.knows(nonsense), "{nonsense}");
        }
        std::thread::sleep(Duration::from_millis(1010));
        assert!(!authority.knows(&token));
    }

    #[test]
    fn no_token_is_good_for_ever() {
        let authority = Authority::new().unwrap();
        assert!(authority.issue(21_600).is_ok());
        assert_eq!(
            authority.issue(0).unwrap_err().to_string(),
            "Invalid time to live value provided for token: 0. Please provide a value between 1 and 21600."
        );
        assert_eq!(authority.issue(21_601), Err(InvalidTtl(21_601)));
    }
}
