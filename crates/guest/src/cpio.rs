//! A deterministic `newc` cpio archive, the format of an initramfs (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Writes an archive whose bytes depend on nothing but what is added: owner root, time 0, inodes numbered in order.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    inode: u32,
    written: usize,
}

impl<W: Write> Writer<W> {
    /// An empty archive.
    pub fn new(out: W) -> Self {
        Writer { out, inode: 0, written: 0 }
    }

    /// A directory. Parents must be added first.
    ///
    /// # Errors
    /// When the archive cannot be written.
    pub fn directory(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.entry(path, DIRECTORY | mode, (0, 0), &[])
    }

    /// A regular file.
    ///
    /// # Errors
    /// When the archive cannot be written, or the file has 4 GiB or more.
    pub fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | mode, (0, 0), bytes)
    }

    /// A character device.
    ///
    /// # Errors
    /// When the archive cannot be written.
    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, CHARACTER_DEVICE | mode, (major, minor), &[])
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// When the archive cannot be written.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), bytes: &[u8]) -> io::Result<()> {
        let size =
            u32::try_from(bytes.len()).map_err(|_| io::Error::other(format!("{path} is 4 GiB or larger")))?;
        self.inode += 1;
        let links = if mode & DIRECTORY != 0 { 2 } else { 1 };
        let fields =
            [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, path.len() as u32 + 1, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.write(header.as_bytes())?;
        self.write(path.as_bytes())?;
        self.write(&[0])?;
        self.pad()?;
        self.write(bytes)?;
        self.pad()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let padding = self.written.next_multiple_of(4) - self.written;
        self.write(&[0; 3][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn archive() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        writer.directory("dev", 0o755).unwrap();
        writer.character_device("dev/console", 0o600, 5, 1).unwrap();
        writer.file("init", 0o755, b"#!\n").unwrap();
        writer.file("empty", 0o600, b"").unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn cpio_reads_it() {
        let Ok(mut cpio) = Command::new("cpio")
            .args(["-itv", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            return println!("skipped: cpio is not installed");
        };
        cpio.stdin.take().unwrap().write_all(&archive()).unwrap();
        let listing = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<_> = listing.lines().collect();
        assert_eq!(lines.len(), 4, "{listing}");
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with("dev"));
        assert!(lines[1].starts_with("crw-------") && lines[1].contains("5,   1"));
        assert!(lines[2].starts_with("-rwxr-xr-x") && lines[2].ends_with("init"));
    }

    #[test]
    fn the_same_bytes_each_time() {
        assert_eq!(archive(), archive());
        assert_eq!(archive().len() % 4, 0);
    }
}
