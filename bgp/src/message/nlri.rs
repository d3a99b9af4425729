//! Network layer reachability information: the prefixes of an UPDATE.

use std::fmt;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::AfiSafi;

/// A prefix, with the identifier of its path where add-path is in use (RFC 7911 section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nlri {
    /// Tells several paths to one prefix apart; present exactly if add-path was negotiated for this
    /// family and direction.
    pub path_id: Option<u32>,
    /// The prefix, without host bits.
    pub prefix: IpNet,
}

impl Nlri {
    /// The only path to a prefix. Host bits are cleared.
    pub fn new(prefix: IpNet) -> Self {
        Self { path_id: None, prefix: prefix.trunc() }
    }

    /// One of several paths to a prefix. Host bits are cleared.
    pub fn with_path_id(prefix: IpNet, path_id: u32) -> Self {
        Self { path_id: Some(path_id), prefix: prefix.trunc() }
    }

    /// The family of the prefix.
    pub const fn family(&self) -> AfiSafi {
        AfiSafi::of(&self.prefix)
    }
}

impl fmt::Display for Nlri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.prefix.fmt(f)?;
        match self.path_id {
            Some(id) => write!(f, " path {id}"),
            None => Ok(()),
        }
    }
}

/// Whether path identifiers are there, and how long prefixes of the family can be.
#[derive(Clone, Copy)]
pub(super) struct Form {
    pub(super) add_path: bool,
    pub(super) ipv6: bool,
}

/// Prefixes that cannot be told apart (RFC 7606 section 5.3).
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Broken {
    TooLong(u8),
    Cut,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong(length) => write!(f, "a prefix of {length} bits is too long for its family"),
            Self::Cut => f.write_str("the last prefix is cut off"),
        }
    }
}

/// Reads prefixes until the bytes end, and appends them. They are counted first: memory is taken once,
/// and none at all for a field that is broken.
pub(super) fn decode(bytes: &[u8], form: Form, out: &mut Vec<Nlri>) -> Result<(), Broken> {
    let most = if form.ipv6 { 128 } else { 32 };
    let (mut rest, mut count) = (bytes, 0);
    while !rest.is_empty() {
        let (_, length, after) = head(rest, form.add_path).ok_or(Broken::Cut)?;
        if length > most {
            return Err(Broken::TooLong(length));
        }
        rest = after.get(octets(length)..).ok_or(Broken::Cut)?;
        count += 1;
    }
    out.reserve_exact(count);
    let mut rest = bytes;
    while let Some((path_id, length, after)) = head(rest, form.add_path)
        && let Some((address, after)) = after.split_at_checked(octets(length))
    {
        rest = after;
        let prefix = if form.ipv6 {
            let mut octets = [0; 16];
            octets[..address.len()].copy_from_slice(address);
            Ipv6Net::new(octets.into(), length).map(|prefix| IpNet::V6(prefix.trunc()))
        } else {
            let mut octets = [0; 4];
            octets[..address.len()].copy_from_slice(address);
            Ipv4Net::new(octets.into(), length).map(|prefix| IpNet::V4(prefix.trunc()))
        };
        out.push(Nlri { path_id, prefix: prefix.map_err(|_| Broken::TooLong(length))? });
    }
    Ok(())
}

/// Path identifier, length in bits, and what follows.
fn head(bytes: &[u8], add_path: bool) -> Option<(Option<u32>, u8, &[u8])> {
    let (path_id, bytes) = if add_path {
        let (id, bytes) = bytes.split_first_chunk()?;
        (Some(u32::from_be_bytes(*id)), bytes)
    } else {
        (None, bytes)
    };
    let (&length, after) = bytes.split_first()?;
    Some((path_id, length, after))
}

/// How many octets hold so many bits.
const fn octets(bits: u8) -> usize {
    (bits as usize).div_ceil(8)
}

impl Nlri {
    /// Length on the wire.
    pub(super) fn encoded_len(&self, add_path: bool) -> usize {
        1 + octets(self.prefix.prefix_len()) + if add_path { 4 } else { 0 }
    }

    /// Appends the prefix, with its path identifier (0 if it has none) where they are in use.
    pub(super) fn encode(&self, add_path: bool, out: &mut Vec<u8>) {
        if add_path {
            out.extend_from_slice(&self.path_id.unwrap_or(0).to_be_bytes());
        }
        let length = self.prefix.prefix_len();
        out.push(length);
        match self.prefix {
            IpNet::V4(prefix) => out.extend_from_slice(&prefix.addr().octets()[..octets(length)]),
            IpNet::V6(prefix) => out.extend_from_slice(&prefix.addr().octets()[..octets(length)]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], ipv6: bool, add_path: bool) -> Result<Vec<String>, Broken> {
        let mut prefixes = Vec::new();
        decode(bytes, Form { add_path, ipv6 }, &mut prefixes)?;
        assert_eq!(prefixes.capacity(), prefixes.len());
        Ok(prefixes.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn prefixes_are_read_without_host_bits() {
        assert_eq!(
            read(&[0, 8, 10, 20, 10, 1, 0xff, 32, 1, 2, 3, 4], false, false).unwrap(),
            ["0.0.0.0/0", "10.0.0.0/8", "10.1.240.0/20", "1.2.3.4/32"]
        );
        assert_eq!(read(&[12, 0x20, 0x0f, 0], true, false).unwrap(), ["2000::/12", "::/0"]);
        assert_eq!(
            read(&[0, 0, 0, 7, 8, 10, 0, 0, 0, 8, 0], false, true).unwrap(),
            ["10.0.0.0/8 path 7", "0.0.0.0/0 path 8"]
        );
    }

    #[test]
    fn broken_fields_are_refused() {
        assert_eq!(read(&[33, 1, 2, 3, 4, 5], false, false), Err(Broken::TooLong(33)));
        assert_eq!(read(&[129], true, false), Err(Broken::TooLong(129)));
        assert_eq!(read(&[8, 10, 24, 1, 2], false, false), Err(Broken::Cut));
        assert_eq!(read(&[8], true, false), Err(Broken::Cut));
        assert_eq!(read(&[0, 0, 0, 7], false, true), Err(Broken::Cut));
        assert_eq!(read(&[0, 0, 0], false, true), Err(Broken::Cut));
    }
}
