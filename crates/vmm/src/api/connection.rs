//! One client: what it sent so far, and what it has not taken yet.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::http::{self, Message, Progress};

/// A client that does not go on with its request, or does not take its answers, for so long has gone.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection of the API. Nothing here waits.
pub struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
    body_max: usize,
    unsent: Vec<u8>,
    /// It may send the body that it asked about.
    leave: bool,
    /// It ends when everything is sent.
    last: bool,
    /// When it said or took something last.
    moved: Instant,
}

impl Connection {
    /// A connection that was just accepted, whose requests' bodies have at most `body_max` bytes.
    pub fn new(stream: UnixStream, body_max: usize) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (received, unsent, moved) = (Vec::new(), Vec::new(), Instant::now());
        Ok(Connection { stream, received, body_max, unsent, leave: false, last: false, moved })
    }

    /// What is waited for: a client that does not take its answers cannot ask for more.
    pub fn interest(&self) -> PollFlags {
        if self.unsent.is_empty() { PollFlags::IN } else { PollFlags::OUT }
    }

    /// When the client is given up. One between two requests may take its time, as with Firecracker.
    pub fn deadline(&self) -> Option<Instant> {
        self.idle_since().is_none().then(|| self.moved + PATIENCE)
    }

    /// Since when nothing is owed to the client, and nothing expected of it.
    pub fn idle_since(&self) -> Option<Instant> {
        (self.received.is_empty() && self.unsent.is_empty()).then_some(self.moved)
    }

    /// Does what can be done without waiting; `answer` gives status and body. False when the connection has ended.
    pub fn advance(&mut self, answer: &mut impl FnMut(&Message) -> (u16, String)) -> bool {
        match self.exchange(answer) {
            Ok(open) => open && !(self.last && self.unsent.is_empty()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
            Err(error) => {
                tracing::debug!(%error, "an API connection ended");
                false
            }
        }
    }

    fn exchange(&mut self, answer: &mut impl FnMut(&Message) -> (u16, String)) -> io::Result<bool> {
        self.send()?;
        if self.last {
            return Ok(true);
        }
        let mut bytes = [0; 4096];
        let count = self.stream.read(&mut bytes)?;
        self.received.extend_from_slice(&bytes[..count]);
        self.moved = Instant::now();
        while !self.last && self.answer_one(answer) {}
        self.send()?;
        Ok(count > 0)
    }

    /// Answers the first request among what was received, if it is complete.
    fn answer_one(&mut self, answer: &mut impl FnMut(&Message) -> (u16, String)) -> bool {
        match http::parse(&self.received, self.body_max) {
            Ok(Progress::Incomplete { asks }) => {
                if asks && !std::mem::replace(&mut self.leave, true) {
                    self.unsent.extend_from_slice(http::CONTINUE);
                }
                false
            }
            Ok(Progress::Complete(message, used)) => {
                self.received.drain(..used);
                let (status, body) = answer(&message);
                self.unsent.extend(http::response(status, &body, message.keep_alive));
                (self.leave, self.last) = (false, !message.keep_alive);
                true
            }
            // Where the next request would begin is not known.
            Err(error) => {
                self.unsent.extend(http::response(
                    400,
                    &super::server::fault_body(&error.to_string()),
                    false,
                ));
                self.last = true;
                false
            }
        }
    }

    fn send(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            let count = self.stream.write(&self.unsent)?;
            self.unsent.drain(..count);
            self.moved = Instant::now();
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_in_pieces_is_answered_and_the_next_one_too() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(server, http::BODY_MAX).unwrap();
        let mut asked = Vec::new();
        let mut answer = |message: &Message| {
            asked.push(message.path.clone());
            (204, String::new())
        };
        for piece in ["GET /on", "e HTTP/1.1\r\n\r\nGET /two HTTP/1.1\r\nConnection: close\r\n\r\n"] {
            client.write_all(piece.as_bytes()).unwrap();
            connection.advance(&mut answer);
        }
        assert_eq!(asked, ["/one", "/two"]);
        drop(connection);
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text.matches("HTTP/1.1 204 ").count(), 2);
    }

    #[test]
    fn a_client_that_takes_nothing_waits_and_one_that_goes_is_forgotten() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(server, http::BODY_MAX).unwrap();
        let long = "x".repeat(1 << 20);
        assert_eq!(connection.deadline(), None);
        client.write_all(b"GET / HTTP/").unwrap();
        assert!(connection.advance(&mut |_| panic!("it has not asked yet")));
        assert!(connection.deadline().is_some() && connection.idle_since().is_none());
        client.write_all(b"1.1\r\n\r\n").unwrap();
        assert!(connection.advance(&mut |_| (200, long.clone())));
        assert_eq!(connection.interest(), PollFlags::OUT);
        assert!(connection.deadline().is_some());
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(connection.advance(&mut |_| panic!("it has not taken the first answer")));
        drop(client);
        assert!(!connection.advance(&mut |_| panic!("nobody asks")));
    }

    #[test]
    fn nonsense_is_answered_and_ends_the_connection() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(server, http::BODY_MAX).unwrap();
        client.write_all(b"nonsense\r\n\r\n").unwrap();
        assert!(!connection.advance(&mut |_| panic!("that was no request")));
        drop(connection);
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 400 ") && text.contains("fault_message"), "{text}");
    }
}
