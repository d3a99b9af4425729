//! One TCP connection of a peer: bytes in both directions, without waiting on either.

use std::future::poll_fn;
use std::io;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fsm::ConnectionId;
use crate::message::{Codec, Decoded, EncodeError, FrameReader, Message, SessionReset};

/// Octets that may wait for the peer before no more routes are turned into messages.
const LOW_WATER: usize = 64 * 1024;
/// Octets read before others have their turn.
const READ_BUDGET: usize = 256 * 1024;
/// How long a peer may take to read the last words.
const LINGER: Duration = Duration::from_secs(2);

/// A connection with what waits to be written and what is not yet a whole message.
#[derive(Debug)]
pub(super) struct Wire {
    pub id: ConnectionId,
    pub codec: Codec,
    stream: TcpStream,
    reader: FrameReader,
    outgoing: Vec<u8>,
    written: usize,
    /// Since when the peer has taken nothing of what waits.
    stalled: Option<Instant>,
}

/// What a connection is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ready {
    Read(ConnectionId),
    Write(ConnectionId),
}

/// What came out of reading.
#[derive(Debug)]
pub(super) enum Heard {
    Message(Box<Decoded>),
    /// Bytes that are no message: the connection is of no more use.
    Garbage(SessionReset),
    /// The peer closed, or the connection broke.
    Closed(Option<String>),
}

impl Wire {
    pub fn new(id: ConnectionId, stream: TcpStream) -> Self {
        Self {
            id,
            codec: Codec::initial(),
            stream,
            reader: FrameReader::new(),
            outgoing: Vec::new(),
            written: 0,
            stalled: None,
        }
    }

    /// Local and remote address, as text for the status.
    pub fn local_address(&self) -> Option<std::net::SocketAddr> {
        self.stream.local_addr().ok()
    }

    /// Appends a message to what waits.
    pub fn send(&mut self, message: &Message, now: Instant) -> Result<(), EncodeError> {
        message.encode(&self.codec, &mut self.outgoing)?;
        self.stalled.get_or_insert(now);
        Ok(())
    }

    /// Gives the buffer to whoever writes messages into it.
    pub fn outgoing(&mut self, now: Instant) -> &mut Vec<u8> {
        self.stalled.get_or_insert(now);
        &mut self.outgoing
    }

    /// Whether routes may be turned into messages now.
    pub fn has_room(&self) -> bool {
        self.outgoing.len() - self.written < LOW_WATER
    }

    fn is_idle(&self) -> bool {
        self.written == self.outgoing.len()
    }

    /// Since when the peer has taken nothing although something waits.
    pub fn stalled_since(&self) -> Option<Instant> {
        if self.is_idle() { None } else { self.stalled }
    }

    /// Writes what the socket takes.
    pub fn flush(&mut self, now: Instant) -> io::Result<()> {
        while !self.is_idle() {
            match self.stream.try_write(&self.outgoing[self.written..]) {
                Ok(count) => {
                    self.written += count;
                    self.stalled = Some(now);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.outgoing.clear();
        self.outgoing.shrink_to(LOW_WATER);
        (self.written, self.stalled) = (0, None);
        Ok(())
    }

    /// Takes what has arrived; `hear` says whether to go on after each message.
    pub fn fill(&mut self) -> Result<bool, Heard> {
        match self.stream.try_read(self.reader.space()) {
            Ok(0) => Err(Heard::Closed(None)),
            Ok(count) => {
                self.reader.filled(count);
                Ok(true)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(false)
            }
            Err(error) => Err(Heard::Closed(Some(error.to_string()))),
        }
    }

    /// The next whole message of what has arrived.
    pub fn next(&mut self) -> Option<Heard> {
        match self.reader.next_frame(&self.codec) {
            Ok(None) => None,
            Ok(Some(frame)) => Some(match Message::decode(frame, &self.codec) {
                Ok(decoded) => Heard::Message(Box::new(decoded)),
                Err(reset) => Heard::Garbage(reset),
            }),
            Err(reset) => Some(Heard::Garbage(reset)),
        }
    }

    /// Sends the rest and closes. A NOTIFICATION would be lost if the socket was closed with
    /// something unread in it: the kernel would answer with a reset.
    pub async fn close(mut self) {
        let goodbye = async {
            self.stream.write_all(&self.outgoing[self.written..]).await?;
            self.stream.shutdown().await?;
            let mut rest = [0; 4096];
            while self.stream.read(&mut rest).await? > 0 {}
            io::Result::Ok(())
        };
        // Whoever does not read the last words has lost them.
        let _ = tokio::time::timeout(LINGER, goodbye).await;
    }
}

/// Waits until a connection can be read, if `reading`, or written, if something waits there.
pub(super) async fn ready(wires: &[Wire], reading: bool) -> Ready {
    poll_fn(|context| {
        for wire in wires {
            // An error shows again when the connection is used.
            if reading && wire.stream.poll_read_ready(context).is_ready() {
                return Poll::Ready(Ready::Read(wire.id));
            }
            if !wire.is_idle() && wire.stream.poll_write_ready(context).is_ready() {
                return Poll::Ready(Ready::Write(wire.id));
            }
        }
        Poll::Pending
    })
    .await
}

/// Octets to read in one go at most.
pub(super) const fn read_budget() -> usize {
    READ_BUDGET
}
