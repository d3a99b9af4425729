//! UPDATE (RFC 4271 section 4.3, multiprotocol by RFC 4760).

use std::sync::Arc;

use super::{AfiSafi, Attributes, Nlri};

/// Changes of routes. Withdrawals apply before announcements: a prefix in both is announced (RFC 4271
/// section 4.3).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Update {
    /// Routes that are gone, of any family.
    pub withdrawn: Vec<Nlri>,
    /// New or changed routes. A received UPDATE has at most two groups: the classic field and
    /// MP_REACH_NLRI, which differ in the next hop only.
    pub announced: Vec<Announcement>,
    /// The initial routes of this family are complete (RFC 4724 section 2).
    pub end_of_rib: Option<AfiSafi>,
}

/// Routes that share their attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// The attributes.
    pub attributes: Arc<Attributes>,
    /// The prefixes, at least one, all of one family.
    pub nlri: Vec<Nlri>,
}
