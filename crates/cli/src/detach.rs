//! Watches typed keys for the sequence that lets go of a container.

/// What to do after some keys were typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    /// Pass these on.
    Pass(Vec<u8>),
    /// Pass these on, and let go: the sequence was typed.
    Detach(Vec<u8>),
}

/// Finds a sequence of keys in what is typed. The beginning of a sequence is held back until it is clear that it is
/// none, so an unfinished one never reaches the container.
#[derive(Debug)]
pub struct Detector {
    keys: Vec<u8>,
    /// How many of `keys` the last bytes typed were.
    matched: usize,
}

impl Detector {
    /// Watches for `keys`; for nothing when they are none.
    pub fn new(keys: Vec<u8>) -> Self {
        Detector { keys, matched: 0 }
    }

    /// Takes what was typed.
    pub fn feed(&mut self, typed: &[u8]) -> Typed {
        let mut pass = Vec::with_capacity(typed.len() + self.matched);
        for &byte in typed {
            self.step(byte, &mut pass);
            if !self.keys.is_empty() && self.matched == self.keys.len() {
                self.matched = 0;
                return Typed::Detach(pass);
            }
        }
        Typed::Pass(pass)
    }

    /// One byte: the longest end of (what matched + byte) that begins the sequence stays held back.
    fn step(&mut self, byte: u8, pass: &mut Vec<u8>) {
        let mut held = self.keys[..self.matched].to_vec();
        held.push(byte);
        let longest = (0..=held.len().min(self.keys.len()))
            .rev()
            .find(|&length| held.ends_with(&self.keys[..length]))
            .unwrap_or(0);
        pass.extend_from_slice(&held[..held.len() - longest]);
        self.matched = longest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pass(bytes: &[u8]) -> Typed {
        Typed::Pass(bytes.to_vec())
    }

    #[test]
    fn the_sequence_lets_go_also_in_pieces() {
        let mut keys = Detector::new(vec![16, 17]);
        assert_eq!(keys.feed(b"ls\x10"), pass(b"ls"));
        assert_eq!(keys.feed(b"\x11rest"), Typed::Detach(vec![]));
        assert_eq!(keys.feed(b"a\x10\x11"), Typed::Detach(b"a".to_vec()));
    }

    #[test]
    fn half_a_sequence_is_passed_on_when_it_is_none() {
        let mut keys = Detector::new(vec![16, 17]);
        assert_eq!(keys.feed(b"\x10"), pass(b""));
        assert_eq!(keys.feed(b"x"), pass(b"\x10x"));
        assert_eq!(keys.feed(b"\x10\x10\x11"), Typed::Detach(b"\x10".to_vec()));
    }

    #[test]
    fn a_sequence_that_begins_within_itself() {
        let mut keys = Detector::new(b"aab".to_vec());
        assert_eq!(keys.feed(b"aaab"), Typed::Detach(b"a".to_vec()));
    }

    proptest! {
        /// Without the whole sequence in it, everything typed arrives, in order, but for a held back beginning.
        #[test]
        fn nothing_is_lost(pieces in proptest::collection::vec(proptest::collection::vec(0u8..3, 0..6), 0..8)) {
            let mut keys = Detector::new(vec![1, 2, 1]);
            let typed: Vec<u8> = pieces.concat();
            let mut got = Vec::new();
            for piece in &pieces {
                match keys.feed(piece) {
                    Typed::Pass(bytes) => got.extend(bytes),
                    Typed::Detach(bytes) => {
                        got.extend(bytes);
                        got.extend([1, 2, 1]);
                        prop_assert!(typed.starts_with(&got));
                        return Ok(());
                    }
                }
            }
            prop_assert!(!typed.windows(3).any(|w| w == [1, 2, 1]));
            got.extend_from_slice(&keys.keys[..keys.matched]);
            prop_assert_eq!(got, typed);
        }

        #[test]
        fn without_keys_everything_passes(typed in proptest::collection::vec(any::<u8>(), 0..50)) {
            prop_assert_eq!(Detector::new(vec![]).feed(&typed), Typed::Pass(typed));
        }
    }
}
