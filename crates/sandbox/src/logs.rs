//! `output.log`: what a container printed, with times and stream names, bounded.
//!
//! A file is a sequence of entries: one byte stream (1 stdout or terminal, 2 stderr), eight bytes nanoseconds since
//! 1970, four bytes length (both little endian), then that many bytes. When the file reaches half of the bound it
//! becomes `output.log.1`, whose predecessor goes: both together stay within the bound, and at least half of it is the
//! newest output. Times never run backwards within a file.

mod reader;
mod writer;

use std::path::{Path, PathBuf};

pub use reader::{Entry, Error, ReadOptions, Reader};
pub use writer::Writer;

/// Bytes before an entry's content.
const HEADER: usize = 13;
/// The longest content of one entry.
pub const MAX_ENTRY: usize = 64 << 10;

/// Which of a process's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout = 1,
    /// Standard error.
    Stderr = 2,
}

/// The older half of a log.
fn rotated(log: &Path) -> PathBuf {
    let mut name = log.file_name().unwrap_or_default().to_owned();
    name.push(".1");
    log.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(log: &Path, options: ReadOptions) -> Vec<u8> {
        let reader = Reader::open(log, options).unwrap();
        reader.map(|entry| entry.unwrap().bytes).collect::<Vec<_>>().concat()
    }

    #[test]
    fn what_is_written_is_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("output.log");
        let mut writer = Writer::create(&log, 1 << 20).unwrap();
        writer.append(Stream::Stdout, 10, b"one\n").unwrap();
        writer.append(Stream::Stderr, 20, &[0, 255, 10]).unwrap();
        let entries: Vec<Entry> =
            Reader::open(&log, ReadOptions::default()).unwrap().map(Result::unwrap).collect();
        assert_eq!(entries.len(), 2);
        assert_eq!(
            (entries[0].stream, entries[0].at, &entries[0].bytes[..]),
            (Stream::Stdout, 10, &b"one\n"[..])
        );
        assert_eq!(
            (entries[1].stream, entries[1].at, &entries[1].bytes[..]),
            (Stream::Stderr, 20, &[0, 255, 10][..])
        );
    }

    #[test]
    fn the_bound_holds_and_the_newest_stays() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("output.log");
        let bound = 64 << 10;
        let mut writer = Writer::create(&log, bound).unwrap();
        for n in 0..2000u64 {
            writer.append(Stream::Stdout, n, format!("line {n} {}\n", "x".repeat(200)).as_bytes()).unwrap();
        }
        let size = |path: &Path| std::fs::metadata(path).unwrap().len();
        assert!(size(&log) + size(&rotated(&log)) <= bound);
        let text = String::from_utf8(read_all(&log, ReadOptions::default())).unwrap();
        assert!(text.starts_with("line ") && text.contains("line 1999 "));
        assert!(text.len() as u64 > bound / 3);
        let tail =
            String::from_utf8(read_all(&log, ReadOptions { tail: Some(3), ..Default::default() })).unwrap();
        assert_eq!(tail.lines().count(), 3);
        assert!(tail.contains("line 1997 ") && tail.contains("line 1999 "), "{tail}");
    }

    #[test]
    fn since_leaves_older_entries_out() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("output.log");
        let mut writer = Writer::create(&log, 1 << 20).unwrap();
        for n in 0..10u64 {
            writer.append(Stream::Stdout, n, &[b'0' + n as u8]).unwrap();
        }
        assert_eq!(read_all(&log, ReadOptions { since: Some(7), ..Default::default() }), b"789");
    }

    #[test]
    fn a_torn_or_damaged_end_is_no_endless_read() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("output.log");
        let mut writer = Writer::create(&log, 1 << 20).unwrap();
        writer.append(Stream::Stdout, 1, b"good").unwrap();
        let whole = std::fs::read(&log).unwrap();
        std::fs::write(&log, [&whole[..], &whole[..15]].concat()).unwrap();
        assert_eq!(read_all(&log, ReadOptions::default()), b"good");
        std::fs::write(&log, [&whole[..], &[0xff; 64]].concat()).unwrap();
        let last = Reader::open(&log, ReadOptions::default()).unwrap().last().unwrap();
        assert!(matches!(last, Err(Error::Damaged { .. })));
    }

    #[test]
    fn a_follower_sees_new_entries_across_a_rotation_and_stops_when_told() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("output.log");
        let mut writer = Writer::create(&log, 32 << 10).unwrap();
        writer.append(Stream::Stdout, 1, b"0 ").unwrap();
        let mut reader = Reader::open(&log, ReadOptions { follow: true, ..Default::default() }).unwrap();
        assert_eq!(reader.next().unwrap().unwrap().bytes, b"0 ");
        let stop = dir.path().join("stop");
        let done = stop.clone();
        let follower = std::thread::spawn(move || {
            let mut seen = String::new();
            reader.stop_when(move || done.exists());
            for entry in reader {
                seen.push_str(std::str::from_utf8(&entry.unwrap().bytes).unwrap());
            }
            seen
        });
        let mut expected = String::new();
        for n in 0..300u64 {
            let text = format!("{n}{} ", "y".repeat(200));
            writer.append(Stream::Stdout, n, text.as_bytes()).unwrap();
            expected.push_str(&text);
            // A follower that is slower than a whole rotation misses the middle, by design: give it time.
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        std::fs::write(&stop, b"").unwrap();
        assert_eq!(follower.join().unwrap(), expected);
    }
}
