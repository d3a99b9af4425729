//! Speakers against each other in one process, over loopback addresses.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod bad_input;
mod restarts;
mod routes;
mod sessions;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferroute_bgp::fsm::{Initiative, State};
use ferroute_bgp::message::{AfiSafi, Asn, Attributes, RouterId};
use ferroute_bgp::peer::{PeerConfig, PeerKey, PeerStatus};
use ferroute_bgp::policy::{LocalAddresses, Policy};
use ferroute_bgp::session::PeerAsn;
use ferroute_bgp::speaker::{Advertisement, Speaker, SpeakerConfig};
use ipnet::IpNet;

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(20);

/// A speaker on a loopback address of its own.
struct Node {
    speaker: Speaker,
    address: SocketAddr,
    asn: Asn,
}

/// Node `number` is AS 64000 + number with router id and address 127.0.0.number.
fn settings(number: u8) -> SpeakerConfig {
    let address = Ipv4Addr::new(127, 0, 0, number);
    let mut config = SpeakerConfig::new(Asn(64000 + u32::from(number)), RouterId(address));
    config.listen = vec![SocketAddr::new(address.into(), 0)];
    config.addresses = LocalAddresses {
        v4: Some(address),
        v6: Some(format!("2001:db8::{number}").parse().unwrap()),
        link_local: None,
    };
    config.host = Some(format!("node-{number}"));
    config
}

impl Node {
    fn start(config: SpeakerConfig) -> Self {
        let speaker = Speaker::start(config.clone()).unwrap();
        let listeners = speaker.listeners();
        let address = listeners[0].address.unwrap_or_else(|| panic!("{listeners:?}"));
        Self { speaker, address, asn: config.asn }
    }

    fn new(number: u8) -> Self {
        Self::start(settings(number))
    }

    /// How `other` sees this node: everything may pass.
    fn as_peer_of(&self, other: &Self) -> PeerConfig {
        let mut config = PeerConfig::new(self.address.ip(), PeerAsn::Exactly(self.asn));
        config.port = self.address.port();
        config.source = Some(other.address.ip());
        config.longest_pause = Duration::from_secs(1);
        config.routes.import = Some(Arc::new(Policy::accept_all()));
        config.routes.export = Some(Arc::new(Policy::accept_all()));
        config
    }

    fn peers(&self, peers: Vec<PeerConfig>) {
        assert_eq!(self.speaker.set_peers(peers), []);
    }

    fn sees(&self, other: &Self) -> PeerStatus {
        self.speaker.peer(&other.key()).unwrap()
    }

    fn key(&self) -> PeerKey {
        self.address.ip().into()
    }

    fn state(&self, other: &Self) -> State {
        self.sees(other).state
    }

    fn advertises(&self, prefixes: impl IntoIterator<Item = IpNet>) {
        self.speaker.set_advertisements(prefixes.into_iter().map(advertisement).collect());
    }

    /// Prefixes of a family with a chosen path from another speaker.
    async fn learned(&self, family: AfiSafi) -> BTreeSet<IpNet> {
        let routes = self.speaker.rib(move |rib| rib.routes(family)).await.unwrap();
        let learned = routes.into_iter().filter(|route| route.paths.iter().all(|path| path.peer.is_some()));
        learned.map(|route| route.prefix).collect()
    }

    async fn last_error(&self, other: &Self) -> String {
        until("an error", || async { self.sees(other).last_error().map(|error| error.text.clone()) }).await
    }
}

fn advertisement(prefix: IpNet) -> Advertisement {
    Advertisement { prefix, path: 0, attributes: Arc::new(Attributes::default()), tag: 0 }
}

fn prefixes(count: u32) -> Vec<IpNet> {
    (0..count)
        .map(|number| IpNet::new(IpAddr::from((0x0a00_0000 + number).to_be_bytes()), 32).unwrap())
        .collect()
}

fn prefixes_v6(count: u32) -> Vec<IpNet> {
    (0..count)
        .map(|number| {
            let bits = (0x2001_0db8_u128 << 96) | u128::from(number);
            IpNet::new(IpAddr::from(bits.to_be_bytes()), 128).unwrap()
        })
        .collect()
}

/// Two nodes that know each other.
async fn pair() -> (Node, Node) {
    let (a, b) = (Node::new(1), Node::new(2));
    connect(&a, &b, |_| ()).await;
    (a, b)
}

/// Makes two nodes peers and waits for the session.
async fn connect(a: &Node, b: &Node, change: impl Fn(&mut PeerConfig)) {
    for (node, other) in [(a, b), (b, a)] {
        let mut config = other.as_peer_of(node);
        change(&mut config);
        node.peers(vec![config]);
    }
    established(a, b).await;
}

async fn established(a: &Node, b: &Node) {
    until("a session", || async {
        let up = a.state(b) == State::Established && b.state(a) == State::Established;
        up.then_some(()).ok_or_else(|| (a.sees(b), b.sees(a)))
    })
    .await;
}

/// What a look at something finds: it, or why not yet.
trait Found {
    type Value;
    fn found(self) -> Result<Self::Value, String>;
}

impl<T> Found for Option<T> {
    type Value = T;
    fn found(self) -> Result<T, String> {
        self.ok_or_else(|| "nothing".into())
    }
}

impl Found for bool {
    type Value = ();
    fn found(self) -> Result<(), String> {
        self.then_some(()).ok_or_else(|| "not so".into())
    }
}

impl<T, E: Debug> Found for Result<T, E> {
    type Value = T;
    fn found(self) -> Result<T, String> {
        self.map_err(|error| format!("{error:#?}"))
    }
}

/// Looks until it is there.
async fn until<F: Found, Fut: Future<Output = F>>(what: &str, mut look: impl FnMut() -> Fut) -> F::Value {
    let started = Instant::now();
    loop {
        match look().await.found() {
            Ok(value) => return value,
            Err(last) if started.elapsed() > PATIENCE => panic!("no {what} after {PATIENCE:?}: {last}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

/// Stays true for a while.
async fn stays(what: &str, time: Duration, look: impl Fn() -> bool) {
    let started = Instant::now();
    while started.elapsed() < time {
        assert!(look(), "{what} ended");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
