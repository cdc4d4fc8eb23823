//! From the merged tree to directory blocks, inodes and the superblock.

use std::collections::HashMap;

use super::data::{DataArea, MAX_INLINE_TAIL};
use super::layout::{
    BLOCK_SIZE, COMPACT_INODE, DIRENT, DataLayout, EXTENDED_INODE, RawInode, S_IFBLK, S_IFCHR, S_IFDIR,
    S_IFIFO, S_IFLNK, S_IFREG, SLOT, Superblock, device_number, encode_xattrs, xattr_fits, xattr_size,
};
use crate::error::Result;
use crate::tar::Timestamp;
use crate::tree::{Directory, Inode, InodeId, Node, ROOT, Tree};
use crate::{DISK_CAPACITY, Error};

/// Writes everything but the files' data, which is in `area` already. Returns the file system's size in bytes.
pub(crate) fn write(tree: &Tree, area: &mut DataArea<'_>, uuid: [u8; 16]) -> Result<u64> {
    area.flush_tails()?;
    // A no-op unless the last file was given up half-way.
    area.align()?;
    let plan = Plan::new(tree, area.position() / BLOCK_SIZE)?;
    for &id in &plan.order {
        if let Node::Directory(directory) = &tree.inode(id).node {
            write_directory_blocks(area, &plan, tree, id, directory)?;
        }
    }
    debug_assert_eq!(area.position(), plan.meta_block * BLOCK_SIZE);
    let mut record = Vec::new();
    for (serial, &id) in plan.order.iter().enumerate() {
        record.clear();
        plan.encode_inode(tree, id, serial as u32 + 1, area, &mut record)?;
        area.append_zeros(plan.offset(id) - area.position())?;
        area.append(&record)?;
    }
    area.align()?;
    area.flush()?;
    let superblock = Superblock {
        // The root is the first inode, so its number is small.
        root_nid: plan.slots[ROOT as usize].nid as u16,
        inodes: plan.order.len() as u64,
        build_time: plan.build_time.seconds.cast_unsigned(),
        build_time_nsec: plan.build_time.nanoseconds,
        blocks: (area.position() / BLOCK_SIZE) as u32,
        meta_blkaddr: plan.meta_block as u32,
        uuid,
    };
    area.write_first_block(&superblock.encode())?;
    Ok(area.position())
}

/// Where every inode and directory block goes.
struct Plan {
    /// Inodes in the order of their places: a directory's children stand together, as `ls -l` and `find` read them.
    order: Vec<InodeId>,
    /// By inode id; ids that are not in use have no place.
    slots: Vec<Slot>,
    /// The time of inodes that have none of their own: the most frequent one, so that most can be compact.
    build_time: Timestamp,
    /// The first block of the metadata area.
    meta_block: u64,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    /// The inode's number; 0 is not used.
    nid: u32,
    extended: bool,
    layout: Option<DataLayout>,
    /// The first data block of a directory or symbolic link.
    block: u32,
}

impl Plan {
    /// Places directory blocks from `first_block` on, and the inodes behind them.
    fn new(tree: &Tree, first_block: u64) -> Result<Plan> {
        let order = walk(tree);
        let build_time = most_frequent_time(tree, &order);
        let mut plan = Plan {
            order,
            slots: vec![Slot::default(); tree.id_limit()],
            build_time,
            meta_block: first_block,
        };
        // Number 0 is left out: a file with `st_ino` 0 counts as deleted in some programs.
        let mut position = SLOT;
        let order = std::mem::take(&mut plan.order);
        for &id in &order {
            let inode = tree.inode(id);
            plan.place(tree, id, inode, &mut position)?;
        }
        plan.order = order;
        let end = plan.meta_block * BLOCK_SIZE + position;
        if end > DISK_CAPACITY {
            return Err(Error::TooLarge { size: end, capacity: DISK_CAPACITY });
        }
        Ok(plan)
    }

    fn place(&mut self, tree: &Tree, id: InodeId, inode: &Inode, position: &mut u64) -> Result<()> {
        let extended = self.needs_extended(tree, inode);
        let xattrs = xattr_size(&inode.metadata.xattrs);
        if !inode.metadata.xattrs.iter().all(xattr_fits) || xattrs >= 4 * 0xffff {
            return Err(Error::Unsupported {
                what: "an extended attribute with a name over 255 or a value over 65535 bytes".into(),
                advice: "lower the limit xattr_size so that such an image is refused early",
            });
        }
        let head = if extended { EXTENDED_INODE } else { COMPACT_INODE } + xattrs;
        let mut slot = Slot { extended, ..Slot::default() };
        // The bytes right behind the inode, and the whole blocks elsewhere.
        let (inline, blocks) = match &inode.node {
            Node::File(content) => (content.tail.map_or(0, |_| content.size % BLOCK_SIZE), 0),
            Node::Symlink(target) => split(target.len() as u64, head, BLOCK_SIZE),
            Node::Directory(directory) => split(directory_size(tree, id, directory), head, MAX_INLINE_TAIL),
            _ => (0, 0),
        };
        slot.layout = Some(if inline > 0 { DataLayout::Inline } else { DataLayout::Plain });
        if blocks > 0 {
            slot.block = self.meta_block as u32;
            self.meta_block += blocks;
        }
        // An inode that fits into one block does not cross a block's end; a larger one (it has many attributes)
        // begins a block.
        let length = head + inline;
        let room = BLOCK_SIZE - *position % BLOCK_SIZE;
        if length > room {
            *position += room;
        }
        slot.nid = u32::try_from(*position / SLOT)
            .map_err(|_| Error::TooLarge { size: *position, capacity: u64::from(u32::MAX) * SLOT })?;
        *position = (*position + length).next_multiple_of(SLOT);
        self.slots[id as usize] = slot;
        Ok(())
    }

    fn needs_extended(&self, tree: &Tree, inode: &Inode) -> bool {
        !fits_compact(tree, inode) || inode.metadata.mtime != self.build_time
    }

    /// The inode's place in the file.
    fn offset(&self, id: InodeId) -> u64 {
        self.meta_block * BLOCK_SIZE + u64::from(self.slots[id as usize].nid) * SLOT
    }

    /// Appends the inode, its attributes and its inline data.
    fn encode_inode(
        &self,
        tree: &Tree,
        id: InodeId,
        ino: u32,
        area: &DataArea<'_>,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let inode = tree.inode(id);
        let slot = self.slots[id as usize];
        let metadata = &inode.metadata;
        let layout = slot.layout.unwrap_or(DataLayout::Plain);
        let (kind, size, union) = match &inode.node {
            Node::File(content) => (S_IFREG, content.size, content.block),
            Node::Directory(directory) => (S_IFDIR, directory_size(tree, id, directory), slot.block),
            Node::Symlink(target) => (S_IFLNK, target.len() as u64, slot.block),
            Node::CharDevice { major, minor } => (S_IFCHR, 0, checked_device(*major, *minor)?),
            Node::BlockDevice { major, minor } => (S_IFBLK, 0, checked_device(*major, *minor)?),
            Node::Fifo => (S_IFIFO, 0, 0),
        };
        let raw = RawInode {
            extended: slot.extended,
            layout,
            xattr_size: xattr_size(&metadata.xattrs),
            mode: kind | metadata.mode,
            links: link_count(tree, inode),
            size,
            union,
            ino,
            uid: metadata.uid,
            gid: metadata.gid,
            mtime: metadata.mtime.seconds.cast_unsigned(),
            mtime_nsec: metadata.mtime.nanoseconds,
        };
        raw.encode(out);
        encode_xattrs(&metadata.xattrs, out);
        if layout == DataLayout::Plain {
            return Ok(());
        }
        match &inode.node {
            Node::File(content) => {
                let start = out.len();
                out.resize(start + (content.size % BLOCK_SIZE) as usize, 0);
                area.read_tail(content.tail.unwrap_or_default(), &mut out[start..])?;
            }
            Node::Symlink(target) => out.extend_from_slice(target),
            Node::Directory(directory) => {
                let entries = sorted_entries(tree, id, directory);
                if let Some(last) = directory_blocks(&entries).last() {
                    self.encode_dirents(tree, last, out);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Appends one block of a directory, without padding: all entries, then all names.
    fn encode_dirents(&self, tree: &Tree, entries: &[(&[u8], InodeId)], out: &mut Vec<u8>) {
        let mut name_offset = entries.len() * DIRENT;
        for (name, id) in entries {
            out.extend_from_slice(&u64::from(self.slots[*id as usize].nid).to_le_bytes());
            out.extend_from_slice(&(name_offset as u16).to_le_bytes());
            out.extend_from_slice(&[file_type(&tree.inode(*id).node), 0]);
            name_offset += name.len();
        }
        for (name, _) in entries {
            out.extend_from_slice(name);
        }
    }
}

/// Writes the blocks of a directory that do not stand beside its inode.
fn write_directory_blocks(
    area: &mut DataArea<'_>,
    plan: &Plan,
    tree: &Tree,
    id: InodeId,
    directory: &Directory,
) -> Result<()> {
    let entries = sorted_entries(tree, id, directory);
    let blocks = directory_blocks(&entries);
    let inline = plan.slots[id as usize].layout == Some(DataLayout::Inline);
    let mut encoded = Vec::new();
    for block in &blocks[..blocks.len() - usize::from(inline)] {
        encoded.clear();
        plan.encode_dirents(tree, block, &mut encoded);
        area.append(&encoded)?;
        area.align()?;
    }
    Ok(())
}

/// All inodes: the root, then for each directory all its children, then each subdirectory in turn.
fn walk(tree: &Tree) -> Vec<InodeId> {
    let mut seen = vec![false; tree.id_limit()];
    let mut order = vec![ROOT];
    seen[ROOT as usize] = true;
    let mut stack = vec![ROOT];
    while let Some(id) = stack.pop() {
        let Some(directory) = tree.directory(id) else { continue };
        for dentry in directory.entries.values() {
            // A file with several names is placed where the first of them is.
            if !std::mem::replace(&mut seen[dentry.inode as usize], true) {
                order.push(dentry.inode);
            }
        }
        let children = directory.entries.values().rev().map(|dentry| dentry.inode);
        stack.extend(children.filter(|&child| tree.directory(child).is_some()));
    }
    order
}

fn most_frequent_time(tree: &Tree, order: &[InodeId]) -> Timestamp {
    let mut counts: HashMap<Timestamp, u64> = HashMap::new();
    for inode in order.iter().map(|&id| tree.inode(id)).filter(|inode| fits_compact(tree, inode)) {
        *counts.entry(inode.metadata.mtime).or_default() += 1;
    }
    // Of equally frequent ones the earliest, whatever the map's order.
    let best = counts.into_iter().max_by_key(|&(time, count)| (count, std::cmp::Reverse(time)));
    best.map(|(time, _)| time).unwrap_or_default()
}

/// Whether all but the time fits into a compact inode.
fn fits_compact(tree: &Tree, inode: &Inode) -> bool {
    let narrow = |n: u32| u16::try_from(n).is_ok();
    let size = match &inode.node {
        Node::File(content) => content.size,
        _ => 0,
    };
    narrow(inode.metadata.uid)
        && narrow(inode.metadata.gid)
        && narrow(link_count(tree, inode))
        && u32::try_from(size).is_ok()
}

fn link_count(tree: &Tree, inode: &Inode) -> u32 {
    match &inode.node {
        Node::Directory(directory) => {
            2 + directory.entries.values().filter(|d| tree.directory(d.inode).is_some()).count() as u32
        }
        _ => inode.links,
    }
}

/// Splits `size` bytes of data into those beside an inode with `head` bytes, and whole blocks.
fn split(size: u64, head: u64, max_inline: u64) -> (u64, u64) {
    let tail = size % BLOCK_SIZE;
    if tail > 0 && tail <= max_inline && head + tail <= BLOCK_SIZE {
        (tail, size / BLOCK_SIZE)
    } else {
        (0, size.div_ceil(BLOCK_SIZE))
    }
}

/// A directory's names and inodes with `.` and `..`, sorted by bytes: the kernel searches them by bisection.
fn sorted_entries<'t>(tree: &Tree, id: InodeId, directory: &'t Directory) -> Vec<(&'t [u8], InodeId)> {
    debug_assert!(tree.directory(id).is_some());
    let mut entries: Vec<(&[u8], InodeId)> = Vec::with_capacity(directory.entries.len() + 2);
    entries.extend([(&b"."[..], id), (&b".."[..], directory.parent)]);
    entries.extend(directory.entries.iter().map(|(name, dentry)| (&**name, dentry.inode)));
    entries.sort_unstable();
    entries
}

/// Cuts a directory's entries into blocks.
fn directory_blocks<'e, 't>(entries: &'e [(&'t [u8], InodeId)]) -> Vec<&'e [(&'t [u8], InodeId)]> {
    let mut blocks = Vec::new();
    let (mut start, mut used) = (0, 0);
    for (i, (name, _)) in entries.iter().enumerate() {
        let length = DIRENT + name.len();
        if used + length > BLOCK_SIZE as usize {
            blocks.push(&entries[start..i]);
            (start, used) = (i, 0);
        }
        used += length;
    }
    blocks.push(&entries[start..]);
    blocks
}

/// `st_size` of a directory: whole blocks, and what is used of the last one.
fn directory_size(tree: &Tree, id: InodeId, directory: &Directory) -> u64 {
    let entries = sorted_entries(tree, id, directory);
    let blocks = directory_blocks(&entries);
    let last = blocks.last().copied().unwrap_or_default();
    let used: usize = last.iter().map(|(name, _)| DIRENT + name.len()).sum();
    (blocks.len() as u64 - 1) * BLOCK_SIZE + used as u64
}

fn file_type(node: &Node) -> u8 {
    match node {
        Node::File(_) => 1,
        Node::Directory(_) => 2,
        Node::CharDevice { .. } => 3,
        Node::BlockDevice { .. } => 4,
        Node::Fifo => 5,
        Node::Symlink(_) => 7,
    }
}

fn checked_device(major: u32, minor: u32) -> Result<u32> {
    device_number(major, minor).ok_or_else(|| Error::Unsupported {
        what: format!("the device number {major}:{minor}"),
        advice: "Linux has 12 bits for the major and 20 for the minor number; rebuild the image without the device",
    })
}
