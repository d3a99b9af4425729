//! OPEN (RFC 4271 section 4.2).

use super::{Asn, Capability, RouterId};

/// The first message of a session. The four-octet AS capability is not in the list: it is written from
/// `asn` and read back into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// The sender's AS: from its four-octet AS capability, else from the two-octet field.
    pub asn: Asn,
    /// Whether the sender announced four-octet AS numbers (RFC 6793).
    pub four_octet_as: bool,
    /// Seconds; 0 means no keepalives, 1 and 2 are refused on decode.
    pub hold_time: u16,
    /// Never zero on decode.
    pub router_id: RouterId,
    /// In the order sent, of all optional parameters. A capability may come several times.
    pub capabilities: Vec<Capability>,
}
