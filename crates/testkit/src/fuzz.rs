//! Fuzzing by mutation in a test: a generator whose runs can be repeated, a corpus in the tree, and a bounded number of its mutations.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

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

/// How long a run shall go on, if somebody wants more than the tests' usual: `KAPSEL_FUZZ_SECONDS`.
pub fn longer() -> Option<Duration> {
    let seconds = std::env::var("KAPSEL_FUZZ_SECONDS").ok()?;
    Some(Duration::from_secs(seconds.parse().expect("KAPSEL_FUZZ_SECONDS is a number")))
}

/// The seed of a run: another one each time if it is a longer one.
pub fn seed() -> u64 {
    longer().map_or(0x9e37_79b9_7f4a_7c15, |_| {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64
    })
}

/// How long and how often the mutations of one corpus run, unless somebody wants more.
const BUDGET: Duration = Duration::from_secs(5);
const MUTATIONS: u64 = 5000;
/// The longest that one of them may take.
const ONE: Duration = Duration::from_secs(5);

/// Values that limits, offsets and counts stumble over, little-endian.
const NUMBERS: [&[u8]; 8] = [
    &[0; 4],
    &[0xff; 4],
    &[0xff; 8],
    &[0, 0, 0, 0x80],
    &[0xff, 0xff, 0xff, 0x7f],
    &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
    &[0, 0x10, 0, 0, 1, 0, 0, 0],
    &[0xff, 0xff],
];

fn mutate(data: &mut Vec<u8>, other: &[u8], words: &[&[u8]], random: &mut Random) {
    for _ in 0..=random.below(4) {
        // Most of what decides is at the beginning.
        let near = if random.below(2) == 0 { data.len().min(256) } else { data.len() };
        let at = random.below(near);
        if at >= data.len() {
            return;
        }
        let word = if random.below(2) == 0 { random.pick(&NUMBERS) } else { random.pick(words) };
        match random.below(7) {
            0 => data[at] ^= 1 << random.below(8),
            1 => data[at] = random.below(256) as u8,
            2 => data.truncate(at + 1),
            3 => drop(data.splice(at..at, word.iter().copied())),
            4 => data[at..].iter_mut().zip(word).for_each(|(byte, new)| *byte = *new),
            5 => drop(data.drain(at..(at + random.below(24)).min(data.len()))),
            _ => {
                let from = random.below(other.len());
                let to = (from + random.below(200)).min(other.len());
                data.splice(at..at, other[from..to].iter().copied());
            }
        }
    }
}

/// Gives `target` the corpus `name` of a crate, and mutations of it with `words` in them. `finish` makes a mutation pass the first
/// checks, three times out of four. What `target` panics with, or takes too long for, is kept in a file.
pub fn run(of_crate: &str, name: &str, words: &[&[u8]], target: fn(&[u8]), finish: fn(&mut Vec<u8>)) {
    let corpus = corpus(of_crate, name);
    corpus.iter().for_each(|data| target(data));
    let seed = seed();
    let (budget, mutations) = longer().map_or((BUDGET, MUTATIONS), |longer| (longer, u64::MAX));
    let (mut random, started) = (Random::new(seed), Instant::now());
    let mut count = 0;
    while count < mutations && started.elapsed() < budget {
        let mut data = corpus[random.below(corpus.len())].clone();
        let other = &corpus[random.below(corpus.len())];
        mutate(&mut data, other, words, &mut random);
        if random.below(4) > 0 {
            finish(&mut data);
        }
        let one = Instant::now();
        if std::panic::catch_unwind(|| target(&data)).is_err() || one.elapsed() > ONE {
            let failure = std::env::temp_dir().join(format!("kapsel-fuzz-{name}"));
            std::fs::write(&failure, &data).unwrap();
            panic!("mutation {count} of {name}, seed {seed:#x}, is in {}", failure.display());
        }
        count += 1;
    }
    println!("{name}: {count} mutations, seed {seed:#x}");
}
