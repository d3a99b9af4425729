//! What the route room says of itself: this node, its sessions, the RIBs.

use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::time::{Duration, UNIX_EPOCH};

use ferroute_bgp::message::{AfiSafi, Attributes, Capability, Open};
use ferroute_bgp::peer::{PeerKey, PeerStatus};
use ferroute_bgp::rib::view::{PathView, Stage};
use ferroute_bgp::rib::{PeerId, Rib};
use serde::Serialize;

use super::identity::Reflection;
use super::peers::Kind;
use super::view::{Known, View};

/// How long the RIB may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// This node in BGP, for `ferroute status` and `ferroute bgp neighbors`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Its AS; absent while there is no speaker.
    pub asn: Option<u32>,
    /// Its identifier.
    pub router_id: Option<String>,
    /// Its part in route reflection: `server CLUSTER-ID` or `client`.
    pub reflection: Option<String>,
    /// Where it listens.
    pub listeners: Vec<Listener>,
    /// Whom it speaks with.
    pub neighbors: Vec<Neighbor>,
}

/// An address to be listened on.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Listener {
    /// Address and port.
    pub address: String,
    /// Why it is not.
    pub error: Option<String>,
}

/// One peer.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Neighbor {
    /// Its address.
    pub address: String,
    /// `internal` or `external`.
    pub kind: &'static str,
    /// What it is: the Node's name, for one.
    pub description: String,
    /// Its AS, from its last OPEN.
    pub asn: Option<u32>,
    /// Its identifier, from its last OPEN.
    pub router_id: Option<String>,
    /// State of the session.
    pub state: &'static str,
    /// Seconds in this state.
    pub since_seconds: u64,
    /// This side's address.
    pub local_address: Option<String>,
    /// Hold time that both agreed on, in seconds.
    pub hold_time: Option<u16>,
    /// Capabilities of its last OPEN.
    pub capabilities: Vec<String>,
    /// Paths per family.
    pub families: Vec<FamilyCounts>,
    /// State of BFD, where it is on, or why there can be none.
    pub bfd: Option<String>,
    /// Sessions that went down again.
    pub flaps: u64,
    /// Its routes are kept because it may come back.
    pub keeping_routes: bool,
    /// Why there is or was no session.
    pub last_error: Option<LastError>,
}

/// Paths of one family.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FamilyCounts {
    /// `ipv4` or `ipv6`.
    pub family: &'static str,
    /// Paths that the peer sent.
    pub received: u64,
    /// Of these, what policy takes.
    pub accepted: u64,
    /// Paths that it was told.
    pub sent: u64,
}

/// The newest error of a session.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LastError {
    /// In words.
    pub text: String,
    /// When, in seconds since 1970.
    pub at: u64,
    /// How often in a row.
    pub times: u64,
}

/// A path in a RIB.
#[derive(Debug, Serialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// Where it leads.
    pub prefix: String,
    /// By which router.
    pub next_hop: String,
    /// Who sent it; absent for a route of this node.
    pub from: Option<String>,
    /// AS path.
    pub as_path: String,
    /// Local preference, where it has one.
    pub local_preference: Option<u32>,
    /// MED, where it has one.
    pub med: Option<u32>,
    /// Communities of all kinds.
    pub communities: Vec<String>,
    /// What became of it: why it is best, lost, refused, advertised or not.
    pub verdict: String,
    /// From before the sender's restart.
    pub stale: bool,
}

/// A look into the RIB.
type Look = Box<dyn FnOnce(&mut Rib) -> Vec<Route> + Send>;

/// Which routes to list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listing {
    /// All paths, and which of them is best.
    Routes,
    /// What a peer is told, or why not.
    Advertised(PeerKey),
    /// What a peer sent.
    Received(PeerKey),
}

/// Why there is no list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoList {
    /// There is no such peer.
    #[error("there is no BGP peer {0}; `ferroute bgp neighbors` lists them")]
    NoPeer(String),
    /// There is no speaker, or it does not answer.
    #[error("the BGP speaker does not answer; `ferroute status` says why")]
    NoSpeaker,
}

fn family(family: AfiSafi) -> &'static str {
    if family == AfiSafi::Ipv4Unicast { "ipv4" } else { "ipv6" }
}

/// A capability in words.
fn capability(capability: &Capability) -> String {
    match capability {
        Capability::Multiprotocol(one) => format!("multiprotocol {one}"),
        Capability::GracefulRestart(restart) => format!("graceful restart {} s", restart.restart_time),
        other => {
            // The name of the variant says it; what is in it is for programs.
            let text = format!("{other:?}");
            let name: String = text.chars().take_while(char::is_ascii_alphanumeric).collect();
            let mut words = String::new();
            for character in name.chars() {
                if character.is_ascii_uppercase() && !words.is_empty() {
                    words.push(' ');
                }
                words.push(character.to_ascii_lowercase());
            }
            words
        }
    }
}

fn neighbor(status: PeerStatus, known: &Known) -> Neighbor {
    let open: Option<&Open> = status.received_open.as_ref();
    let error = status.last_error().map(|error| LastError {
        text: error.text.clone(),
        at: error.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        times: error.times,
    });
    Neighbor {
        address: status.key.to_string(),
        kind: match known.peers.get(&status.key) {
            Some(Kind::External) => "external",
            _ => "internal",
        },
        asn: open.map(|open| open.asn.0),
        router_id: open.map(|open| open.router_id.to_string()),
        state: status.state.name(),
        since_seconds: status.in_state.as_secs(),
        local_address: status.local_address.map(|address| address.to_string()),
        hold_time: status.negotiated.as_ref().map(|agreed| agreed.hold_time),
        capabilities: open.map(|open| open.capabilities.iter().map(capability).collect()).unwrap_or_default(),
        families: status
            .prefixes
            .iter()
            .map(|(one, counts)| FamilyCounts {
                family: family(*one),
                received: counts.received,
                accepted: counts.accepted,
                sent: counts.sent,
            })
            .collect(),
        bfd: status.path.map(|path| path.error.unwrap_or_else(|| format!("{:?}", path.state))),
        flaps: status.flaps,
        keeping_routes: status.keeping_routes,
        last_error: error,
        description: status.description,
    }
}

impl View {
    /// This node and its sessions.
    pub fn status(&self) -> Status {
        let (known, speaker) = (self.known(), self.speaker());
        let identity = known.identity.as_ref();
        let listeners = speaker.iter().flat_map(|speaker| speaker.listeners());
        let peers = speaker.iter().flat_map(|speaker| speaker.peers());
        Status {
            asn: identity.map(|identity| identity.asn.0),
            router_id: identity.map(|identity| identity.router_id.to_string()),
            reflection: identity.and_then(|identity| match identity.reflection {
                Reflection::None => None,
                Reflection::Client => Some("client".to_owned()),
                Reflection::Server(cluster) => Some(format!("server {cluster}")),
            }),
            listeners: listeners
                .map(|listener| Listener { address: listener.wanted.to_string(), error: listener.error })
                .collect(),
            neighbors: peers.map(|status| neighbor(status, &known)).collect(),
        }
    }

    /// Routes of one of the RIBs. Blocks while the RIB is read.
    ///
    /// # Errors
    ///
    /// [`NoList`].
    pub fn routes(&self, listing: &Listing) -> Result<Vec<Route>, NoList> {
        let speaker = self.speaker().ok_or(NoList::NoSpeaker)?;
        let names: Vec<(PeerId, String)> =
            speaker.peers().iter().filter_map(|peer| Some((peer.id?, peer.key.to_string()))).collect();
        let id = |key: &PeerKey| {
            speaker.peer(key).and_then(|peer| peer.id).ok_or_else(|| NoList::NoPeer(key.to_string()))
        };
        let list: Look = match listing {
            Listing::Routes => Box::new(move |rib| {
                let paths = AfiSafi::SUPPORTED.into_iter().flat_map(|family| rib.paths(family));
                paths.map(|path| received(path, &names)).collect()
            }),
            Listing::Received(key) => {
                let id = id(key)?;
                Box::new(move |rib| {
                    let families = AfiSafi::SUPPORTED.into_iter();
                    let paths = families.flat_map(|family| rib.received(id, family, Stage::Before));
                    paths.map(|path| received(path, &names)).collect()
                })
            }
            Listing::Advertised(key) => {
                let id = id(key)?;
                Box::new(move |rib| {
                    AfiSafi::SUPPORTED.into_iter().flat_map(|family| told(rib, id, family)).collect()
                })
            }
        };
        self.look(PATIENCE, list).ok_or(NoList::NoSpeaker)
    }
}

/// What a peer is told as it is told; what it is not told as it is here, with the reason.
fn told(rib: &Rib, peer: PeerId, family: AfiSafi) -> Vec<Route> {
    let after = rib.advertised(peer, family, Stage::After).into_iter().map(|view| {
        let verdict = if view.is_current { "advertised" } else { "about to be advertised" };
        route(view.prefix.to_string(), &view.attributes, None, verdict.to_owned(), false)
    });
    let held = rib.advertised(peer, family, Stage::Before).into_iter().filter_map(|view| {
        let withheld = view.withheld?;
        let statement = view.statement.map_or(String::new(), |name| format!(" {name:?}"));
        let verdict = format!("not advertised: {withheld}{statement}");
        Some(route(view.prefix.to_string(), &view.attributes, None, verdict, false))
    });
    after.chain(held).collect()
}

fn received(path: PathView, names: &[(PeerId, String)]) -> Route {
    let from = path.peer.map(|peer| {
        let name = names.iter().find(|(id, _)| *id == peer).map(|(_, name)| name.clone());
        name.unwrap_or_else(|| "a peer that is gone".to_owned())
    });
    let statement = path.statement.as_ref().map_or(String::new(), |name| format!(" {name:?}"));
    let verdict = format!("{}{statement}", path.reason);
    route(path.prefix.to_string(), &path.attributes, from, verdict, path.stale)
}

fn route(
    prefix: String,
    attributes: &Attributes,
    from: Option<String>,
    verdict: String,
    stale: bool,
) -> Route {
    let communities = attributes.communities.iter().map(ToString::to_string);
    let extended = attributes.extended_communities.iter().map(ToString::to_string);
    let large = attributes.large_communities.iter().map(ToString::to_string);
    Route {
        prefix,
        next_hop: attributes.next_hop.to_string(),
        from,
        as_path: attributes.as_path.to_string(),
        local_preference: attributes.local_preference,
        med: attributes.med,
        communities: communities.chain(extended).chain(large).collect(),
        verdict,
        stale,
    }
}

/// A table of routes for people.
pub fn table(routes: &[Route]) -> String {
    let rows = routes.iter().map(|route| {
        let mut verdict = route.verdict.clone();
        if route.stale {
            verdict += ", stale";
        }
        [
            route.prefix.clone(),
            route.next_hop.clone(),
            route.from.clone().unwrap_or_else(|| "-".to_owned()),
            if route.as_path.is_empty() { "-".to_owned() } else { route.as_path.clone() },
            if route.communities.is_empty() { "-".to_owned() } else { route.communities.join(",") },
            verdict,
        ]
    });
    align(["PREFIX", "NEXT HOP", "FROM", "AS PATH", "COMMUNITIES", "STATUS"], rows.collect())
}

fn align<const N: usize>(head: [&str; N], rows: Vec<[String; N]>) -> String {
    let mut widths = head.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let head = head.map(str::to_owned);
    for row in std::iter::once(&head).chain(&rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            // Writing to a String cannot fail.
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn age(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(asn), Some(router_id)) = (self.asn, &self.router_id) else {
            return writeln!(f, "BGP: no speaker; the problems above say why");
        };
        write!(f, "BGP: AS {asn}, router id {router_id}")?;
        if let Some(reflection) = &self.reflection {
            write!(f, ", route reflection {reflection}")?;
        }
        writeln!(f)?;
        for listener in &self.listeners {
            match &listener.error {
                None => writeln!(f, "  listens on {}", listener.address)?,
                Some(error) => writeln!(f, "  does not listen on {}: {error}", listener.address)?,
            }
        }
        let rows = self.neighbors.iter().map(|peer| {
            let sum =
                |count: fn(&FamilyCounts) -> u64| peer.families.iter().map(count).sum::<u64>().to_string();
            let error = match (&peer.last_error, peer.state) {
                (Some(error), state) if state != "Established" => error.text.clone(),
                _ => String::new(),
            };
            [
                peer.address.clone(),
                peer.asn.map_or("-".to_owned(), |asn| asn.to_string()),
                peer.description.clone(),
                peer.state.to_owned(),
                age(peer.since_seconds),
                sum(|counts| counts.received),
                sum(|counts| counts.accepted),
                sum(|counts| counts.sent),
                error,
            ]
        });
        let head = ["NEIGHBOR", "AS", "WHO", "STATE", "SINCE", "RECEIVED", "ACCEPTED", "SENT", "LAST ERROR"];
        f.write_str(&align(head, rows.collect()))
    }
}

impl Listing {
    /// Reads a list's name and the peer it is of.
    ///
    /// # Errors
    ///
    /// What to write instead.
    pub fn parse(name: &str, peer: Option<&str>) -> Result<Self, String> {
        let key = || {
            let text = peer.ok_or_else(|| format!("write `ferroute bgp {name} ADDRESS`"))?;
            let (address, interface) = match text.split_once('%') {
                Some((address, interface)) => (address, Some(interface.into())),
                None => (text, None),
            };
            let address: IpAddr =
                address.parse().map_err(|_| format!("{text:?} is no IP address of a peer"))?;
            Ok(PeerKey { address, interface })
        };
        match name {
            "routes" if peer.is_none() => Ok(Self::Routes),
            "routes" => {
                Err("routes takes no address; write `ferroute bgp received ADDRESS` for one peer's"
                    .to_owned())
            }
            "advertised" => key().map(Self::Advertised),
            "received" => key().map(Self::Received),
            _ => Err("write `ferroute bgp neighbors`, `routes`, `advertised ADDRESS` or `received ADDRESS`"
                .to_owned()),
        }
    }
}
