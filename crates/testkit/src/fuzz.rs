//! What fuzzing by mutation needs in a test: a generator whose runs can be repeated, and a corpus in the tree.

use std::path::Path;

/// A small generator (xorshift64): the same seed gives the same run.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// One that begins with `seed`, which must not be 0.
    pub fn new(seed: u64) -> Self {
        assert_ne!(seed, 0, "xorshift stays at 0");
        Self(seed)
    }

    /// A number below `limit`; 0 when that is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        // The low bits are the weak ones.
        ((self.0 >> 11) % limit.max(1) as u64) as usize
    }

    /// One of several.
    pub fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len())]
    }
}

/// The files of `fuzz/corpus/NAME` in a crate's directory (`CARGO_MANIFEST_DIR`), of which there must be some, by their names.
pub fn corpus(of_crate: &str, name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(of_crate).join("fuzz/corpus").join(name);
    let mut files: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "the corpus {name} is empty");
    files.iter().map(|path| std::fs::read(path).unwrap()).collect()
}
