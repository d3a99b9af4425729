//! UDP sockets that tell and set hop limits.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

use nix::cmsg_space;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::super::table::{MAXIMUM_TTL, PeerKey, Received};

/// Longer than any packet: what is longer is cut, and its length field then does not fit.
const BUFFER: usize = 512;
/// Source ports (RFC 5881 section 4), the dynamic range of IANA.
const SOURCE_PORTS: std::ops::RangeInclusive<u16> = 49152..=65535;
/// Class selector 6, network control, as routing protocols use it.
const TRAFFIC_CLASS: u32 = 0xc0;

/// A socket that packets arrive at.
#[derive(Debug)]
pub(super) struct Listener {
    socket: UdpSocket,
    port: u16,
}

impl Listener {
    pub(super) fn open(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        match address {
            SocketAddr::V4(_) => {
                setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
                setsockopt(&socket, sockopt::Ipv4RecvTtl, &true)?;
            }
            SocketAddr::V6(_) => {
                socket.set_only_v6(true)?;
                setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
                setsockopt(&socket, sockopt::Ipv6RecvHopLimit, &true)?;
            }
        }
        socket.bind(&address.into())?;
        Ok(Self { socket: socket.into(), port: address.port() })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Hands out up to `burst` packets; `true` if there may be more.
    pub(super) fn receive(&self, burst: usize, mut take: impl FnMut(&[u8], &Received)) -> bool {
        let mut buffer = [0; BUFFER];
        let mut space = cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo, libc::c_int, libc::c_int);
        for _ in 0..burst {
            let mut slices = [IoSliceMut::new(&mut buffer)];
            let message =
                recvmsg::<SockaddrStorage>(self.fd(), &mut slices, Some(&mut space), MsgFlags::empty());
            let (length, received) = match &message {
                Ok(message) => (message.bytes, self.envelope(message)),
                Err(nix::Error::EINTR) => continue,
                // Nothing left, or an error of one packet that is not ours to repair.
                Err(_) => return false,
            };
            if let Some(received) = received {
                take(&buffer[..length], &received);
            }
        }
        true
    }

    fn envelope(&self, message: &nix::sys::socket::RecvMsg<'_, '_, SockaddrStorage>) -> Option<Received> {
        let address = message.address.as_ref()?;
        let source = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => IpAddr::V4(v4.ip()),
            (None, Some(v6)) => IpAddr::V6(v6.ip()),
            (None, None) => return None,
        };
        let (mut ttl, mut arrival) = (None, None);
        for control in message.cmsgs().ok()? {
            match control {
                ControlMessageOwned::Ipv4Ttl(value) | ControlMessageOwned::Ipv6HopLimit(value) => {
                    ttl = u8::try_from(value).ok();
                }
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    let address = Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr));
                    arrival = Some((address.into(), u32::try_from(info.ipi_ifindex).ok()?));
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    let address = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                    arrival = Some((address.into(), info.ipi6_ifindex));
                }
                _ => {}
            }
        }
        let (destination, interface) = arrival?;
        Some(Received { source, destination, interface, port: self.port, ttl: ttl? })
    }
}

/// The socket that one session sends from.
#[derive(Debug)]
pub(super) struct Speaker {
    socket: UdpSocket,
    peer: SocketAddr,
}

impl Speaker {
    pub(super) fn open(key: &PeerKey) -> io::Result<Self> {
        let scope = key.interface.unwrap_or(0);
        let scoped = |address, port| match address {
            IpAddr::V6(address) if address.is_unicast_link_local() => {
                SocketAddrV6::new(address, port, 0, scope).into()
            }
            address => SocketAddr::new(address, port),
        };
        let peer = scoped(key.peer, key.port);
        let any: IpAddr = match key.peer {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let local = key.local.unwrap_or(any);
        let socket = Socket::new(Domain::for_address(peer), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        match key.peer {
            IpAddr::V4(_) => {
                socket.set_ttl_v4(u32::from(MAXIMUM_TTL))?;
                socket.set_tos_v4(TRAFFIC_CLASS)?;
            }
            IpAddr::V6(_) => {
                socket.set_only_v6(true)?;
                socket.set_unicast_hops_v6(u32::from(MAXIMUM_TTL))?;
                socket.set_tclass_v6(TRAFFIC_CLASS)?;
            }
        }
        // From a place that depends on the session, so that many sessions do not try the same ports.
        let count = SOURCE_PORTS.len() as u16;
        let first = hash(key) % count;
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for step in 0..count {
            let port = SOURCE_PORTS.start() + (first + step) % count;
            match socket.bind(&scoped(local, port).into()) {
                Ok(()) => return Ok(Self { socket: socket.into(), peer }),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// Sends a packet. One that cannot be sent is as good as lost on the way, and the peer notices.
    pub(super) fn send(&self, bytes: &[u8]) {
        if let Err(error) = self.socket.send_to(bytes, self.peer) {
            tracing::debug!(peer = %self.peer, %error, "BFD packet not sent");
        }
    }
}

fn hash(key: &PeerKey) -> u16 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(key) as u16
}
