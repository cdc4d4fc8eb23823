//! Applying a layer's tar stream to the tree (OCI image spec, "Image Layer Filesystem Changeset").
//!
//! When a layer names one path several times, the last entry wins, as it would with `tar -x`. Whiteouts hide what
//! *lower* layers have, wherever in the layer they stand.

use std::io::{self, BufRead};

use crate::tar::{Entry, Kind, Reader, Segment, TarError};
use crate::tree::{Content, Metadata, NewNode, Tree, TreeError, Xattr, lossy};
use crate::{Error, Limits};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names with this beginning are AUFS's own bookkeeping, which Docker skips too.
const WHITEOUT_META: &[u8] = b".wh..wh.";

/// Takes the data of regular files.
pub(crate) trait ContentSink {
    /// A file of `size` bytes begins; `xattr_size` is what its attributes will take beside its inode.
    fn begin(&mut self, size: u64, xattrs: &[Xattr]) -> Result<(), Error>;
    /// The next bytes of the file.
    fn write(&mut self, data: &[u8]) -> Result<(), Error>;
    /// The next `length` bytes of the file are a hole.
    fn hole(&mut self, length: u64) -> Result<(), Error>;
    /// The file is complete.
    fn end(&mut self) -> Result<Content, Error>;
}

/// Applies layers one after the other.
pub(crate) struct Applier<'a, S> {
    pub tree: &'a mut Tree,
    pub sink: &'a mut S,
    pub limits: &'a Limits,
    /// Entries of all layers so far.
    pub entries: u64,
}

impl<S: ContentSink> Applier<'_, S> {
    /// Applies the layer that `input` gives. `label` names it in errors; `on_bytes` is told of progress in the tar.
    pub(crate) fn apply(
        &mut self,
        label: &str,
        input: impl BufRead,
        on_bytes: &mut dyn FnMut(u64),
    ) -> Result<(), Error> {
        let mut reader = Reader::new(input, self.limits);
        let mut reported = 0;
        while let Some(entry) = reader.next_entry().map_err(|error| tar_error(label, error))? {
            self.entries += 1;
            if self.entries > self.limits.entries {
                let limit = self.limits.entries;
                return Err(Error::limit(format!("an image of more than {limit} entries"), "entries", limit));
            }
            let path = entry.path.clone();
            self.entry(label, entry, &mut reader).map_err(|error| match error {
                Failure::Tree(error) => tree_error(label, &path, error),
                Failure::Tar(error) => tar_error(label, error),
                Failure::Other(error) => error,
            })?;
            on_bytes(reader.position() - reported);
            reported = reader.position();
        }
        reader.drain().map_err(|error| tar_error(label, error))?;
        on_bytes(reader.position() - reported);
        self.tree.next_layer();
        Ok(())
    }

    fn entry<R: BufRead>(
        &mut self,
        _label: &str,
        entry: Entry,
        reader: &mut Reader<'_, R>,
    ) -> Result<(), Failure> {
        let path = trim_slashes(&entry.path);
        let (parent, name) = match path.iter().rposition(|&b| b == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&path[..0], path),
        };
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if name == OPAQUE {
                self.tree.opaque(parent)?;
            } else if !name.starts_with(WHITEOUT_META) {
                if matches!(hidden, b"" | b"." | b"..") {
                    return Err(TreeError::Refused("it is a whiteout of nothing".into()).into());
                }
                self.tree.whiteout(&[parent, b"/", hidden].concat())?;
            }
            return Ok(());
        }
        let metadata = Metadata {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: xattrs(entry.xattrs),
        };
        let node = match entry.kind {
            Kind::HardLink { target } => return Ok(self.tree.hard_link(path, &target)?),
            Kind::Directory => NewNode::Directory,
            Kind::Symlink { target } if target.is_empty() => {
                return Err(TreeError::Refused("it is a symbolic link to nothing".into()).into());
            }
            Kind::Symlink { target } => NewNode::Symlink(target.into()),
            Kind::CharDevice { major, minor } => NewNode::CharDevice { major, minor },
            Kind::BlockDevice { major, minor } => NewNode::BlockDevice { major, minor },
            Kind::Fifo => NewNode::Fifo,
            Kind::File => NewNode::File(self.content(entry.size, entry.segments, &metadata, reader)?),
        };
        Ok(self.tree.insert(path, metadata, node)?)
    }

    /// Hands a file's data to the sink.
    fn content<R: BufRead>(
        &mut self,
        size: u64,
        segments: Option<Vec<Segment>>,
        metadata: &Metadata,
        reader: &mut Reader<'_, R>,
    ) -> Result<Content, Failure> {
        self.sink.begin(size, &metadata.xattrs)?;
        let mut position = 0;
        for Segment { offset, length } in
            segments.unwrap_or_else(|| vec![Segment { offset: 0, length: size }])
        {
            if offset > position {
                self.sink.hole(offset - position)?;
            }
            let mut left = length;
            while left > 0 {
                let data = reader.data()?;
                let data = &data[..usize::try_from(left).map_or(data.len(), |left| left.min(data.len()))];
                self.sink.write(data)?;
                let taken = data.len();
                left -= taken as u64;
                reader.consume(taken);
            }
            position = offset + length;
        }
        if size > position {
            self.sink.hole(size - position)?;
        }
        Ok(self.sink.end()?)
    }
}

/// Leaves out what must not come from a layer: overlayfs would obey its own attributes when the rootfs becomes a lower
/// directory, so that a layer could redirect and hide files in ways that this library does not see.
fn xattrs(xattrs: Vec<(Vec<u8>, Vec<u8>)>) -> Box<[Xattr]> {
    let kept = xattrs
        .into_iter()
        .filter(|(name, _)| !name.starts_with(b"trusted.overlay.") && !name.starts_with(b"user.overlay."));
    let mut kept: Vec<Xattr> =
        kept.map(|(name, value)| Xattr { name: name.into(), value: value.into() }).collect();
    kept.sort();
    kept.into()
}

fn trim_slashes(mut path: &[u8]) -> &[u8] {
    loop {
        path = match path {
            [rest @ .., b'/'] => rest,
            [rest @ .., b'/', b'.'] => rest,
            _ => return path,
        }
    }
}

enum Failure {
    Tree(TreeError),
    Tar(TarError),
    Other(Error),
}

impl From<TreeError> for Failure {
    fn from(error: TreeError) -> Failure {
        Failure::Tree(error)
    }
}

impl From<TarError> for Failure {
    fn from(error: TarError) -> Failure {
        Failure::Tar(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Other(error)
    }
}

fn tree_error(label: &str, path: &[u8], error: TreeError) -> Error {
    match error {
        TreeError::Refused(reason) => Error::Layer { layer: label.into(), entry: lossy(path), reason },
        TreeError::Limit { what, name, limit } => {
            Error::limit(format!("{what} in layer {label}"), name, limit)
        }
    }
}

/// Names the layer in an error of the tar reader, and takes out errors that came through the input's own reader.
pub(crate) fn tar_error(label: &str, error: TarError) -> Error {
    match error {
        TarError::Malformed { entry, reason } => {
            Error::Layer { layer: label.into(), entry: lossy(&entry), reason }
        }
        TarError::Limit { what, name, limit } => {
            Error::limit(format!("{what} in layer {label}"), name, limit)
        }
        TarError::Io(error) => match error.downcast::<Error>() {
            Ok(error) => error,
            Err(error) => stream_error(label, error),
        },
    }
}

fn stream_error(label: &str, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
            Error::malformed(format!("layer {label}"), error)
        }
        _ => Error::malformed(format!("layer {label}"), format!("it cannot be decompressed: {error}")),
    }
}
