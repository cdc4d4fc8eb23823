//! How much an image may ask for.

/// Bounds on what an image may make this library read, remember or write. Images are hostile input: each bound is
/// checked before the memory or the disk is taken, and exceeding it is [`Error::Limit`](crate::Error::Limit).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one manifest, index or image configuration.
    pub document_size: u64,
    /// Layers of one image.
    pub layers: usize,
    /// Bytes of one blob as stored (compressed).
    pub blob_size: u64,
    /// Bytes of one layer once decompressed.
    pub layer_size: u64,
    /// How many times larger than its blob a layer may become. Looked at only once a layer has grown past
    /// [`ratio_floor`](Limits::ratio_floor), because small files full of zeros are common and harmless.
    pub ratio: u64,
    /// Bytes that any layer may decompress to whatever its ratio.
    pub ratio_floor: u64,
    /// Entries (files, directories, links, whiteouts) in all layers together.
    pub entries: u64,
    /// Bytes of one path, and of a link's target.
    pub path_length: usize,
    /// Components of one path.
    pub path_depth: usize,
    /// Apparent bytes of one file, holes included.
    pub file_size: u64,
    /// Data segments of one sparse file.
    pub sparse_segments: usize,
    /// Bytes of one file's extended attributes (names and values).
    pub xattr_size: usize,
    /// Bytes of memory for names, link targets and extended attributes in all layers together.
    pub metadata_size: u64,
}

impl Default for Limits {
    /// Generous for real images (the largest public ones have about a million entries), tight for bombs: the tree of
    /// the worst image takes less than 1 GB of memory, some 200 bytes an entry and its names.
    fn default() -> Limits {
        Limits {
            document_size: 4 << 20,
            layers: 512,
            blob_size: 64 << 30,
            layer_size: 64 << 30,
            ratio: 1100,
            ratio_floor: 1 << 30,
            entries: 2_000_000,
            path_length: 4096,
            path_depth: 1024,
            file_size: 32 << 30,
            sparse_segments: 1 << 18,
            xattr_size: 64 << 10,
            metadata_size: 256 << 20,
        }
    }
}
