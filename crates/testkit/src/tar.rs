//! Tar archives, well-formed or not, byte by byte.

/// Writes tar archives. Unlike library writers it writes whatever it is told, so that tests can make archives that no
/// honest tool would: `../` in paths, lies about sizes, endless nesting.
#[derive(Clone, Debug, Default)]
pub struct TarBuilder {
    archive: Vec<u8>,
}

/// One header, ready to be changed before it is written.
#[derive(Clone, Debug)]
pub struct Header {
    path: Vec<u8>,
    target: Vec<u8>,
    typeflag: u8,
    mode: u32,
    uid: u64,
    gid: u64,
    size: u64,
    mtime: i64,
    device: (u32, u32),
    pax: Vec<(Vec<u8>, Vec<u8>)>,
    gnu_sparse: Option<(Vec<(u64, u64)>, u64)>,
}

impl Header {
    /// A header of the given type (`b'0'` file, `b'5'` directory …) with mode 0644, owned by root, of time 0.
    pub fn new(typeflag: u8, path: impl AsRef<[u8]>) -> Header {
        Header {
            path: path.as_ref().to_vec(),
            target: Vec::new(),
            typeflag,
            mode: if typeflag == b'5' { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            size: 0,
            mtime: 0,
            device: (0, 0),
            pax: Vec::new(),
            gnu_sparse: None,
        }
    }

    /// Sets the permission bits.
    pub fn mode(mut self, mode: u32) -> Header {
        self.mode = mode;
        self
    }

    /// Sets owner and group.
    pub fn owner(mut self, uid: u64, gid: u64) -> Header {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    /// Sets the time in seconds.
    pub fn mtime(mut self, mtime: i64) -> Header {
        self.mtime = mtime;
        self
    }

    /// Sets the size that the header claims, whatever data follows.
    pub fn claim_size(mut self, size: u64) -> Header {
        self.size = size;
        self
    }

    /// Sets a link's target.
    pub fn target(mut self, target: impl AsRef<[u8]>) -> Header {
        self.target = target.as_ref().to_vec();
        self
    }

    /// Sets a device's number.
    pub fn device(mut self, major: u32, minor: u32) -> Header {
        self.device = (major, minor);
        self
    }

    /// Adds a PAX record.
    pub fn pax(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Header {
        self.pax.push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    /// Adds an extended attribute.
    pub fn xattr(self, name: &str, value: impl AsRef<[u8]>) -> Header {
        self.pax(format!("SCHILY.xattr.{name}"), value)
    }

    /// Makes it an old GNU sparse file with these segments (offset, length) and real size.
    pub fn gnu_sparse(mut self, segments: &[(u64, u64)], real_size: u64) -> Header {
        self.typeflag = b'S';
        self.gnu_sparse = Some((segments.to_vec(), real_size));
        self
    }

    fn block(&self) -> Vec<u8> {
        let mut block = vec![0; 512];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.path[..self.path.len().min(100)]);
        put(100, &octal(self.mode.into(), 8));
        put(108, &octal(self.uid, 8));
        put(116, &octal(self.gid, 8));
        put(124, &octal(self.size, 12));
        put(
            136,
            &if self.mtime < 0 {
                base256(self.mtime.into(), 12)
            } else {
                octal(self.mtime.cast_unsigned(), 12)
            },
        );
        put(156, &[self.typeflag]);
        put(157, &self.target[..self.target.len().min(100)]);
        put(257, if self.gnu_sparse.is_some() { b"ustar  \0" } else { b"ustar\x0000" });
        put(329, &octal(self.device.0.into(), 8));
        put(337, &octal(self.device.1.into(), 8));
        if let Some((segments, real_size)) = &self.gnu_sparse {
            for (i, (offset, length)) in segments.iter().take(4).enumerate() {
                put(386 + 24 * i, &octal(*offset, 12));
                put(398 + 24 * i, &octal(*length, 12));
            }
            put(482, &[u8::from(segments.len() > 4)]);
            put(483, &octal(*real_size, 12));
        }
        seal(&mut block);
        block
    }

    /// The blocks with the old GNU sparse descriptors that the header has no room for.
    fn gnu_extensions(&self) -> Vec<u8> {
        let mut blocks = Vec::new();
        let Some((segments, _)) = &self.gnu_sparse else { return blocks };
        let mut rest = segments.get(4..).unwrap_or_default();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(21));
            let start = blocks.len();
            for (offset, length) in now {
                blocks.extend(octal(*offset, 12));
                blocks.extend(octal(*length, 12));
            }
            blocks.resize(start + 504, 0);
            blocks.push(u8::from(!later.is_empty()));
            blocks.resize(start + 512, 0);
            rest = later;
        }
        blocks
    }
}

/// Writes the checksum of a header block.
fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// A numeric field: octal if it fits, base 256 otherwise.
fn octal(value: u64, width: usize) -> Vec<u8> {
    let digits = format!("{value:0width$o}", width = width - 1);
    if digits.len() < width { [digits.as_bytes(), b"\0"].concat() } else { base256(value.into(), width) }
}

/// Big-endian two's complement, marked by the top bit.
fn base256(value: i128, width: usize) -> Vec<u8> {
    let mut field = value.to_be_bytes()[16 - width..].to_vec();
    field[0] |= 0x80;
    field
}

impl TarBuilder {
    /// An empty archive.
    pub fn new() -> TarBuilder {
        TarBuilder::default()
    }

    /// Adds an entry. A size that was not claimed is that of the data.
    pub fn entry(mut self, mut header: Header, data: impl AsRef<[u8]>) -> TarBuilder {
        let data = data.as_ref();
        if header.size == 0 {
            header.size = data.len() as u64;
        }
        let mut records = header.pax.clone();
        if header.path.len() > 100 {
            records.push((b"path".to_vec(), header.path.clone()));
        }
        if header.target.len() > 100 {
            records.push((b"linkpath".to_vec(), header.target.clone()));
        }
        if !records.is_empty() {
            let body: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
            let pax =
                Header { typeflag: b'x', size: body.len() as u64, ..Header::new(b'x', "PaxHeaders/entry") };
            self.archive.extend(pax.block());
            self = self.data(&body);
        }
        self.archive.extend(header.block());
        self.archive.extend(header.gnu_extensions());
        self.data(data)
    }

    /// Adds a regular file.
    pub fn file(self, path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> TarBuilder {
        self.entry(Header::new(b'0', path), data)
    }

    /// Adds an executable regular file.
    pub fn executable(self, path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> TarBuilder {
        self.entry(Header::new(b'0', path).mode(0o755), data)
    }

    /// Adds a directory.
    pub fn dir(self, path: impl AsRef<[u8]>) -> TarBuilder {
        self.entry(Header::new(b'5', path), b"")
    }

    /// Adds a symbolic link.
    pub fn symlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> TarBuilder {
        self.entry(Header::new(b'2', path).mode(0o777).target(target), b"")
    }

    /// Adds a hard link.
    pub fn hard_link(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> TarBuilder {
        self.entry(Header::new(b'1', path).target(target), b"")
    }

    /// Adds bytes as they are, without padding.
    pub fn raw(mut self, bytes: impl AsRef<[u8]>) -> TarBuilder {
        self.archive.extend_from_slice(bytes.as_ref());
        self
    }

    /// The archive with its end: two blocks of zeros.
    pub fn build(mut self) -> Vec<u8> {
        self.archive.resize(self.archive.len() + 1024, 0);
        self.archive
    }

    /// The archive without an end.
    pub fn build_open(self) -> Vec<u8> {
        self.archive
    }

    fn data(mut self, data: &[u8]) -> TarBuilder {
        self.archive.extend_from_slice(data);
        self.archive.resize(self.archive.len().next_multiple_of(512), 0);
        self
    }
}

/// A PAX record, whose length counts its own digits.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = 1 + key.len() + 1 + value.len() + 1;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}
