//! Speakers in network namespaces of their own, against each other and against BIRD, FRR and GoBGP: real
//! links, signatures, link-local addresses. Needs root and Debian's bird2, frr and gobgpd; run it through
//! `scripts/test`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod bird;
#[path = "../corpus/mod.rs"]
#[allow(dead_code, reason = "tests of the codec use more of it")]
mod corpus;
mod differential;
mod interop;
mod paths;
mod restarts;
mod router;
mod sessions;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use ferroute_bgp::fsm::State;
use ferroute_bgp::message::{AfiSafi, Asn, Attributes, Families, RouterId};
use ferroute_bgp::peer::{PeerConfig, PeerKey, PeerStatus};
use ferroute_bgp::policy::{LocalAddresses, Policy};
use ferroute_bgp::session::PeerAsn;
use ferroute_bgp::speaker::{Advertisement, RestartConfig, Speaker, SpeakerConfig};
use ferroute_kit::Netns;
use ferroute_kit::assert::eventually;
use ipnet::IpNet;
use tokio::runtime::Runtime;

const PATIENCE: Duration = Duration::from_secs(30);

/// A network namespace on one end of a wire: 10.9.0.`number`, fd09::`number`, fe80::`number`.
struct Host {
    netns: Netns,
    number: u8,
}

/// Two hosts with a wire between them.
fn wire(name: &str) -> (Host, Host) {
    let host = |number: u8| Host { netns: Netns::named(format!("{name}{number}")).unwrap(), number };
    let (a, b) = (host(1), host(2));
    a.netns.sh(&format!("ip link add eth0 type veth peer name eth0 netns {}", b.netns.name())).unwrap();
    a.set_up();
    b.set_up();
    (a, b)
}

/// Three hosts on one segment; the second has the bridge.
fn star(name: &str) -> (Host, Host, Host) {
    let host = |number: u8| Host { netns: Netns::named(format!("{name}{number}")).unwrap(), number };
    let hosts = [host(1), host(2), host(3)];
    let [a, r, c] = &hosts;
    r.netns.sh("ip link add eth0 type bridge").unwrap();
    for leaf in [a, c] {
        let port = format!("port{}", leaf.number);
        r.netns
            .sh(&format!("ip link add {port} type veth peer name eth0 netns {}", leaf.netns.name()))
            .unwrap();
        r.netns.sh(&format!("ip link set {port} master eth0 up")).unwrap();
    }
    hosts.iter().for_each(Host::set_up);
    hosts.into()
}

impl Host {
    fn set_up(&self) {
        let number = self.number;
        self.netns.set_sysctl("net/ipv6/conf/eth0/addr_gen_mode", "1").unwrap();
        self.netns.sh("ip link set eth0 up").unwrap();
        for address in
            [format!("10.9.0.{number}/24"), format!("fd09::{number}/64"), format!("fe80::{number}/64")]
        {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            self.netns.sh(&format!("ip address add {address} dev eth0 {nodad}")).unwrap();
        }
    }

    fn v4(&self) -> IpAddr {
        Ipv4Addr::new(10, 9, 0, self.number).into()
    }

    fn v6(&self) -> IpAddr {
        format!("fd09::{}", self.number).parse().unwrap()
    }

    fn link_local(&self) -> PeerKey {
        let address = format!("fe80::{}", self.number).parse().unwrap();
        PeerKey { address, interface: Some("eth0".into()) }
    }

    /// Lets nothing out of this host any more (`-A`), or again (`-D`): the link stays up.
    fn silence(&self, what: &str) {
        self.filter(what, &[]);
    }

    /// The same for the packets that an iptables match names.
    fn filter(&self, what: &str, matching: &[&str]) {
        for program in ["iptables", "ip6tables"] {
            let rule = [&["--wait", what, "OUTPUT", "-o", "eth0"], matching, &["-j", "DROP"]].concat();
            self.netns.exec(program, &rule).unwrap();
        }
    }

    fn asn(&self) -> Asn {
        Asn(64000 + u32::from(self.number))
    }

    fn settings(&self) -> SpeakerConfig {
        let mut config = SpeakerConfig::new(self.asn(), RouterId(Ipv4Addr::new(10, 9, 0, self.number)));
        config.listen = vec!["0.0.0.0:179".parse().unwrap(), "[::]:179".parse().unwrap()];
        let (IpAddr::V4(v4), IpAddr::V6(v6)) = (self.v4(), self.v6()) else { unreachable!() };
        config.addresses = LocalAddresses { v4: Some(v4), v6: Some(v6), link_local: None };
        config
    }

    /// The same with graceful restart; `restarted`: it takes over from a former one.
    fn restarting(&self, restarted: bool) -> SpeakerConfig {
        let mut config = self.settings();
        config.restart = Some(RestartConfig {
            time: 60,
            forwarding: Families::ALL,
            restarted,
            deferral: Duration::from_secs(10),
        });
        config
    }

    /// How this host is configured as a peer.
    fn as_peer(&self, key: impl Into<PeerKey>) -> PeerConfig {
        let key = key.into();
        let mut config = PeerConfig::new(key.address, PeerAsn::Exactly(self.asn()));
        config.key = key;
        config.longest_pause = Duration::from_secs(1);
        config.dial_timeout = Duration::from_secs(2);
        config.routes.import = Some(Arc::new(Policy::accept_all()));
        config.routes.export = Some(Arc::new(Policy::accept_all()));
        config
    }

    fn start(&self, config: SpeakerConfig) -> Node {
        // The threads stay in the namespace that they were started in.
        let runtime = self.netns.run(|| Runtime::new().unwrap());
        let speaker = {
            let _inside = runtime.enter();
            self.netns.run(|| Speaker::start(config).unwrap())
        };
        for listener in speaker.listeners() {
            assert_eq!(listener.error, None);
        }
        Node { runtime, speaker }
    }
}

/// A speaker with a runtime of its own.
struct Node {
    runtime: Runtime,
    speaker: Speaker,
}

impl Node {
    fn peers(&self, peers: Vec<PeerConfig>) {
        let _inside = self.runtime.enter();
        assert_eq!(self.speaker.set_peers(peers), []);
    }

    fn advertises(&self, prefixes: &[&str]) {
        let advertisement = |prefix: &&str| Advertisement {
            prefix: prefix.parse().unwrap(),
            path: 0,
            attributes: Arc::new(Attributes::default()),
            tag: 0,
        };
        self.speaker.set_advertisements(prefixes.iter().map(advertisement).collect());
    }

    fn peer(&self, key: impl Into<PeerKey>) -> PeerStatus {
        self.speaker.peer(&key.into()).unwrap()
    }

    fn established(&self, key: impl Into<PeerKey>) -> PeerStatus {
        let key = key.into();
        eventually("a session", PATIENCE, || {
            let status = self.peer(key.clone());
            if status.state == State::Established { Ok(status) } else { Err(format!("{status:#?}")) }
        })
    }

    /// No session has ended since this node started.
    fn never_flapped(&self, keys: impl IntoIterator<Item = IpAddr>) {
        for key in keys {
            let status = self.peer(key);
            assert_eq!((status.established, status.flaps), (1, 0), "{status:#?}");
        }
    }

    fn error(&self, key: impl Into<PeerKey>, text: &str) {
        let key = key.into();
        eventually("words", PATIENCE, || {
            let status = self.peer(key.clone());
            let said = status.errors.iter().any(|error| error.text.contains(text));
            if said { Ok(()) } else { Err(format!("{:#?}", status.errors)) }
        });
    }

    /// Learned prefixes with their next hops, as text.
    fn learned(&self, family: AfiSafi) -> Vec<String> {
        let paths = self.runtime.block_on(self.speaker.rib(move |rib| rib.paths(family))).unwrap();
        let learned = paths.iter().filter(|path| path.peer.is_some());
        let mut learned: Vec<String> =
            learned.map(|path| format!("{} via {}", path.prefix, path.attributes.next_hop)).collect();
        learned.sort();
        learned
    }

    fn learns(&self, family: AfiSafi, wanted: &[&str]) {
        ferroute_kit::assert::eventually_equal("routes", PATIENCE, &wanted.to_vec(), || {
            let learned: Vec<String> = self.learned(family);
            wanted.iter().copied().filter(|route| learned.iter().any(|known| known == route)).collect()
        });
        assert_eq!(self.learned(family).len(), wanted.len());
    }

    /// Ends as a killed process does: the kernel closes its sockets, and nobody says a word.
    fn kill(self) {
        self.runtime.shutdown_background();
    }
}
