//! The client of QEMU's control protocol (QMP): one JSON object a line, an event may come between a command and its answer.
//!
//! QEMU is confined because its guest may take it over, so what it says is bounded in length and in time like a guest's words.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// The longest line that is read, in bytes.
const MAX_LINE: u64 = 256 * 1024;

/// Events that are kept until somebody asks for them.
const MAX_EVENTS: usize = 64;

/// What can go wrong with a command.
#[derive(Debug)]
pub(super) enum QmpError {
    /// QEMU refused it, in these words.
    Refused(String),
    /// No answer in time.
    Deadline(Duration),
    /// The connection is broken, or QEMU does not keep to the protocol.
    Broken(String),
}

impl From<io::Error> for QmpError {
    fn from(error: io::Error) -> Self {
        QmpError::Broken(error.to_string())
    }
}

type Result<T> = std::result::Result<T, QmpError>;

/// A connection to QEMU's control socket.
pub(super) struct Qmp {
    io: BufReader<UnixStream>,
    /// The line being read; kept here so that a deadline loses nothing of it.
    line: Vec<u8>,
    events: VecDeque<Value>,
    next_id: u64,
    /// The first command has been sent, with what QMP wants before it.
    greeted: bool,
}

impl Qmp {
    pub(super) fn new(io: UnixStream) -> Qmp {
        Qmp { io: BufReader::new(io), line: Vec::new(), events: VecDeque::new(), next_id: 0, greeted: false }
    }

    /// Sends commands without waiting for the answers of earlier ones; gives what identifies the last.
    ///
    /// QEMU reads them when it is up: a machine that is being restored needs no turn of ours in between.
    pub(super) async fn send(&mut self, commands: &[(&str, Value)]) -> Result<u64> {
        let mut text = Vec::new();
        if !self.greeted {
            self.greeted = true;
            self.append(&mut text, "qmp_capabilities", json!({}));
        }
        for (command, arguments) in commands {
            self.append(&mut text, command, arguments.clone());
        }
        tokio::io::AsyncWriteExt::write_all(self.io.get_mut(), &text).await?;
        Ok(self.next_id)
    }

    fn append(&mut self, text: &mut Vec<u8>, command: &str, arguments: Value) {
        self.next_id += 1;
        let message = json!({ "execute": command, "arguments": arguments, "id": self.next_id });
        text.extend(message.to_string().into_bytes());
        text.push(b'\n');
    }

    /// Sends a command and waits for its answer.
    pub(super) async fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value> {
        timeout(deadline, async {
            let id = self.send(&[(command, arguments)]).await?;
            self.answer(id).await
        })
        .await
        .unwrap_or(Err(QmpError::Deadline(deadline)))
    }

    /// Waits for the answer to the command `id`. An earlier command's refusal is this one's too.
    pub(super) async fn answer(&mut self, id: u64) -> Result<Value> {
        loop {
            let mut message = self.message().await?;
            if message.get("event").is_some() {
                self.keep(message);
                continue;
            }
            if let Some(error) = message.get("error") {
                let words = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(QmpError::Refused(words.to_owned()));
            }
            if message.get("id").and_then(Value::as_u64) == Some(id) {
                return Ok(message.get_mut("return").map(Value::take).unwrap_or_default());
            }
        }
    }

    /// Waits for an event that `wanted` accepts.
    pub(super) async fn event<T>(&mut self, mut wanted: impl FnMut(&str, &Value) -> Option<T>) -> Result<T> {
        let mut check = |message: &Value| {
            wanted(message.get("event")?.as_str()?, message.get("data").unwrap_or(&Value::Null))
        };
        while let Some(event) = self.events.pop_front() {
            if let Some(found) = check(&event) {
                return Ok(found);
            }
        }
        loop {
            let message = self.message().await?;
            if let Some(found) = check(&message) {
                return Ok(found);
            }
        }
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    async fn message(&mut self) -> Result<Value> {
        loop {
            let room = MAX_LINE.saturating_sub(self.line.len() as u64);
            let n = (&mut self.io).take(room).read_until(b'\n', &mut self.line).await?;
            if !self.line.ends_with(b"\n") {
                let what = if n == 0 && room > 0 { "QEMU closed it" } else { "a line that is too long" };
                return Err(QmpError::Broken(what.into()));
            }
            let line = std::mem::take(&mut self.line);
            let message: Value = serde_json::from_slice(&line)
                .map_err(|_| QmpError::Broken("a line that is not JSON".into()))?;
            if message.get("QMP").is_none() {
                return Ok(message);
            }
        }
    }

    /// Hands QEMU a descriptor under a name that later commands use.
    pub(super) async fn send_fd(&mut self, name: &str, fd: BorrowedFd<'_>, deadline: Duration) -> Result<()> {
        timeout(deadline, async {
            let mut text = Vec::new();
            self.append(&mut text, "getfd", json!({ "fdname": name }));
            let id = self.next_id;
            let socket = self.io.get_ref();
            loop {
                socket.writable().await?;
                match socket.try_io(Interest::WRITABLE, || send_with_fd(socket, &text, fd)) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                    Ok(n) if n == text.len() => break,
                    Ok(_) => return Err(QmpError::Broken("a short write".into())),
                }
            }
            self.answer(id).await.map(drop)
        })
        .await
        .unwrap_or(Err(QmpError::Deadline(deadline)))
    }
}

fn send_with_fd(socket: &UnixStream, text: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(text)], &mut ancillary, SendFlags::NOSIGNAL)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    const SOON: Duration = Duration::from_millis(300);

    fn pair() -> (Qmp, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Qmp::new(near), far)
    }

    #[tokio::test]
    async fn events_before_an_answer_are_kept() {
        let (mut qmp, mut qemu) = pair();
        qemu.write_all(b"{\"QMP\": {}}\n{\"return\": {}, \"id\": 1}\n{\"event\": \"STOP\"}\n{\"return\": {\"a\": 1}, \"id\": 2}\n")
            .await
            .unwrap();
        assert_eq!(qmp.execute("stop", json!({}), SOON).await.unwrap()["a"], 1);
        qmp.event(|name, _| (name == "STOP").then_some(())).await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_a_silence_and_a_flood_are_told_apart() {
        let (mut qmp, mut qemu) = pair();
        qemu.write_all(b"{\"error\": {\"desc\": \"no such thing\"}, \"id\": 2}\n").await.unwrap();
        let refused = qmp.execute("x", json!({}), SOON).await;
        assert!(matches!(refused, Err(QmpError::Refused(words)) if words == "no such thing"));
        assert!(matches!(qmp.execute("x", json!({}), SOON).await, Err(QmpError::Deadline(_))));
        tokio::spawn(async move { while qemu.write_all(&[b'x'; 65536]).await.is_ok() {} });
        assert!(matches!(qmp.execute("x", json!({}), SOON * 10).await, Err(QmpError::Broken(_))));
    }

    #[tokio::test]
    async fn qemu_going_away_is_an_error() {
        let (mut qmp, qemu) = pair();
        drop(qemu);
        assert!(matches!(qmp.execute("x", json!({}), SOON).await, Err(QmpError::Broken(_))));
    }
}
