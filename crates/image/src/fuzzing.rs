//! Entry points for fuzzers. Each takes any bytes, and must return: no panic, no file outside of its own temporary
//! ones, and no more time or memory than the limits allow.

use std::io::Cursor;

use crate::erofs::{self, BLOCK_SIZE, DataArea, Superblock};
use crate::layer::Applier;
use crate::store::{parse, parse_manifest};
use crate::tree::Tree;
use crate::{ImageConfiguration, Limits};

fn limits() -> Limits {
    Limits {
        layer_size: 16 << 20,
        file_size: 16 << 20,
        entries: 10_000,
        metadata_size: 4 << 20,
        sparse_segments: 1000,
        ..Limits::default()
    }
}

/// A layer's tar, twice, so that it also falls on a tree that is not empty; what it becomes is written as EROFS.
pub fn fuzz_layer(data: &[u8]) {
    let limits = limits();
    let (Ok(output), Ok(staging)) = (tempfile::tempfile(), tempfile::tempfile()) else { return };
    let mut area = DataArea::new(&output, "fuzz".into(), staging);
    let mut tree = Tree::new(&limits);
    let mut applier = Applier { tree: &mut tree, sink: &mut area, limits: &limits, entries: 0 };
    for _ in 0..2 {
        if applier.apply("fuzz", Cursor::new(data), &mut |_| {}).is_err() {
            break;
        }
    }
    // A layer that was refused half-way leaves a tree that must still be sound.
    let dropped = tree.take_dropped();
    if area.discard(&dropped).is_ok()
        && let Ok(size) = erofs::write(&tree, &mut area, [0; 16])
    {
        use std::os::unix::fs::FileExt;
        let mut block = [0; BLOCK_SIZE as usize];
        let superblock = output.read_exact_at(&mut block, 0).ok().and_then(|()| Superblock::decode(&block));
        assert_eq!(superblock.map(|superblock| u64::from(superblock.blocks) * BLOCK_SIZE), Some(size));
    }
}

/// A manifest, index or image configuration.
pub fn fuzz_document(data: &[u8]) {
    let _ = parse_manifest(data, "fuzz", &limits());
    let _ = parse::<oci_spec::image::ImageIndex>(data, "fuzz");
    let _ = parse::<ImageConfiguration>(data, "fuzz");
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use kapsel_testkit::fuzz::{Random, corpus};

    /// How long the mutations of one corpus run.
    const BUDGET: Duration = Duration::from_secs(4);
    const MUTATIONS: u32 = 4000;

    fn mutate(data: &mut Vec<u8>, random: &mut Random) {
        for _ in 0..1 + random.below(4) {
            if data.is_empty() {
                return;
            }
            let at = random.below(data.len());
            match random.below(5) {
                0 => data[at] ^= 1 << random.below(8),
                1 => data[at] = b"0177/.-=\0\xff\""[random.below(12).min(10)],
                2 => data.truncate(at),
                3 => {
                    let block = at / 512 * 512;
                    let end = (block + 512).min(data.len());
                    let copy = data[block..end].to_vec();
                    let to = random.below(data.len()) / 512 * 512;
                    data.splice(to..to, copy);
                }
                _ => {
                    let end = (at + random.below(16)).min(data.len());
                    data.drain(at..end);
                }
            }
        }
    }

    /// Makes the checksums of mutated headers right again, or few mutations would get past them.
    fn seal(data: &mut [u8]) {
        for block in data.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }

    fn run(name: &str, target: fn(&[u8]), finish: fn(&mut [u8])) {
        let corpus = corpus(env!("CARGO_MANIFEST_DIR"), name);
        corpus.iter().for_each(|data| target(data));
        let mut random = Random::new(0x9e37_79b9_7f4a_7c15);
        let deadline = Instant::now() + BUDGET;
        for _ in 0..MUTATIONS {
            let mut data = corpus[random.below(corpus.len())].clone();
            mutate(&mut data, &mut random);
            if random.below(4) > 0 {
                finish(&mut data);
            }
            target(&data);
            if Instant::now() > deadline {
                return;
            }
        }
    }

    #[test]
    fn layers() {
        run("layer", super::fuzz_layer, seal);
    }

    #[test]
    fn documents() {
        run("document", super::fuzz_document, |_| {});
    }
}
