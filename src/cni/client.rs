//! The plugin's end of the socket: a question, an answer, a deadline.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use super::protocol::{ANSWER_LIMIT, Answer, Request};

/// Between two attempts to reach a daemon that is away: at first short, since a restart takes a moment.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens on the socket.
    #[error("no ferroute daemon answers on {socket}: {source}")]
    Away {
        /// The socket.
        socket: String,
        /// What the system said.
        source: io::Error,
    },
    /// The daemon is there but did not answer in time.
    #[error("the ferroute daemon on {socket} did not answer within {}ms", waited.as_millis())]
    Late {
        /// The socket.
        socket: String,
        /// How long it had.
        waited: Duration,
    },
    /// What it said is no answer.
    #[error("the ferroute daemon on {socket} sent no valid answer: {why}")]
    Garbage {
        /// The socket.
        socket: String,
        /// What is wrong with it.
        why: String,
    },
}

/// How often to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// A daemon that is away is waited for until the deadline: it may just be restarting.
    Persistent,
    /// One attempt.
    Once,
}

/// Asks until there is an answer or `limit` is over.
///
/// # Errors
/// No daemon, no answer in time, or none that can be understood.
pub fn ask(socket: &Path, request: &Request, limit: Duration, patience: Patience) -> Result<Answer, Error> {
    let started = Instant::now();
    let deadline = started + limit;
    let name = || socket.display().to_string();
    let mut pause = FIRST_PAUSE;
    loop {
        let source = match attempt(socket, request, deadline) {
            Ok(line) => {
                return serde_json::from_slice(&line)
                    .map_err(|error| Error::Garbage { socket: name(), why: error.to_string() });
            }
            Err(Failure::Io(error)) if is_late(&error) => {
                return Err(Error::Late { socket: name(), waited: limit });
            }
            Err(Failure::Long) => {
                let why = format!("longer than {ANSWER_LIMIT} bytes");
                return Err(Error::Garbage { socket: name(), why });
            }
            Err(Failure::Io(source)) => source,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if patience == Patience::Once || left.is_zero() {
            return Err(Error::Away { socket: name(), source });
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

enum Failure {
    Io(io::Error),
    Long,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn is_late(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::TimedOut
}

/// What is left, or that nothing is.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Sockets report a passed timeout as EAGAIN.
fn timed(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

fn attempt(path: &Path, request: &Request, deadline: Instant) -> Result<Vec<u8>, Failure> {
    let mut stream = connect(path, deadline)?;
    let left_ms = u64::try_from(left(deadline)?.as_millis()).unwrap_or(u64::MAX);
    let mut line =
        serde_json::to_vec(&Request { timeout_ms: left_ms, ..request.clone() }).map_err(io::Error::from)?;
    line.push(b'\n');
    let mut rest = &line[..];
    while !rest.is_empty() {
        stream.set_write_timeout(Some(left(deadline)?))?;
        match stream.write(rest) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(timed(error).into()),
        }
    }
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(&mut chunk) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(count) => answer.extend(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(timed(error).into()),
        }
        if let Some(end) = answer.iter().position(|byte| *byte == b'\n') {
            answer.truncate(end);
            return Ok(answer);
        }
        if answer.len() > ANSWER_LIMIT {
            return Err(Failure::Long);
        }
    }
}

/// A blocking connect would wait without end for a daemon that accepts nothing.
fn connect(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = SockAddr::unix(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    loop {
        match socket.connect(&address) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The queue of connections is full.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(left(deadline)?.min(FIRST_PAUSE));
            }
            Err(error) => return Err(error),
        }
    }
    socket.set_nonblocking(false)?;
    Ok(std::os::fd::OwnedFd::from(socket).into())
}
