//! TCP for BGP: listen, dial, sign with MD5 (RFC 2385), keep strangers out by TTL (RFC 5082).
//!
//! A connection is set up here and handed to its peer's task; nothing is read or written.

mod option;

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Differentiated services code point CS6, network control (RFC 4594, section 3.2), in its place
/// within the byte.
const NETWORK_CONTROL: u32 = 0xc0;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// The secret that two peers share for TCP MD5 signatures: 1 to 80 bytes. Shown as stars, never
/// logged.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(Arc<[u8]>);

/// A password that the kernel would not take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a TCP MD5 password has 1 to {} bytes, this one has {length}", Password::LIMIT)]
pub struct InvalidPassword {
    length: usize,
}

impl Password {
    /// `TCP_MD5SIG_MAXKEYLEN` of `linux/tcp.h`.
    pub const LIMIT: usize = 80;

    /// Takes the bytes of a password.
    ///
    /// # Errors
    ///
    /// [`InvalidPassword`] when it is empty or longer than the kernel takes.
    pub fn new(password: &[u8]) -> Result<Self, InvalidPassword> {
        match password.len() {
            1..=Self::LIMIT => Ok(Self(password.into())),
            length => Err(InvalidPassword { length }),
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(****)")
    }
}

/// How many routers may lie between two peers, and how that is enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Reach {
    /// Any distance that the kernel's default TTL covers: internal peers.
    #[default]
    Any,
    /// At most this many hops: packets leave with this TTL. 1 is a directly connected peer.
    Hops(u8),
    /// At most this many hops, and packets from further away are dropped unread (GTSM, RFC 5082):
    /// packets leave with TTL 255 and must arrive with 256 minus this or more. The peer must send
    /// with TTL 255 as well.
    Security(u8),
}

impl Reach {
    /// Sets a socket up, before or after it is connected.
    fn apply(self, socket: &impl AsFd, ipv6: bool) -> io::Result<()> {
        let ttl = match self {
            Self::Any => return Ok(()),
            Self::Hops(hops) => u32::from(hops.max(1)),
            Self::Security(_) => 255,
        };
        set_ttl(socket, ipv6, ttl)?;
        if let Self::Security(hops) = self {
            // 1 hop: 255 must arrive as 255.
            option::set_minimum_ttl(socket, ipv6, 255 - hops.clamp(1, 254) + 1)?;
        }
        Ok(())
    }
}

/// An address with the link that a link-local one lives on.
///
/// # Errors
///
/// When the address is link-local and no interface is named, or there is none of that name.
pub fn scoped(address: IpAddr, port: u16, interface: Option<&str>) -> Result<SocketAddr, ScopeError> {
    match address {
        IpAddr::V6(address) if address.is_unicast_link_local() => {
            let name = interface.ok_or(ScopeError::NoInterface { address })?;
            let index = nix::net::if_::if_nametoindex(name)
                .map_err(|_| ScopeError::UnknownInterface { address, name: name.to_owned() })?;
            Ok(SocketAddrV6::new(address, port, 0, index).into())
        }
        address => Ok(SocketAddr::new(address, port)),
    }
}

/// The name of the interface with this index, if there is one.
pub(crate) fn interface_name(index: u32) -> Option<String> {
    nix::net::if_::if_indextoname(index).ok()?.into_string().ok()
}

/// Why a link-local address cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// It is ambiguous.
    #[error("{address} is link-local: name the interface it is reached through")]
    NoInterface {
        /// Which.
        address: Ipv6Addr,
    },
    /// There is no such link now.
    #[error("{address} is to be reached through interface {name}, which this node does not have")]
    UnknownInterface {
        /// Which address.
        address: Ipv6Addr,
        /// Which interface.
        name: String,
    },
}

/// What is needed to open a connection.
#[derive(Debug, Clone)]
pub struct Dial {
    /// Where to.
    pub remote: SocketAddr,
    /// From which address of this node; the kernel chooses if `None`.
    pub source: Option<IpAddr>,
    /// Distance and its check.
    pub reach: Reach,
    /// Signature, if any.
    pub password: Option<Password>,
    /// How long to wait for an answer.
    pub timeout: Duration,
}

/// Why there is no connection, in words for the peer's last error.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// An RST came back.
    #[error(
        "{remote} refuses the connection: no BGP speaker listens there, or it does not know this node as a neighbour"
    )]
    Refused {
        /// Who.
        remote: SocketAddr,
    },
    /// Nothing came back.
    #[error("no answer from {remote} within {} s: it is down, filtered{}{}", timeout.as_secs_f32(),
        if *signed { ", has no or another TCP MD5 password for this node" } else { ", or wants a TCP MD5 password" },
        match reach {
            Reach::Any => "",
            Reach::Hops(_) => ", or further away than the allowed number of hops",
            Reach::Security(_) => ", further away than TTL security allows, or without TTL security itself",
        })]
    Timeout {
        /// Who.
        remote: SocketAddr,
        /// How long.
        timeout: Duration,
        /// Whether a password is configured here.
        signed: bool,
        /// Distance allowed.
        reach: Reach,
    },
    /// There is no way.
    #[error("{remote} cannot be reached: {source}")]
    Unreachable {
        /// Who.
        remote: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The source address is not this node's.
    #[error("cannot connect to {remote} from {from}: {source} (is it an address of this node?)")]
    Source {
        /// Who.
        remote: SocketAddr,
        /// The address wanted.
        from: IpAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The password cannot be set.
    #[error(
        "cannot sign the connection to {remote} with TCP MD5: {source} (the kernel needs CONFIG_TCP_MD5SIG)"
    )]
    Password {
        /// Who.
        remote: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The peer's link is not there.
    #[error(transparent)]
    Scope(#[from] ScopeError),
    /// Anything else.
    #[error("cannot connect to {remote}: {source}")]
    Other {
        /// Who.
        remote: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl Dial {
    /// Opens the connection.
    ///
    /// # Errors
    ///
    /// [`DialError`], each worth another try later.
    pub async fn connect(&self) -> Result<TcpStream, DialError> {
        let remote = self.remote;
        let socket = self.socket()?;
        match tokio::time::timeout(self.timeout, socket.connect(remote)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(source)) => Err(match source.kind() {
                io::ErrorKind::ConnectionRefused => DialError::Refused { remote },
                io::ErrorKind::TimedOut => self.timed_out(),
                io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkUnreachable
                | io::ErrorKind::NetworkDown
                | io::ErrorKind::AddrNotAvailable => DialError::Unreachable { remote, source },
                _ => DialError::Other { remote, source },
            }),
            Err(_) => Err(self.timed_out()),
        }
    }

    fn socket(&self) -> Result<TcpSocket, DialError> {
        let remote = self.remote;
        let other = |source| DialError::Other { remote, source };
        let ipv6 = remote.is_ipv6();
        let socket =
            Socket::new(Domain::for_address(remote), Type::STREAM, Some(Protocol::TCP)).map_err(other)?;
        socket.set_nonblocking(true).map_err(other)?;
        if let Some(password) = &self.password {
            option::set_md5(&socket, remote.ip(), Some(password))
                .map_err(|source| DialError::Password { remote, source })?;
        }
        self.reach.apply(&socket, ipv6).map_err(other)?;
        common_options(&socket, ipv6).map_err(other)?;
        if let Some(from) = self.source {
            let address = match (from, remote) {
                // A link-local source lives on the link of the remote address.
                (IpAddr::V6(from), SocketAddr::V6(remote)) if from.is_unicast_link_local() => {
                    SocketAddrV6::new(from, 0, 0, remote.scope_id()).into()
                }
                (from, _) => SocketAddr::new(from, 0),
            };
            socket.bind(&address.into()).map_err(|source| DialError::Source { remote, from, source })?;
        }
        Ok(TcpSocket::from_std_stream(socket.into()))
    }

    fn timed_out(&self) -> DialError {
        DialError::Timeout {
            remote: self.remote,
            timeout: self.timeout,
            signed: self.password.is_some(),
            reach: self.reach,
        }
    }
}

/// Readies a connection that a peer opened. TTL security holds from here on: segments that came between
/// the handshake and this call are not checked. Who is too far away has not seen the answer to its SYN,
/// which went to the peer, so it has no connection to send them on.
///
/// # Errors
///
/// What the kernel says.
pub fn adopt(stream: &TcpStream, reach: Reach) -> io::Result<()> {
    let ipv6 = stream.local_addr()?.is_ipv6();
    reach.apply(stream, ipv6)?;
    if reach == Reach::Any {
        // Not the 255 inherited from the listener: what the kernel would use for a connection of
        // its own. Older than the answer to the first segment, this was never promised.
        set_ttl(stream, ipv6, 64)?;
    }
    common_options(stream, ipv6)
}

/// An address that peers may connect to.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
}

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else has the port.
    #[error(
        "cannot listen on {address}: the port is in use, perhaps by another BGP speaker on this node; choose \
         another port or address, or do not listen and only dial"
    )]
    InUse {
        /// Where.
        address: SocketAddr,
    },
    /// The address is not there.
    #[error("cannot listen on {address}: this node does not have the address")]
    NoAddress {
        /// Where.
        address: SocketAddr,
    },
    /// The kernel takes no keys.
    #[error(
        "cannot listen on {address} with the TCP MD5 password of {peer}: {source} (the kernel needs CONFIG_TCP_MD5SIG)"
    )]
    Password {
        /// Where.
        address: SocketAddr,
        /// Whose password.
        peer: IpAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Ports below 1024 need a privilege.
    #[error("cannot listen on {address}: not permitted; ports below 1024 need CAP_NET_BIND_SERVICE")]
    NotPermitted {
        /// Where.
        address: SocketAddr,
    },
    /// Anything else.
    #[error("cannot listen on {address}: {source}")]
    Other {
        /// Where.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl Listener {
    /// Binds and listens. An IPv6 listener takes IPv6 only: keys for IPv4 peers on it would have to
    /// be set in mapped form. Port 0 lets the kernel choose. The keys are in place before the first
    /// segment can arrive; those of the other family are left out.
    ///
    /// # Errors
    ///
    /// [`ListenError`].
    pub fn bind<'a>(
        address: SocketAddr,
        keys: impl IntoIterator<Item = (IpAddr, &'a Password)>,
    ) -> Result<Self, ListenError> {
        let ipv6 = address.is_ipv6();
        let prepare = || -> io::Result<Socket> {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            socket.set_reuse_address(true)?;
            if ipv6 {
                socket.set_only_v6(true)?;
            }
            // The answer to a SYN is sent before the peer is known, and a peer with TTL security
            // takes it with 255 only.
            set_ttl(&socket, ipv6, 255)?;
            common_options(&socket, ipv6)?;
            socket.bind(&address.into())?;
            Ok(socket)
        };
        let listen = |socket: Socket| {
            socket.listen(BACKLOG)?;
            TcpListener::from_std(socket.into())
        };
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => ListenError::InUse { address },
            io::ErrorKind::AddrNotAvailable => ListenError::NoAddress { address },
            io::ErrorKind::PermissionDenied => ListenError::NotPermitted { address },
            _ => ListenError::Other { address, source },
        };
        let socket = prepare().map_err(failed)?;
        for (peer, password) in keys.into_iter().filter(|(peer, _)| peer.is_ipv6() == ipv6) {
            option::set_md5(&socket, peer, Some(password)).map_err(|source| ListenError::Password {
                address,
                peer,
                source,
            })?;
        }
        let socket = listen(socket).map_err(failed)?;
        let address = socket.local_addr().map_err(failed)?;
        Ok(Self { socket, address })
    }

    /// Where peers connect to, with the port that the kernel chose.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Demands signatures from a peer, or no longer. Must be done before the peer's first segment
    /// arrives. A peer of the other family is nothing to this listener.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_password(&self, peer: IpAddr, password: Option<&Password>) -> io::Result<()> {
        if peer.is_ipv6() != self.address.is_ipv6() {
            return Ok(());
        }
        option::set_md5(&self.socket, peer, password)
    }

    /// The next connection. Cancelling it loses nothing.
    ///
    /// # Errors
    ///
    /// What the kernel says: nearly always about this one connection, or too many open files.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        self.socket.accept().await
    }
}

fn common_options(socket: &impl AsFd, ipv6: bool) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    if ipv6 { socket.set_tclass_v6(NETWORK_CONTROL) } else { socket.set_tos_v4(NETWORK_CONTROL) }
}

fn set_ttl(socket: &impl AsFd, ipv6: bool, ttl: u32) -> io::Result<()> {
    let socket = SockRef::from(socket);
    if ipv6 { socket.set_unicast_hops_v6(ttl) } else { socket.set_ttl_v4(ttl) }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn dial(remote: SocketAddr, source: IpAddr) -> Dial {
        Dial {
            remote,
            source: Some(source),
            reach: Reach::Any,
            password: None,
            timeout: Duration::from_millis(400),
        }
    }

    fn loopback(last: u8) -> IpAddr {
        Ipv4Addr::new(127, 0, 0, last).into()
    }

    #[test]
    fn passwords_have_a_length_and_no_face() {
        assert!(Password::new(b"").is_err());
        assert!(Password::new(&[b'x'; 80]).is_ok());
        assert_eq!(
            Password::new(&[b'x'; 81]).unwrap_err().to_string(),
            "a TCP MD5 password has 1 to 80 bytes, this one has 81"
        );
        assert_eq!(format!("{:?}", Password::new(b"hunter2").unwrap()), "Password(****)");
    }

    #[test]
    fn link_local_needs_its_link() {
        let address: IpAddr = "fe80::1".parse().unwrap();
        assert!(matches!(scoped(address, 179, None), Err(ScopeError::NoInterface { .. })));
        assert!(matches!(
            scoped(address, 179, Some("no-such-link")),
            Err(ScopeError::UnknownInterface { .. })
        ));
        let scoped = scoped(address, 179, Some("lo")).unwrap();
        assert_eq!(scoped.to_string(), "[fe80::1%1]:179");
    }

    #[tokio::test]
    async fn both_families_connect() {
        for (address, source) in [("127.0.0.1:0", "127.0.0.9"), ("[::1]:0", "::1")] {
            let listener = Listener::bind(address.parse().unwrap(), []).unwrap();
            let source: IpAddr = source.parse().unwrap();
            let dialed = dial(listener.address(), source).connect().await.unwrap();
            let (accepted, from) = listener.accept().await.unwrap();
            adopt(&accepted, Reach::Hops(1)).unwrap();
            assert_eq!(from.ip(), source);
            assert_eq!(dialed.peer_addr().unwrap(), listener.address());
        }
    }

    #[tokio::test]
    async fn failures_are_words() {
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), []).unwrap();
        let address = listener.address();
        let error = Listener::bind(address, []).unwrap_err();
        assert!(matches!(error, ListenError::InUse { .. }), "{error}");
        let error = Listener::bind("192.0.2.1:0".parse().unwrap(), []).unwrap_err();
        assert!(matches!(error, ListenError::NoAddress { .. }), "{error}");
        drop(listener);
        let error = dial(address, loopback(1)).connect().await.unwrap_err();
        assert!(matches!(error, DialError::Refused { .. }), "{error}");
        let error = dial(address, "192.0.2.1".parse().unwrap()).connect().await.unwrap_err();
        assert!(matches!(error, DialError::Source { .. }), "{error}");
    }

    #[tokio::test]
    async fn ttl_security_keeps_low_ttls_out() {
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), []).unwrap();
        let mut secure = dial(listener.address(), loopback(2));
        secure.reach = Reach::Security(1);
        // The listener answers with 255, so the handshake passes.
        let dialed = secure.connect().await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        adopt(&accepted, Reach::Security(1)).unwrap();
        let mut byte = [0];
        accepted.writable().await.unwrap();
        assert_eq!(accepted.try_write(b"x").unwrap(), 1);
        dialed.readable().await.unwrap();
        assert_eq!(dialed.try_read(&mut byte).unwrap(), 1);
        // A sender with another TTL is not heard.
        adopt(&accepted, Reach::Hops(64)).unwrap();
        assert_eq!(accepted.try_write(b"y").unwrap(), 1);
        let heard = tokio::time::timeout(Duration::from_millis(300), async {
            loop {
                dialed.readable().await.unwrap();
                if let Ok(count) = dialed.try_read(&mut byte) {
                    return count;
                }
            }
        });
        assert!(heard.await.is_err(), "a segment with TTL 64 passed");
    }
}
