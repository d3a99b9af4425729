//! The ends: peers that send a prepared stream, and one that counts what arrives. They do as little as
//! they can, since they share the CPUs with the router.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferroute_bgp::message::{
    AfiSafi, Announcement, AsPath, Asn, Attributes, Capability, Codec, Community, Families, FrameReader,
    Message, NextHop, Nlri, Open, RouterId, Update,
};
use ferroute_kit::Netns;
use ipnet::{IpNet, Ipv4Net};
use socket2::{Domain, Socket, Type};

use super::{HOLD_TIME, Load, PATIENCE, ROUTER, end_address, end_asn};

/// Prefixes that share a set of attributes: about as many as in a table of the Internet.
const PER_SET: u32 = 10;
/// The first prefix, as the number of a /24.
const FIRST: u32 = 1 << 16;
const UPDATE: u8 = 2;

/// A peer with routes to send.
pub struct Sender {
    stream: TcpStream,
    bytes: Vec<u8>,
    threads: Vec<JoinHandle<()>>,
}

impl Sender {
    /// Establishes the `index`th session and prepares its routes.
    pub fn connect(outside: &Netns, index: u32, routes: u32, deadline: Instant) -> Result<Self> {
        let bytes = stream(index, routes)?;
        let (stream, _) = establish(outside, index, deadline)?;
        Ok(Self { stream, bytes, threads: Vec::new() })
    }

    /// Sends, and takes what comes back, on threads of its own.
    pub fn start(&mut self) -> Result<()> {
        let (mut writer, bytes) = (self.stream.try_clone()?, std::mem::take(&mut self.bytes));
        // A router that ends the session shows at the receiver.
        self.threads.push(std::thread::spawn(move || drop(writer.write_all(&bytes))));
        let mut reader = self.stream.try_clone()?;
        reader.set_read_timeout(None)?;
        self.threads.push(std::thread::spawn(move || {
            let mut scrap = vec![0; 1 << 16];
            while reader.read(&mut scrap).is_ok_and(|count| count > 0) {}
        }));
        Ok(())
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        // The router may have closed it.
        let _ = self.stream.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The peer that is to get everything.
pub struct Receiver {
    stream: TcpStream,
    reader: FrameReader,
    load: Load,
}

impl Receiver {
    /// Establishes the session.
    pub fn connect(outside: &Netns, load: Load, deadline: Instant) -> Result<Self> {
        let (stream, reader) = establish(outside, 0, deadline)?;
        Ok(Self { stream, reader, load })
    }

    /// Waits until every route was announced at least once, and says when.
    pub fn wait(mut self, deadline: Instant) -> Result<Instant> {
        let total = self.load.senders * self.load.routes;
        let (mut seen, mut count) = (vec![false; total as usize], 0);
        let codec = codec();
        loop {
            while let Some(frame) =
                self.reader.next_frame(&codec).map_err(|reset| anyhow::anyhow!("{reset:?}"))?
            {
                ensure!(frame.get(18) != Some(&3), "the router ended the receiver's session: {frame:?}");
                for prefix in announced(frame) {
                    let first = prefix.checked_sub(FIRST).and_then(|index| seen.get_mut(index as usize));
                    count += u32::from(first.is_some_and(|seen| !std::mem::replace(seen, true)));
                }
                if count == total {
                    return Ok(Instant::now());
                }
            }
            ensure!(Instant::now() < deadline, "{count} of {total} routes within {PATIENCE:?}");
            match self.stream.read(self.reader.space()) {
                Ok(0) => bail!("the router closed the receiver's session after {count} of {total} routes"),
                Ok(filled) => self.reader.filled(filled),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The /24s that an UPDATE announces, as their first three octets (RFC 4271 section 4.3).
fn announced(frame: &[u8]) -> impl Iterator<Item = u32> {
    let mut rest = routes(frame).unwrap_or_default().1;
    std::iter::from_fn(move || {
        let (&[_, a, b, c], after) = rest.split_first_chunk()?;
        rest = after;
        Some(u32::from_be_bytes([0, a, b, c]))
    })
}

/// What an UPDATE withdraws and what it announces, as it stands there (RFC 4271 section 4.3); `None` of other
/// messages.
pub fn routes(frame: &[u8]) -> Option<(&[u8], &[u8])> {
    let body = frame.get(19..).filter(|_| frame[18] == UPDATE)?;
    let (length, rest) = body.split_first_chunk()?;
    let (withdrawn, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
    let (length, rest) = rest.split_first_chunk()?;
    Some((withdrawn, rest.get(usize::from(u16::from_be_bytes(*length))..)?))
}

fn codec() -> Codec {
    Codec { families: Families::IPV4, four_octet_as: true, ..Codec::initial() }
}

/// All routes of a sender as octets.
fn stream(index: u32, routes: u32) -> Result<Vec<u8>> {
    let first = (index - 1) * routes;
    let mut bytes = Vec::new();
    for set in (first..first + routes).step_by(PER_SET as usize) {
        let nlri = set..(set + PER_SET).min(first + routes);
        let attributes = Attributes {
            // None of these is the router's or the receiver's.
            as_path: AsPath::sequence(
                [end_asn(index), 100_000 + set % 7919, 200_000 + set % 104_729, 3_000_000 + set].map(Asn),
            ),
            next_hop: NextHop::V4(end_address(index)),
            communities: vec![Community::new(64_600, (set % 50) as u16), Community(set)],
            ..Attributes::default()
        };
        let announcement = Announcement {
            attributes: attributes.into(),
            nlri: nlri.map(|number| prefix(number).map(Nlri::new)).collect::<Result<_>>()?,
        };
        let update = Update { announced: vec![announcement], ..Update::default() };
        Message::Update(update).encode(&codec(), &mut bytes).context("an UPDATE")?;
    }
    Ok(bytes)
}

fn prefix(number: u32) -> Result<IpNet> {
    Ok(Ipv4Net::new(Ipv4Addr::from((FIRST + number) << 8), 24)?.into())
}

/// Dials the router from an end's address until a session stands.
///
/// # Errors
///
/// Why there is none at the deadline.
pub fn establish(outside: &Netns, index: u32, deadline: Instant) -> Result<(TcpStream, FrameReader)> {
    loop {
        match attempt(outside, index) {
            Ok(session) => return Ok(session),
            // It is not listening yet, or does not know this neighbour yet.
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("no session from {}", end_address(index))));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn attempt(outside: &Netns, index: u32) -> Result<(TcpStream, FrameReader)> {
    let socket = outside.run(|| Socket::new(Domain::IPV4, Type::STREAM, None))?;
    socket.bind(&SocketAddr::new(end_address(index).into(), 0).into())?;
    socket.connect_timeout(&SocketAddr::new(ROUTER.into(), 179).into(), Duration::from_secs(1))?;
    let mut stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let asn = end_asn(index);
    let open = Open {
        asn: Asn(asn),
        four_octet_as: true,
        hold_time: HOLD_TIME,
        router_id: RouterId(end_address(index)),
        capabilities: vec![Capability::Multiprotocol(AfiSafi::Ipv4Unicast)],
    };
    let mut bytes = Vec::new();
    Message::Open(open).encode(&Codec::initial(), &mut bytes)?;
    stream.write_all(&bytes)?;
    let mut reader = FrameReader::new();
    let (mut opened, codec) = (false, codec());
    loop {
        while let Some(frame) = reader.next_frame(&codec).map_err(|reset| anyhow::anyhow!("{reset:?}"))? {
            match frame[18] {
                1 => {
                    opened = true;
                    bytes.clear();
                    Message::Keepalive.encode(&codec, &mut bytes)?;
                    stream.write_all(&bytes)?;
                }
                4 if opened => return Ok((stream, reader)),
                kind => bail!("message of type {kind} instead of OPEN and KEEPALIVE"),
            }
        }
        let filled = stream.read(reader.space())?;
        ensure!(filled > 0, "the router closed the connection");
        reader.filled(filled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_counted() {
        let (bytes, codec) = (stream(2, 25).unwrap(), codec());
        let mut reader = FrameReader::new();
        let mut all = Vec::new();
        for chunk in bytes.chunks(1000) {
            let space = reader.space();
            space[..chunk.len()].copy_from_slice(chunk);
            reader.filled(chunk.len());
            while let Some(frame) = reader.next_frame(&codec).unwrap() {
                all.extend(announced(frame));
            }
        }
        assert_eq!(all, (FIRST + 25..FIRST + 50).collect::<Vec<_>>());
    }
}
