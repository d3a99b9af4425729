//! Messages that broke other speakers, rebuilt from the published descriptions and fixes of BIRD, FRR
//! (and Quagga) and GoBGP since 2016, and what each must lead to here (RFC 4271 section 6, RFC 7606).
//!
//! Not here, because no message shows them: races after a NOTIFICATION (CVE-2022-37035, CVE-2025-59688),
//! RPKI (CVE-2024-55553, CVE-2025-43970, CVE-2025-43973), and faults of OSPF that are often listed along
//! (CVE-2024-27913, CVE-2024-31950, CVE-2024-31951, CVE-2024-34088).

use ferroute_bgp::message::*;

/// What must come of a message.
pub enum Expected {
    /// So many routes announced and withdrawn, or a message that is no UPDATE.
    Clean(usize, usize),
    /// So many announced, without these attributes.
    Discard(usize, &'static [u8]),
    /// So many withdrawn, nothing announced, because of these attributes.
    Withdraw(usize, &'static [u8]),
    /// A NOTIFICATION with these numbers.
    Reset(u8, u8),
}

pub use Expected::{Clean, Discard, Reset, Withdraw};

pub struct Case {
    pub name: &'static str,
    /// Of the session on which it comes; [`Codec::initial`] for an OPEN.
    pub codec: Codec,
    pub frame: Vec<u8>,
    pub expected: Expected,
}

pub fn external() -> Codec {
    Codec { families: Families::ALL, four_octet_as: true, enhanced_refresh: true, ..Codec::initial() }
}

pub fn internal() -> Codec {
    Codec { internal: true, ..external() }
}

pub fn two_octets() -> Codec {
    Codec { four_octet_as: false, ..external() }
}

pub fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 16];
    frame.extend((19 + body.len() as u16).to_be_bytes());
    frame.push(kind);
    frame.extend(body);
    frame
}

fn open(parameters: &[u8]) -> Vec<u8> {
    open_saying(parameters.len() as u8, parameters)
}

fn open_saying(length: u8, parameters: &[u8]) -> Vec<u8> {
    let body = [&[4, 0xfd, 0xe9, 0, 90, 10, 0, 0, 1, length], parameters].concat();
    message(1, &body)
}

fn capability(code: u8, value: &[u8]) -> Vec<u8> {
    let length = value.len() as u8;
    open(&[&[2, length + 2, code, length], value].concat())
}

pub fn attribute(flags: u8, code: u8, value: &[u8]) -> Vec<u8> {
    match u8::try_from(value.len()) {
        Ok(length) => [&[flags, code, length], value].concat(),
        Err(_) => [&[flags | 0x10, code][..], &(value.len() as u16).to_be_bytes(), value].concat(),
    }
}

pub fn update_of(withdrawn: &[u8], attributes: &[u8], routes: &[u8]) -> Vec<u8> {
    let mut body = (withdrawn.len() as u16).to_be_bytes().to_vec();
    body.extend(withdrawn);
    body.extend((attributes.len() as u16).to_be_bytes());
    body.extend(attributes);
    body.extend(routes);
    message(2, &body)
}

pub const ROUTE: [u8; 4] = [24, 192, 0, 2];
const V6_ROUTE: [u8; 5] = [32, 0x20, 1, 0xd, 0xb8];
const GLOBAL: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const LINK_LOCAL: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

pub fn origin() -> Vec<u8> {
    attribute(0x40, 1, &[0])
}

pub fn as_path() -> Vec<u8> {
    attribute(0x40, 2, &[2, 1, 0, 0, 0xfd, 0xe9])
}

pub fn as_path2() -> Vec<u8> {
    attribute(0x40, 2, &[2, 3, 0xfd, 0xe9, 0x5b, 0xa0, 0x5b, 0xa0])
}

pub fn next_hop() -> Vec<u8> {
    attribute(0x40, 3, &[192, 0, 2, 1])
}

/// A good route with one attribute more.
pub fn with(extra: &[u8]) -> Vec<u8> {
    update_of(&[], &[&origin()[..], &as_path(), &next_hop(), extra].concat(), &ROUTE)
}

/// A good route without NEXT_HOP, with one attribute more.
fn instead(extra: &[u8]) -> Vec<u8> {
    update_of(&[], &[&origin()[..], &as_path(), extra].concat(), &ROUTE)
}

/// MP_REACH_NLRI and what IPv6 routes need.
fn reach(flags: u8, afi: u16, safi: u8, next_hop: &[u8], routes: &[u8]) -> Vec<u8> {
    let mut value = afi.to_be_bytes().to_vec();
    value.extend([safi, next_hop.len() as u8]);
    value.extend(next_hop);
    value.push(0);
    value.extend(routes);
    attribute(flags, 14, &value)
}

fn reach6(next_hop: &[u8], routes: &[u8]) -> Vec<u8> {
    update_of(&[], &[&reach(0x80, 2, 1, next_hop, routes)[..], &origin(), &as_path()].concat(), &[])
}

fn case(name: &'static str, codec: Codec, frame: Vec<u8>, expected: Expected) -> Case {
    Case { name, codec, frame, expected }
}

fn headers() -> Vec<Case> {
    let mut wrong_marker = message(4, &[]);
    wrong_marker[3] = 0;
    let sized = |length: u16, kind: u8| {
        let mut frame = message(kind, &[0; 40]);
        frame[16..18].copy_from_slice(&length.to_be_bytes());
        frame
    };
    vec![
        case("GoBGP f0f24a2a: the marker is not looked at", external(), wrong_marker, Reset(1, 1)),
        case("FRR #1668: length below the header, assertion", external(), sized(0, 2), Reset(1, 2)),
        case("FRR #1668: length 18", external(), sized(18, 4), Reset(1, 2)),
        case("UPDATE of 22 octets", external(), sized(22, 2), Reset(1, 2)),
        case("GoBGP 2020: OPEN without a body", Codec::initial(), message(1, &[]), Reset(1, 2)),
        case("KEEPALIVE with a body", external(), message(4, &[0]), Reset(1, 2)),
        case(
            "BIRD ea0cb652e: extended message that was not agreed",
            external(),
            message(2, &[0; 5000]),
            Reset(1, 2),
        ),
        case(
            "CVE-2022-37032: FRR reads beyond a CAPABILITY message",
            external(),
            message(6, &[1, 0, 0, 1, 2]),
            Reset(1, 3),
        ),
        case(
            "CVE-2024-31949: FRR loops for ever in a CAPABILITY message with graceful restart",
            external(),
            message(6, &[1, 0, 0, 1, 64, 1, 0]),
            Reset(1, 3),
        ),
    ]
}

fn opens() -> Vec<Case> {
    let opening = Codec::initial;
    let with_as4 = |asn: [u8; 4]| capability(65, &asn);
    let mut version = open(&[]);
    version[19] = 3;
    let hold_time = |seconds| {
        let mut frame = open(&[]);
        frame[23] = seconds;
        frame
    };
    let mut no_id = open(&[]);
    no_id[24..28].fill(0);
    let mut no_as = open(&[]);
    no_as[20..22].fill(0);
    vec![
        case("BIRD f8ba82804: OPEN without any parameter", opening(), open(&[]), Clean(0, 0)),
        case("CVE-2022-40302: FRR reads three octets where two are", opening(), open(&[255, 0]), Reset(2, 4)),
        case("CVE-2022-40302: long form, cut parameter", opening(), open(&[255, 0, 2, 2, 0]), Reset(2, 0)),
        case(
            "CVE-2022-40318: long form that ends in a length",
            opening(),
            open(&[255, 0, 1, 2]),
            Reset(2, 0),
        ),
        case(
            "CVE-2022-40318: long form with a parameter longer than itself",
            opening(),
            open(&[255, 0, 5, 2, 0xff, 0xff, 1, 4]),
            Reset(2, 0),
        ),
        case("CVE-2022-43681: ends before the length of a parameter", opening(), open(&[2]), Reset(2, 0)),
        case(
            "CVE-2022-43681: long form that ends within its length",
            opening(),
            open_saying(255, &[255, 0]),
            Reset(2, 0),
        ),
        case("CVE-2022-43681: parameters that are not there", opening(), open_saying(1, &[]), Reset(2, 0)),
        case(
            "CVE-2022-36440: FRR asserts on a cut four-octet AS capability",
            opening(),
            open(&[2, 6, 65, 4, 0, 0]),
            Reset(2, 0),
        ),
        case(
            "FRR e1eb4ba98: four-octet AS capability of three octets",
            opening(),
            capability(65, &[0, 1, 2]),
            Reset(2, 0),
        ),
        case(
            "GoBGP f02ca397: empty four-octet AS capability reads into the next",
            opening(),
            open(&[2, 8, 65, 0, 1, 4, 0, 1, 0, 1]),
            Reset(2, 0),
        ),
        case("GoBGP 0f5f9078: parameters of one octet", opening(), open_saying(1, &[0]), Reset(2, 0)),
        case("GoBGP 4f000d78: parameter longer than all", opening(), open(&[2, 200, 1, 4]), Reset(2, 0)),
        case("GoBGP 388ef503: octets behind the parameters", opening(), open_saying(0, &[2, 0]), Reset(2, 0)),
        case(
            "CVE-2018-5381: Quagga loops on a family that it does not know",
            opening(),
            capability(1, &[0xff, 0xff, 0, 0xff]),
            Clean(0, 0),
        ),
        case(
            "CVE-2018-5381: multiprotocol of three octets",
            opening(),
            capability(1, &[0, 1, 0]),
            Reset(2, 0),
        ),
        case("FRR d2b6417bd: capability of one octet, loop", opening(), open(&[2, 1, 2]), Reset(2, 0)),
        case("capability longer than its parameter", opening(), open(&[2, 2, 1, 4]), Reset(2, 0)),
        case(
            "CVE-2023-31489: FRR, LLGR capability of odd length",
            opening(),
            capability(71, &[0; 6]),
            Clean(0, 0),
        ),
        case(
            "CVE-2023-41361: FRR, software version longer than it is",
            opening(),
            capability(75, &[255, 118]),
            Clean(0, 0),
        ),
        case(
            "CVE-2025-43971: GoBGP, software version of no length",
            opening(),
            capability(75, &[0]),
            Clean(0, 0),
        ),
        case("CVE-2025-43971: GoBGP, empty software version", opening(), capability(75, &[]), Clean(0, 0)),
        case("GoBGP 1e47e4f6: graceful restart of one octet", opening(), capability(64, &[0]), Reset(2, 0)),
        case(
            "GoBGP e847113b: graceful restart, cut family",
            opening(),
            capability(64, &[0, 120, 0, 1, 1]),
            Reset(2, 0),
        ),
        case(
            "GoBGP 67c05941: FQDN longer than itself",
            opening(),
            capability(73, &[200, 97, 0]),
            Clean(0, 0),
        ),
        case("FRR 73b420df0: empty FQDN", opening(), capability(73, &[]), Clean(0, 0)),
        case(
            "FRR 0f05e56be: add-path with undefined directions",
            opening(),
            capability(69, &[0, 1, 1, 0, 0, 2, 1, 4]),
            Clean(0, 0),
        ),
        case("add-path of odd length", opening(), capability(69, &[0, 1, 1]), Reset(2, 0)),
        case("extended next hop of odd length", opening(), capability(5, &[0, 1, 0, 1, 0]), Reset(2, 0)),
        case("authentication, long gone", opening(), open(&[1, 1, 0]), Reset(2, 4)),
        case("RFC 7607: AS 0", opening(), no_as, Reset(2, 2)),
        case("RFC 7607: AS 0 in the capability", opening(), with_as4([0; 4]), Reset(2, 2)),
        case("AS_TRANS in the capability", opening(), with_as4([0, 0, 0x5b, 0xa0]), Reset(2, 2)),
        case("version 3", opening(), version, Reset(2, 1)),
        case("hold time of one second", opening(), hold_time(1), Reset(2, 6)),
        case("hold time of two seconds", opening(), hold_time(2), Reset(2, 6)),
        case("identifier zero", opening(), no_id, Reset(2, 3)),
    ]
}

fn notifications_and_refreshes() -> Vec<Case> {
    let plain = || Codec { enhanced_refresh: false, ..external() };
    vec![
        case(
            "CVE-2019-16159: BIRD overflows its stack with a shutdown text beyond 128 octets",
            external(),
            message(3, &[&[6, 2, 255][..], &[b'x'; 255]].concat()),
            Clean(0, 0),
        ),
        case(
            "BIRD 8388f5a7e: shutdown text longer than it is",
            external(),
            message(3, &[6, 4, 200, b'x']),
            Clean(0, 0),
        ),
        case("BIRD 8388f5a7e: shutdown without text", external(), message(3, &[6, 2]), Clean(0, 0)),
        case(
            "CVE-2018-5380: Quagga reads behind its table of codes",
            external(),
            message(3, &[255, 255]),
            Clean(0, 0),
        ),
        case("FRR 72a2f165e: hard reset with nothing inside", external(), message(3, &[6, 9]), Clean(0, 0)),
        case("hard reset cut inside", external(), message(3, &[6, 9, 6]), Clean(0, 0)),
        case("NOTIFICATION of one octet", external(), message(3, &[6]), Reset(1, 2)),
        case(
            "CVE-2023-41360: FRR reads an ORF that is not there",
            external(),
            message(5, &[0, 1, 0, 1, 1]),
            Reset(7, 1),
        ),
        case("CVE-2023-41360, refresh not enhanced", plain(), message(5, &[0, 1, 0, 1, 1]), Reset(1, 2)),
        case(
            "FRR 7a110595c: ORF longer than the message",
            external(),
            message(5, &[0, 1, 0, 1, 1, 64, 0xff, 0xff]),
            Reset(7, 1),
        ),
        case("refresh without a family", external(), message(5, &[0, 1]), Reset(7, 1)),
        case("refresh of an unknown subtype", external(), message(5, &[0, 1, 9, 1]), Clean(0, 0)),
        case("refresh of an unknown family", external(), message(5, &[0x40, 4, 0, 71]), Clean(0, 0)),
    ]
}

/// Errors in the frame of an UPDATE and in its prefixes.
fn structure() -> Vec<Case> {
    let good = [origin(), as_path(), next_hop()].concat();
    let add_path = || Codec { add_path_receive: Families::ALL, ..external() };
    let unreach = |value: &[u8]| attribute(0x80, 15, value);
    vec![
        case("withdrawn routes longer than the message", external(), message(2, &[0, 9, 0, 0]), Reset(3, 1)),
        case("attributes longer than the message", external(), message(2, &[0, 0, 0, 9]), Reset(3, 1)),
        case(
            "CVE-2026-37462: GoBGP, prefix longer than the withdrawn field",
            external(),
            message(2, &[0, 2, 32, 10, 0, 0, 1, 0, 0]),
            Reset(3, 10),
        ),
        case(
            "CVE-2026-37462: GoBGP, attribute longer than all attributes",
            external(),
            message(2, &[&[0, 0, 0, 3, 0x40, 1, 1, 0][..], &ROUTE].concat()),
            Withdraw(2, &[1, 1, 2, 3]),
        ),
        case(
            "GoBGP 0ac9ac9b: prefix of 33 bits",
            external(),
            update_of(&[], &good, &[33, 1, 2, 3, 4, 5]),
            Reset(3, 10),
        ),
        case(
            "withdrawn prefix of 33 bits",
            external(),
            update_of(&[33, 1, 2, 3, 4, 5], &[], &[]),
            Reset(3, 10),
        ),
        case("prefix cut off", external(), update_of(&[], &good, &[24, 192]), Reset(3, 10)),
        case(
            "FRR 761ed6652: path identifier cut off",
            add_path(),
            update_of(&[], &good, &[0, 0, 0, 1, 24, 1, 2, 3, 0, 0]),
            Reset(3, 10),
        ),
        case(
            "add-path length behind the identifier",
            add_path(),
            update_of(&[], &good, &[0, 0, 0, 1]),
            Reset(3, 10),
        ),
        case("default routes without end", external(), update_of(&[], &good, &[0; 4000]), Clean(4000, 0)),
        case(
            "CVE-2023-41358: FRR takes routes without any attribute",
            external(),
            update_of(&[], &[], &ROUTE),
            Withdraw(1, &[1, 2, 3]),
        ),
        case(
            "CVE-2023-46753: FRR, an unknown attribute and no mandatory one",
            external(),
            update_of(&[], &attribute(0xff, 31, &[0x46; 300]), &ROUTE),
            Withdraw(1, &[1, 2, 3]),
        ),
        case(
            "CVE-2023-47234: FRR, MP_UNREACH_NLRI with routes beside it",
            external(),
            update_of(&[], &unreach(&[&[0, 2, 1][..], &V6_ROUTE].concat()), &ROUTE),
            Withdraw(2, &[1, 2, 3]),
        ),
        case(
            "CVE-2023-47235: FRR, End-of-RIB with a broken attribute",
            external(),
            update_of(&[], &[unreach(&[0, 1, 1]), vec![0xc0, 8, 200, 1]].concat(), &[]),
            Reset(3, 1),
        ),
        case(
            "End-of-RIB with a good attribute is none",
            external(),
            update_of(&[], &[unreach(&[0, 1, 1]), origin()].concat(), &[]),
            Clean(0, 0),
        ),
        case(
            "FRR f023a2e03: two octets left of the attributes",
            external(),
            with(&[0xc0, 8]),
            Withdraw(1, &[8]),
        ),
        case("one octet left of the attributes", external(), with(&[0xc0]), Withdraw(1, &[0])),
        case("extended length cut off", external(), with(&[0xd0, 8, 0]), Withdraw(1, &[8])),
        case(
            "FRR 70ff940fd: a broken attribute, then good ones and routes",
            external(),
            update_of(&[], &[attribute(0x40, 1, &[7]), as_path(), next_hop()].concat(), &ROUTE),
            Withdraw(1, &[1]),
        ),
        case(
            "RFC 7606 5.2: broken, and nothing announced",
            external(),
            update_of(&ROUTE, &attribute(0x40, 1, &[7]), &[]),
            Reset(3, 1),
        ),
        case(
            "RFC 7606 5.2: discarded, and nothing announced",
            external(),
            update_of(&ROUTE, &attribute(0x40, 6, &[7]), &[]),
            Discard(0, &[6]),
        ),
        case(
            "RFC 7606 3 g: MP_UNREACH_NLRI twice",
            external(),
            update_of(&[], &[unreach(&[0, 2, 1]), unreach(&[0, 2, 1])].concat(), &[]),
            Reset(3, 1),
        ),
        case("RFC 7606 3 g: ORIGIN twice", external(), with(&attribute(0x40, 1, &[9])), Discard(1, &[1])),
        case(
            "MP_UNREACH_NLRI of two octets",
            external(),
            update_of(&[], &unreach(&[0, 2]), &[]),
            Reset(3, 9),
        ),
        case(
            "MP_UNREACH_NLRI with a prefix of 129 bits",
            external(),
            update_of(&[], &unreach(&[0, 2, 1, 129]), &[]),
            Reset(3, 9),
        ),
        case(
            "attributes of no length without end",
            external(),
            with(&(0..1300_u32).flat_map(|n| [0xc0, 33 + (n % 220) as u8, 0]).collect::<Vec<_>>()),
            Discard(1, &[33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48]),
        ),
    ]
}

/// MP_REACH_NLRI, for families that are spoken here and for those that are not.
fn multiprotocol() -> Vec<Case> {
    let rest = || [origin(), as_path()].concat();
    let foreign = |afi, safi, routes: &[u8]| {
        update_of(&[], &[reach(0x80, afi, safi, &GLOBAL[..4], routes), rest()].concat(), &[])
    };
    let both = |next_hop: &[u8]| {
        let attributes = [reach(0x80, 2, 1, &GLOBAL, &V6_ROUTE), rest(), next_hop.to_vec()].concat();
        update_of(&[], &attributes, &ROUTE)
    };
    let pair = |first: [u8; 16], second: [u8; 16]| [first, second].concat();
    let mut multicast = GLOBAL;
    multicast[0] = 0xff;
    let ipv4 = |next_hop: &[u8]| update_of(&[], &[reach(0x80, 1, 1, next_hop, &ROUTE), rest()].concat(), &[]);
    let unnumbered = || Codec { extended_next_hop: true, ..external() };
    vec![
        case("IPv6 as it should be", external(), reach6(&GLOBAL, &V6_ROUTE), Clean(1, 0)),
        case("both families in one UPDATE", external(), both(&next_hop()), Clean(2, 0)),
        case("FRR 49b9f2d7a: both families, NEXT_HOP is missing", external(), both(&[]), Withdraw(2, &[3])),
        case(
            "CVE-2023-46752: FRR, MP_REACH_NLRI ends within its next hop",
            external(),
            update_of(&[], &[attribute(0x80, 14, &[0, 2, 1, 16, 0x20, 1, 0xd]), rest()].concat(), &[]),
            Reset(3, 9),
        ),
        case(
            "CVE-2023-46752: MP_REACH_NLRI of four octets",
            external(),
            update_of(&[], &[attribute(0x80, 14, &[0, 2, 1, 0]), rest()].concat(), &[]),
            Reset(3, 9),
        ),
        case(
            "MP_REACH_NLRI without the octet between",
            external(),
            update_of(
                &[],
                &[attribute(0x80, 14, &[&[0, 2, 1, 16][..], &GLOBAL].concat()), rest()].concat(),
                &[],
            ),
            Reset(3, 9),
        ),
        case("GoBGP 173621ff: next hop of no length", external(), reach6(&[], &V6_ROUTE), Reset(3, 9)),
        case("IPv6 with next hop of four octets", external(), reach6(&GLOBAL[..4], &V6_ROUTE), Reset(3, 9)),
        case(
            "IPv6 with next hop of 24 octets, as VPNs have",
            external(),
            reach6(&pair(GLOBAL, GLOBAL)[..24], &V6_ROUTE),
            Reset(3, 9),
        ),
        case(
            "FRR 8102a8aec: multicast next hop",
            external(),
            reach6(&multicast, &V6_ROUTE),
            Withdraw(1, &[14]),
        ),
        case(
            "FRR 8102a8aec: unspecified next hop",
            external(),
            reach6(&[0; 16], &V6_ROUTE),
            Withdraw(1, &[14]),
        ),
        case(
            "BIRD 17de3a023: link-local address alone, behind zeroes",
            external(),
            reach6(&pair([0; 16], LINK_LOCAL), &V6_ROUTE),
            Clean(1, 0),
        ),
        case(
            "BIRD 17de3a023: link-local address twice",
            external(),
            reach6(&pair(LINK_LOCAL, LINK_LOCAL), &V6_ROUTE),
            Clean(1, 0),
        ),
        case(
            "second address is not link-local",
            external(),
            reach6(&pair(GLOBAL, GLOBAL), &V6_ROUTE),
            Clean(1, 0),
        ),
        case("two unspecified addresses", external(), reach6(&[0; 32], &V6_ROUTE), Withdraw(1, &[14])),
        case("IPv6 prefix of 129 bits", external(), reach6(&GLOBAL, &[129]), Reset(3, 9)),
        case("IPv6 prefix cut off", external(), reach6(&GLOBAL, &[64, 0x20, 1]), Reset(3, 9)),
        case("IPv4 with IPv6 next hop", unnumbered(), ipv4(&LINK_LOCAL), Clean(1, 0)),
        case(
            "FRR 7f040da1a: IPv4 with IPv6 next hop, not agreed, as GoBGP has it over IPv6",
            external(),
            ipv4(&GLOBAL),
            Withdraw(1, &[14]),
        ),
        case("IPv4 in MP_REACH_NLRI", external(), ipv4(&[192, 0, 2, 1]), Clean(1, 0)),
        case(
            "RFC 7606 3 g: MP_REACH_NLRI twice",
            external(),
            update_of(
                &[],
                &[reach(0x80, 2, 1, &GLOBAL, &V6_ROUTE), reach(0x80, 2, 1, &GLOBAL, &V6_ROUTE), rest()]
                    .concat(),
                &[],
            ),
            Reset(3, 1),
        ),
        case(
            "RFC 7606 5.3: transitive MP_REACH_NLRI",
            external(),
            update_of(&[], &[reach(0xc0, 2, 1, &GLOBAL, &V6_ROUTE), rest()].concat(), &[]),
            Reset(3, 9),
        ),
        case(
            "CVE-2023-38406: FRR, flowspec rule of no length",
            external(),
            foreign(1, 133, &[0]),
            Discard(0, &[14]),
        ),
        case(
            "CVE-2023-41909: FRR, flowspec without attributes",
            external(),
            update_of(&[], &reach(0x80, 1, 133, &[], &[3, 1, 24, 10]), &[]),
            Withdraw(0, &[14, 1, 2]),
        ),
        case(
            "CVE-2025-43972: GoBGP, flowspec rule cut off",
            external(),
            foreign(1, 133, &[0xf0]),
            Discard(0, &[14]),
        ),
        case(
            "CVE-2026-37457: FRR, flowspec with too many operators",
            external(),
            foreign(
                1,
                133,
                &[20, 4, 1, 80, 1, 80, 1, 80, 1, 80, 1, 80, 1, 80, 1, 80, 1, 80, 1, 80, 0x81, 80],
            ),
            Discard(0, &[14]),
        ),
        case(
            "BIRD 3d96db91a: flowspec IPv6 beyond its buffer",
            external(),
            foreign(2, 133, &[0xff; 200]),
            Discard(0, &[14]),
        ),
        case(
            "CVE-2023-38407: FRR, labelled route beyond the end",
            external(),
            foreign(1, 4, &[255, 0, 0, 1]),
            Discard(0, &[14]),
        ),
        case(
            "GoBGP 7b3e5553: label stack without bottom",
            external(),
            foreign(1, 4, &[48, 0, 0, 0, 0, 0, 0]),
            Discard(0, &[14]),
        ),
        case(
            "CVE-2016-2342: Quagga, VPN route longer than its buffer",
            external(),
            foreign(1, 128, &[255; 33]),
            Discard(0, &[14]),
        ),
        case(
            "FRR e121d8316: EVPN route of type 2 cut off",
            external(),
            foreign(25, 70, &[2, 33, 0]),
            Discard(0, &[14]),
        ),
        case(
            "GoBGP 69da7bfa: EVPN prefix of 255 bits",
            external(),
            foreign(25, 70, &[5, 34, 0, 0, 0, 0, 0, 0, 0, 0, 255]),
            Discard(0, &[14]),
        ),
        case(
            "GoBGP f842cdf3: BGP-LS, inner length beyond the outer",
            external(),
            foreign(16388, 71, &[0, 1, 0, 9, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
            Discard(0, &[14]),
        ),
        case(
            "GoBGP 1bccb270: route target of more than 96 bits",
            external(),
            foreign(1, 132, &[97; 14]),
            Discard(0, &[14]),
        ),
        case(
            "GoBGP cl. SR policy: endpoint longer than declared",
            external(),
            foreign(1, 73, &[255, 0, 0, 0]),
            Discard(0, &[14]),
        ),
        case(
            "withdrawn of a family not in use",
            external(),
            update_of(&[], &attribute(0x80, 15, &[0, 25, 70, 2, 200, 0]), &[]),
            Discard(0, &[15]),
        ),
    ]
}

/// Paths, next hops and what two-octet speakers pass on.
fn paths() -> Vec<Case> {
    let path =
        |value: &[u8]| update_of(&[], &[origin(), attribute(0x40, 2, value), next_hop()].concat(), &ROUTE);
    let long = |segments: usize| {
        let segment = [&[2, 255][..], &[0, 0, 0xfd, 0xe9].repeat(255)].concat();
        path(&segment.repeat(segments))
    };
    let old = |extra: &[u8], before: bool| {
        let as_path = as_path2();
        let (first, second) = if before { (extra, &as_path[..]) } else { (&as_path[..], extra) };
        update_of(&[], &[&origin()[..], first, second, &next_hop()].concat(), &ROUTE)
    };
    let as4 = attribute(0xc0, 17, &[2, 2, 0, 6, 0x1a, 0x80, 0, 4, 0x93, 0xe0]);
    let hop = |value: &[u8]| instead(&attribute(0x40, 3, value));
    let extended = || Codec { receive_max: 65535, send_max: 65535, ..external() };
    let enforcing = || Codec { first_as: Some(Asn(65002)), ..external() };
    let sets = || Codec { accept_as_sets: true, ..external() };
    vec![
        case(
            "CVE-2017-16227: Quagga and FRR, path of several long segments",
            external(),
            long(3),
            Clean(1, 0),
        ),
        case("CVE-2026-49943: BIRD, path of more than 2048 ASes", extended(), long(60), Clean(1, 0)),
        case(
            "GoBGP 15f0c50a: path longer than itself",
            external(),
            path(&[2, 3, 0, 0, 0xfd, 0xe9]),
            Withdraw(1, &[2]),
        ),
        case(
            "path that ends in a segment's type",
            external(),
            path(&[2, 1, 0, 0, 0xfd, 0xe9, 2]),
            Withdraw(1, &[2]),
        ),
        case("segment without ASes", external(), path(&[2, 0]), Withdraw(1, &[2])),
        case("segment of unknown type", external(), path(&[9, 1, 0, 0, 0xfd, 0xe9]), Withdraw(1, &[2])),
        case(
            "two-octet path on a four-octet session",
            external(),
            path(&[2, 1, 0xfd, 0xe9]),
            Withdraw(1, &[2]),
        ),
        case(
            "RFC 7607: AS 0 in the path",
            external(),
            path(&[2, 2, 0, 0, 0xfd, 0xe9, 0, 0, 0, 0]),
            Withdraw(1, &[2]),
        ),
        case("RFC 9774: AS_SET", external(), path(&[1, 1, 0, 0, 0xfd, 0xe9]), Withdraw(1, &[2])),
        case("AS_SET, taken by choice", sets(), path(&[1, 1, 0, 0, 0xfd, 0xe9]), Clean(1, 0)),
        case(
            "confederation segment from outside",
            external(),
            path(&[3, 1, 0, 0, 0xfd, 0xe9]),
            Withdraw(1, &[2]),
        ),
        case(
            "GoBGP 4a319a6c: empty path where the first AS is checked",
            enforcing(),
            path(&[]),
            Withdraw(1, &[2]),
        ),
        case("another AS in front", enforcing(), with(&[]), Withdraw(1, &[2])),
        case("FRR 3c5108817: empty path from inside", internal(), path(&[]), Clean(1, 0)),
        case("CVE-2026-41643: GoBGP, AS4_PATH before AS_PATH", two_octets(), old(&as4, true), Clean(1, 0)),
        case("AS4_PATH behind AS_PATH", two_octets(), old(&as4, false), Clean(1, 0)),
        case(
            "CVE-2026-41643: broken AS4_PATH before AS_PATH",
            two_octets(),
            old(&attribute(0xc0, 17, &[2, 9, 0, 6]), true),
            Discard(1, &[17]),
        ),
        case(
            "FRR e8cac071f: AS4_PATH without segments",
            two_octets(),
            old(&attribute(0xc0, 17, &[]), false),
            Discard(1, &[17]),
        ),
        case(
            "2009: confederation segment in AS4_PATH ends sessions",
            two_octets(),
            old(&attribute(0xc0, 17, &[3, 1, 0, 0, 0xfd, 0xe9, 2, 1, 0, 4, 0x93, 0xe0]), false),
            Clean(1, 0),
        ),
        case(
            "RFC 7607: AS 0 in AS4_PATH",
            two_octets(),
            old(&attribute(0xc0, 17, &[2, 1, 0, 0, 0, 0]), false),
            Discard(1, &[17]),
        ),
        case(
            "RFC 9774: AS_SET in AS4_PATH",
            two_octets(),
            old(&attribute(0xc0, 17, &[1, 1, 0, 0, 0xfd, 0xe9]), false),
            Withdraw(1, &[17]),
        ),
        case(
            "AS4_PATH longer than AS_PATH",
            two_octets(),
            old(&attribute(0xc0, 17, &[&[2, 9][..], &[0, 0, 0, 9].repeat(9)].concat()), false),
            Clean(1, 0),
        ),
        case("AS4_PATH from a four-octet speaker", external(), with(&as4), Discard(1, &[17])),
        case(
            "AS4_AGGREGATOR of seven octets",
            two_octets(),
            old(&attribute(0xc0, 18, &[0; 7]), false),
            Discard(1, &[18]),
        ),
        case(
            "CVE-2026-30405: GoBGP, NEXT_HOP of three octets",
            external(),
            hop(&[192, 0, 2]),
            Withdraw(1, &[3]),
        ),
        case("CVE-2026-30405: NEXT_HOP of no length", external(), hop(&[]), Withdraw(1, &[3])),
        case("NEXT_HOP of sixteen octets", external(), hop(&GLOBAL), Withdraw(1, &[3])),
        case("NEXT_HOP 0.0.0.0", external(), hop(&[0; 4]), Withdraw(1, &[3])),
        case("multicast NEXT_HOP", external(), hop(&[224, 0, 0, 1]), Withdraw(1, &[3])),
        case("broadcast NEXT_HOP", external(), hop(&[255; 4]), Withdraw(1, &[3])),
    ]
}

/// Attributes that are known here.
fn known_attributes() -> Vec<Case> {
    let origin_flagged = |flags: u8| {
        let attributes = [attribute(flags, 1, &[0]), as_path(), next_hop()].concat();
        update_of(&[], &attributes, &ROUTE)
    };
    vec![
        case(
            "CVE-2023-46565: GoBGP, flags that contradict the type",
            external(),
            origin_flagged(0xc0),
            Withdraw(1, &[1]),
        ),
        case(
            "CVE-2023-46565: with extended length",
            external(),
            update_of(&[], &[vec![0xd0, 1, 0, 1, 0], as_path(), next_hop()].concat(), &ROUTE),
            Withdraw(1, &[1]),
        ),
        case("unused flags are ignored", external(), origin_flagged(0x4f), Clean(1, 0)),
        case(
            "ORIGIN 3",
            external(),
            update_of(&[], &[attribute(0x40, 1, &[3]), as_path(), next_hop()].concat(), &ROUTE),
            Withdraw(1, &[1]),
        ),
        case(
            "ORIGIN of two octets",
            external(),
            update_of(&[], &[attribute(0x40, 1, &[0, 0]), as_path(), next_hop()].concat(), &ROUTE),
            Withdraw(1, &[1]),
        ),
        case("MED of three octets", external(), with(&attribute(0x80, 4, &[0; 3])), Withdraw(1, &[4])),
        case("transitive MED", external(), with(&attribute(0xc0, 4, &[0; 4])), Withdraw(1, &[4])),
        case(
            "FRR ad61f7780: LOCAL_PREF of no length",
            internal(),
            with(&attribute(0x40, 5, &[])),
            Withdraw(1, &[5]),
        ),
        case(
            "FRR ad61f7780: LOCAL_PREF of no length from outside",
            external(),
            with(&attribute(0x40, 5, &[])),
            Discard(1, &[5]),
        ),
        case(
            "LOCAL_PREF from outside",
            external(),
            with(&attribute(0x40, 5, &[0, 0, 1, 0])),
            Discard(1, &[5]),
        ),
        case("ATOMIC_AGGREGATE of one octet", external(), with(&attribute(0x40, 6, &[0])), Discard(1, &[6])),
        case(
            "FRR 8085c9a7a: AGGREGATOR of AS 0",
            external(),
            with(&attribute(0xc0, 7, &[0, 0, 0, 0, 10, 0, 0, 1])),
            Discard(1, &[7]),
        ),
        case(
            "AGGREGATOR of six octets on a four-octet session",
            external(),
            with(&attribute(0xc0, 7, &[0xfd, 0xe9, 10, 0, 0, 1])),
            Discard(1, &[7]),
        ),
        case(
            "FRR 6680b5508: COMMUNITIES of no length",
            external(),
            with(&attribute(0xc0, 8, &[])),
            Withdraw(1, &[8]),
        ),
        case("COMMUNITIES of five octets", external(), with(&attribute(0xc0, 8, &[0; 5])), Withdraw(1, &[8])),
        case(
            "ORIGINATOR_ID of three octets",
            internal(),
            with(&attribute(0x80, 9, &[0; 3])),
            Withdraw(1, &[9]),
        ),
        case(
            "ORIGINATOR_ID from outside",
            external(),
            with(&attribute(0x80, 9, &[10, 0, 0, 1])),
            Discard(1, &[9]),
        ),
        case(
            "CVE-2018-5379: Quagga frees CLUSTER_LIST twice",
            internal(),
            with(&attribute(0x80, 10, &[1; 5])),
            Withdraw(1, &[10]),
        ),
        case(
            "CVE-2018-5379: CLUSTER_LIST twice, the second broken",
            internal(),
            with(&[attribute(0x80, 10, &[1; 4]), attribute(0x80, 10, &[])].concat()),
            Discard(1, &[10]),
        ),
        case(
            "CVE-2018-5379: unknown attribute twice",
            external(),
            with(&[attribute(0xc0, 99, &[1]), attribute(0xc0, 99, &[2])].concat()),
            Discard(1, &[99]),
        ),
        case("CLUSTER_LIST from outside", external(), with(&attribute(0x80, 10, &[])), Discard(1, &[10])),
        case(
            "EXTENDED COMMUNITIES of no length",
            external(),
            with(&attribute(0xc0, 16, &[])),
            Withdraw(1, &[16]),
        ),
        case(
            "EXTENDED COMMUNITIES of seven octets",
            external(),
            with(&attribute(0xc0, 16, &[0; 7])),
            Withdraw(1, &[16]),
        ),
        case(
            "GoBGP 9c13d68e: extended community of unknown type",
            external(),
            with(&attribute(0xc0, 16, &[0x3f; 8])),
            Clean(1, 0),
        ),
        case(
            "LARGE_COMMUNITY of eleven octets",
            external(),
            with(&attribute(0xc0, 32, &[0; 11])),
            Withdraw(1, &[32]),
        ),
        case(
            "FRR babb23b74: unknown, but claims to be well known",
            external(),
            with(&attribute(0x40, 200, &[1])),
            Withdraw(1, &[200]),
        ),
        case(
            "several errors: the strongest counts",
            external(),
            with(&[attribute(0x40, 6, &[0]), attribute(0xc0, 8, &[])].concat()),
            Withdraw(1, &[6, 8]),
        ),
    ]
}

/// Attributes that nobody here reads: what is in them cannot hurt, and the session goes on.
fn unknown_attributes() -> Vec<Case> {
    let unknown = |code, value: &[u8]| with(&attribute(0xc0, code, value));
    vec![
        case(
            "CVE-2023-38802: FRR, broken tunnel encapsulation",
            external(),
            unknown(23, &[0, 1, 0xff, 0xff, 1]),
            Clean(1, 0),
        ),
        case(
            "CVE-2024-44070: FRR, tunnel encapsulation beyond its end",
            external(),
            unknown(23, &[0, 8, 0, 4, 1, 200]),
            Clean(1, 0),
        ),
        case("GoBGP 3dc23d30, FRR 8ef655c24: broken PMSI tunnel", external(), unknown(22, &[0]), Clean(1, 0)),
        case(
            "CVE-2023-41359: FRR, AIGP beyond its end",
            external(),
            with(&attribute(0x80, 26, &[1, 0xff, 0xff])),
            Clean(1, 0),
        ),
        case(
            "2023: entropy label capability with content ends sessions",
            external(),
            unknown(28, &[0x66, 0x75, 0x7a, 0x7a]),
            Clean(1, 0),
        ),
        case(
            "FRR 585a5bc1b: broken BGP-LS attribute",
            external(),
            with(&attribute(0x80, 29, &[4, 1, 0xff, 0xff])),
            Clean(1, 0),
        ),
        case("2023: only-to-customer of the wrong length", external(), unknown(35, &[1, 2, 3]), Clean(1, 0)),
        case(
            "2025: BIRD 2.0.8 passes only-to-customer on as 1024 octets",
            external(),
            with(&[0xd0, 35, 4, 0, 0, 0, 0xfd, 0xe9]),
            Withdraw(1, &[35]),
        ),
        case(
            "CVE-2026-37459: FRR, next hop capability, inner length one too long",
            external(),
            unknown(39, &[0, 3, 0, 5, 1, 2, 3, 4]),
            Clean(1, 0),
        ),
        case(
            "CVE-2024-31948, CVE-2023-31490: FRR, broken prefix SID",
            external(),
            unknown(40, &[5, 0, 34, 0, 1]),
            Clean(1, 0),
        ),
        case("2025: prefix SID of zeroes ends sessions", external(), unknown(40, &[0; 37]), Clean(1, 0)),
        case(
            "CVE-2026-37461: GoBGP, IPv6 extended community of eight octets",
            external(),
            unknown(25, &[0; 8]),
            Clean(1, 0),
        ),
        case(
            "CVE-2019-5892, CVE-2026-37460: FRR, attribute 255",
            external(),
            unknown(255, &[0xff; 10]),
            Clean(1, 0),
        ),
        case("2010: attribute 99 of 3000 octets", external(), unknown(99, &[0xaa; 3000]), Clean(1, 0)),
        case(
            "attribute set with broken attributes inside",
            external(),
            unknown(128, &[0, 0, 0, 1, 0x40, 1, 9]),
            Clean(1, 0),
        ),
        case(
            "BIRD d493d0f18: unknown and not transitive",
            external(),
            with(&attribute(0x80, 201, &[1])),
            Clean(1, 0),
        ),
    ]
}

pub fn cases() -> Vec<Case> {
    [
        headers(),
        opens(),
        notifications_and_refreshes(),
        structure(),
        multiprotocol(),
        paths(),
        known_attributes(),
        unknown_attributes(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
