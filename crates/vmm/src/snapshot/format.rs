//! The file with a machine's state: a header with version, length and checksum, then named sections in a fixed order.
//!
//! | bytes | header |
//! | --- | --- |
//! | 8 | `KAPSELVM` |
//! | 4 | version, little-endian as all numbers |
//! | 4 | zero |
//! | 8 | length of what follows the header |
//! | 8 | checksum of what follows the header (CRC-64/XZ) |
//!
//! A section is 8 bytes of name, padded with zeroes, 8 bytes of length, and its contents.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use kapsel_devices::state::{Reader, StateError, Writer};

use super::Error;

/// The only version so far.
pub const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"KAPSELVM";
const HEADER: usize = 32;
const NAME: usize = 8;
/// A machine of 32 processors and all devices has less than a tenth of this, in bytes.
const SIZE_MAX: u64 = 4 << 20;

/// Sections, to be written.
#[derive(Debug, Default)]
pub struct Sections(Writer);

impl Sections {
    /// Adds a section.
    pub fn add(&mut self, name: &str, contents: &[u8]) {
        self.0.raw(&padded(name));
        self.0.u64(contents.len() as u64);
        self.0.raw(contents);
    }

    /// Writes the file and makes it durable.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn write(self, path: &Path) -> Result<(), Error> {
        let failed = |e| Error::file("write the state", path, e);
        let mut file = File::create(path).map_err(failed)?;
        file.write_all(&self.finish()).map_err(failed)?;
        file.sync_all().map_err(failed)
    }

    /// The file's contents.
    pub fn finish(self) -> Vec<u8> {
        enveloped(&self.0.finish())
    }
}

/// Makes the length and the checksum of a changed file right again, for fuzzers, which would not get past them.
#[cfg(any(test, feature = "fuzzing"))]
pub fn seal(bytes: &mut Vec<u8>) {
    if let Some(body) = bytes.get(HEADER..) {
        *bytes = enveloped(body);
    }
}

fn enveloped(body: &[u8]) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.raw(&MAGIC);
    writer.u32(VERSION);
    writer.u32(0);
    writer.u64(body.len() as u64);
    writer.u64(checksum(body));
    writer.raw(body);
    writer.finish()
}

fn padded(name: &str) -> [u8; NAME] {
    let mut bytes = [0; NAME];
    let length = name.len().min(NAME);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}

/// The body of a state file, whose checksum is right.
#[derive(Debug)]
pub struct State(Vec<u8>);

impl State {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error`] says what is wrong with it.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let failed = |e| Error::file("read the state", path, e);
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(failed)?;
        file.take(SIZE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        Self::parse(bytes)
    }

    /// Takes a file's contents.
    ///
    /// # Errors
    /// [`Error`] says what is wrong with them.
    pub fn parse(mut bytes: Vec<u8>) -> Result<Self, Error> {
        if bytes.len() as u64 > SIZE_MAX {
            return Err(Error::TooLarge);
        }
        check(&bytes)?;
        bytes.drain(..HEADER);
        Ok(State(bytes))
    }

    /// Takes the sections one after the other.
    pub fn sections(&self) -> SectionReader<'_> {
        SectionReader(Reader::new(&self.0))
    }
}

/// The version of a state file whose header is right.
///
/// # Errors
/// [`Error`] says what is wrong with it.
pub fn version(path: &Path) -> Result<u32, Error> {
    State::read(path).map(|_| VERSION)
}

fn check(bytes: &[u8]) -> Result<(), Error> {
    if !bytes.starts_with(&MAGIC) {
        return Err(Error::NotASnapshot);
    }
    let mut header = Reader::new(&bytes[MAGIC.len()..]);
    let version = header.u32()?;
    if version != VERSION {
        return Err(Error::Version(version));
    }
    header.u32()?;
    let (length, sum) = (header.u64()?, header.u64()?);
    let body = bytes.get(HEADER..).ok_or(StateError::Truncated)?;
    if length != body.len() as u64 {
        return Err(Error::Length { expected: length, found: body.len() as u64 });
    }
    if checksum(body) != sum {
        return Err(Error::Checksum);
    }
    Ok(())
}

/// Sections, in the order in which they were written.
#[derive(Debug)]
pub struct SectionReader<'a>(Reader<'a>);

impl<'a> SectionReader<'a> {
    /// The next section, which has to have this name.
    ///
    /// # Errors
    /// [`Error::Section`] or [`Error::State`].
    pub fn take(&mut self, name: &'static str) -> Result<&'a [u8], Error> {
        let found = self.0.raw(NAME)?;
        if found != padded(name) {
            return Err(Error::Section(name));
        }
        let length = usize::try_from(self.0.u64()?).map_err(|_| StateError::Truncated)?;
        Ok(self.0.raw(length)?)
    }

    /// There are no more.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn finish(self) -> Result<(), Error> {
        Ok(self.0.finish()?)
    }
}

/// CRC-64/XZ.
fn checksum(bytes: &[u8]) -> u64 {
    const TABLE: [u64; 256] = table();
    let step = |sum: u64, byte: &u8| TABLE[((sum ^ u64::from(*byte)) & 0xff) as usize] ^ sum >> 8;
    !bytes.iter().fold(!0, step)
}

const fn table() -> [u64; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let (mut value, mut bit) = (index as u64, 0);
        while bit < 8 {
            value = if value & 1 == 1 { 0xc96c_5795_d787_0f42 ^ value >> 1 } else { value >> 1 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<State, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        State::read(file.path())
    }

    fn file() -> Vec<u8> {
        let mut sections = Sections::default();
        sections.add("config", b"{}");
        sections.add("cpu", &[7; 100]);
        sections.finish()
    }

    #[test]
    fn sections_come_back_in_their_order_and_under_their_names() {
        let state = read(&file()).unwrap();
        let mut sections = state.sections();
        assert_eq!(sections.take("config").unwrap(), b"{}");
        assert!(matches!(sections.take("device"), Err(Error::Section("device"))));
        let mut sections = state.sections();
        sections.take("config").unwrap();
        assert_eq!(sections.take("cpu").unwrap(), [7; 100]);
        sections.finish().unwrap();
    }

    #[test]
    fn the_checksum_is_the_published_one() {
        assert_eq!(checksum(b"123456789"), 0x995d_c9bb_df19_39fa);
    }

    #[test]
    fn every_cut_and_every_changed_byte_is_found() {
        let good = file();
        for end in 0..good.len() {
            assert!(read(&good[..end]).is_err(), "{end}");
            let mut changed = good.clone();
            changed[end] ^= 0x10;
            // Four bytes of the header mean nothing.
            assert_eq!(read(&changed).is_err(), !(12..16).contains(&end), "{end}");
        }
        assert!(matches!(read(&[&good[..], b"x"].concat()), Err(Error::Length { .. })));
        assert!(matches!(read(&vec![0; SIZE_MAX as usize + 1]), Err(Error::TooLarge)));
        assert!(matches!(read(b"\x7fELF"), Err(Error::NotASnapshot)));
        let mut newer = good;
        newer[8] = 2;
        assert!(matches!(read(&newer), Err(Error::Version(2))));
    }
}
