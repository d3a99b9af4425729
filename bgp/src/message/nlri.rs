//! Network layer reachability information: the prefixes of an UPDATE.

use std::fmt;

use ipnet::IpNet;

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
