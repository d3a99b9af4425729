//! What BIRD makes of the hostile messages of the corpus, beside what this speaker makes of them: each on a
//! session of its own with either, after good routes and before another good one.
//!
//! It shows that of 194 messages 166 come to the same. Both end the session with another NOTIFICATION in 13;
//! BIRD 2.0.12 ends 7 sessions more and takes 3 malformed paths, this speaker ends 3 more, each because an RFC
//! says so, and passes on 2 times what only BIRD knows. [`DIFFERENCES`] has all with the reasons.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::time::Instant;

use ferroute_bgp::fsm::Initiative;
use ferroute_bgp::message::{
    AddPath, AddPathMode, Announcement, AsPath, Capability, Codec, Community, ExtendedNextHop, Message, Nlri,
    Open, Update,
};
use ferroute_bgp::rib::view::Stage;
use ferroute_bgp::transport::Reach;
use ferroute_kit::router::{CONFIG, CONTROL, Make};
use ferroute_kit::serial;

use super::*;
use crate::corpus::{Case, cases};

/// AS of BIRD and of this speaker.
const OWN_ASN: Asn = Asn(64_002);
/// On routes that were there before the hostile message.
const BEFORE: Community = Community::new(64_999, 1);
/// Announced after the hostile message.
const MARK: &str = "203.0.113.0/24";

/// What came of a message.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// The session ended with this NOTIFICATION.
    Reset(u8, u8),
    /// The session ended without a word.
    Closed,
    /// It goes on, with these routes; `true` are those that the message brought or changed.
    Kept(BTreeMap<String, bool>),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset(code, subcode) => write!(f, "reset {code}/{subcode}"),
            Self::Closed => f.write_str("closed"),
            Self::Kept(routes) => {
                f.write_str("kept")?;
                for (prefix, is_new) in routes {
                    write!(f, ", {} {prefix}", if *is_new { "new" } else { "old" })?;
                }
                Ok(())
            }
        }
    }
}

/// One corpus message on its way.
struct Trial {
    stream: TcpStream,
    heard: Vec<u8>,
    ended: Option<Outcome>,
}

/// Address of the speaker that sends case `index`.
fn address(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 1 + (index / 200) as u8, 1 + (index % 200) as u8)
}

fn is_open(case: &Case) -> bool {
    case.codec == Codec::initial()
}

/// AS of the speaker that sends a case.
fn asn(case: &Case) -> Asn {
    if case.codec.internal { OWN_ASN } else { case.codec.first_as.unwrap_or(Asn(65_001)) }
}

fn open(index: usize, case: &Case) -> Open {
    let mut capabilities: Vec<Capability> = Families::ALL.iter().map(Capability::Multiprotocol).collect();
    capabilities.push(Capability::RouteRefresh);
    let codec = &case.codec;
    if codec.enhanced_refresh {
        capabilities.push(Capability::EnhancedRouteRefresh);
    }
    if codec.receive_max > 4096 {
        capabilities.push(Capability::ExtendedMessage);
    }
    if codec.extended_next_hop {
        let entry = ExtendedNextHop { family: AfiSafi::Ipv4Unicast, next_hop_afi: 2 };
        capabilities.push(Capability::ExtendedNextHop(vec![entry]));
    }
    let paths: Vec<AddPath> =
        codec.add_path_receive.iter().map(|family| AddPath { family, mode: AddPathMode::Send }).collect();
    if !paths.is_empty() {
        capabilities.push(Capability::AddPath(paths));
    }
    Open {
        asn: asn(case),
        four_octet_as: codec.four_octet_as,
        hold_time: 90,
        router_id: RouterId(address(index)),
        capabilities,
    }
}

fn bytes(message: &Message, codec: &Codec) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(codec, &mut bytes).unwrap();
    bytes
}

/// A good announcement.
fn route(case: &Case, prefix: &str, communities: Vec<Community>) -> Vec<u8> {
    let codec = Codec { add_path_send: case.codec.add_path_receive, ..case.codec.clone() };
    let prefix: IpNet = prefix.parse().unwrap();
    let next_hop: IpAddr = if prefix.addr().is_ipv4() { "192.0.2.1" } else { "2001:db8::1" }.parse().unwrap();
    let attributes = Arc::new(Attributes {
        as_path: AsPath::sequence([if codec.internal { Asn(65_001) } else { asn(case) }]),
        next_hop: next_hop.into(),
        local_preference: codec.internal.then_some(100),
        communities,
        ..Attributes::default()
    });
    let announced = vec![Announcement { attributes, nlri: vec![Nlri::new(prefix)] }];
    bytes(&Message::Update(Update { announced, ..Update::default() }), &codec)
}

impl Trial {
    fn start(index: usize, case: &Case, to: SocketAddr) -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::new(address(index).into(), 0).into()).unwrap();
        socket.connect(&to.into()).unwrap();
        let mut trial = Self { stream: socket.into(), heard: Vec::new(), ended: None };
        trial.say(&match is_open(case) {
            true => case.frame.clone(),
            false => bytes(&Message::Open(open(index, case)), &Codec::initial()),
        });
        trial
    }

    /// The other side may be gone already.
    fn say(&mut self, bytes: &[u8]) {
        self.stream.set_nonblocking(false).unwrap();
        let _ = self.stream.write_all(bytes);
    }

    /// Types and bodies of the messages that came so far.
    fn messages(&mut self) -> Vec<(u8, Vec<u8>)> {
        self.stream.set_nonblocking(true).unwrap();
        let mut buffer = [0; 4096];
        let mut over = false;
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => over = true,
                Ok(count) => {
                    self.heard.extend(&buffer[..count]);
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => over = true,
            }
            break;
        }
        let mut messages = Vec::new();
        let mut rest = &self.heard[..];
        while rest.len() >= 19 {
            let length = usize::from(u16::from_be_bytes([rest[16], rest[17]]));
            if rest.len() < length {
                break;
            }
            messages.push((rest[18], rest[19..length].to_vec()));
            rest = &rest[length..];
        }
        if let Some((_, body)) = messages.iter().find(|(kind, _)| *kind == 3) {
            self.ended = Some(Outcome::Reset(body[0], body[1]));
        } else if over {
            self.ended = Some(Outcome::Closed);
        }
        messages
    }

    /// Waits for the word that the OPEN was good, or for the end.
    fn is_accepted(&mut self) -> bool {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if self.messages().iter().any(|(kind, _)| *kind == 4) {
                return true;
            }
            if self.ended.is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("no answer to an OPEN");
    }
}

/// Routes by the index of the case that brought them: with `false` those from before it.
type Routes = BTreeMap<usize, BTreeMap<String, bool>>;

/// Plays all cases to one speaker, of which `look` tells the routes.
fn play(host: &Host, to: SocketAddr, mut look: impl FnMut() -> Routes) -> Vec<Outcome> {
    let cases = cases();
    let mut trials: Vec<Trial> = host
        .netns
        .run(|| cases.iter().enumerate().map(|(index, case)| Trial::start(index, case, to)).collect());
    for (trial, case) in trials.iter_mut().zip(&cases) {
        let accepted = trial.is_accepted();
        if is_open(case) {
            trial.ended.get_or_insert(Outcome::Kept(BTreeMap::new()));
            continue;
        }
        assert!(accepted, "{}: {:?} before it was sent", case.name, trial.ended);
        trial.say(&bytes(&Message::Keepalive, &case.codec));
        for prefix in ["192.0.2.0/24", "2001:db8::/32"] {
            trial.say(&route(case, prefix, vec![BEFORE]));
        }
        trial.say(&case.frame);
        trial.say(&route(case, MARK, vec![]));
    }
    let mut outcomes = Vec::new();
    eventually("outcomes", PATIENCE, || {
        let mut routes = look();
        outcomes.clear();
        let mut open = Vec::new();
        for (index, trial) in trials.iter_mut().enumerate() {
            let mut routes = routes.remove(&index).unwrap_or_default();
            let marked = routes.remove(MARK).is_some();
            if trial.ended.is_none() {
                trial.messages();
            }
            match &trial.ended {
                Some(ended) => outcomes.push(ended.clone()),
                None if marked => outcomes.push(Outcome::Kept(routes)),
                None => open.push(cases[index].name),
            }
        }
        if open.is_empty() { Ok(()) } else { Err(format!("{open:?}")) }
    });
    outcomes
}

/// A BIRD that knows the sender of each case.
struct Bird {
    process: Child,
    folder: std::path::PathBuf,
    netns: Netns,
}

impl Bird {
    fn start(host: &Host) -> Self {
        let mut config = "router id 10.9.0.2; protocol device { }\n".to_owned();
        for (index, case) in cases().iter().enumerate() {
            let codec = &case.codec;
            let (from, asn) = (address(index), asn(case));
            let extended = if codec.receive_max > 4096 { "on" } else { "off" };
            let next_hop = if codec.extended_next_hop { "extended next hop on;" } else { "" };
            let paths = if codec.add_path_receive.is_empty() { "" } else { "add paths rx;" };
            let first = if codec.first_as.is_some() { "enforce first as on;" } else { "" };
            config += &format!(
                "protocol bgp c{index} {{
                   local as {OWN_ASN}; neighbor {from} as {asn}; direct; passive on;
                   graceful restart off; enable extended messages {extended}; {first}
                   ipv4 {{ import all; export none; {paths} {next_hop} }};
                   ipv6 {{ import all; export none; {paths} }};
                 }}\n"
            );
        }
        let folder = std::env::temp_dir().join(format!("ferroute-differential-{}", host.netns.name()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(CONFIG), config).unwrap();
        let mut command = Make::Bird.command(&folder);
        command.stderr(Stdio::null());
        let process = host.netns.run(|| command.spawn()).unwrap();
        let bird = Self { process, folder, netns: host.netns.clone() };
        eventually("BIRD", PATIENCE, || bird.ask("show status").map(|_| ()));
        bird
    }

    fn ask(&self, question: &str) -> Result<String, String> {
        let socket = self.folder.join(CONTROL);
        let words: Vec<&str> =
            ["-s", socket.to_str().unwrap()].into_iter().chain(question.split(' ')).collect();
        self.netns.exec("birdc", &words).map_err(|error| error.to_string())
    }

    /// A prefix and the protocol of a path are on one line, further paths and what is in them below.
    fn routes(&self) -> Routes {
        let mut routes = Routes::new();
        let (mut prefix, mut case) = (String::new(), None);
        for line in self.ask("show route all").unwrap().lines() {
            if let Some((_, from)) = line.split_once(" [c") {
                if let Some(word) = line.split_whitespace().next().filter(|word| word.contains('/')) {
                    word.clone_into(&mut prefix);
                }
                let index = from.split(' ').next().unwrap().parse::<usize>().unwrap();
                routes.entry(index).or_default().insert(prefix.clone(), true);
                case = Some(index);
            } else if line.contains("BGP.community:")
                && line.contains("(64999,1)")
                && let Some(routes) = case.and_then(|index| routes.get_mut(&index))
            {
                routes.insert(prefix.clone(), false);
            }
        }
        routes
    }
}

impl Drop for Bird {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// This speaker with the same peers.
fn ours(host: &Host) -> Node {
    let mut config = SpeakerConfig { asn: OWN_ASN, ..host.settings() };
    config.listen = vec!["0.0.0.0:1179".parse().unwrap()];
    let node = host.start(config);
    let cases = cases();
    let peers = cases.iter().enumerate().map(|(index, case)| {
        let mut peer = PeerConfig::new(address(index).into(), PeerAsn::Exactly(asn(case)));
        peer.initiative = Initiative::Passive;
        peer.reach = Some(Reach::Any);
        peer.extended_next_hop = case.codec.extended_next_hop;
        peer.add_path_receive = case.codec.add_path_receive;
        peer.accept_as_sets = case.codec.accept_as_sets;
        peer.routes.enforce_first_as = case.codec.first_as.is_some();
        peer.routes.import = Some(Arc::new(Policy::accept_all()));
        peer
    });
    node.peers(peers.collect());
    node
}

fn routes(node: &Node) -> Routes {
    let ids = |(index, _): (usize, &Case)| Some((index, node.peer(IpAddr::from(address(index))).id?));
    let ids: Vec<_> = cases().iter().enumerate().filter_map(ids).collect();
    let look = node.speaker.rib(move |rib| {
        let mut routes = Routes::new();
        for (index, id) in ids {
            for path in Families::ALL.iter().flat_map(|family| rib.received(id, family, Stage::After)) {
                let is_new = !path.attributes.communities.contains(&BEFORE);
                routes.entry(index).or_default().insert(path.prefix.to_string(), is_new);
            }
        }
        routes
    });
    node.runtime.block_on(look).unwrap()
}

/// A case, what comes of it here, and what at BIRD.
type Difference = (&'static str, &'static str, &'static str);

const OLD_V4: &str = "kept, old 192.0.2.0/24";
const OLD_V6: &str = "kept, old 2001:db8::/32";
const OLD: &str = "kept, old 192.0.2.0/24, old 2001:db8::/32";
const NEW: &str = "kept, new 192.0.2.0/24, old 2001:db8::/32";

/// Where BIRD 2.0.12 differs, and why.
const DIFFERENCES: &[(&str, &[Difference])] = &[
    (
        "An OPEN with capabilities but none of a family is one for IPv4 (RFC 4760 section 8, RFC 4271). BIRD \
         sees no common family and says so before it looks at the AS.",
        &[
            ("CVE-2023-41361: FRR, software version longer than it is", "kept", "reset 2/7"),
            ("CVE-2025-43971: GoBGP, software version of no length", "kept", "reset 2/7"),
            ("CVE-2025-43971: GoBGP, empty software version", "kept", "reset 2/7"),
            ("FRR 0f05e56be: add-path with undefined directions", "kept", "reset 2/7"),
            ("RFC 7607: AS 0 in the capability", "reset 2/2", "reset 2/7"),
            ("AS_TRANS in the capability", "reset 2/2", "reset 2/7"),
        ],
    ),
    (
        "A capability that is not spoken is ignored whatever is in it (RFC 5492 section 3), as is a broken name \
         for people; BIRD reads both.",
        &[
            ("CVE-2023-31489: FRR, LLGR capability of odd length", "kept", "reset 2/0"),
            ("GoBGP 67c05941: FQDN longer than itself", "kept", "reset 2/0"),
            ("FRR 73b420df0: empty FQDN", "kept", "reset 2/0"),
        ],
    ),
    (
        "Both refuse parameters that do not add up, for which RFC 9072 section 2 has no number of its own.",
        &[("CVE-2022-40302: FRR reads three octets where two are", "reset 2/4", "reset 2/0")],
    ),
    (
        "The length of the optional parameters must be that of the rest (RFC 4271 section 4.2). BIRD ignores \
         what is behind.",
        &[("GoBGP 388ef503: octets behind the parameters", "reset 2/0", "kept")],
    ),
    (
        "A KEEPALIVE has 19 octets (RFC 4271 section 6.1). BIRD takes longer ones.",
        &[("KEEPALIVE with a body", "reset 1/2", OLD)],
    ),
    (
        "Error code 7 is for speakers that agreed on enhanced refresh; whether also for a message without a \
         subtype, RFC 7313 section 5 does not say. BIRD goes by the octets that are there.",
        &[
            ("CVE-2023-41360, refresh not enhanced", "reset 1/2", "reset 7/1"),
            ("refresh without a family", "reset 7/1", "reset 1/2"),
        ],
    ),
    (
        "Prefixes that cannot be read are an invalid network field (3/10, RFC 4271 section 6.3), or an error \
         of the attribute that they are in, as its flags are (3/9, RFC 4760 section 7). BIRD says 3/1.",
        &[
            ("CVE-2026-37462: GoBGP, prefix longer than the withdrawn field", "reset 3/10", "reset 3/1"),
            ("prefix cut off", "reset 3/10", "reset 3/1"),
            ("FRR 761ed6652: path identifier cut off", "reset 3/10", "reset 3/1"),
            ("add-path length behind the identifier", "reset 3/10", "reset 3/1"),
            ("IPv6 prefix of 129 bits", "reset 3/9", "reset 3/1"),
            ("IPv6 prefix cut off", "reset 3/9", "reset 3/1"),
            ("MP_UNREACH_NLRI with a prefix of 129 bits", "reset 3/9", "reset 3/1"),
            ("RFC 7606 5.3: transitive MP_REACH_NLRI", "reset 3/9", "reset 3/1"),
        ],
    ),
    (
        "Behind a next hop of a length that cannot be, nobody knows where the prefixes begin: reset \
         (RFC 7606 section 7.11). BIRD takes them as withdrawn.",
        &[("IPv6 with next hop of four octets", "reset 3/9", OLD_V4)],
    ),
    (
        "AS 0 makes a path malformed (RFC 7607 section 2). BIRD takes it.",
        &[("RFC 7607: AS 0 in the path", OLD_V6, NEW)],
    ),
    (
        "RFC 9774 is younger than this BIRD.",
        &[("RFC 9774: AS_SET", OLD_V6, NEW), ("RFC 9774: AS_SET in AS4_PATH", OLD_V6, NEW)],
    ),
    (
        "BIRD knows only-to-customer, of which any length but four makes the route a withdrawn one (RFC 9234 \
         section 5); here it is an unknown attribute (RFC 4271 section 5).",
        &[
            ("2023: only-to-customer of the wrong length", NEW, OLD_V6),
            ("attributes of no length without end", NEW, OLD_V6),
        ],
    ),
];

#[test]
fn bird_makes_the_same_of_hostile_messages() {
    let _serial = serial();
    let (a, b) = wire("df");
    let addresses: String =
        (0..cases().len()).map(|index| format!("address add {}/32 dev eth0\n", address(index))).collect();
    a.netns.exec_with_input("ip", &["-batch", "-"], &addresses).unwrap();
    // Next hops of the corpus and its senders are on the link.
    for address in ["10.9.0.2/16", "192.0.2.2/24", "2001:db8::2/64"] {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        b.netns.sh(&format!("ip address add {address} dev eth0 {nodad}")).unwrap();
    }
    let bird = Bird::start(&b);
    let started = Instant::now();
    let there = play(&a, "10.9.0.2:179".parse().unwrap(), || bird.routes());
    println!("BIRD: {} ms", started.elapsed().as_millis());
    drop(bird);
    let started = Instant::now();
    let node = ours(&b);
    let here = play(&a, "10.9.0.2:1179".parse().unwrap(), || routes(&node));
    println!("this speaker: {} ms", started.elapsed().as_millis());

    let found: BTreeSet<(String, String, String)> = cases()
        .iter()
        .zip(here.iter().zip(&there))
        .filter(|(_, (here, there))| here != there)
        .map(|(case, (here, there))| (case.name.to_owned(), here.to_string(), there.to_string()))
        .collect();
    println!("{} messages, {} taken differently", here.len(), found.len());
    assert_eq!((here.len(), found.len()), (194, 28), "the module's text says other figures: {found:#?}");
    let listed: BTreeSet<(String, String, String)> = DIFFERENCES
        .iter()
        .flat_map(|(_, differences)| *differences)
        .map(|(name, here, there)| ((*name).to_owned(), (*here).to_owned(), (*there).to_owned()))
        .collect();
    let unlisted: Vec<_> = found.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&found).collect();
    assert!(unlisted.is_empty() && gone.is_empty(), "not on the list: {unlisted:#?}\nnot so: {gone:#?}");
}
