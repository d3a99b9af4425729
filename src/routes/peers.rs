//! Nodes and settings to peers. Pure: what changes is found by comparing, by the speaker.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ferroute_bgp::bfd::Hops;
use ferroute_bgp::peer::{PeerBfd, PeerConfig, PeerKey};
use ferroute_bgp::session::PeerAsn;
use ferroute_bgp::transport::{Password, Reach};

use super::external::{self, annotated};
use super::identity::{ASN, CLIENT, Identity, Reflection, SERVER, asn, families, primary};
use super::policies::Policies;
use super::settings::{ExternalPeer, Settings};
use crate::cluster::node::Node;
use crate::cluster::secret::Secrets;
use crate::cluster::service::Problem;

/// Seconds without a word after which another node counts as gone (RFC 4271's suggestion).
const HOLD_TIME: u16 = 90;

/// Who a peer is to the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Another node.
    Internal {
        /// Its name.
        node: Arc<str>,
    },
    /// A router outside the cluster.
    External,
}

/// A peer as wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who it is.
    pub kind: Kind,
    /// What the speaker has to know.
    pub config: PeerConfig,
}

/// The external peers of this node: those of the flags, else those of its annotations.
///
/// `secrets` are those of the passwords file, `named` the Secrets that annotations name, `last` what there
/// was before.
pub fn external(
    settings: &Settings,
    node: &Node,
    secrets: Option<&Result<Vec<Option<Password>>, String>>,
    named: &Secrets,
    last: &[ExternalPeer],
) -> (Vec<ExternalPeer>, Vec<Problem>) {
    let given = &settings.external.peers;
    if given.is_empty() {
        return annotated(node, named, last);
    }
    let mut peers = given.clone();
    let mut problems = Vec::new();
    let wrong = |what: String| Problem {
        reason: "InvalidPasswordsFile",
        message: format!(
            "--peer-router-passwords-file of Node {}: {what}; passwords stay as they were",
            node.name
        ),
    };
    // A password on the command line wins over the file.
    if peers.iter().all(|peer| peer.password.is_none()) {
        let before = |address: IpAddr| last.iter().find(|peer| peer.address == address)?.password.clone();
        match secrets {
            None => {}
            Some(Ok(secrets)) if secrets.len() == peers.len() || secrets.is_empty() => {
                for (peer, secret) in peers.iter_mut().zip(secrets) {
                    peer.password = secret.clone();
                }
            }
            Some(outcome) => {
                peers.iter_mut().for_each(|peer| peer.password = before(peer.address));
                problems.push(wrong(match outcome {
                    Ok(secrets) => format!(
                        "{} items for {} addresses of --peer-router-ips; write one for each, blank for none",
                        secrets.len(),
                        peers.len()
                    ),
                    Err(why) => why.clone(),
                }));
            }
        }
    }
    (peers, problems)
}

/// Everybody this node speaks with, with the problems of each Node by name. `nodes` may hold this node.
pub fn peers<'a>(
    settings: &Settings,
    identity: &Identity,
    node: &Node,
    nodes: impl IntoIterator<Item = &'a Node>,
    external: &[ExternalPeer],
    policies: &Policies,
) -> (Vec<Peer>, Vec<(Arc<str>, Problem)>) {
    let mut gathering = Gathering { node, seen: BTreeSet::new(), peers: Vec::new(), problems: Vec::new() };
    for peer in external {
        gathering.add(external_peer(settings, identity, peer, policies), Kind::External);
    }
    if settings.mesh {
        let mut others: Vec<&Node> = nodes.into_iter().filter(|other| other.name != node.name).collect();
        others.sort_by(|a, b| a.name.cmp(&b.name));
        for other in others {
            match internal_peer(settings, identity, other, policies) {
                Ok(Some(config)) => gathering.add(config, Kind::Internal { node: other.name.clone() }),
                Ok(None) => {}
                Err(problem) => gathering.problems.push((other.name.clone(), problem)),
            }
        }
    }
    (gathering.peers, gathering.problems)
}

struct Gathering<'a> {
    node: &'a Node,
    seen: BTreeSet<PeerKey>,
    peers: Vec<Peer>,
    problems: Vec<(Arc<str>, Problem)>,
}

impl Gathering<'_> {
    fn add(&mut self, config: PeerConfig, kind: Kind) {
        let Node { name, internal_ips, external_ips, .. } = self.node;
        let address = config.key.address;
        let (who, cure) = match &kind {
            Kind::Internal { node } => (format!("Node {node}"), "in its status"),
            Kind::External => (
                format!("the external peer {address}"),
                "in --peer-router-ips, or in the annotation of the Node",
            ),
        };
        let mut refuse = |reason, why: String| {
            self.problems.push((
                name.clone(),
                Problem {
                    reason,
                    message: format!("Node {name} does not peer with {who}: {why}; correct it {cure}"),
                },
            ));
        };
        if internal_ips.contains(&address) || external_ips.contains(&address) {
            return refuse("PeerIsItself", format!("{address} is its own address"));
        }
        if self.seen.contains(&config.key) {
            return refuse("DuplicatePeer", format!("another peer has the address {address} as well"));
        }
        let flaws = config.flaws();
        if !flaws.is_empty() {
            let flaws: Vec<String> = flaws.iter().map(ToString::to_string).collect();
            return refuse("InvalidPeer", flaws.join("; "));
        }
        self.seen.insert(config.key.clone());
        self.peers.push(Peer { kind, config });
    }
}

fn external_peer(
    settings: &Settings,
    identity: &Identity,
    peer: &ExternalPeer,
    policies: &Policies,
) -> PeerConfig {
    let mut config = PeerConfig::new(peer.address, PeerAsn::Exactly(peer.asn));
    config.description = "external peer".to_owned();
    config.port = peer.port;
    config.source = peer.source.or_else(|| identity.source.get(peer.address.is_ipv6()));
    config.password = peer.password.clone();
    config.reach = settings.external.multihop.map(Reach::Hops);
    config.hold_time = settings.external.hold_time;
    config.families = identity.families();
    // As GoBGP has it: its IPv4 routes come with IPv6 next hops over such a session.
    config.extended_next_hop = peer.address.is_ipv6();
    config.bfd = peer.bfd.map(|timers| PeerBfd {
        timers,
        hops: settings
            .external
            .multihop
            .map_or(Hops::Single, |hops| Hops::Multi { minimum_ttl: u8::MAX - hops + 1 }),
        passive: false,
        graceful: false,
    });
    config.routes.import = Some(policies.external_import.clone());
    config.routes.export = Some(policies.external_export.clone());
    config
}

/// Another node as a peer, if both sides want it.
fn internal_peer(
    settings: &Settings,
    identity: &Identity,
    other: &Node,
    policies: &Policies,
) -> Result<Option<PeerConfig>, Problem> {
    let is_server = other.annotations.contains_key(SERVER);
    let is_client = !is_server && other.annotations.contains_key(CLIENT);
    let reflects = matches!(identity.reflection, Reflection::Server(_));
    if (identity.reflection == Reflection::Client && !is_server) || (is_client && !reflects) {
        return Ok(None);
    }
    let remote = match settings.cluster_asn {
        // While a cluster changes its AS, nodes of both speak with each other.
        Some(_) => PeerAsn::Any,
        None => {
            let Some(text) = other.annotations.get(ASN) else { return Ok(None) };
            let asn = asn(text).map_err(|why| super::identity::annotation(other, ASN, text, &why))?;
            if asn != identity.asn {
                return Ok(None);
            }
            PeerAsn::Exactly(asn)
        }
    };
    // One session carries both families; it runs over the one that both sides have, if possible that
    // of the primary addresses.
    let Some(first) = primary(other) else { return Ok(None) };
    let (v4, v6) = (other.address(false), other.address(true));
    let of = |ipv6: bool| {
        if first.is_ipv6() == ipv6 {
            Some(first)
        } else if ipv6 {
            v6
        } else {
            v4
        }
    };
    let own = identity.primary.is_ipv6();
    let pair = |ipv6: bool| Some((of(ipv6)?, source(identity, ipv6)?));
    let Some((address, source)) = pair(own).or_else(|| pair(!own)) else { return Ok(None) };
    let mut config = PeerConfig::new(address, remote);
    config.description = format!("node {}", other.name);
    config.port = settings.port;
    config.source = Some(source);
    config.hold_time = HOLD_TIME;
    config.families = families(v4.is_some(), v6.is_some()).and(identity.families());
    config.extended_next_hop = address.is_ipv6();
    config.routes.client = reflects && is_client;
    config.routes.import = Some(policies.internal_import.clone());
    config.routes.export = Some(policies.internal_export.clone());
    Ok((!config.families.is_empty()).then_some(config))
}

/// The address that other nodes know this one by.
fn source(identity: &Identity, ipv6: bool) -> Option<IpAddr> {
    if identity.primary.is_ipv6() == ipv6 { Some(identity.primary) } else { identity.known.get(ipv6) }
}

/// Reads the passwords file.
///
/// # Errors
///
/// What is wrong, without the secrets.
pub fn read_passwords(path: &std::path::Path) -> Result<Vec<Option<Password>>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    external::passwords(&text)
}

#[cfg(test)]
mod tests;
