//! The guest's console: drained always, kept within bounds.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::{CONSOLE_FILE_MAX, CONSOLE_MEMORY};

/// The last bytes of a stream.
#[derive(Clone, Default)]
pub(crate) struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    /// The bytes kept, at most [`CONSOLE_MEMORY`].
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    /// The last `lines` lines, as text that is safe to print.
    pub(crate) fn lines(&self, lines: usize) -> String {
        let bytes = self.bytes();
        let text = String::from_utf8_lossy(&bytes);
        let mut last: Vec<&str> =
            text.lines().filter(|line| !line.trim().is_empty()).rev().take(lines).collect();
        last.reverse();
        last.join("\n").chars().filter(|c| *c == '\n' || !c.is_control()).collect()
    }

    /// Why the guest's kernel panicked, in its words, if it did.
    pub(crate) fn panic(&self) -> Option<String> {
        const WORDS: usize = 200;
        let bytes = self.bytes();
        let text = String::from_utf8_lossy(&bytes);
        let (_, reason) = text.rsplit_once("Kernel panic - not syncing: ")?;
        Some(reason.chars().take_while(|c| !c.is_control()).take(WORDS).collect())
    }

    fn push(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(CONSOLE_MEMORY);
        kept.drain(..excess);
    }
}

/// Reads `source` to its end. `file` gets the first [`CONSOLE_FILE_MAX`] bytes: a guest that floods its console must neither
/// stop (it would take its monitor with it) nor fill the disk.
pub(crate) async fn drain(mut source: impl AsyncRead + Unpin, tail: Tail, mut file: Option<File>) {
    let mut room = CONSOLE_FILE_MAX;
    let mut buffer = vec![0; 4096];
    while let Ok(n @ 1..) = source.read(&mut buffer).await {
        tail.push(&buffer[..n]);
        if let Some(log) = &mut file {
            let part = &buffer[..n.min(room as usize)];
            room -= part.len() as u64;
            let cut = room == 0;
            if log.write_all(part).is_err() || cut {
                let _ = cut.then(|| log.write_all(b"\n[cut here: the guest wrote more than is kept]\n"));
                file = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_flood_is_cut_in_the_file_and_its_end_kept_in_memory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut flood = vec![b'x'; 3 * CONSOLE_FILE_MAX as usize];
        flood.extend(b"\nsecond last\nKernel panic\x1b[2J\n");
        let tail = Tail::default();
        drain(flood.as_slice(), tail.clone(), Some(file.reopen().unwrap())).await;
        assert!(file.as_file().metadata().unwrap().len() < CONSOLE_FILE_MAX + 100);
        assert_eq!(tail.bytes().len(), CONSOLE_MEMORY);
        assert_eq!(tail.lines(2), "second last\nKernel panic[2J");
    }

    #[test]
    fn a_panic_is_found_above_its_long_trace() {
        let tail = Tail::default();
        tail.push(b"[1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x0\r\n");
        assert_eq!(tail.panic().as_deref(), Some("Attempted to kill init! exitcode=0x0"));
        (0..100).for_each(|_| tail.push(b"[1.0]  ? ret_from_fork+0x1a/0x30\r\n"));
        assert!(tail.panic().is_some());
        assert_eq!(Tail::default().panic(), None);
    }
}
