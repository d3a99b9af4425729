//! ROUTE-REFRESH (RFC 2918, with the demarcation of RFC 7313).

use super::AfiSafi;

/// Asks for the routes of a family again, or marks where an answer begins and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RouteRefresh {
    /// Which family.
    pub family: AfiSafi,
    /// What is said of it.
    pub kind: RefreshKind,
}

/// Message subtype of a ROUTE-REFRESH (RFC 7313 section 3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefreshKind {
    /// 0: send your routes again.
    Request,
    /// 1: my answer begins (BoRR).
    Begin,
    /// 2: my answer ends (EoRR); what was not sent again is stale.
    End,
    /// Any other: to be ignored.
    Other(u8),
}

impl RefreshKind {
    /// The kind of a message subtype.
    pub const fn from_number(number: u8) -> Self {
        match number {
            0 => Self::Request,
            1 => Self::Begin,
            2 => Self::End,
            number => Self::Other(number),
        }
    }

    /// The message subtype.
    pub const fn number(self) -> u8 {
        match self {
            Self::Request => 0,
            Self::Begin => 1,
            Self::End => 2,
            Self::Other(number) => number,
        }
    }
}
