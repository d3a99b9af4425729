//! Clients: one request, many requests, steady load, long-lived flows.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{Ipv4RecvErr, Ipv6RecvErr};
use socket2::{Domain, Socket, Type};

use crate::{Netns, reach};

/// How long [`Netns::tcp`] and its like wait for an answer.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// How long one request of a protocol may take. A lost SCTP INIT is sent again only after three
/// seconds (RFC 9260, 16: RTO.Initial as Linux has it), TCP's SYN after one.
fn patience(protocol: Protocol) -> Duration {
    if protocol == Protocol::Sctp { PATIENCE * 4 } else { PATIENCE }
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP, one-to-one style.
    Sctp,
}

impl Protocol {
    /// All three, for tests that run once for each.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The IP protocol number.
    pub fn number(self) -> i32 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// `ipvsadm`'s option for a service of this protocol.
    pub fn ipvsadm(self) -> &'static str {
        match self {
            Self::Tcp => "-t",
            Self::Udp => "-u",
            Self::Sctp => "--sctp-service",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// What an echo server said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Who answered: pod name.
    pub pod: String,
    /// And its namespace.
    pub namespace: String,
    /// The address it was reached at.
    pub ip: IpAddr,
    /// The port it was reached at.
    pub port: u16,
    /// Whom it saw.
    pub peer: SocketAddr,
}

impl Answer {
    /// Reads an answer line.
    pub fn parse(line: &str) -> Option<Self> {
        let fields: BTreeMap<&str, &str> =
            line.split_whitespace().filter_map(|field| field.split_once('=')).collect();
        Some(Self {
            pod: (*fields.get("pod")?).to_owned(),
            namespace: (*fields.get("ns")?).to_owned(),
            ip: fields.get("ip")?.parse().ok()?,
            port: fields.get("port")?.parse().ok()?,
            peer: fields.get("peer")?.parse().ok()?,
        })
    }
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Answered.
    Answer(Answer),
    /// Refused at once: a reset or "port unreachable" instead of a connection.
    Refused,
    /// Nothing came.
    Timeout,
    /// An ICMP error other than "port unreachable", no route here, or a packet filter of the sender's own
    /// (EPERM); with the errno it became.
    Unreachable(Errno),
    /// Accepted, then reset or closed without an answer.
    Reset,
    /// Anything else.
    Failed(String),
}

impl Reply {
    fn from_error(error: &io::Error) -> Self {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ECONNREFUSED) => Self::Refused,
            Some(Errno::ECONNRESET | Errno::EPIPE | Errno::ECONNABORTED) => Self::Reset,
            Some(Errno::ETIMEDOUT | Errno::EAGAIN) => Self::Timeout,
            Some(errno @ (Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EACCES | Errno::EPERM)) => {
                Self::Unreachable(errno)
            }
            _ => match error.kind() {
                ErrorKind::TimedOut | ErrorKind::WouldBlock => Self::Timeout,
                ErrorKind::UnexpectedEof => Self::Reset,
                _ => Self::Failed(error.to_string()),
            },
        }
    }

    /// The answer, if there was one.
    pub fn answer(&self) -> Option<&Answer> {
        match self {
            Self::Answer(answer) => Some(answer),
            _ => None,
        }
    }

    /// The name of the pod that answered.
    pub fn pod(&self) -> Option<&str> {
        self.answer().map(|answer| answer.pod.as_str())
    }

    /// The address that the pod saw.
    pub fn peer(&self) -> Option<IpAddr> {
        self.answer().map(|answer| answer.peer.ip())
    }
}

impl Netns {
    /// One TCP request on a connection of its own.
    pub fn tcp(&self, to: SocketAddr) -> Reply {
        self.ask(Protocol::Tcp, to, PATIENCE)
    }

    /// One UDP request from a port of its own.
    pub fn udp(&self, to: SocketAddr) -> Reply {
        self.ask(Protocol::Udp, to, PATIENCE)
    }

    /// One SCTP request on an association of its own.
    pub fn sctp(&self, to: SocketAddr) -> Reply {
        self.ask(Protocol::Sctp, to, patience(Protocol::Sctp))
    }

    /// One request on a connection of its own, with a deadline for the whole of it.
    pub fn ask(&self, protocol: Protocol, to: SocketAddr, patience: Duration) -> Reply {
        let outcome = Connection::open(self, protocol, to, patience).and_then(|mut it| it.ask(patience));
        outcome.map_or_else(|error| Reply::from_error(&error), Reply::Answer)
    }

    /// One ICMP echo request; whether it was answered within [`PATIENCE`].
    ///
    /// # Errors
    /// No raw socket.
    pub fn ping(&self, to: IpAddr) -> io::Result<bool> {
        // Type, code, checksum, identifier, sequence number (RFC 792, RFC 4443). The kernel fills in
        // the checksum of ICMPv6 only; that of this IPv4 message is its one's complement.
        let (protocol, request, answer) = match to {
            IpAddr::V4(_) => (1, [8, 0, 0xf7, 0xfe, 0, 0, 0, 1], 0),
            IpAddr::V6(_) => (58, [128, 0, 0, 0, 0, 0, 0, 1], 129),
        };
        let to = SocketAddr::new(to, 0);
        let mut socket = self.run(|| {
            Socket::new(Domain::for_address(to), Type::RAW, Some(socket2::Protocol::from(protocol)))
        })?;
        socket.connect(&to.into())?;
        socket.send(&request)?;
        let deadline = Instant::now() + PATIENCE;
        let mut packet = [0; 128];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            socket.set_read_timeout(Some(left))?;
            let length = match socket.read(&mut packet) {
                Ok(length) => length,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(false);
                }
                Err(error) => return Err(error),
            };
            // IPv4 hands over the IP header too, IPv6 does not.
            let header = if to.is_ipv4() { usize::from(packet[0] & 0x0f) * 4 } else { 0 };
            if length > header && packet[header] == answer {
                return Ok(true);
            }
        }
    }

    /// Asks so many times one after the other, each on a connection of its own.
    pub fn spread(&self, protocol: Protocol, to: SocketAddr, times: usize) -> Tally {
        let mut tally = Tally::default();
        for _ in 0..times {
            tally.count(self.ask(protocol, to, patience(protocol)));
        }
        tally
    }
}

/// An open connection (for UDP: a bound and connected socket).
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    stream: bool,
}

impl Connection {
    /// Connects from a namespace.
    ///
    /// # Errors
    /// As the kernel says; [`ErrorKind::TimedOut`] at the deadline.
    pub fn open(netns: &Netns, protocol: Protocol, to: SocketAddr, patience: Duration) -> io::Result<Self> {
        let stream = protocol != Protocol::Udp;
        let kind = if stream { Type::STREAM } else { Type::DGRAM };
        let socket = netns.run(|| {
            let socket = Socket::new(Domain::for_address(to), kind, Some(protocol.number().into()))?;
            if protocol == Protocol::Sctp {
                // One address only: SCTP tells the other side all it is bound to, past any NAT.
                socket.bind(&SocketAddr::new(source_towards(to)?, 0).into())?;
            }
            Ok::<_, io::Error>(socket)
        })?;
        connect(&socket, to, patience)?;
        Ok(Self { socket, stream })
    }

    /// The address and port this end has.
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn local(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()?.as_socket().ok_or_else(|| ErrorKind::InvalidData.into())
    }

    /// One request on this connection.
    ///
    /// # Errors
    /// As the kernel says; [`ErrorKind::UnexpectedEof`] when the other side has closed.
    pub fn ask(&mut self, patience: Duration) -> io::Result<Answer> {
        let deadline = Instant::now() + patience;
        self.socket.set_write_timeout(Some(patience))?;
        self.socket.write_all(b"who\n")?;
        let mut line = Vec::new();
        let mut buffer = [0; 1024];
        while !line.ends_with(b"\n") {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.socket.set_read_timeout(Some(left))?;
            match self.socket.read(&mut buffer) {
                Ok(0) if self.stream => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(length) => line.extend(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let text = String::from_utf8_lossy(&line);
        Answer::parse(&text).ok_or_else(|| io::Error::other(format!("not an echo server: {text:?}")))
    }
}

/// Connects. A refusal by ICMP that arrives while connect(2) holds the socket, as it does where the
/// refusing node is in the same kernel, is told at once (ip(7), IP_RECVERR) and not when the first packet
/// is repeated.
fn connect(socket: &Socket, to: SocketAddr, patience: Duration) -> io::Result<()> {
    if to.is_ipv4() {
        setsockopt(socket, Ipv4RecvErr, &true)?;
    } else {
        setsockopt(socket, Ipv6RecvErr, &true)?;
    }
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => return Err(error),
        _ => {}
    }
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut ready, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(0) => return Err(ErrorKind::TimedOut.into()),
            Ok(_) => break,
        }
    }
    if let Some((_, _, errno)) = reach::errors(socket).first() {
        return Err((*errno).into());
    }
    match socket.take_error()? {
        Some(error) => Err(error),
        None => socket.set_nonblocking(false),
    }
}

/// The address from which the kernel would send there.
fn source_towards(to: SocketAddr) -> io::Result<IpAddr> {
    let any = if to.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}

/// Requests counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests answered.
    pub ok: u64,
    /// Requests not answered.
    pub failed: u64,
    /// The first that was not, and how far in it came (0 when not timed).
    pub first_failure: Option<(Duration, Reply)>,
    /// Answers by pod name.
    pub pods: BTreeMap<String, u64>,
    /// Addresses that the pods saw.
    pub peers: BTreeSet<IpAddr>,
}

impl Tally {
    fn count(&mut self, reply: Reply) {
        self.count_at(Duration::ZERO, reply);
    }

    fn count_at(&mut self, at: Duration, reply: Reply) {
        match reply {
            Reply::Answer(answer) => {
                self.ok += 1;
                *self.pods.entry(answer.pod).or_default() += 1;
                self.peers.insert(answer.peer.ip());
            }
            failure => {
                self.failed += 1;
                self.first_failure.get_or_insert((at, failure));
            }
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ok, {} failed", self.ok, self.failed)?;
        if let Some((at, reply)) = &self.first_failure {
            write!(f, " (first after {} ms: {reply:?})", at.as_millis())?;
        }
        for (pod, count) in &self.pods {
            write!(f, ", {pod} {count}")?;
        }
        Ok(())
    }
}

/// Requests in the background until stopped, each on a connection of its own.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    tally: Arc<Mutex<Tally>>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts so many clients, each asking and then pausing.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(
        netns: &Netns,
        protocol: Protocol,
        to: SocketAddr,
        clients: usize,
        pause: Duration,
    ) -> io::Result<Self> {
        let mut load = Self { stop: Arc::default(), tally: Arc::default(), threads: Vec::new() };
        let begin = Instant::now();
        for _ in 0..clients {
            let (netns, stop, tally) = (netns.clone(), load.stop.clone(), load.tally.clone());
            let client = move || {
                while !stop.load(Ordering::Relaxed) {
                    let at = begin.elapsed();
                    let reply = netns.ask(protocol, to, PATIENCE);
                    tally.lock().unwrap_or_else(PoisonError::into_inner).count_at(at, reply);
                    std::thread::sleep(pause);
                }
            };
            load.threads.push(small_thread("load", client)?);
        }
        Ok(load)
    }

    /// The count so far.
    pub fn tally(&self) -> Tally {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it; the whole count, requests under way included.
    pub fn stop(mut self) -> Tally {
        self.finish();
        self.tally()
    }

    fn finish(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A client thread has nothing that could panic; if one did, its message is on stderr.
            let _ = thread.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.finish();
    }
}

/// One connection (for UDP: one source port) that asks again and again until stopped.
#[derive(Debug)]
pub struct Flow {
    stop: Arc<AtomicBool>,
    tally: Arc<Mutex<Tally>>,
    thread: Option<JoinHandle<()>>,
    /// Its own address and port.
    pub local: SocketAddr,
}

impl Flow {
    /// Connects, then asks every `interval`. A broken connection counts as one failure and ends the
    /// flow; a UDP request without an answer counts as one and the next is sent.
    ///
    /// # Errors
    /// When the connection cannot be made.
    pub fn start(netns: &Netns, protocol: Protocol, to: SocketAddr, interval: Duration) -> io::Result<Self> {
        let mut connection = Connection::open(netns, protocol, to, PATIENCE)?;
        let local = connection.local()?;
        let (stop, tally): (Arc<AtomicBool>, Arc<Mutex<Tally>>) = Default::default();
        // A lost datagram should cost about one interval, or one stalled wait hides many.
        let patience =
            if protocol == Protocol::Udp { interval.max(Duration::from_millis(200)) } else { PATIENCE };
        let (flag, count) = (stop.clone(), tally.clone());
        let begin = Instant::now();
        let client = move || {
            while !flag.load(Ordering::Relaxed) {
                let at = begin.elapsed();
                let reply = connection.ask(patience).map_or_else(|e| Reply::from_error(&e), Reply::Answer);
                let broken = protocol != Protocol::Udp && reply.answer().is_none();
                count.lock().unwrap_or_else(PoisonError::into_inner).count_at(at, reply);
                if broken {
                    return;
                }
                std::thread::sleep(interval);
            }
        };
        Ok(Self { stop, tally, thread: Some(small_thread("flow", client)?), local })
    }

    /// The count so far.
    pub fn tally(&self) -> Tally {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it; the whole count.
    pub fn stop(mut self) -> Tally {
        self.finish();
        self.tally()
    }

    fn finish(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.finish();
    }
}

fn small_thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).stack_size(128 * 1024).spawn(work)
}
