//! Who reaches whom: thousands of connection attempts a second, from every host to every listener.
//!
//! Everything runs on the calling thread: a socket belongs to the namespace in which it was opened,
//! so namespaces are entered only to open sockets, many at a time. A TCP connection or SCTP
//! association is made by the kernels of both ends, without anybody accepting it, and ended at once
//! with a reset; a UDP datagram must come back, so that replies are seen to pass too. System calls are
//! what costs time in User-Mode Linux: an attempt takes about five.
//!
//! A refusal by ICMP is read from the socket's error queue (ip(7), IP_RECVERR): an error that arrives
//! while connect(2) still holds the socket, as it does where the refusing node is in the same kernel,
//! is otherwise told only when the first packet is repeated, a second later.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::sockopt::{Ipv4RecvErr, Ipv6RecvErr};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvfrom, recvmsg, sendto, setsockopt,
};
use socket2::{Domain, Socket, Type};

use crate::{Netns, Protocol};

/// Attempts under way at a time; no socket's buffer is filled by their answers.
const WINDOW: usize = 256;
/// How long nothing at all may happen before the attempts under way count as unanswered.
const PATIENCE: Duration = Duration::from_millis(500);
/// Connections that wait at a TCP listener before it is opened anew. Nobody takes them: that would
/// cost two system calls each. (An SCTP association leaves by itself when it is aborted.)
const BACKLOG: usize = 64;
/// First local port of UDP clients. Each call of [`Prober::probe`] has ports of its own: a flow of an
/// earlier call could be let through as an established one.
const FIRST_UDP_PORT: u16 = 20_000;

/// A namespace that asks and listens.
#[derive(Clone, Debug)]
pub struct Host {
    /// For messages.
    pub name: String,
    /// Where its sockets are.
    pub netns: Netns,
    /// Its addresses; no other host has them.
    pub addresses: Vec<IpAddr>,
}

/// One attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Probe {
    /// From this address of a host.
    pub from: IpAddr,
    /// To here.
    pub to: SocketAddr,
    /// By this protocol.
    pub protocol: Protocol,
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} -> {}", self.protocol, self.from, self.to)
    }
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Connected; for UDP, answered.
    Reached,
    /// An ICMP error came, from this address, and became this errno.
    Rejected(IpAddr, Errno),
    /// Refused by a reset (TCP) or, for SCTP, by an abort or an ICMP error, which look alike.
    Refused,
    /// Nothing came in time.
    Silent,
    /// The kernel would not even try.
    Failed(Errno),
}

/// Hosts that listen, and ask each other.
#[derive(Debug)]
pub struct Prober {
    hosts: Vec<Host>,
    owner: HashMap<IpAddr, usize>,
    servers: Vec<Server>,
    listening: HashMap<(Protocol, SocketAddr), usize>,
    calls: u16,
}

/// A listener.
#[derive(Debug)]
struct Server {
    host: usize,
    protocol: Protocol,
    at: SocketAddr,
    /// Not there only while it is opened anew.
    socket: Option<Socket>,
    /// Connections that were made and never taken.
    waiting: usize,
}

/// Attempts of one kind at once, and how they ended.
struct Run<'a> {
    probes: &'a [Probe],
    outcomes: &'a mut [Option<Outcome>],
    /// TCP and SCTP under way, with the index of the probe.
    streams: Vec<(usize, Socket)>,
    /// One UDP socket for each source address.
    datagrams: Vec<UdpSocket>,
    under_way: usize,
}

impl Prober {
    /// Listens on every address of every host.
    ///
    /// # Errors
    /// When a port is taken, the kernel lacks a protocol, or two hosts claim an address.
    pub fn listen(hosts: Vec<Host>, ports: &[u16]) -> Result<Self> {
        allow_many_sockets()?;
        let mut owner = HashMap::new();
        for (index, host) in hosts.iter().enumerate() {
            for &address in &host.addresses {
                ensure!(owner.insert(address, index).is_none(), "two hosts have the address {address}");
            }
        }
        let mut prober = Self { hosts, owner, servers: Vec::new(), listening: HashMap::new(), calls: 0 };
        for (number, host) in prober.hosts.iter().enumerate() {
            // An SCTP refusal while connect(2) holds the socket is told by the next INIT only: do not
            // wait 3 s for it. The kernel asks for minimum <= initial.
            for name in ["rto_min", "rto_initial"] {
                host.netns.set_sysctl(&format!("net/sctp/{name}"), "60")?;
            }
            let places =
                host.addresses.iter().flat_map(|ip| ports.iter().map(|port| SocketAddr::new(*ip, *port)));
            for (at, protocol) in places.flat_map(|at| Protocol::ALL.map(|protocol| (at, protocol))) {
                prober.listening.insert((protocol, at), prober.servers.len());
                prober.servers.push(Server { host: number, protocol, at, socket: None, waiting: 0 });
            }
        }
        prober.open_listeners()?;
        Ok(prober)
    }

    /// The hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Makes all attempts, many at a time; their outcomes, in order. What stays silent is asked once
    /// more before it counts as silence.
    ///
    /// # Errors
    /// When a source is no address of a host, or sockets cannot be had.
    pub fn probe(&mut self, probes: &[Probe]) -> Result<Vec<Outcome>> {
        let mut outcomes = vec![None; probes.len()];
        let mut open: Vec<usize> = (0..probes.len()).collect();
        for patience in [PATIENCE, PATIENCE * 6] {
            for index in &open {
                outcomes[*index] = None;
            }
            self.attempt(probes, &mut outcomes, &open, patience)?;
            open.retain(|index| outcomes[*index] == Some(Outcome::Silent));
        }
        for server in &mut self.servers {
            if server.protocol == Protocol::Tcp && server.waiting >= BACKLOG {
                server.socket = None;
                server.waiting = 0;
            }
        }
        self.open_listeners()?;
        outcomes.into_iter().map(|outcome| outcome.context("a probe without outcome")).collect()
    }

    fn attempt(
        &mut self,
        probes: &[Probe],
        outcomes: &mut [Option<Outcome>],
        indices: &[usize],
        patience: Duration,
    ) -> Result<()> {
        self.calls = (self.calls + 1) % 40_000;
        // By source, so that a namespace is entered once for many; by protocol, so that nobody waits
        // for a slow one.
        let mut order = Vec::with_capacity(indices.len());
        for &index in indices {
            let probe = probes[index];
            let host = *self.owner.get(&probe.from).with_context(|| format!("nobody has {}", probe.from))?;
            order.push((probe.protocol, host, probe.from, index));
        }
        order.sort_unstable();
        let (mut datagrams, mut by_source) = (Vec::new(), HashMap::new());
        for window in order.chunk_by(|a, b| a.0 == b.0).flat_map(|same| same.chunks(WINDOW)) {
            let (streams, under_way) = (Vec::new(), 0);
            let mut run = Run { probes, outcomes: &mut *outcomes, streams, datagrams, under_way };
            for batch in window.chunk_by(|a, b| a.1 == b.1) {
                let indices: Vec<usize> = batch.iter().map(|(_, _, _, index)| *index).collect();
                self.start(&mut run, &mut by_source, batch[0].1, &indices)?;
            }
            let servers: &[Server] = if window[0].0 == Protocol::Udp { &self.servers } else { &[] };
            run.finish(servers, patience)?;
            datagrams = run.datagrams;
        }
        for &index in indices {
            let Probe { protocol, to, .. } = probes[index];
            if outcomes[index] == Some(Outcome::Reached)
                && let Some(server) = self.listening.get(&(protocol, to))
            {
                self.servers[*server].waiting += 1;
            }
        }
        Ok(())
    }

    fn start(
        &self,
        run: &mut Run<'_>,
        by_source: &mut HashMap<IpAddr, usize>,
        host: usize,
        indices: &[usize],
    ) -> Result<()> {
        let host = &self.hosts[host];
        let port = FIRST_UDP_PORT + self.calls;
        // Sockets are opened inside; the rest needs no namespace.
        let opened: io::Result<()> = host.netns.run(|| {
            for &index in indices {
                let Probe { from, protocol, .. } = run.probes[index];
                if protocol != Protocol::Udp {
                    // SCTP tells the other side all addresses it is bound to.
                    let only = host.addresses.iter().filter(|ip| ip.is_ipv4() == from.is_ipv4()).count() == 1;
                    let bind = protocol == Protocol::Sctp || !only;
                    run.streams.push((index, client(protocol, SocketAddr::new(from, 0), bind)?));
                } else if let Entry::Vacant(entry) = by_source.entry(from) {
                    entry.insert(run.datagrams.len());
                    run.datagrams.push(client(Protocol::Udp, SocketAddr::new(from, port), true)?.into());
                }
            }
            Ok(())
        });
        opened.with_context(|| format!("{}: open sockets", host.name))?;
        run.under_way += indices.len();
        let first = run.streams.len().saturating_sub(indices.len());
        for &index in indices {
            if run.probes[index].protocol == Protocol::Udp {
                run.send(index, by_source[&run.probes[index].from]);
            }
        }
        let mut at = first;
        while let Some((index, socket)) = run.streams.get(at) {
            let index = *index;
            match socket.connect(&run.probes[index].to.into()) {
                Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => {
                    run.streams.swap_remove(at);
                    run.end(index, refusal(&error));
                }
                _ => at += 1,
            }
        }
        Ok(())
    }

    /// Opens what is not open.
    fn open_listeners(&mut self) -> Result<()> {
        for same in self.servers.chunk_by_mut(|a, b| a.host == b.host) {
            if same.iter().all(|server| server.socket.is_some()) {
                continue;
            }
            let host = &self.hosts[same[0].host];
            host.netns.run(|| {
                for server in same.iter_mut().filter(|server| server.socket.is_none()) {
                    let Server { protocol, at, .. } = *server;
                    let socket = listen(protocol, at);
                    server.socket =
                        Some(socket.with_context(|| format!("{}: listen on {protocol} {at}", host.name))?);
                }
                Ok::<_, anyhow::Error>(())
            })?;
        }
        Ok(())
    }
}

impl Run<'_> {
    /// Serves clients and listeners until every attempt has ended.
    fn finish(&mut self, servers: &[Server], patience: Duration) -> Result<()> {
        let mut deadline = Instant::now() + patience;
        while self.under_way > 0 {
            let sockets: Vec<&Socket> = servers
                .iter()
                .filter(|server| server.protocol == Protocol::Udp)
                .filter_map(|server| server.socket.as_ref())
                .collect();
            let fd = |fd, flags| PollFd::new(fd, flags);
            let mut fds: Vec<PollFd<'_>> = Vec::new();
            if self.streams.is_empty() {
                fds.extend(sockets.iter().map(|socket| fd(socket.as_fd(), PollFlags::POLLIN)));
                fds.extend(self.datagrams.iter().map(|socket| fd(socket.as_fd(), PollFlags::POLLIN)));
            }
            fds.extend(self.streams.iter().map(|(_, socket)| fd(socket.as_fd(), PollFlags::POLLOUT)));
            let left = deadline.saturating_duration_since(Instant::now());
            let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let ready = match poll(&mut fds, wait) {
                Err(Errno::EINTR) => continue,
                ready => ready.context("wait for sockets")?,
            };
            let events: Vec<(usize, bool)> = fds
                .iter()
                .enumerate()
                .filter_map(|(at, fd)| fd.revents().filter(|events| !events.is_empty()).map(|it| (at, it)))
                .map(|(at, events)| (at, events.contains(PollFlags::POLLERR)))
                .collect();
            if ready == 0 {
                // Only now: nothing is left that this thread had no time for.
                let probes: Vec<usize> = self.streams.drain(..).map(|(index, _)| index).collect();
                for index in probes {
                    self.end(index, Outcome::Silent);
                }
                if self.under_way > 0 {
                    for place in self.outcomes.iter_mut().zip(self.probes).filter_map(|(place, probe)| {
                        (probe.protocol == Protocol::Udp && place.is_none()).then_some(place)
                    }) {
                        *place = Some(Outcome::Silent);
                    }
                    self.under_way = 0;
                }
                return Ok(());
            }
            if self.streams.is_empty() {
                for (at, error) in events {
                    match sockets.get(at) {
                        Some(socket) => echo(socket),
                        None => self.receive(at - sockets.len(), error),
                    }
                }
            } else {
                // From the last, so that those before keep their places.
                for (at, error) in events.into_iter().rev() {
                    self.connected(at, error);
                }
            }
            // A loaded machine is slow, not silent.
            deadline = deadline.max(Instant::now() + patience / 2);
        }
        Ok(())
    }

    fn end(&mut self, index: usize, outcome: Outcome) {
        // An error may follow an answer, and the other way round: the first counts.
        if let Some(place @ None) = self.outcomes.get_mut(index) {
            *place = Some(outcome);
            self.under_way -= 1;
        }
    }

    fn send(&mut self, index: usize, number: usize) {
        let payload = (index as u64).to_be_bytes();
        // An error that came for another datagram is told once, instead of sending.
        for _ in 0..4 {
            match self.datagrams[number].send_to(&payload, self.probes[index].to) {
                Ok(_) => return,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) if self.read_errors(number) => {}
                Err(error) => return self.end(index, refusal(&error)),
            }
        }
        self.end(index, Outcome::Failed(Errno::EAGAIN));
    }

    /// A connection attempt has come to its end.
    fn connected(&mut self, at: usize, error: bool) {
        let (index, socket) = self.streams.swap_remove(at);
        let outcome = if error {
            let rejected = errors(&socket).first().map(|(_, by, errno)| Outcome::Rejected(*by, *errno));
            rejected.unwrap_or_else(|| match socket.take_error() {
                Ok(Some(error)) | Err(error) => refusal(&error),
                Ok(None) => Outcome::Reached,
            })
        } else {
            Outcome::Reached
        };
        if outcome == Outcome::Reached {
            // Reset, not closed: no state is kept anywhere for a connection that is done.
            let _ = socket.set_linger(Some(Duration::ZERO));
        }
        self.end(index, outcome);
    }

    /// Reads answers and errors of a UDP client.
    fn receive(&mut self, number: usize, error: bool) {
        if error {
            self.read_errors(number);
        }
        let mut buffer = [0; 64];
        loop {
            match self.datagrams[number].recv_from(&mut buffer) {
                Ok((8, _)) => self.end(index_of(&buffer[..8]), Outcome::Reached),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // It is in the error queue too.
                Err(_) if self.read_errors(number) => {}
                Err(_) => return,
            }
        }
    }

    /// Whether there were any.
    fn read_errors(&mut self, number: usize) -> bool {
        let errors = errors(&self.datagrams[number]);
        for (payload, by, errno) in &errors {
            // The kernel gives back what was sent.
            if payload.len() == 8 {
                self.end(index_of(payload), Outcome::Rejected(*by, *errno));
            }
        }
        !errors.is_empty()
    }
}

/// Sends datagrams back to where they came from. What is lost on the way back counts as silence.
fn echo(socket: &Socket) {
    let mut buffer = [0; 64];
    loop {
        let received = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer);
        match received {
            Ok((length, Some(peer))) => {
                let _ = sendto(socket.as_raw_fd(), &buffer[..length], &peer, MsgFlags::empty());
            }
            Ok((_, None)) => {}
            Err(Errno::EAGAIN) => return,
            // An ICMP error for an earlier answer.
            Err(_) => {}
        }
    }
}

fn open(protocol: Protocol, at: SocketAddr, bind: bool) -> io::Result<Socket> {
    let kind = if protocol == Protocol::Udp { Type::DGRAM } else { Type::STREAM };
    let socket = Socket::new(Domain::for_address(at), kind.nonblocking(), Some(protocol.number().into()))?;
    if at.is_ipv6() && protocol != Protocol::Sctp {
        socket.set_only_v6(true)?;
    }
    if bind {
        if protocol == Protocol::Tcp && at.port() != 0 {
            socket.set_reuse_address(true)?;
        }
        socket.bind(&at.into())?;
    }
    Ok(socket)
}

fn listen(protocol: Protocol, at: SocketAddr) -> io::Result<Socket> {
    if protocol == Protocol::Sctp {
        // As in `workload`: listen() must not ask for the module of the cookie's hash.
        let _ = std::fs::write("/proc/sys/net/sctp/cookie_hmac_alg", "none");
    }
    let socket = open(protocol, at, true)?;
    if protocol != Protocol::Udp {
        socket.listen(4096)?;
    }
    Ok(socket)
}

fn client(protocol: Protocol, at: SocketAddr, bind: bool) -> io::Result<Socket> {
    let socket = open(protocol, at, bind)?;
    if at.is_ipv4() {
        setsockopt(&socket, Ipv4RecvErr, &true)?;
    } else {
        setsockopt(&socket, Ipv6RecvErr, &true)?;
    }
    Ok(socket)
}

/// What the error queue of a socket holds: what was sent, who refused it, and the errno.
pub(crate) fn errors(socket: &impl AsRawFd) -> Vec<(Vec<u8>, IpAddr, Errno)> {
    let mut found = Vec::new();
    loop {
        let mut payload = [0; 64];
        let mut parts = [IoSliceMut::new(&mut payload)];
        let mut space = nix::cmsg_space!(nix::libc::sock_extended_err, nix::libc::sockaddr_in6);
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let read = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags);
        let Ok(message) = read else { return found };
        let length = message.bytes;
        let mut error = None;
        for control in message.cmsgs().into_iter().flatten() {
            match control {
                ControlMessageOwned::Ipv4RecvErr(told, Some(by)) => {
                    let by = IpAddr::from(u32::from_be(by.sin_addr.s_addr).to_be_bytes());
                    error = Some((by, told.ee_errno));
                }
                ControlMessageOwned::Ipv6RecvErr(told, Some(by)) => {
                    error = Some((IpAddr::from(by.sin6_addr.s6_addr), told.ee_errno));
                }
                _ => {}
            }
        }
        if let Some((by, errno)) = error {
            #[allow(clippy::cast_possible_wrap)] // errnos are small
            found.push((payload[..length].to_vec(), by, Errno::from_raw(errno as i32)));
        }
    }
}

fn index_of(payload: &[u8]) -> usize {
    payload.iter().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

fn refusal(error: &io::Error) -> Outcome {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ECONNREFUSED | Errno::ECONNRESET) => Outcome::Refused,
        Some(Errno::ETIMEDOUT) => Outcome::Silent,
        Some(errno) => Outcome::Failed(errno),
        None => Outcome::Failed(Errno::UnknownErrno),
    }
}

/// A listener for every address, port and protocol is more than the usual 1,024 sockets.
fn allow_many_sockets() -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("read the limit of open files")?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raise the limit of open files")?;
    }
    Ok(())
}
