//! The root file system of an image, as an EROFS file that is made once.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::image::Descriptor;
use serde::Serialize;

use crate::decode::Decoder;
use crate::erofs::{self, BLOCK_SIZE, DataArea, Superblock, WRITER_VERSION};
use crate::error::{IoContext, Result};
use crate::layer::Applier;
use crate::progress::Phase;
use crate::store::{Claim, Claimed, Image, LOCK_POLL, Lock, LockMode, Store, digest_of, remove_file, verify};
use crate::tree::Tree;
use crate::{DISK_CAPACITY, Digest, Error, ImageConfiguration, Progress};

/// How long another process may take to make the same file before this one gives up waiting.
const PATIENCE: Duration = Duration::from_secs(30 * 60);

/// The root file system of an image: a read-only EROFS disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rootfs {
    /// The file, of apparent size [`DISK_CAPACITY`](crate::DISK_CAPACITY). Its name is bound to the content of the
    /// image's layers and to the version of the writer, so it never changes once it is there.
    pub path: PathBuf,
    /// Bytes of the file system itself.
    pub size: u64,
    /// Bytes that the file takes on the disk.
    pub allocated: u64,
}

/// The rootfs of the image, made if it is not there.
pub(crate) fn rootfs(store: &Store, image: &Image, progress: &dyn Progress) -> Result<Rootfs> {
    let _lock = store.keep_blobs()?;
    let manifest = store.blobs().manifest(&image.digest)?;
    let config = store.blobs().config(&manifest)?;
    let diff_ids = diff_ids(&config)?;
    let chain = chain_id(&diff_ids);
    let target = path(store, &chain);
    let partial = store.layout().partial().join(file_name(&chain));
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Claim::attempt(&partial, &target)? {
            Claimed::Exists => match open(&target)? {
                Some(rootfs) => return Ok(rootfs),
                None => remove_damaged(store, &target)?,
            },
            Claimed::Busy if Instant::now() > deadline => {
                let holder = "another process is making the same root file system";
                return Err(Error::Busy { path: store.layout().dir.clone(), holder });
            }
            Claimed::Busy => std::thread::sleep(LOCK_POLL),
            Claimed::Mine(claim) => {
                match build(store, &claim, manifest.layers(), &diff_ids, &chain, progress) {
                    Ok(()) => claim.complete()?,
                    Err(error) => {
                        // The cause is worth more than an error of the clean-up, which the next attempt would repeat.
                        let _ = claim.discard();
                        return Err(error);
                    }
                }
            }
        }
    }
}

/// The rootfs of an image with this configuration, if it has been made.
pub(crate) fn existing(store: &Store, config: &ImageConfiguration) -> Result<Option<Rootfs>> {
    open(&path(store, &chain_id(&diff_ids(config)?)))
}

/// Where the rootfs of an image with this configuration is or will be.
pub(crate) fn path_for(store: &Store, config: &ImageConfiguration) -> Result<PathBuf> {
    Ok(path(store, &chain_id(&diff_ids(config)?)))
}

fn path(store: &Store, chain: &Digest) -> PathBuf {
    store.layout().rootfs().join(file_name(chain))
}

/// The file's name is bound to all that its bytes depend on.
fn file_name(chain: &Digest) -> String {
    format!("sha256-{}.v{WRITER_VERSION}.erofs", chain.hex())
}

fn diff_ids(config: &ImageConfiguration) -> Result<Vec<Digest>> {
    config.rootfs().diff_ids().iter().map(|id| id.parse()).collect()
}

/// The digest that stands for a stack of layers (OCI image spec, "Layer ChainID").
fn chain_id(diff_ids: &[Digest]) -> Digest {
    let mut ids = diff_ids.iter();
    let first = ids.next().copied().unwrap_or_else(|| Digest::of(b""));
    ids.fold(first, |chain, id| Digest::of(format!("{chain} {id}").as_bytes()))
}

/// Opens a finished file; `None` if it is not there or is not one (a disk error, or somebody's edit).
fn open(path: &Path) -> Result<Option<Rootfs>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("open", path),
    };
    let metadata = file.metadata().context("inspect", path)?;
    let mut block = [0; BLOCK_SIZE as usize];
    let superblock = file.read_exact_at(&mut block, 0).ok().and_then(|()| Superblock::decode(&block));
    Ok(superblock.filter(|_| metadata.len() == DISK_CAPACITY).map(|superblock| Rootfs {
        path: path.to_owned(),
        size: u64::from(superblock.blocks) * BLOCK_SIZE,
        allocated: metadata.blocks() * 512,
    }))
}

/// Removes a damaged file, unless somebody has made a good one meanwhile.
fn remove_damaged(store: &Store, target: &Path) -> Result<()> {
    let holder = "another process changes its index";
    let _lock =
        Lock::take(&store.layout().index_lock(), LockMode::Exclusive, Duration::from_secs(30), holder)?;
    if open(target)?.is_none() {
        tracing::warn!("{} is damaged and will be made again", target.display());
        remove_file(target)?;
    }
    Ok(())
}

/// Merges the layers into the claim's file. Every layer is verified against its diff_id, so that the file's name,
/// which is made of them, is true.
fn build(
    store: &Store,
    claim: &Claim,
    layers: &[Descriptor],
    diff_ids: &[Digest],
    chain: &Digest,
    progress: &dyn Progress,
) -> Result<()> {
    // A killed process may have left something in it.
    claim.file.set_len(0).context("truncate", claim.partial())?;
    let temporary = store.layout().temporary();
    let staging = tempfile::tempfile_in(&temporary).context("create a file in", &temporary)?;
    let mut area = DataArea::new(&claim.file, claim.partial().to_owned(), staging);
    let mut tree = Tree::new(store.limits());
    let mut entries = 0;
    let mut upcoming = layers.first().map(|layer| decoder(store, layer));
    for (i, (layer, diff_id)) in layers.iter().zip(diff_ids).enumerate() {
        let Some(decoder) = upcoming.take() else { break };
        let (label, mut decoder, total) = decoder?;
        // The next layer's first pieces are decoded while this one is still being merged.
        upcoming = layers.get(i + 1).map(|layer| self::decoder(store, layer));
        let mut item = progress.start(Phase::Unpack, &digest_of(layer)?.short(), total);
        let limits = store.limits();
        let mut applier = Applier { tree: &mut tree, sink: &mut area, limits, entries };
        applier.apply(&label, &mut decoder, &mut |bytes| item.advance(bytes))?;
        entries = applier.entries;
        verify(&format!("the content of layer {label}"), diff_id, &decoder.digest()?)?;
        area.discard(&tree.take_dropped())?;
        item.done();
    }
    erofs::write(&tree, &mut area, uuid(chain))?;
    claim.file.set_len(DISK_CAPACITY).context("extend", claim.partial())
}

/// Begins to decode a layer: its label, its content, and the content's size if that is known.
fn decoder(store: &Store, layer: &Descriptor) -> Result<(String, Decoder, Option<u64>)> {
    let digest = digest_of(layer)?;
    let (file, size) = store.blobs().open(&digest)?;
    let label = digest.to_string();
    let decoder = Decoder::start(file, size, &label, store.limits())?;
    let uncompressed =
        !layer.media_type().as_ref().contains('+') && !layer.media_type().as_ref().contains("gzip");
    Ok((label, decoder, uncompressed.then_some(size)))
}

/// A UUID that is fixed for the content (RFC 9562, version 8).
fn uuid(chain: &Digest) -> [u8; 16] {
    let digest = Digest::of(format!("{chain} v{WRITER_VERSION}").as_bytes());
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest.as_bytes()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}
