//! What must hold for any octets that a peer sends, and octets that are worth sending. Shared by the
//! fuzz targets, `examples/message_hammer.rs` and `tests/mutations.rs`.

use std::fmt::Write;
use std::sync::Arc;

use ferroute_bgp::message::*;

/// Octets of memory that reading a message may take at most, for so many octets of message. A default
/// route takes one octet on the wire and 28 in memory, and treat-as-withdraw may copy it once; texts of
/// errors are bounded.
pub const fn allowance(length: usize) -> usize {
    8192 + 64 * length
}

/// Sessions of all kinds.
pub fn codecs() -> Vec<Codec> {
    let plain = Codec { families: Families::ALL, four_octet_as: true, ..Codec::initial() };
    let internal = Codec { internal: true, accept_as_sets: true, ..plain.clone() };
    let long = Codec { receive_max: 65535, send_max: 65535, ..internal.clone() };
    vec![
        Codec::initial(),
        Codec { families: Families::IPV4, ..Codec::initial() },
        Codec { internal: true, accept_as_sets: true, families: Families::ALL, ..Codec::initial() },
        Codec { first_as: Some(Asn(65001)), ..plain.clone() },
        Codec { add_path_receive: Families::ALL, add_path_send: Families::ALL, ..internal.clone() },
        Codec { extended_next_hop: true, enhanced_refresh: true, ..plain },
        Codec { extended_next_hop: true, enhanced_refresh: true, ..internal },
        Codec { add_path_receive: Families::IPV6, add_path_send: Families::IPV6, ..long },
    ]
}

/// Reads one message and checks all that must hold whatever it is. Gives a word for the outcome.
///
/// # Errors
///
/// What does not hold.
pub fn judge(frame: &[u8], codec: &Codec) -> Result<&'static str, String> {
    let decoded = match Message::decode(frame, codec) {
        Ok(decoded) => decoded,
        Err(reset) => {
            let _ = reset.to_string();
            if reset.reason.is_empty() {
                return Err("a reset without a reason".to_owned());
            }
            // What answers it must be a message itself.
            let answer = Message::Notification(reset.notification);
            let mut bytes = Vec::new();
            answer.encode(codec, &mut bytes).map_err(|error| format!("{answer:?}: {error}"))?;
            let again = Message::decode(&bytes, codec).map_err(|reset| format!("{answer:?}: {reset}"))?;
            if bytes.len() > usize::from(codec.send_max) || !matches!(again.message, Message::Notification(_))
            {
                return Err(format!("{answer:?} became {again:?}"));
            }
            return Ok("reset");
        }
    };
    if decoded.flaws.len() > Flaw::KEPT {
        return Err(format!("{} flaws", decoded.flaws.len()));
    }
    let mut words = String::new();
    for flaw in &decoded.flaws {
        let _ = write!(words, "{flaw} ");
    }
    let action = decoded.action();
    let outcome = match action {
        None => decoded.message.name(),
        Some(Action::AttributeDiscard) => "attribute discard",
        Some(Action::TreatAsWithdraw) => "treat as withdraw",
    };
    if let Message::Update(update) = &decoded.message {
        sound(update, action, frame.len())?;
    } else if action.is_some() {
        return Err(format!("flaws of a {}: {words}", decoded.message.name()));
    }
    if let Message::Notification(notification) = &decoded.message {
        let _ = write!(words, "{notification} {:?}", notification.inner().map(|inner| inner.to_string()));
    }
    rewritten(decoded.message, codec)?;
    Ok(outcome)
}

/// What an UPDATE must look like.
fn sound(update: &Update, action: Option<Action>, length: usize) -> Result<(), String> {
    if action == Some(Action::TreatAsWithdraw) && !update.announced.is_empty() {
        return Err("announced what should be withdrawn".to_owned());
    }
    if update.announced.len() > 2 || update.announced.iter().any(|announcement| announcement.nlri.is_empty())
    {
        return Err("too many announcements, or an empty one".to_owned());
    }
    let announced = update.announced.iter().flat_map(|announcement| &announcement.nlri);
    let mut count = 0;
    for nlri in update.withdrawn.iter().chain(announced) {
        count += 1;
        if nlri.prefix != nlri.prefix.trunc() {
            return Err(format!("{nlri} has host bits"));
        }
    }
    if count > length {
        return Err(format!("{count} prefixes of {length} octets"));
    }
    for announcement in &update.announced {
        let attributes = &announcement.attributes;
        if attributes.next_hop.is_unspecified() {
            return Err("no next hop".to_owned());
        }
        let mut words = format!("{} {} {:?}", attributes.as_path, attributes.next_hop, attributes.as_path);
        for community in &attributes.communities {
            let _ = write!(words, "{community}");
        }
        for community in &attributes.extended_communities {
            let _ = write!(words, "{community} {:?}", community.bandwidth());
        }
        if attributes.as_path.contains(Asn(0)) {
            return Err(format!("AS 0 in {words}"));
        }
        let mut longer = attributes.as_path.clone();
        longer.prepend(Asn(65000), 3);
        if longer.hops() != attributes.as_path.hops() + 3 {
            return Err(format!("{words} became {longer} by three"));
        }
    }
    Ok(())
}

/// What was read must survive being written and read again.
fn rewritten(message: Message, codec: &Codec) -> Result<(), String> {
    let mut bytes = Vec::new();
    match message.encode(codec, &mut bytes) {
        Ok(()) => {}
        // LOCAL_PREF is added where an internal peer left it out, and prefixes get a message each.
        Err(EncodeError::TooLarge { .. }) if bytes.is_empty() => return Ok(()),
        Err(error) => return Err(format!("{message:?}: {error}")),
    }
    let mut again = Vec::new();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let length = match frame_length(rest, codec) {
            Ok(Some(length)) if length <= rest.len() => length,
            other => return Err(format!("{message:?} was written with a frame {other:?}")),
        };
        let (frame, after) = rest.split_at(length);
        let decoded = Message::decode(frame, codec).map_err(|reset| format!("{message:?}: {reset}"))?;
        if !decoded.flaws.is_empty() {
            return Err(format!("{message:?} was written with flaws {:?}", decoded.flaws));
        }
        again.push(decoded.message);
        rest = after;
    }
    let (expected, got) = match message {
        Message::Update(update) => {
            let updates = again.into_iter().map(|message| match message {
                Message::Update(update) => Ok(update),
                other => Err(format!("an UPDATE became {other:?}")),
            });
            (joined([update], codec), joined(updates.collect::<Result<Vec<_>, _>>()?, codec))
        }
        message => return if again == [message] { Ok(()) } else { Err(format!("became {again:?}")) },
    };
    if expected == got { Ok(()) } else { Err(format!("{expected:?} became {got:?}")) }
}

/// Several UPDATEs as one, with what a session adds and cannot carry levelled.
fn joined(updates: impl IntoIterator<Item = Update>, codec: &Codec) -> Update {
    let mut whole = Update::default();
    for update in updates {
        whole.withdrawn.extend(update.withdrawn);
        whole.end_of_rib = whole.end_of_rib.or(update.end_of_rib);
        for mut announcement in update.announced {
            let attributes = Arc::make_mut(&mut announcement.attributes);
            if codec.internal {
                attributes.local_preference.get_or_insert(100);
            }
            let confederation = attributes.as_path.segments().any(|segment| segment.kind.is_confederation());
            if confederation && !codec.four_octet_as {
                // AS4_PATH holds no confederation segments.
                attributes.as_path = AsPath::empty();
            }
            match whole.announced.last_mut() {
                Some(last)
                    if last.attributes == announcement.attributes
                        && last.nlri.first().map(Nlri::family)
                            == announcement.nlri.first().map(Nlri::family) =>
                {
                    last.nlri.extend(announcement.nlri);
                }
                _ => whole.announced.push(announcement),
            }
        }
    }
    whole
}

/// Reads a stream in pieces and checks that the same messages come out as in one piece.
///
/// # Errors
///
/// What does not hold.
pub fn judge_stream(stream: &[u8], codec: &Codec, mut piece: impl FnMut() -> usize) -> Result<usize, String> {
    let (mut expected, mut rest) = (Vec::new(), stream);
    let end = loop {
        match frame_length(rest, codec) {
            Ok(Some(length)) if length <= rest.len() => {
                let (frame, after) = rest.split_at(length);
                expected.push(frame);
                rest = after;
            }
            Ok(_) => break None,
            Err(reset) => break Some(reset),
        }
    };
    let (mut reader, mut rest, mut seen) = (FrameReader::new(), stream, 0);
    loop {
        loop {
            match reader.next_frame(codec) {
                Ok(Some(frame)) if expected.get(seen) == Some(&frame) => seen += 1,
                Ok(Some(frame)) => return Err(format!("message {seen} is {frame:?}")),
                Ok(None) => break,
                Err(reset) if end.as_ref().is_some_and(|end| reset.reason == end.reason) => {
                    return if seen == expected.len() { Ok(seen) } else { Err(format!("{reset} too early")) };
                }
                Err(reset) => return Err(format!("{reset} came of pieces only")),
            }
        }
        if rest.is_empty() {
            return if seen == expected.len() { Ok(seen) } else { Err(format!("only {seen} messages")) };
        }
        let space = reader.space();
        let count = piece().clamp(1, space.len().min(rest.len()));
        space[..count].copy_from_slice(&rest[..count]);
        reader.filled(count);
        rest = &rest[count..];
    }
}

/// Pseudo-random numbers (SplitMix64): the same for the same seed, everywhere.
pub struct Numbers(pub u64);

impl Numbers {
    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not zero.
    pub const fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn octet(&mut self) -> u8 {
        const TELLING: [u8; 24] = [
            0, 1, 2, 3, 4, 5, 8, 14, 15, 16, 17, 18, 24, 25, 32, 33, 64, 0x40, 0x80, 0xc0, 0x90, 128, 129,
            255,
        ];
        if self.below(2) == 0 { TELLING[self.below(TELLING.len())] } else { self.next() as u8 }
    }
}

/// Messages to begin with: every kind, on every session that can carry it.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    let family = AfiSafi::Ipv4Unicast;
    let restart = GracefulRestart {
        restarted: true,
        notification: true,
        restart_time: 120,
        families: vec![
            GracefulRestartFamily { family, forwarding_preserved: true },
            GracefulRestartFamily { family: AfiSafi::Ipv6Unicast, forwarding_preserved: false },
        ],
    };
    let mut open = Open {
        asn: Asn(4_200_000_001),
        four_octet_as: true,
        hold_time: 90,
        router_id: RouterId::from(0x0a00_0001),
        capabilities: vec![
            Capability::Multiprotocol(family),
            Capability::Multiprotocol(AfiSafi::Ipv6Unicast),
            Capability::RouteRefresh,
            Capability::ExtendedNextHop(vec![ExtendedNextHop { family, next_hop_afi: 2 }]),
            Capability::ExtendedMessage,
            Capability::GracefulRestart(restart),
            Capability::AddPath(vec![AddPath { family, mode: AddPathMode::Both }]),
            Capability::EnhancedRouteRefresh,
            Capability::Fqdn { host: "node-7".to_owned(), domain: "example.org".to_owned() },
            Capability::Unknown { code: 75, value: b"\x03v10".to_vec() },
        ],
    };
    let mut messages = vec![Message::Open(open.clone())];
    open.capabilities
        .extend((0..3).map(|code| Capability::Unknown { code: 200 + code, value: vec![7; 200] }));
    messages.push(Message::Open(open));
    messages.push(Message::Open(Open {
        asn: Asn(65001),
        four_octet_as: false,
        hold_time: 0,
        router_id: RouterId::from(1),
        capabilities: Vec::new(),
    }));
    messages.push(Message::Notification(Notification::shutdown("drain node-7").hard()));
    messages.push(Message::Notification(Notification::cease(Cease::Collision)));
    messages.push(Message::Keepalive);
    messages.push(Message::RouteRefresh(RouteRefresh { family, kind: RefreshKind::Begin }));
    messages.extend(updates().into_iter().map(Message::Update));
    for codec in codecs() {
        for message in &messages {
            let mut bytes = Vec::new();
            if message.encode(&codec, &mut bytes).is_ok() {
                // An UPDATE that became several messages is several seeds.
                let mut rest = &bytes[..];
                while let Ok(Some(length)) = frame_length(rest, &codec) {
                    let (frame, after) = rest.split_at(length);
                    seeds.push(frame.to_vec());
                    rest = after;
                }
            }
        }
    }
    seeds.sort();
    seeds.dedup();
    seeds
}

fn updates() -> Vec<Update> {
    let prefixes = |texts: &[&str]| -> Vec<Nlri> {
        texts
            .iter()
            .enumerate()
            .flat_map(|(id, text)| text.parse().map(|prefix| Nlri::with_path_id(prefix, id as u32 + 1)))
            .collect()
    };
    let v4 = prefixes(&["0.0.0.0/0", "10.0.0.0/8", "10.96.0.0/12", "192.0.2.128/25", "198.51.100.7/32"]);
    let v6 = prefixes(&["::/0", "2001:db8::/32", "fd00:10:96::/108", "2001:db8::7/128"]);
    let small = Attributes {
        as_path: AsPath::sequence([Asn(65001)]),
        next_hop: NextHop::V4([192, 0, 2, 1].into()),
        ..Attributes::default()
    };
    let mut path = AsPath::sequence([65001, 4_200_000_001, 65003].map(Asn));
    path.push(SegmentKind::Set, [Asn(7), Asn(70_000)]);
    let mut rich = Attributes {
        origin: Origin::Incomplete,
        as_path: path,
        med: Some(10),
        local_preference: Some(200),
        atomic_aggregate: true,
        aggregator: Some(Aggregator { asn: Asn(70_000), router_id: RouterId::from(9) }),
        communities: vec![Community::NO_EXPORT, Community::new(65001, 100), Community::GRACEFUL_SHUTDOWN],
        originator_id: Some(RouterId::from(7)),
        cluster_list: vec![RouterId::from(1), RouterId::from(2)],
        extended_communities: vec![
            ExtendedCommunity::link_bandwidth(65001, 1e9),
            ExtendedCommunity([0, 2, 0, 1, 0, 0, 0, 1]),
        ],
        large_communities: vec![LargeCommunity::new(Asn(4_200_000_001), 1, 2)],
        unknown: vec![
            UnknownAttribute { code: 28, value: Vec::new() },
            UnknownAttribute { code: 255, value: vec![1; 300] },
        ],
        partial: Partial { communities: true, ..Partial::default() },
        ..small.clone()
    };
    let announce = |attributes: &Attributes, nlri: &[Nlri]| Update {
        announced: vec![Announcement { attributes: Arc::new(attributes.clone()), nlri: nlri.to_vec() }],
        ..Update::default()
    };
    let mut updates = vec![announce(&small, &v4), announce(&rich, &v4)];
    let global = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1].into();
    let link_local = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1].into();
    for link_local in [None, Some(link_local)] {
        rich.next_hop = NextHop::V6 { global, link_local };
        updates.push(announce(&rich, &v6));
        updates.push(announce(&rich, &v4));
    }
    updates.push(Update { withdrawn: v4, ..Update::default() });
    updates.push(Update { withdrawn: v6, ..Update::default() });
    for family in [AfiSafi::Ipv4Unicast, AfiSafi::Ipv6Unicast, AfiSafi::new(25, 70)] {
        updates.push(Update { end_of_rib: Some(family), ..Update::default() });
    }
    updates
}

/// Changes a message in a few places: octets, ranges, whole attributes. Mostly the lengths are put right
/// afterwards, so that what is inside is looked at.
pub fn mutate(seeds: &[Vec<u8>], numbers: &mut Numbers) -> Vec<u8> {
    let mut frame = seeds[numbers.below(seeds.len())].clone();
    for _ in 0..1 + numbers.below(4) {
        let other = &seeds[numbers.below(seeds.len())];
        match numbers.below(4) {
            0 => octets(&mut frame, other, numbers),
            _ => {
                if !attributes(&mut frame, other, numbers) {
                    octets(&mut frame, other, numbers);
                }
            }
        }
    }
    if numbers.below(8) != 0 {
        if frame.len() < 19 {
            frame.resize(19, 0);
        }
        frame[..16].fill(0xff);
        let length = (frame.len() as u16).to_be_bytes();
        frame[16..18].copy_from_slice(&length);
        if !(1..=5).contains(&frame[18]) {
            frame[18] = 2;
        }
    }
    frame
}

fn octets(frame: &mut Vec<u8>, other: &[u8], numbers: &mut Numbers) {
    let begin = 19.min(frame.len());
    let at = begin + numbers.below(frame.len() - begin + 1);
    let count = 1 + numbers.below(8);
    let end = (at + count).min(frame.len());
    match numbers.below(6) {
        0 if at < frame.len() => frame[at] ^= 1 << numbers.below(8),
        1 if at < frame.len() => frame[at] = numbers.octet(),
        2 => drop(frame.drain(at..end)),
        3 => {
            let octets: Vec<u8> = (0..count).map(|_| numbers.octet()).collect();
            frame.splice(at..at, octets);
        }
        4 => {
            let copy = frame[at..end].to_vec();
            frame.splice(at..at, copy);
        }
        _ => {
            let from = numbers.below(other.len());
            let piece = &other[from..(from + numbers.below(64)).min(other.len())];
            frame.splice(at..end, piece.iter().copied());
        }
    }
    frame.truncate(usize::from(u16::MAX));
}

/// Where the attributes of an UPDATE are: the total length's place, and each attribute's.
fn layout(frame: &[u8]) -> Option<(usize, Vec<std::ops::Range<usize>>)> {
    let length =
        |at: usize| frame.get(at..at + 2).map(|octets| usize::from(octets[0]) << 8 | usize::from(octets[1]));
    if *frame.get(18)? != 2 {
        return None;
    }
    let total = 21 + length(19)?;
    let end = total + 2 + length(total)?;
    let (mut at, mut ranges) = (total + 2, Vec::new());
    while at < end.min(frame.len()) {
        let head = if frame[at] & 0x10 != 0 { 4 } else { 3 };
        let value = if head == 4 { length(at + 2)? } else { usize::from(*frame.get(at + 2)?) };
        let next = at + head + value;
        if next > end || next > frame.len() {
            break;
        }
        ranges.push(at..next);
        at = next;
    }
    (!ranges.is_empty()).then_some((total, ranges))
}

/// Changes one attribute, with the total length put right; false if there is none.
fn attributes(frame: &mut Vec<u8>, other: &[u8], numbers: &mut Numbers) -> bool {
    let Some((total, ranges)) = layout(frame) else { return false };
    let before = frame.len();
    let place = ranges[numbers.below(ranges.len())].clone();
    let at = place.start;
    match numbers.below(8) {
        0 => frame[at] ^= 0x10 << numbers.below(4),
        1 => frame[at + 1] = numbers.octet(),
        2 => {
            let last = at + if frame[at] & 0x10 != 0 { 3 } else { 2 };
            frame[last] = if numbers.below(2) == 0 { frame[last].wrapping_add(1) } else { numbers.octet() };
        }
        3 => drop(frame.drain(place)),
        4 => {
            let copy = frame[place].to_vec();
            frame.splice(at..at, copy);
        }
        5 => {
            // A value of another length, with its own length right.
            let head = if frame[at] & 0x10 != 0 { 4 } else { 3 };
            let value: Vec<u8> = (0..numbers.below(40)).map(|_| numbers.octet()).collect();
            frame[at + head - 1] = value.len() as u8;
            if head == 4 {
                frame[at + 2] = 0;
            }
            frame.splice(at + head..place.end, value);
        }
        6 => {
            let inside = at + numbers.below(place.len());
            frame[inside] = numbers.octet();
        }
        _ => {
            if let Some((_, theirs)) = layout(other) {
                let theirs = theirs[numbers.below(theirs.len())].clone();
                frame.splice(at..at, other[theirs].iter().copied());
            }
        }
    }
    let length = usize::from(frame[total]) << 8 | usize::from(frame[total + 1]);
    let length = (length + frame.len()).wrapping_sub(before) as u16;
    frame[total..total + 2].copy_from_slice(&length.to_be_bytes());
    frame.truncate(usize::from(u16::MAX));
    true
}
