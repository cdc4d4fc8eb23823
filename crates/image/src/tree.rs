//! The merged file tree of an image's layers, in memory.
//!
//! Paths of layers are resolved here, against the tree itself: symbolic links mean what they will mean inside the
//! container, `..` stops at the root, and the host's file system is never asked. The file *contents* are elsewhere; the
//! tree knows only where ([`Content`]).

use std::collections::BTreeMap;

use crate::Limits;
use crate::tar::Timestamp;

/// Names an inode of a [`Tree`].
pub(crate) type InodeId = u32;

/// The root directory.
pub(crate) const ROOT: InodeId = 0;

/// How many symbolic links one path may lead through, as in Linux.
const MAX_SYMLINKS: u32 = 40;

/// The longest name of a directory entry, as in Linux (`NAME_MAX`) and EROFS.
pub(crate) const MAX_NAME: usize = 255;

/// Why the tree refuses an operation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TreeError {
    /// No layer may do this.
    Refused(String),
    /// A field of [`Limits`] is exceeded.
    Limit { what: String, name: &'static str, limit: u64 },
}

fn refused(reason: impl Into<String>) -> TreeError {
    TreeError::Refused(reason.into())
}

type Result<T> = std::result::Result<T, TreeError>;

/// The bytes of a regular file, in the terms of whoever stores them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Content {
    /// Apparent size in bytes.
    pub size: u64,
    /// The first data block.
    pub block: u32,
    /// The place of the file's last, partial block in the staging area, where it is to stand beside the inode.
    pub tail: Option<u64>,
}

/// What a file is, with what only that kind has.
#[derive(Debug)]
pub(crate) enum Node {
    File(Content),
    Directory(Directory),
    Symlink(Box<[u8]>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

/// A directory's entries, sorted by their bytes.
#[derive(Debug)]
pub(crate) struct Directory {
    pub entries: BTreeMap<Box<[u8]>, Dentry>,
    pub parent: InodeId,
    depth: usize,
    /// The layer that has already hidden everything below it in this directory and its subdirectories.
    cleared_in: u32,
}

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dentry {
    pub inode: InodeId,
    /// The last layer that has this name among its entries.
    layer: u32,
}

/// What all kinds of files have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// Permission bits, with set-user-id, set-group-id and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    /// Names and values, sorted by name.
    pub xattrs: Box<[Xattr]>,
}

/// An extended attribute.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Xattr {
    pub name: Box<[u8]>,
    pub value: Box<[u8]>,
}

#[derive(Debug)]
pub(crate) struct Inode {
    pub metadata: Metadata,
    pub node: Node,
    /// Names that a file has. A directory has one; its `st_nlink` is another matter.
    pub links: u32,
}

/// Where a path leads.
enum Place {
    /// To the root directory.
    Root,
    /// To a name, used or not, in a directory.
    In(InodeId, Box<[u8]>),
    /// Into a directory that is not there.
    Missing,
}

/// A tree that layers are applied to, from the lowest to the highest.
#[derive(Debug)]
pub(crate) struct Tree {
    inodes: Vec<Option<Inode>>,
    free: Vec<InodeId>,
    layer: u32,
    limits: Limits,
    /// Bytes of names, targets and attributes added so far. Only grows, so that it also bounds the work.
    metadata_size: u64,
    /// Contents of files that are gone.
    dropped: Vec<Content>,
}

impl Tree {
    /// An empty tree: a root directory with mode 0755 that belongs to root.
    pub(crate) fn new(limits: &Limits) -> Tree {
        let root =
            Inode { metadata: implied_directory(), node: Node::Directory(directory(ROOT, 0)), links: 1 };
        Tree {
            inodes: vec![Some(root)],
            free: Vec::new(),
            layer: 1,
            limits: limits.clone(),
            metadata_size: 0,
            dropped: Vec::new(),
        }
    }

    /// The next layer begins.
    pub(crate) fn next_layer(&mut self) {
        self.layer += 1;
    }

    /// The inode. Ids come from this tree and stay valid as long as a name leads to them.
    pub(crate) fn inode(&self, id: InodeId) -> &Inode {
        self.inodes[id as usize].as_ref().expect("an id of a live inode")
    }

    /// One more than the largest id.
    pub(crate) fn id_limit(&self) -> usize {
        self.inodes.len()
    }

    /// The directory with the id, if it is one.
    pub(crate) fn directory(&self, id: InodeId) -> Option<&Directory> {
        match &self.inode(id).node {
            Node::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    /// The contents of files that are gone since the last call.
    pub(crate) fn take_dropped(&mut self) -> Vec<Content> {
        std::mem::take(&mut self.dropped)
    }

    /// Adds a file, link or device at `path`, or a directory. What is there already is replaced, a directory with all
    /// that is in it; but a directory upon a directory only changes its metadata.
    pub(crate) fn insert(&mut self, path: &[u8], metadata: Metadata, node: NewNode) -> Result<()> {
        let xattrs: usize = metadata.xattrs.iter().map(|x| x.name.len() + x.value.len()).sum();
        self.charge(xattrs + if let NewNode::Symlink(target) = &node { target.len() } else { 0 })?;
        let Place::In(parent, name) = self.resolve(path, true)? else {
            return match node {
                NewNode::Directory => {
                    self.inode_mut(ROOT).metadata = metadata;
                    Ok(())
                }
                _ => Err(refused("it would replace the root directory")),
            };
        };
        let existing = self.dentry(parent, &name);
        if let (Some(dentry), NewNode::Directory) = (existing, &node)
            && self.directory(dentry.inode).is_some()
        {
            self.inode_mut(dentry.inode).metadata = metadata;
            self.link(parent, name, dentry.inode)?;
            return Ok(());
        }
        let node = match node {
            NewNode::File(content) => Node::File(content),
            NewNode::Directory => Node::Directory(self.new_directory(parent)?),
            NewNode::Symlink(target) => Node::Symlink(target),
            NewNode::CharDevice { major, minor } => Node::CharDevice { major, minor },
            NewNode::BlockDevice { major, minor } => Node::BlockDevice { major, minor },
            NewNode::Fifo => Node::Fifo,
        };
        let id = self.allocate(Inode { metadata, node, links: 1 });
        self.unlink(parent, &name);
        self.link(parent, name, id)
    }

    /// Makes `path` another name of the file at `target`, which may come from a lower layer.
    pub(crate) fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let id = match self.resolve(target, false)? {
            Place::Root => ROOT,
            Place::In(parent, name) if let Some(dentry) = self.dentry(parent, &name) => dentry.inode,
            _ => {
                return Err(refused(format!("it is a hard link to {:?}, which is not there", lossy(target))));
            }
        };
        if self.directory(id).is_some() {
            return Err(refused("it is a hard link to a directory"));
        }
        let Place::In(parent, name) = self.resolve(path, true)? else {
            return Err(refused("it would replace the root directory"));
        };
        if self.dentry(parent, &name).is_some_and(|existing| existing.inode == id) {
            return self.link(parent, name, id);
        }
        // Counted first: the target may be inside a directory that the new name replaces.
        let inode = self.inode_mut(id);
        inode.links =
            inode.links.checked_add(1).ok_or_else(|| refused("it is the 2^32nd name of one file"))?;
        self.unlink(parent, &name);
        self.link(parent, name, id)
    }

    /// Hides what lower layers have at `path` (a `.wh.` entry). What this layer put there stays, whichever came first.
    pub(crate) fn whiteout(&mut self, path: &[u8]) -> Result<()> {
        match self.resolve(path, false)? {
            Place::In(parent, name) => {
                if self.directory(parent).is_some_and(|d| d.cleared_in == self.layer) {
                    return Ok(());
                }
                if let Some(dentry) = self.dentry(parent, &name) {
                    self.clear_lower(dentry.inode);
                    self.settle(parent, &name);
                }
                Ok(())
            }
            Place::Missing => Ok(()),
            Place::Root => Err(refused("it would remove the root directory")),
        }
    }

    /// Hides what lower layers have in the directory at `path` (a `.wh..wh..opq` entry).
    pub(crate) fn opaque(&mut self, path: &[u8]) -> Result<()> {
        match self.resolve(path, false)? {
            Place::Root => self.clear_lower(ROOT),
            Place::In(parent, name) => {
                if let Some(dentry) = self.dentry(parent, &name) {
                    self.clear_lower(dentry.inode);
                }
            }
            Place::Missing => {}
        }
        Ok(())
    }

    /// Decides what becomes of a name whose directory, if it is one, has been cleared of lower layers: what this layer
    /// has stays, a lower directory too if this layer has put something into it, then as if only implied by that.
    fn settle(&mut self, parent: InodeId, name: &[u8]) {
        let layer = self.layer;
        let Some(dentry) = self.dentry(parent, name).filter(|dentry| dentry.layer != layer) else { return };
        if self.directory(dentry.inode).is_none_or(|directory| directory.entries.is_empty()) {
            return self.unlink(parent, name);
        }
        self.inode_mut(dentry.inode).metadata = implied_directory();
        if let Node::Directory(directory) = &mut self.inode_mut(parent).node
            && let Some(dentry) = directory.entries.get_mut(name)
        {
            dentry.layer = layer;
        }
    }

    /// Removes everything of lower layers from a directory and its subdirectories. A subdirectory of lower layers
    /// stays if this layer has put something into it.
    ///
    /// Each directory is cleared once per layer at most, since afterwards all in it is of this layer: so repeated
    /// whiteouts cannot make a small layer cost more than its number of entries.
    fn clear_lower(&mut self, top: InodeId) {
        // Directories in the order of a walk from the top, so that in reverse every one follows its children.
        let mut order = Vec::new();
        let mut stack = vec![top];
        while let Some(id) = stack.pop() {
            let layer = self.layer;
            let Node::Directory(directory) = &mut self.inode_mut(id).node else { continue };
            if std::mem::replace(&mut directory.cleared_in, layer) == layer {
                continue;
            }
            let children: Vec<InodeId> = directory.entries.values().map(|dentry| dentry.inode).collect();
            stack.extend(children.into_iter().filter(|&child| self.directory(child).is_some()));
            order.push(id);
        }
        for id in order.into_iter().rev() {
            let Some(directory) = self.directory(id) else { continue };
            let lower = directory.entries.iter().filter(|(_, dentry)| dentry.layer != self.layer);
            let lower: Vec<Box<[u8]>> = lower.map(|(name, _)| name.clone()).collect();
            for name in lower {
                self.settle(id, &name);
            }
        }
    }

    /// Finds the directory that holds the last component of `path`, which itself is not followed if it is a link.
    /// Missing directories on the way are made if `create` is set.
    fn resolve(&mut self, path: &[u8], create: bool) -> Result<Place> {
        let mut components = self.components(path)?;
        // Taken off first, so that what a link adds is followed.
        let Some(last) = components.pop() else { return Ok(Place::Root) };
        let mut pending: Vec<Box<[u8]>> = components.into_iter().rev().map(Box::from).collect();
        let last: Box<[u8]> = last.into();
        let mut current = ROOT;
        let mut symlinks = 0;
        while let Some(name) = pending.pop() {
            let Some(directory) = self.directory(current) else { return self.not_a_directory(create) };
            if *name == *b".." {
                current = directory.parent;
                continue;
            }
            let Some(dentry) = directory.entries.get(&name) else {
                if !create {
                    return Ok(Place::Missing);
                }
                let directory = self.new_directory(current)?;
                let inode =
                    Inode { metadata: implied_directory(), node: Node::Directory(directory), links: 1 };
                let id = self.allocate(inode);
                self.link(current, name, id)?;
                current = id;
                continue;
            };
            let Node::Symlink(target) = &self.inode(dentry.inode).node else {
                current = dentry.inode;
                continue;
            };
            symlinks += 1;
            if symlinks > MAX_SYMLINKS {
                return Err(refused(format!(
                    "its path leads through more than {MAX_SYMLINKS} symbolic links"
                )));
            }
            if target.starts_with(b"/") {
                current = ROOT;
            }
            let target = target.split(|&b| b == b'/').filter(|c| !c.is_empty() && *c != b".");
            let target: Vec<Box<[u8]>> = target.map(Box::from).collect();
            if pending.len() + target.len() > self.limits.path_depth {
                return Err(self.too_deep());
            }
            pending.extend(target.into_iter().rev());
        }
        match self.directory(current) {
            Some(_) => Ok(Place::In(current, last)),
            None => self.not_a_directory(create),
        }
    }

    /// A file stands where a path needs a directory: nothing is below it, and nothing can be put there.
    fn not_a_directory(&self, create: bool) -> Result<Place> {
        if create { Err(refused("a parent in its path is not a directory")) } else { Ok(Place::Missing) }
    }

    /// Splits a path of a layer and checks it. A leading slash means nothing: layers begin at the root.
    fn components<'p>(&self, path: &'p [u8]) -> Result<Vec<&'p [u8]>> {
        let mut components = Vec::new();
        for component in path.split(|&b| b == b'/') {
            match component {
                b"" | b"." => continue,
                b".." => return Err(refused("its path has a \"..\", by which it could leave the root")),
                _ if component.contains(&0) => return Err(refused("its path has a NUL byte")),
                _ if component.len() > MAX_NAME => {
                    return Err(refused(format!("its path has a name of more than {MAX_NAME} bytes")));
                }
                _ if components.len() >= self.limits.path_depth => return Err(self.too_deep()),
                _ => components.push(component),
            }
        }
        Ok(components)
    }

    fn too_deep(&self) -> TreeError {
        let limit = self.limits.path_depth as u64;
        TreeError::Limit {
            what: format!("a path of more than {limit} components"),
            name: "path_depth",
            limit,
        }
    }

    fn new_directory(&self, parent: InodeId) -> Result<Directory> {
        let depth = self.directory(parent).map_or(0, |d| d.depth) + 1;
        if depth > self.limits.path_depth { Err(self.too_deep()) } else { Ok(directory(parent, depth)) }
    }

    fn dentry(&self, parent: InodeId, name: &[u8]) -> Option<Dentry> {
        self.directory(parent)?.entries.get(name).copied()
    }

    /// Gives a file a name, as an entry of the current layer. The name must be free, or that file's already.
    fn link(&mut self, parent: InodeId, name: Box<[u8]>, inode: InodeId) -> Result<()> {
        self.charge(name.len())?;
        let layer = self.layer;
        if let Node::Directory(directory) = &mut self.inode_mut(parent).node {
            directory.entries.insert(name, Dentry { inode, layer });
        }
        Ok(())
    }

    /// Removes a name, if it is there, with all that is below it.
    fn unlink(&mut self, parent: InodeId, name: &[u8]) {
        let Node::Directory(directory) = &mut self.inode_mut(parent).node else { return };
        let Some(dentry) = directory.entries.remove(name) else { return };
        let mut stack = vec![dentry.inode];
        while let Some(id) = stack.pop() {
            let inode = self.inode_mut(id);
            inode.links -= 1;
            if inode.links > 0 {
                continue;
            }
            self.free.push(id);
            match self.inodes[id as usize].take().map(|inode| inode.node) {
                Some(Node::Directory(directory)) => stack.extend(directory.entries.values().map(|d| d.inode)),
                Some(Node::File(content)) => self.dropped.push(content),
                _ => {}
            }
        }
    }

    fn allocate(&mut self, inode: Inode) -> InodeId {
        if let Some(id) = self.free.pop() {
            self.inodes[id as usize] = Some(inode);
            return id;
        }
        // Each inode has cost an entry or a path component, both bounded far below 2^32 by `Limits`.
        let id = InodeId::try_from(self.inodes.len()).expect("fewer than 2^32 inodes");
        self.inodes.push(Some(inode));
        id
    }

    fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        self.inodes[id as usize].as_mut().expect("an id of a live inode")
    }

    /// Counts memory for names and attributes, with the cost of an inode so that empty ones are not free.
    fn charge(&mut self, bytes: usize) -> Result<()> {
        self.metadata_size += bytes as u64 + 16;
        let limit = self.limits.metadata_size;
        if self.metadata_size > limit {
            let what = format!("names, links and attributes of more than {limit} bytes");
            return Err(TreeError::Limit { what, name: "metadata_size", limit });
        }
        Ok(())
    }
}

/// What [`Tree::insert`] puts into the tree.
#[derive(Clone, Debug)]
pub(crate) enum NewNode {
    File(Content),
    Directory,
    Symlink(Box<[u8]>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

/// The metadata of a directory that no layer has an entry for, only files in it.
fn implied_directory() -> Metadata {
    Metadata { mode: 0o755, ..Metadata::default() }
}

fn directory(parent: InodeId, depth: usize) -> Directory {
    Directory { entries: BTreeMap::new(), parent, depth, cleared_in: 0 }
}

pub(crate) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(256)]).into_owned()
}

#[cfg(test)]
mod tests;
