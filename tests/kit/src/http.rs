//! As much HTTP/1.1 as tests need: one request per connection, and a watch read line by line.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::Netns;
use crate::traffic::PATIENCE;

/// An answer, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Body as text.
    pub body: String,
}

/// A request without its target.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// `GET`, `PATCH`, ...
    pub method: &'a str,
    /// Path and query.
    pub path: &'a str,
    /// Content type of the body.
    pub content_type: &'a str,
    /// Body; empty for none.
    pub body: &'a str,
}

impl<'a> Request<'a> {
    /// A GET.
    pub fn get(path: &'a str) -> Self {
        Self { method: "GET", path, content_type: "", body: "" }
    }

    /// Sends it from a namespace; the whole answer.
    ///
    /// # Errors
    /// As the kernel says; [`ErrorKind::TimedOut`] when the answer is not whole in time,
    /// [`ErrorKind::InvalidData`] when it is not HTTP.
    pub fn send(&self, netns: &Netns, to: SocketAddr) -> io::Result<Response> {
        let deadline = Instant::now() + 2 * PATIENCE;
        let mut incoming = self.open(netns, to)?;
        while incoming.receive(deadline.saturating_duration_since(Instant::now()))? {}
        if !incoming.whole() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(Response { status: incoming.status, body: String::from_utf8_lossy(&incoming.body).into_owned() })
    }

    /// Sends it from a namespace and reads the answer's head; the body is read as it comes.
    ///
    /// # Errors
    /// As [`Request::send`].
    pub fn open(&self, netns: &Netns, to: SocketAddr) -> io::Result<Incoming> {
        let mut socket = netns.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        let Self { method, path, content_type, body } = self;
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n");
        if !body.is_empty() {
            head += &format!("Content-Type: {content_type}\r\nContent-Length: {}\r\n", body.len());
        }
        socket.write_all(format!("{head}\r\n{body}").as_bytes())?;
        let mut incoming = Incoming {
            socket,
            status: 0,
            raw: Vec::new(),
            body: Vec::new(),
            framing: Framing::ToEnd,
            ended: false,
        };
        let deadline = Instant::now() + PATIENCE;
        let end = loop {
            if let Some(end) = incoming.raw.windows(4).position(|window| window == b"\r\n\r\n") {
                break end;
            }
            if !incoming.fill(deadline.saturating_duration_since(Instant::now()))? {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        };
        let head = String::from_utf8_lossy(&incoming.raw[..end]).to_ascii_lowercase();
        incoming.raw.drain(..end + 4);
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        incoming.status = status.ok_or(ErrorKind::InvalidData)?;
        let field =
            |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<usize>().ok());
        if head.lines().any(|line| line.starts_with("transfer-encoding:") && line.ends_with("chunked")) {
            incoming.framing = Framing::Chunked { left: 0 };
        } else if let Some(length) = field("content-length:") {
            incoming.framing = Framing::Length { left: length };
        }
        incoming.decode()?;
        Ok(incoming)
    }
}

#[derive(Debug)]
enum Framing {
    ToEnd,
    Length {
        left: usize,
    },
    /// Bytes left of the present chunk, its line end included.
    Chunked {
        left: usize,
    },
}

/// An answer whose body is still coming.
#[derive(Debug)]
pub struct Incoming {
    /// Status code.
    pub status: u16,
    socket: TcpStream,
    raw: Vec<u8>,
    body: Vec<u8>,
    framing: Framing,
    ended: bool,
}

impl Incoming {
    /// Reads what comes within this time; false at the end of the connection.
    fn fill(&mut self, patience: Duration) -> io::Result<bool> {
        // A timeout of zero would mean none.
        self.socket.set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
        let mut buffer = [0; 16 * 1024];
        match self.socket.read(&mut buffer) {
            Ok(0) => Ok(false),
            Ok(length) => {
                self.raw.extend(&buffer[..length]);
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(ErrorKind::TimedOut.into()),
            Err(error) => Err(error),
        }
    }

    /// Reads more of the body; false when it has ended.
    fn receive(&mut self, patience: Duration) -> io::Result<bool> {
        if self.ended || !self.fill(patience)? {
            return Ok(false);
        }
        self.decode()?;
        Ok(!self.ended)
    }

    fn whole(&self) -> bool {
        self.ended || matches!(self.framing, Framing::ToEnd)
    }

    fn decode(&mut self) -> io::Result<()> {
        loop {
            match &mut self.framing {
                Framing::ToEnd => {
                    self.body.append(&mut self.raw);
                    return Ok(());
                }
                Framing::Length { left } => {
                    let length = self.raw.len().min(*left);
                    *left -= length;
                    self.ended = *left == 0;
                    self.body.extend(self.raw.drain(..length));
                    return Ok(());
                }
                Framing::Chunked { left: 0 } => {
                    let Some(end) = self.raw.windows(2).position(|window| window == b"\r\n") else {
                        return Ok(());
                    };
                    let line = String::from_utf8_lossy(&self.raw[..end]).into_owned();
                    self.raw.drain(..end + 2);
                    let size = line.split(';').next().unwrap_or_default().trim();
                    let size = usize::from_str_radix(size, 16).map_err(|_| ErrorKind::InvalidData)?;
                    if size == 0 {
                        self.ended = true;
                        return Ok(());
                    }
                    self.framing = Framing::Chunked { left: size.saturating_add(2) };
                }
                Framing::Chunked { left } => {
                    if self.raw.is_empty() {
                        return Ok(());
                    }
                    let length = self.raw.len().min(*left);
                    let of_body = length.min(left.saturating_sub(2));
                    *left -= length;
                    self.body.extend(&self.raw[..of_body]);
                    self.raw.drain(..length);
                }
            }
        }
    }

    /// The next line of the body within this time; none when nothing came.
    ///
    /// # Errors
    /// [`ErrorKind::UnexpectedEof`] when the body has ended; else as the kernel says.
    pub fn line(&mut self, patience: Duration) -> io::Result<Option<String>> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(end) = self.body.iter().position(|&byte| byte == b'\n') {
                let line = String::from_utf8_lossy(&self.body[..end]).into_owned();
                self.body.drain(..=end);
                return Ok(Some(line));
            }
            match self.receive(deadline.saturating_duration_since(Instant::now())) {
                Ok(true) => {}
                // What came with the end may hold more lines.
                Ok(false) if self.body.contains(&b'\n') => {}
                Ok(false) => return Err(ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == ErrorKind::TimedOut => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

impl Netns {
    /// One HTTP GET.
    ///
    /// # Errors
    /// As [`Request::send`].
    pub fn http_get(&self, to: SocketAddr, path: &str) -> io::Result<Response> {
        Request::get(path).send(self, to)
    }
}
