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
