//! Socket options that neither std nor socket2 has: the TCP MD5 signature and the least TTL.
//!
//! nix's macro writes the system call, so that no unsafe code is needed here. The MD5 request is
//! laid out by hand as bytes (`struct tcp_md5sig` in `linux/tcp.h`), which leaves no padding
//! uninitialised.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::SetStruct;

use super::Password;

/// `sizeof(struct tcp_md5sig)`: a `sockaddr_storage`, flags, prefix length, key length, interface
/// index, key.
const MD5_REQUEST: usize = 128 + 1 + 1 + 2 + 4 + Password::LIMIT;

#[derive(Debug, Clone, Copy)]
struct Md5Signature;
nix::setsockopt_impl!(
    Md5Signature,
    libc::IPPROTO_TCP,
    libc::TCP_MD5SIG,
    [u8; MD5_REQUEST],
    SetStruct<'_, [u8; MD5_REQUEST]>
);

#[derive(Debug, Clone, Copy)]
struct MinimumTtl;
nix::setsockopt_impl!(MinimumTtl, libc::IPPROTO_IP, libc::IP_MINTTL, i32, SetStruct<'_, i32>);

#[derive(Debug, Clone, Copy)]
struct MinimumHopCount;
nix::setsockopt_impl!(MinimumHopCount, libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT, i32, SetStruct<'_, i32>);

/// Sets or removes the key that segments from and to `peer` are signed with (RFC 2385). The socket
/// must be of the peer's family. Taking away a key that is not there is no error.
///
/// # Errors
///
/// What the kernel says; `ENOPROTOOPT` when it was built without `CONFIG_TCP_MD5SIG`.
pub(super) fn set_md5(socket: &impl AsFd, peer: IpAddr, password: Option<&Password>) -> io::Result<()> {
    let mut request = [0; MD5_REQUEST];
    // The family in the machine's byte order, then the port (not looked at).
    match peer {
        IpAddr::V4(address) => {
            request[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            request[4..8].copy_from_slice(&address.octets());
        }
        IpAddr::V6(address) => {
            request[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            // After port and flow label.
            request[8..24].copy_from_slice(&address.octets());
        }
    }
    if let Some(password) = password {
        let key = password.bytes();
        request[130..132].copy_from_slice(&(key.len() as u16).to_ne_bytes());
        request[136..136 + key.len()].copy_from_slice(key);
    }
    match setsockopt(socket, Md5Signature, &request) {
        // Nothing to take away.
        Err(Errno::ENOENT) if password.is_none() => Ok(()),
        outcome => Ok(outcome?),
    }
}

/// Drops segments that arrive with a TTL or hop limit below `least` (RFC 5082, section 3).
pub(super) fn set_minimum_ttl(socket: &impl AsFd, ipv6: bool, least: u8) -> io::Result<()> {
    let least = i32::from(least);
    Ok(if ipv6 {
        setsockopt(socket, MinimumHopCount, &least)
    } else {
        setsockopt(socket, MinimumTtl, &least)
    }?)
}
