//! The wire between speaker and receiver, as it is seen where the receiver is: the same eyes for every make.

use std::io::{ErrorKind, Read};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ferroute_kit::Netns;
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

use crate::routers::{ROUTER, routes};

/// The port of BGP.
const PORT: u16 = 179;
const OPEN: u8 = 1;
const UPDATE: u8 = 2;
const KEEPALIVE: u8 = 4;

/// A socket that gets every packet of a namespace.
pub struct Tap(Socket);

/// What was seen.
pub struct Seen {
    /// Both had an OPEN of the other and the KEEPALIVE that answers it.
    pub established: Instant,
    /// The speaker's first UPDATE with a route.
    pub announced: Instant,
}

impl Tap {
    /// Listens from now on.
    pub fn open(netns: &Netns) -> Result<Self> {
        let protocol = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
        let socket = netns.run(|| Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol)));
        let socket = socket.context("a packet socket")?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        Ok(Self(socket))
    }

    /// Waits for both.
    pub fn wait(&self, deadline: Instant) -> Result<Seen> {
        let mut buffer = vec![0; 1 << 16];
        // By direction: from the speaker, from the receiver.
        let (mut opened, mut confirmed) = ([false; 2], [false; 2]);
        let (mut established, mut announced) = (None, None);
        loop {
            if let (Some(established), Some(announced)) = (established, announced) {
                return Ok(Seen { established, announced });
            }
            if Instant::now() > deadline {
                bail!("established: {}, a route: {}", established.is_some(), announced.is_some());
            }
            let length = match (&self.0).read(&mut buffer) {
                Ok(length) => length,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
                Err(error) => return Err(error.into()),
            };
            let now = Instant::now();
            let Some((source, payload)) = bgp(&buffer[..length]) else { continue };
            let side = usize::from(source != ROUTER);
            for message in messages(payload) {
                match message[18] {
                    OPEN => (opened[side], confirmed[side]) = (true, false),
                    KEEPALIVE => confirmed[side] = opened[side],
                    UPDATE if side == 0 && routes(message).is_some_and(|(_, new)| !new.is_empty()) => {
                        announced.get_or_insert(now);
                    }
                    _ => {}
                }
            }
            if confirmed == [true; 2] {
                established.get_or_insert(now);
            }
        }
    }
}

/// Source and payload of a TCP segment over IPv4 from or to BGP's port (RFC 791, RFC 9293 section 3.1).
fn bgp(packet: &[u8]) -> Option<(Ipv4Addr, &[u8])> {
    let (first, protocol) = (*packet.first()?, *packet.get(9)?);
    if first >> 4 != 4 || i32::from(protocol) != libc::IPPROTO_TCP {
        return None;
    }
    let source = Ipv4Addr::from(*packet.get(12..)?.first_chunk::<4>()?);
    let segment = packet.get(usize::from(first & 15) * 4..)?;
    let ports = segment.first_chunk::<4>()?;
    let ports = [[ports[0], ports[1]], [ports[2], ports[3]]].map(u16::from_be_bytes);
    let payload = segment.get(usize::from(segment.get(12)? >> 4) * 4..)?;
    ports.contains(&PORT).then_some((source, payload))
}

/// The messages of a segment; those of a session that begins are small, and none is cut.
fn messages(mut rest: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = u16::from_be_bytes(*rest.strip_prefix(&[0xff; 16])?.first_chunk()?);
        let (message, after) = rest.split_at_checked(usize::from(length))?;
        rest = after;
        (message.len() >= 19).then_some(message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_in_packets() {
        let message = |kind: u8| [&[0xff; 16][..], &[0, 19, kind]].concat();
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 10, 9, 0, 1, 10, 9, 1, 0];
        packet.extend([0x9c, 0x40, 0, 179, 0, 0, 0, 0, 0, 0, 0, 0, 0x60, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]);
        packet.extend([message(OPEN), message(KEEPALIVE)].concat());
        let (source, payload) = bgp(&packet).unwrap();
        assert_eq!(source, ROUTER);
        assert_eq!(messages(payload).map(|message| message[18]).collect::<Vec<_>>(), [OPEN, KEEPALIVE]);
        packet[23] = 80;
        assert!(bgp(&packet).is_none(), "another port");
        for length in 0..packet.len() {
            let _ = bgp(&packet[..length]).map(|(_, payload)| messages(payload).count());
        }
    }
}
