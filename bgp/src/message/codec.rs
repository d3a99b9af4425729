//! What both sides agreed on, as far as it changes bytes.

use super::{AddPath, AfiSafi, Asn, Capability, ExtendedNextHop, Families, Open};

/// Longest message without, and with, extended messages, in octets (RFC 4271 section 4.1, RFC 8654).
pub const MESSAGE_MAX: u16 = 4096;
/// Longest message where extended messages are agreed (RFC 8654 section 3).
pub const EXTENDED_MESSAGE_MAX: u16 = 65535;

/// How messages of a session are written and read. [`Codec::initial`] until both OPENs are there, then
/// [`Codec::negotiate`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Codec {
    /// The peer is of this AS: LOCAL_PREF, ORIGINATOR_ID and CLUSTER_LIST count, and are sent.
    pub internal: bool,
    /// AS numbers have four octets (RFC 6793).
    pub four_octet_as: bool,
    /// Families that are in use; routes of others are ignored.
    pub families: Families,
    /// Families of which the peer sends path identifiers.
    pub add_path_receive: Families,
    /// Families of which path identifiers are sent.
    pub add_path_send: Families,
    /// IPv4 routes may have IPv6 next hops (RFC 8950).
    pub extended_next_hop: bool,
    /// Refreshes have a beginning and an end (RFC 7313).
    pub enhanced_refresh: bool,
    /// Longest message that may come.
    pub receive_max: u16,
    /// Longest message that may be sent.
    pub send_max: u16,
    /// Leftmost AS that every AS_PATH from this peer must have; none if it is not to be checked (RFC 4271
    /// section 6.3). For external peers, route servers excepted.
    pub first_as: Option<Asn>,
    /// Take AS_PATHs with AS_SET or AS_CONFED_SET; else their routes are treated as withdrawn (RFC 9774).
    pub accept_as_sets: bool,
}

impl Codec {
    /// For the time before the OPENs are exchanged.
    pub const fn initial() -> Self {
        Self {
            internal: false,
            four_octet_as: false,
            families: Families::NONE,
            add_path_receive: Families::NONE,
            add_path_send: Families::NONE,
            extended_next_hop: false,
            enhanced_refresh: false,
            receive_max: MESSAGE_MAX,
            send_max: MESSAGE_MAX,
            first_as: None,
            accept_as_sets: false,
        }
    }

    /// What follows from the OPEN that was sent and the one that came. `first_as` is not set and AS_SETs
    /// are refused: that is configuration.
    pub fn negotiate(sent: &Open, received: &Open) -> Self {
        let (ours, theirs) = (&sent.capabilities, &received.capabilities);
        let both = |capability| ours.contains(&capability) && theirs.contains(&capability);
        let families = multiprotocol(ours).and(multiprotocol(theirs));
        let extended = if both(Capability::ExtendedMessage) { EXTENDED_MESSAGE_MAX } else { MESSAGE_MAX };
        Self {
            internal: sent.asn == received.asn,
            four_octet_as: sent.four_octet_as && received.four_octet_as,
            families,
            add_path_receive: families.and(receivers(ours)).and(senders(theirs)),
            add_path_send: families.and(senders(ours)).and(receivers(theirs)),
            extended_next_hop: families.contains(AfiSafi::Ipv4Unicast)
                && extended_next_hop(ours)
                && extended_next_hop(theirs),
            enhanced_refresh: both(Capability::EnhancedRouteRefresh),
            receive_max: extended,
            send_max: extended,
            first_as: None,
            accept_as_sets: false,
        }
    }
}

/// Families of the multiprotocol capabilities; IPv4 unicast if there is none at all (RFC 4760 section 8).
fn multiprotocol(capabilities: &[Capability]) -> Families {
    let mut named = capabilities
        .iter()
        .filter_map(|capability| match capability {
            Capability::Multiprotocol(family) => Some(*family),
            _ => None,
        })
        .peekable();
    if named.peek().is_none() { Families::IPV4 } else { named.collect() }
}

fn add_path(capabilities: &[Capability], wanted: impl Fn(&AddPath) -> bool) -> Families {
    let entries = capabilities.iter().flat_map(|capability| match capability {
        Capability::AddPath(entries) => &entries[..],
        _ => &[],
    });
    entries.filter(|entry| wanted(entry)).map(|entry| entry.family).collect()
}

fn receivers(capabilities: &[Capability]) -> Families {
    add_path(capabilities, |entry| entry.mode.receives())
}

fn senders(capabilities: &[Capability]) -> Families {
    add_path(capabilities, |entry| entry.mode.sends())
}

fn extended_next_hop(capabilities: &[Capability]) -> bool {
    const IPV6: ExtendedNextHop = ExtendedNextHop { family: AfiSafi::Ipv4Unicast, next_hop_afi: 2 };
    capabilities.iter().any(
        |capability| matches!(capability, Capability::ExtendedNextHop(entries) if entries.contains(&IPV6)),
    )
}

#[cfg(test)]
mod tests {
    use super::super::{AddPathMode, RouterId};
    use super::*;

    fn open(asn: u32, capabilities: Vec<Capability>) -> Open {
        let router_id = RouterId::from(asn);
        Open { asn: Asn(asn), four_octet_as: true, hold_time: 90, router_id, capabilities }
    }

    #[test]
    fn without_capabilities_there_is_ipv4_only() {
        let codec = Codec::negotiate(&open(1, vec![]), &Open { four_octet_as: false, ..open(2, vec![]) });
        assert_eq!(codec, Codec { families: Families::IPV4, ..Codec::initial() });
        let v6 = vec![Capability::Multiprotocol(AfiSafi::Ipv6Unicast)];
        assert!(Codec::negotiate(&open(1, vec![]), &open(2, v6)).families.is_empty());
    }

    #[test]
    fn directions_of_add_path_cross() {
        let with = |mode| {
            let family = AfiSafi::Ipv4Unicast;
            open(
                1,
                vec![Capability::Multiprotocol(family), Capability::AddPath(vec![AddPath { family, mode }])],
            )
        };
        for (ours, theirs, receive, send) in [
            (AddPathMode::Both, AddPathMode::Send, true, false),
            (AddPathMode::Both, AddPathMode::Receive, false, true),
            (AddPathMode::Both, AddPathMode::Both, true, true),
            (AddPathMode::Send, AddPathMode::Send, false, false),
        ] {
            let codec = Codec::negotiate(&with(ours), &with(theirs));
            assert_eq!(codec.add_path_receive.contains(AfiSafi::Ipv4Unicast), receive);
            assert_eq!(codec.add_path_send.contains(AfiSafi::Ipv4Unicast), send);
        }
    }

    #[test]
    fn both_must_want_extensions() {
        let next_hop = ExtendedNextHop { family: AfiSafi::Ipv4Unicast, next_hop_afi: 2 };
        let full = open(
            7,
            vec![
                Capability::Multiprotocol(AfiSafi::Ipv4Unicast),
                Capability::Multiprotocol(AfiSafi::Ipv6Unicast),
                Capability::ExtendedNextHop(vec![next_hop]),
                Capability::ExtendedMessage,
                Capability::EnhancedRouteRefresh,
            ],
        );
        let codec = Codec::negotiate(&full, &full);
        assert_eq!((codec.families, codec.internal), (Families::ALL, true));
        assert!(codec.extended_next_hop && codec.enhanced_refresh && codec.four_octet_as);
        assert_eq!((codec.receive_max, codec.send_max), (65535, 65535));
        let codec = Codec::negotiate(&full, &open(8, vec![]));
        assert_eq!((codec.families, codec.internal), (Families::IPV4, false));
        assert!(!codec.extended_next_hop && !codec.enhanced_refresh);
        assert_eq!((codec.receive_max, codec.send_max), (4096, 4096));
    }
}
