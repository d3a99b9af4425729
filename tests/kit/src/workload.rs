//! Echo servers that say who they are and whom they saw.
//!
//! All servers of the process share one reactor thread: a socket belongs to the namespace in which it
//! was opened, whichever thread serves it, so hundreds of pods cost some sockets each and no thread.
//! (A thread per connection was the alternative; every wake-up of a sleeping thread costs two
//! process switches in User-Mode Linux, and rollouts open thousands of connections.)

use std::collections::HashMap;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};

use anyhow::{Context, Result};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use socket2::{Domain, Socket, Type};

use crate::Netns;
use crate::traffic::Protocol;

/// More than this without a line end is no request.
const LINE_LIMIT: usize = 64 * 1024;
const WAKE: Token = Token(usize::MAX);

/// Who a server says it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Pod name.
    pub pod: String,
    /// Pod namespace.
    pub namespace: String,
}

/// The echo servers of one pod. They are closed, connections and all, when this is dropped.
///
/// Every TCP or SCTP line and every UDP datagram is answered by one line
/// `pod=NAME ns=NAMESPACE ip=OWN port=OWN peer=IP:PORT`; connections stay open for more. A line that
/// starts with `GET ` makes it HTTP/1.1: `/healthz` answers `ok`, any other path the line above.
#[derive(Debug)]
pub struct Workload {
    owner: u64,
}

impl Workload {
    /// Listens in a namespace. TCP listens on all addresses; UDP and SCTP on each of `addresses`, so
    /// that answers leave from the address that was asked and SCTP offers no second path.
    ///
    /// # Errors
    /// When a port is taken, or the kernel lacks the protocol (SCTP: module `sctp`).
    pub fn start(
        netns: &Netns,
        identity: Identity,
        addresses: &[IpAddr],
        ports: &[(Protocol, u16)],
    ) -> Result<Self> {
        let identity = Arc::new(identity);
        let mut slots = Vec::new();
        for &(protocol, port) in ports {
            for &address in addresses {
                let any = match address {
                    IpAddr::V4(_) => IpAddr::from([0; 4]),
                    IpAddr::V6(_) => IpAddr::from([0; 16]),
                };
                let at = SocketAddr::new(if protocol == Protocol::Tcp { any } else { address }, port);
                let kind = netns.run(|| listen(protocol, at)).with_context(|| {
                    format!("pod {}: listen on {protocol} {at} in {}", identity.pod, netns.name())
                })?;
                slots.push((identity.clone(), kind));
            }
        }
        let reactor = Reactor::shared()?;
        let owner = reactor.next.fetch_add(1, Ordering::Relaxed);
        reactor.ask(|done| Command::Serve { owner, slots, done })?;
        Ok(Self { owner })
    }

    /// Stops accepting connections and datagrams; open connections are served on.
    ///
    /// # Errors
    /// When the reactor has ended.
    pub fn stop_accepting(&self) -> Result<()> {
        Reactor::shared()?.ask(|done| Command::StopAccepting { owner: self.owner, done })
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        // Waits: a namespace whose sockets are open would outlive its pod.
        let closed = Reactor::shared().and_then(|r| r.ask(|done| Command::Close { owner: self.owner, done }));
        if let Err(error) = closed {
            eprintln!("close workload: {error:#}");
        }
    }
}

enum Kind {
    Listener(Socket),
    Stream {
        socket: Socket,
        local: SocketAddr,
        peer: SocketAddr,
        input: Vec<u8>,
        output: Vec<u8>,
        ending: bool,
    },
    Datagram(UdpSocket),
}

impl Kind {
    fn fd(&self) -> RawFd {
        match self {
            Kind::Listener(socket) | Kind::Stream { socket, .. } => socket.as_raw_fd(),
            Kind::Datagram(socket) => socket.as_raw_fd(),
        }
    }
}

fn listen(protocol: Protocol, at: SocketAddr) -> io::Result<Kind> {
    let kind = if protocol == Protocol::Udp { Type::DGRAM } else { Type::STREAM };
    if protocol == Protocol::Sctp {
        // Taken over when the socket is made. listen() else wants the kernel to load hmac(md5), which a lab with its module loader
        // switched off answers with ENOSYS. Kernels from 6.18 on have no such choice and no such need.
        let _ = std::fs::write("/proc/sys/net/sctp/cookie_hmac_alg", "none");
    }
    let socket = Socket::new(Domain::for_address(at), kind, Some(protocol.number().into()))?;
    if at.is_ipv6() && protocol != Protocol::Sctp {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    if protocol == Protocol::Tcp {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&at.into())?;
    if protocol == Protocol::Udp {
        return Ok(Kind::Datagram(socket.into()));
    }
    socket.listen(4096)?;
    Ok(Kind::Listener(socket))
}

enum Command {
    Serve { owner: u64, slots: Vec<(Arc<Identity>, Kind)>, done: mpsc::Sender<io::Result<()>> },
    StopAccepting { owner: u64, done: mpsc::Sender<io::Result<()>> },
    Close { owner: u64, done: mpsc::Sender<io::Result<()>> },
}

struct Reactor {
    next: AtomicU64,
    commands: mpsc::Sender<Command>,
    waker: Waker,
}

impl Reactor {
    fn shared() -> Result<&'static Self> {
        static REACTOR: OnceLock<Result<Reactor, String>> = OnceLock::new();
        REACTOR
            .get_or_init(|| Self::start().map_err(|error| error.to_string()))
            .as_ref()
            .map_err(|text| anyhow::anyhow!("start the workload reactor: {text}"))
    }

    fn start() -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKE)?;
        let (commands, inbox) = mpsc::channel();
        std::thread::Builder::new().name("workloads".into()).spawn(move || Served::new(poll).run(&inbox))?;
        Ok(Self { next: AtomicU64::new(1), commands, waker })
    }

    fn ask(&self, command: impl FnOnce(mpsc::Sender<io::Result<()>>) -> Command) -> Result<()> {
        let (done, answer) = mpsc::channel();
        self.commands.send(command(done)).ok().context("the workload reactor has ended")?;
        self.waker.wake().context("wake the workload reactor")?;
        answer.recv().context("the workload reactor has ended")?.context("register with the workload reactor")
    }
}

struct Slot {
    owner: u64,
    identity: Arc<Identity>,
    kind: Kind,
}

/// What the reactor thread owns.
struct Served {
    poll: Poll,
    slots: HashMap<usize, Slot>,
    next: usize,
}

impl Served {
    fn new(poll: Poll) -> Self {
        Self { poll, slots: HashMap::new(), next: 0 }
    }

    fn run(&mut self, inbox: &mpsc::Receiver<Command>) {
        let mut events = Events::with_capacity(1024);
        loop {
            match self.poll.poll(&mut events, None) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    eprintln!("workload reactor: {error}");
                    return;
                }
                Ok(()) => {}
            }
            let ready: Vec<Token> = events.iter().map(|event| event.token()).collect();
            for token in ready {
                if token == WAKE {
                    while let Ok(command) = inbox.try_recv() {
                        self.obey(command);
                    }
                } else {
                    self.serve(token.0);
                }
            }
        }
    }

    fn obey(&mut self, command: Command) {
        // An asker that has gone needs no answer.
        match command {
            Command::Serve { owner, slots, done } => {
                let result = slots
                    .into_iter()
                    .try_for_each(|(identity, kind)| self.insert(Slot { owner, identity, kind }).map(drop));
                let _ = done.send(result);
            }
            Command::StopAccepting { owner, done } => {
                self.slots.retain(|_, slot| slot.owner != owner || matches!(slot.kind, Kind::Stream { .. }));
                let _ = done.send(Ok(()));
            }
            Command::Close { owner, done } => {
                self.slots.retain(|_, slot| slot.owner != owner);
                let _ = done.send(Ok(()));
            }
        }
    }

    fn insert(&mut self, slot: Slot) -> io::Result<usize> {
        let key = self.next;
        self.next += 1;
        let interest = match slot.kind {
            Kind::Stream { .. } => Interest::READABLE | Interest::WRITABLE,
            _ => Interest::READABLE,
        };
        self.poll.registry().register(&mut SourceFd(&slot.kind.fd()), Token(key), interest)?;
        self.slots.insert(key, slot);
        Ok(key)
    }

    fn serve(&mut self, key: usize) {
        let Some(slot) = self.slots.get_mut(&key) else { return };
        match &mut slot.kind {
            Kind::Listener(listener) => {
                let mut accepted = Vec::new();
                // Edge triggered: take all there are. Any other error than "no more" concerns one
                // connection that ended before it was taken.
                loop {
                    match listener.accept() {
                        Ok((socket, peer)) => accepted.push((socket, peer)),
                        Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                        Err(error) if error.kind() == ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
                let (owner, identity) = (slot.owner, slot.identity.clone());
                for (socket, peer) in accepted {
                    let _ = self.adopt(owner, &identity, socket, &peer);
                }
            }
            Kind::Datagram(socket) => {
                let mut buffer = [0; 2048];
                loop {
                    match socket.recv_from(&mut buffer) {
                        Ok((_, peer)) => {
                            if let Ok(local) = socket.local_addr() {
                                let _ = socket.send_to(line(&slot.identity, local, peer).as_bytes(), peer);
                            }
                        }
                        Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                        // An ICMP error for an earlier answer; it costs no request.
                        Err(_) => {}
                    }
                }
            }
            Kind::Stream { .. } => {
                if !matches!(stream(slot), Ok(true)) {
                    self.slots.remove(&key);
                }
            }
        }
    }

    fn adopt(
        &mut self,
        owner: u64,
        identity: &Arc<Identity>,
        socket: Socket,
        peer: &socket2::SockAddr,
    ) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let address = |a: &socket2::SockAddr| a.as_socket().ok_or(ErrorKind::InvalidData);
        let (local, peer) = (address(&socket.local_addr()?)?, address(peer)?);
        let (input, output) = (Vec::new(), Vec::new());
        let kind = Kind::Stream { socket, local, peer, input, output, ending: false };
        let key = self.insert(Slot { owner, identity: identity.clone(), kind })?;
        self.serve(key);
        Ok(())
    }
}

fn line(identity: &Identity, local: SocketAddr, peer: SocketAddr) -> String {
    let Identity { pod, namespace } = identity;
    format!("pod={pod} ns={namespace} ip={} port={} peer={peer}\n", local.ip(), local.port())
}

/// Serves a connection as far as it goes; whether it stays open.
fn stream(slot: &mut Slot) -> io::Result<bool> {
    let Kind::Stream { socket, local, peer, input, output, ending } = &mut slot.kind else { return Ok(true) };
    let mut buffer = [0; 4096];
    while !*ending {
        match socket.read(&mut buffer) {
            Ok(0) => *ending = true,
            Ok(length) => input.extend(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        while let Some(request) = Request::take(input) {
            let text = line(&slot.identity, *local, *peer);
            match request {
                Request::Line => output.extend(text.as_bytes()),
                Request::Get { health, close } => {
                    let body = if health { "ok\n" } else { text.as_str() };
                    let rest = if close { "Connection: close\r\n" } else { "" };
                    let length = body.len();
                    let head = format!(
                        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n{rest}\r\n"
                    );
                    output.extend(head.as_bytes());
                    output.extend(body.as_bytes());
                    *ending |= close;
                }
            }
        }
        if input.len() > LINE_LIMIT {
            *ending = true;
        }
    }
    while !output.is_empty() {
        match socket.write(output) {
            Ok(length) => drop(output.drain(..length)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(!*ending)
}

enum Request {
    Line,
    Get { health: bool, close: bool },
}

impl Request {
    /// Takes one whole request off the front of the input, if there is one.
    fn take(input: &mut Vec<u8>) -> Option<Self> {
        if !input.starts_with(b"GET ") {
            let end = input.iter().position(|&byte| byte == b'\n')?;
            input.drain(..=end);
            return Some(Self::Line);
        }
        let end = input.windows(4).position(|window| window == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&input[..end]).to_ascii_lowercase();
        input.drain(..end + 4);
        let first = head.lines().next().unwrap_or_default();
        let health = first.split(' ').nth(1).is_some_and(|path| path.starts_with("/healthz"));
        let close = first.ends_with("http/1.0") || head.lines().any(|line| line == "connection: close");
        Some(Self::Get { health, close })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.pod)
    }
}
