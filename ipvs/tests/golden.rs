//! The exact bytes of messages; `tests/kernel.rs` sends these bytes and asks ipvsadm what came of it. The file holds a name and the message in hex per line, for a little-endian machine,
//! with family number 0x1c and sequence number 0.

#![cfg(target_endian = "little")]
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::net::Ipv4Addr;

use ferroute_ipvs::*;
use ferroute_netlink::Batch;

const FAMILY: u16 = 0x1c;

fn cases() -> Vec<(&'static str, Change)> {
    let v4 = VirtualServerKey::Address { protocol: Protocol::Tcp, address: [10, 96, 0, 1].into(), port: 443 };
    let address = "fd00::1".parse().unwrap();
    let v6 = VirtualServerKey::Address { protocol: Protocol::Sctp, address, port: 80 };
    let mark = VirtualServerKey::Mark { family: Family::V6, mark: 0x4000_0001 };
    let rr = Options {
        scheduler: Scheduler::RR,
        flags: Flags::NONE,
        timeout: 0,
        netmask: Netmask::host(Family::V4),
    };
    let persistent = Options {
        scheduler: Scheduler::MH,
        flags: Flags::PERSISTENT | Flags::MH_PORT,
        timeout: 10_800,
        netmask: Netmask::V4(Ipv4Addr::new(255, 255, 255, 0)),
    };
    let v6_options = Options { netmask: Netmask::host(Family::V6), ..rr };
    let plain = Destination::masquerade([10, 1, 2, 3].into(), 8080, 1);
    let tunnel = Destination {
        forwarding: Forwarding::Tunnel(Tunnel { kind: TunnelKind::Gue, port: 6080, flags: 1 }),
        upper_threshold: 100,
        lower_threshold: 50,
        ..Destination::masquerade("fd00::9".parse().unwrap(), 0, 7)
    };
    vec![
        ("create-server-v4", Change::CreateServer { key: v4, options: rr }),
        ("create-server-v6-sctp", Change::CreateServer { key: v6, options: v6_options }),
        ("create-server-mark", Change::CreateServer { key: mark, options: v6_options }),
        ("update-server-persistent", Change::UpdateServer { key: v4, options: persistent }),
        ("create-destination", Change::CreateDestination { server: v4, destination: plain }),
        ("create-destination-gue", Change::CreateDestination { server: mark, destination: tunnel }),
        (
            "update-destination",
            Change::UpdateDestination { server: v4, destination: Destination { weight: 0, ..plain } },
        ),
        ("delete-destination", Change::DeleteDestination { server: v4, destination: plain.key() }),
        ("delete-server", Change::DeleteServer { key: v6 }),
    ]
}

fn encoded(change: &Change) -> Vec<u8> {
    let mut batch = Batch::new();
    wire::change(&mut batch, FAMILY, change);
    batch.bytes().to_vec()
}

#[test]
fn messages_are_these_bytes() {
    let now: Vec<_> = cases()
        .iter()
        .map(|(name, change)| {
            let hex: String = encoded(change).iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{name} {hex}")
        })
        .collect();
    let golden: Vec<_> = include_str!("golden.txt").lines().collect();
    assert_eq!(now, golden, "print:\n{}\n", now.join("\n"));
}

/// neli is another author's reading of the same headers: what it decodes it must encode alike.
#[test]
fn an_independent_codec_agrees() {
    use neli::consts::nl::NlmF;
    use neli::genl::Genlmsghdr;
    use neli::nl::Nlmsghdr;
    use neli::{FromBytes, ToBytes};
    use std::io::Cursor;

    for (name, change) in cases() {
        let bytes = encoded(&change);
        let message =
            Nlmsghdr::<u16, Genlmsghdr<u8, u16>>::from_bytes(&mut Cursor::new(bytes.as_slice())).unwrap();
        assert_eq!(*message.nl_type(), FAMILY, "{name}");
        assert_eq!(*message.nl_flags(), NlmF::REQUEST, "{name}");
        let body = message.get_payload().unwrap();
        let nests: Vec<_> = body.attrs().iter().map(|attribute| *attribute.nla_type().nla_type()).collect();
        let has_destination = matches!(
            change,
            Change::CreateDestination { .. }
                | Change::UpdateDestination { .. }
                | Change::DeleteDestination { .. }
        );
        assert_eq!(nests, if has_destination { vec![1, 2] } else { vec![1] }, "{name}");
        let attributes = body.attrs().get_attr_handle();
        let service = attributes.get_nested_attributes::<u16>(1).unwrap();
        let family = service.get_attr_payload_as::<u16>(1).unwrap();
        assert_eq!(family, if change.server().family() == Family::V4 { 2 } else { 10 }, "{name}");
        let mut again = Cursor::new(Vec::new());
        message.to_bytes(&mut again).unwrap();
        assert_eq!(again.into_inner(), bytes, "{name}");
    }
}
