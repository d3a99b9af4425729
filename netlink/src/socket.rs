//! The socket: batches out, acknowledgements, dumps and events in.

use std::fmt;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{RcvBuf, RcvBufForce, SetBool, SetUsize, SndBuf, SndBufForce};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockopt, recvmsg, send,
    setsockopt, socket,
};

use crate::message::{DONE, ERROR, Message, NOOP, OVERRUN, messages, outcome};
use crate::{Batch, DecodeError, Error, Failure, HEADER, align, flags};

/// Most bytes in one send: larger ones gain nothing (measured: 64 KiB as fast as 256 KiB), and
/// this stays below the kernel's default send buffer of 212,992 bytes.
const SEND: usize = 64 * 1024;
/// Socket buffer asked for, when the process may force it: room for the refusal of every message of
/// a full send, and for bursts of events.
const BUFFER: usize = 4 * 1024 * 1024;
/// Kernel memory that one refusal takes beside twice the copy of its message: socket buffer
/// structure, shared info and the extended acknowledgement, rounded up to allocation sizes.
const REFUSAL: usize = 1536;
/// Receive buffer to begin with. The kernel fills at most 32 KiB per read of a dump; single
/// messages can be longer.
const RECEIVE: usize = 128 * 1024;
/// A request is carried out before its send returns, so its answer is there at once; the limit only
/// keeps a caller from hanging on a broken kernel.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often an interrupted dump is started again.
const ATTEMPTS: u32 = 16;
/// Most datagrams that one call of `receive_events` hands out, so that a storm cannot hold it.
const EVENTS: usize = 4096;

/// `NETLINK_EXT_ACK`: refusals carry text.
#[derive(Debug, Clone, Copy)]
struct ExtendedAck;
nix::setsockopt_impl!(ExtendedAck, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, bool, SetBool);

/// `NETLINK_CAP_ACK`: refusals repeat the header of the request only, not all of it.
#[derive(Debug, Clone, Copy)]
struct CappedAck;
nix::setsockopt_impl!(CappedAck, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, bool, SetBool);

/// `NETLINK_GET_STRICT_CHK`: rtnetlink dumps read the whole request and filter by it.
#[derive(Debug, Clone, Copy)]
struct StrictCheck;
nix::setsockopt_impl!(StrictCheck, libc::SOL_NETLINK, libc::NETLINK_GET_STRICT_CHK, bool, SetBool);

/// `NETLINK_ADD_MEMBERSHIP`.
#[derive(Debug, Clone, Copy)]
struct Membership;
nix::setsockopt_impl!(Membership, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, usize, SetUsize);

/// The netlink protocols in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// `NETLINK_GENERIC`: IPVS and other families found by name.
    Generic,
    /// `NETLINK_ROUTE`: links, addresses, routes, rules, neighbours.
    Route,
    /// `NETLINK_NETFILTER`: ipset, conntrack.
    Netfilter,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Generic => "generic",
            Self::Route => "route",
            Self::Netfilter => "netfilter",
        })
    }
}

/// A blocking netlink socket, in the network namespace of the thread that opened it.
///
/// Use one socket for requests and another for events: [`Socket::execute`] and [`Socket::dump`]
/// drop notifications that arrive while they wait.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    /// Kernel memory for unread answers.
    room: usize,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    messages_sent: u64,
    requests: u64,
    sends: u64,
}

impl Socket {
    /// Opens and binds a socket, with extended acknowledgements on and large buffers where the
    /// process has `CAP_NET_ADMIN` (else as large as the host allows).
    ///
    /// # Errors
    ///
    /// [`Error::Open`] with the step that failed.
    pub fn open(protocol: Protocol) -> Result<Self, Error> {
        let failed = |action| move |source| Error::Open { protocol, action, source };
        let number = match protocol {
            Protocol::Generic => SockProtocol::NetlinkGeneric,
            Protocol::Route => SockProtocol::NetlinkRoute,
            Protocol::Netfilter => SockProtocol::NetlinkNetFilter,
        };
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, number)
            .map_err(failed("open"))?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(failed("bind"))?;
        setsockopt(&fd, SndBufForce, &BUFFER)
            .or_else(|_| setsockopt(&fd, SndBuf, &BUFFER))
            .and_then(|()| {
                setsockopt(&fd, RcvBufForce, &BUFFER).or_else(|_| setsockopt(&fd, RcvBuf, &BUFFER))
            })
            .map_err(failed("set the buffers of"))?;
        // Absent before Linux 4.12 and 4.3: the text is lost then, nothing else.
        let _ = setsockopt(&fd, ExtendedAck, &true);
        let _ = setsockopt(&fd, CappedAck, &true);
        if protocol == Protocol::Route {
            // Absent before Linux 4.20, which answers a filtered dump with everything.
            let _ = setsockopt(&fd, StrictCheck, &true);
        }
        let room = getsockopt(&fd, RcvBuf).map_err(failed("read the buffer size of"))?;
        Ok(Self {
            fd,
            sequence: 0,
            room,
            outgoing: Vec::new(),
            incoming: vec![0; RECEIVE],
            messages_sent: 0,
            requests: 0,
            sends: 0,
        })
    }

    /// Sends all messages of a batch in as few sends as fit and returns those that the kernel
    /// refused, in order. The others were carried out: a refusal does not stop the rest.
    ///
    /// # Errors
    ///
    /// When the outcome of some messages is unknown ([`Error::Overrun`], [`Error::Timeout`],
    /// [`Error::Truncated`], [`Error::Decode`]) or when a send failed as a whole: dump and compare
    /// before going on.
    pub fn execute(&mut self, batch: &Batch) -> Result<Vec<Failure>, Error> {
        if let Some(index) = batch.too_long() {
            return Err(Error::TooLong { index });
        }
        let mut failures = Vec::new();
        let (mut rest, mut first) = (batch.bytes(), 0);
        while !rest.is_empty() {
            let (taken, count) = self.load(rest);
            let base = self.send(count)?;
            self.acknowledged(base, count, first, &mut failures)?;
            rest = &rest[taken..];
            first += count;
        }
        Ok(failures)
    }

    /// Sends one request and collects what `parse` makes of the answers (message type and payload
    /// after the netlink header); `None` leaves an answer out. With [`flags::DUMP`] on the
    /// request the whole table is read, and read again from the start when it changed meanwhile: then
    /// `parse` sees answers of attempts that are dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with the kernel's text, [`Error::Interrupted`] after 16 attempts, and
    /// those of reading. The socket stays usable.
    pub fn dump<T>(
        &mut self,
        request: &Batch,
        mut parse: impl FnMut(u16, &[u8]) -> Result<Option<T>, DecodeError>,
    ) -> Result<Vec<T>, Error> {
        if let Some(index) = request.too_long() {
            return Err(Error::TooLong { index });
        }
        if request.len() != 1 {
            return Err(Error::NotOneRequest(request.len()));
        }
        for _ in 0..ATTEMPTS {
            let (_, count) = self.load(request.bytes());
            let whole_table = flags_of(&self.outgoing) & flags::DUMP == flags::DUMP;
            if whole_table {
                set_flags(&mut self.outgoing, |flags| flags & !flags::ACK);
            }
            let sequence = self.send(count)?;
            self.requests += count as u64;
            if let Some(collected) = self.collect(sequence, whole_table, &mut parse)? {
                return Ok(collected);
            }
        }
        Err(Error::Interrupted(ATTEMPTS))
    }

    /// Joins a multicast group by number (`RTNLGRP_*`, `NFNLGRP_*`).
    ///
    /// # Errors
    ///
    /// [`Error::Join`], for instance EPERM without `CAP_NET_ADMIN`.
    pub fn join(&mut self, group: u32) -> Result<(), Error> {
        let number = usize::try_from(group).unwrap_or(usize::MAX);
        setsockopt(&self.fd, Membership, &number).map_err(|source| Error::Join { group, source })
    }

    /// Waits for events until something comes or `timeout` is over (`None` waits for ever), then
    /// hands out all that is there (message type and payload after the netlink header) and
    /// returns how many events that were: 0 means the time is over.
    ///
    /// # Errors
    ///
    /// [`Error::Overrun`] when events were lost: read the table again. Those handed out before count.
    pub fn receive_events(
        &mut self,
        timeout: Option<Duration>,
        mut event: impl FnMut(u16, &[u8]),
    ) -> Result<usize, Error> {
        if !self.readable(timeout)? {
            return Ok(0);
        }
        let mut count = 0;
        for _ in 0..EVENTS {
            let length = match self.receive(MsgFlags::MSG_DONTWAIT) {
                Ok(Some(length)) => length,
                Ok(None) => continue,
                Err(Error::Receive { source: Errno::EAGAIN }) => break,
                // What does not fit is lost, whatever it was.
                Err(Error::Truncated(_)) => return Err(Error::Overrun),
                Err(error) => return Err(error),
            };
            for message in messages(&self.incoming[..length]) {
                let message = message?;
                match message.kind {
                    NOOP | ERROR | DONE => {}
                    OVERRUN => return Err(Error::Overrun),
                    kind => {
                        count += 1;
                        event(kind, message.payload);
                    }
                }
            }
        }
        Ok(count)
    }

    /// How many messages were sent since the socket was opened.
    pub fn messages_sent(&self) -> u64 {
        self.messages_sent
    }

    /// How many of the messages sent were requests of [`Socket::dump`], which only read.
    pub fn requests_sent(&self) -> u64 {
        self.requests
    }

    /// How many system calls that took.
    pub fn sends(&self) -> u64 {
        self.sends
    }

    /// Copies as many whole messages as fit one send to the outgoing buffer, numbers them and asks
    /// for an acknowledgement of the last. Returns bytes and messages taken, at least one message.
    fn load(&mut self, rest: &[u8]) -> (usize, usize) {
        self.outgoing.clear();
        let (mut taken, mut count, mut refusals, mut last) = (0, 0, 0, 0);
        while let Some(length) = rest.get(taken..).and_then(|left| left.first_chunk::<4>()) {
            // Batch wrote the length, so it covers a header and ends inside the batch.
            let length = align(usize::try_from(u32::from_ne_bytes(*length)).unwrap_or(usize::MAX));
            let end = taken.saturating_add(length).min(rest.len());
            refusals += REFUSAL + 2 * length;
            // The answers must fit the receive buffer even if every message is refused.
            if count > 0 && (end > SEND || refusals > self.room) {
                break;
            }
            last = taken;
            taken = end;
            count += 1;
        }
        self.outgoing.extend_from_slice(&rest[..taken]);
        let mut start = 0;
        let mut sequence = self.sequence;
        while start < taken {
            let message = &mut self.outgoing[start..];
            sequence = sequence.wrapping_add(1);
            let length = message.first_chunk::<4>().map_or(0, |length| u32::from_ne_bytes(*length));
            if let Some(field) = message.get_mut(8..12) {
                field.copy_from_slice(&sequence.to_ne_bytes());
            }
            let is_last = start == last;
            set_flags(message, |flags| if is_last { flags | flags::ACK } else { flags & !flags::ACK });
            start += align(usize::try_from(length).unwrap_or(usize::MAX)).max(HEADER);
        }
        (taken, count)
    }

    /// Sends the outgoing buffer; returns the sequence number of its first message.
    fn send(&mut self, count: usize) -> Result<u32, Error> {
        let base = self.sequence.wrapping_add(1);
        // A batch of 2^32 messages does not fit one send.
        self.sequence = self.sequence.wrapping_add(u32::try_from(count).unwrap_or(u32::MAX));
        loop {
            match send(self.fd.as_raw_fd(), &self.outgoing, MsgFlags::empty()) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(source) => return Err(Error::Send { messages: count, source }),
            }
        }
        self.messages_sent += count as u64;
        self.sends += 1;
        Ok(base)
    }

    /// Reads until the last message of a send is answered, noting refusals on the way.
    fn acknowledged(
        &mut self,
        base: u32,
        count: usize,
        first: usize,
        failures: &mut Vec<Failure>,
    ) -> Result<(), Error> {
        loop {
            let length = self.answer()?;
            for message in messages(&self.incoming[..length]) {
                let message = message?;
                let Some(position) = position(&message, base, count) else { continue };
                if message.kind != ERROR {
                    continue;
                }
                let (errno, text) = outcome(&message)?;
                if errno != 0 {
                    failures.push(Failure { index: first + position, errno, text });
                }
                if position + 1 == count {
                    return Ok(());
                }
            }
        }
    }

    /// Reads the answers to one request; `None` when the dump was interrupted.
    fn collect<T>(
        &mut self,
        sequence: u32,
        whole_table: bool,
        parse: &mut impl FnMut(u16, &[u8]) -> Result<Option<T>, DecodeError>,
    ) -> Result<Option<Vec<T>>, Error> {
        let mut collected = Vec::new();
        let mut interrupted = false;
        // Kept until the end of the dump: leaving earlier would make the next one fail with EBUSY.
        let mut broken = None;
        loop {
            let length = match self.answer() {
                Ok(length) => length,
                Err(Error::Truncated(length)) => {
                    if !whole_table {
                        return Err(Error::Truncated(length));
                    }
                    // The buffer has grown meanwhile: what was cut off comes with the next attempt.
                    interrupted = true;
                    continue;
                }
                // Something else filled the buffer; the rest of a dump still comes, as it is read.
                Err(Error::Overrun) if whole_table => {
                    interrupted = true;
                    continue;
                }
                Err(error) => return Err(error),
            };
            for message in messages(&self.incoming[..length]) {
                let message = message?;
                if position(&message, sequence, 1).is_none() {
                    continue;
                }
                interrupted |= whole_table && message.flags & flags::DUMP_INTERRUPTED != 0;
                match message.kind {
                    NOOP => {}
                    OVERRUN => return Err(Error::Overrun),
                    ERROR | DONE => {
                        let (errno, text) = outcome(&message)?;
                        if errno != 0 {
                            return Err(Error::Refused(Failure { index: 0, errno, text }));
                        }
                        return match broken {
                            _ if interrupted => Ok(None),
                            Some(error) => Err(Error::Decode(error)),
                            None => Ok(Some(collected)),
                        };
                    }
                    _ if broken.is_some() || interrupted => {}
                    kind => match parse(kind, message.payload) {
                        Ok(Some(value)) => collected.push(value),
                        Ok(None) => {}
                        Err(error) => broken = Some(error),
                    },
                }
            }
        }
    }

    /// The next datagram from the kernel, within the limit of patience.
    fn answer(&mut self) -> Result<usize, Error> {
        let mut deadline = None;
        loop {
            // Almost always the answer is there, so waiting is only asked for when it is not.
            match self.receive(MsgFlags::MSG_DONTWAIT) {
                Ok(Some(length)) => return Ok(length),
                Ok(None) => {}
                Err(Error::Receive { source: Errno::EAGAIN }) => {
                    let now = Instant::now();
                    let left = deadline.get_or_insert(now + PATIENCE).saturating_duration_since(now);
                    if left.is_zero() || !self.readable(Some(left))? {
                        return Err(Error::Timeout(PATIENCE));
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn readable(&self, timeout: Option<Duration>) -> Result<bool, Error> {
        // A time too far to be told is for ever.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let wait = match deadline {
                None => PollTimeout::NONE,
                Some(deadline) => {
                    // Rounded up: a fraction of a millisecond must not spin.
                    let left = deadline.saturating_duration_since(Instant::now());
                    let millis = left.as_micros().div_ceil(1000);
                    PollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX))
                }
            };
            match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], wait) {
                Ok(0) if deadline.is_none_or(|deadline| Instant::now() < deadline) => {}
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::EINTR) => {}
                Err(source) => return Err(Error::Receive { source }),
            }
        }
    }

    /// One datagram into the incoming buffer; `None` when it is not from the kernel.
    fn receive(&mut self, flags: MsgFlags) -> Result<Option<usize>, Error> {
        let fd = self.fd.as_raw_fd();
        let (length, truncated, sender) = loop {
            let mut parts = [IoSliceMut::new(&mut self.incoming)];
            // With MSG_TRUNC the length is that of the datagram, not of what fitted.
            match recvmsg::<NetlinkAddr>(fd, &mut parts, None, flags | MsgFlags::MSG_TRUNC) {
                Ok(got) => {
                    break (got.bytes, got.flags.contains(MsgFlags::MSG_TRUNC), got.address);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => return Err(Error::Overrun),
                Err(source) => return Err(Error::Receive { source }),
            }
        };
        if truncated || length > self.incoming.len() {
            self.incoming.resize(length.next_power_of_two(), 0);
            return Err(Error::Truncated(length));
        }
        Ok(sender.is_some_and(|sender| sender.pid() == 0).then_some(length))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Which message of a send is answered; answers to earlier sends are left over from an error.
fn position(message: &Message<'_>, base: u32, count: usize) -> Option<usize> {
    usize::try_from(message.sequence.wrapping_sub(base)).ok().filter(|&position| position < count)
}

fn flags_of(message: &[u8]) -> u16 {
    message.get(6..8).and_then(|flags| flags.first_chunk()).map_or(0, |flags| u16::from_ne_bytes(*flags))
}

fn set_flags(message: &mut [u8], change: impl FnOnce(u16) -> u16) {
    let flags = change(flags_of(message));
    if let Some(field) = message.get_mut(6..8) {
        field.copy_from_slice(&flags.to_ne_bytes());
    }
}
