//! Who this node is in BGP: AS, identifier, part in route reflection, addresses. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ferroute_bgp::message::{Asn, Families, RouterId};

use super::settings::{RouterIdChoice, Settings};
use crate::cluster::node::Node;
use crate::cluster::service::Problem;
use crate::host::Family;
use crate::network::node_address::{Addresses, Method, Purpose};

/// Annotation with the AS of a Node, where nodes have their own.
pub const ASN: &str = "kube-router.io/node.asn";
/// Annotation that makes a Node a route reflector of the cluster id it names.
pub const SERVER: &str = "kube-router.io/rr.server";
/// Annotation that makes a Node a client of route reflectors.
pub const CLIENT: &str = "kube-router.io/rr.client";
/// Annotation with the addresses to listen on.
pub const LISTEN: &str = "kube-router.io/bgp-local-addresses";

/// This node as a BGP speaker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its AS.
    pub asn: Asn,
    /// Its identifier.
    pub router_id: RouterId,
    /// Its part in route reflection.
    pub reflection: Reflection,
    /// The first address of the Node object: others know it by this one.
    pub primary: IpAddr,
    /// The best address of the Node object in each family: other nodes know it by these.
    pub known: Pair,
    /// Where sessions to external peers start.
    pub source: Pair,
    /// Where this node's routes lead to.
    pub next_hop: Pair,
    /// Addresses to listen on.
    pub listen: Vec<IpAddr>,
}

/// A node's part in route reflection (RFC 4456).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reflection {
    /// Peers with everybody.
    None,
    /// Reflects routes, in this cluster.
    Server(RouterId),
    /// Peers with reflectors only.
    Client,
}

/// An address of each family, where there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pair {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl Pair {
    /// From what is asked for each family; an address of the other one is none.
    fn from(of: impl Fn(Family) -> Option<IpAddr>) -> Self {
        Self {
            v4: of(Family::V4).and_then(|ip| if let IpAddr::V4(ip) = ip { Some(ip) } else { None }),
            v6: of(Family::V6).and_then(|ip| if let IpAddr::V6(ip) = ip { Some(ip) } else { None }),
        }
    }

    /// The address of a family.
    pub fn get(&self, ipv6: bool) -> Option<IpAddr> {
        if ipv6 { self.v6.map(IpAddr::V6) } else { self.v4.map(IpAddr::V4) }
    }

    fn iter(self) -> impl Iterator<Item = IpAddr> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }
}

impl Identity {
    /// Families in which routes can lead to this node.
    pub fn families(&self) -> Families {
        families(self.next_hop.v4.is_some(), self.next_hop.v6.is_some())
    }
}

/// Both, one or no family.
pub(super) fn families(v4: bool, v6: bool) -> Families {
    let one = |has: bool, family| if has { family } else { Families::NONE };
    one(v4, Families::IPV4).or(one(v6, Families::IPV6))
}

/// The address by which other nodes know a node.
pub(super) fn primary(node: &Node) -> Option<IpAddr> {
    node.internal_ips.first().or(node.external_ips.first()).copied()
}

/// Reads this node's identity from its Node object; none when it has no usable AS or address. `chosen` are
/// addresses found on this machine, for those purposes that do not take the Node object's. The problems
/// name what is not as written, or why there is none.
pub fn identify(settings: &Settings, node: &Node, chosen: &Addresses) -> (Option<Identity>, Vec<Problem>) {
    let mut problems = Vec::new();
    let asn = match settings.cluster_asn {
        Some(asn) => Some(asn),
        None => match node.annotations.get(ASN) {
            None => {
                problems.push(Problem {
                    reason: "AsnMissing",
                    message: format!(
                        "Node {} has no annotation {ASN}, so it cannot speak BGP: with --nodes-full-mesh=false every \
                         Node needs one",
                        node.name
                    ),
                });
                None
            }
            Some(text) => asn(text).map_err(|why| problems.push(annotation(node, ASN, text, &why))).ok(),
        },
    };
    let primary = primary(node);
    if primary.is_none() {
        problems.push(Problem {
            reason: "NodeAddressMissing",
            message: format!(
                "Node {} has no address in its status, so it cannot speak BGP: the kubelet or the cloud provider \
                 writes it there",
                node.name
            ),
        });
    }
    let reflection = match (node.annotations.get(SERVER), node.annotations.get(CLIENT)) {
        (None, None) => Some(Reflection::None),
        (Some(text), client) => {
            if client.is_some() {
                problems.push(Problem {
                    reason: "ContradictoryAnnotations",
                    message: format!(
                        "Node {} has both {SERVER} and {CLIENT}; it is a server: remove one of them",
                        node.name
                    ),
                });
            }
            match cluster_id(text) {
                Ok(id) => Some(Reflection::Server(id)),
                Err(why) => {
                    problems.push(annotation(node, SERVER, text, &why));
                    None
                }
            }
        }
        (None, Some(text)) => {
            if let Err(why) = cluster_id(text) {
                problems.push(annotation(node, CLIENT, text, &why));
            }
            // The number is not looked at: a client belongs to the cluster of its servers.
            Some(Reflection::Client)
        }
    };
    let (Some(asn), Some(primary), Some(reflection)) = (asn, primary, reflection) else {
        return (None, problems);
    };
    let known = Pair::from(|family| node.address(family == Family::V6));
    let found = |purpose| match settings.addresses.of(purpose) {
        Method::KubernetesInternalIp => known,
        _ => Pair::from(|family| chosen.get(&(purpose, family)).copied()),
    };
    let (source, next_hop) = (found(Purpose::Source), found(Purpose::NextHop));
    if next_hop == Pair::default() {
        problems.push(Problem {
            reason: "NextHopMissing",
            message: format!(
                "Node {} has no address by --bgp-next-hop-address={}, so no route leads to it: see the address \
                 problems of `ferroute status`",
                node.name, settings.addresses.next_hop
            ),
        });
    }
    let router_id = match (settings.router_id, known.v4) {
        (RouterIdChoice::Given(id), _) => id,
        (RouterIdChoice::NodeAddress, Some(address)) => RouterId(address),
        (RouterIdChoice::NodeAddress, None) | (RouterIdChoice::Generated, _) => generate(primary),
    };
    let listen = listen(node, known, source, &mut problems);
    let identity = Identity { asn, router_id, reflection, primary, known, source, next_hop, listen };
    (Some(identity), problems)
}

/// The addresses to listen on: those of the annotation, else those that nodes and external peers dial.
fn listen(node: &Node, known: Pair, source: Pair, problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    let has = |ipv6| known.get(ipv6).or(source.get(ipv6)).is_some();
    let mut list = Vec::new();
    if let Some(text) = node.annotations.get(LISTEN) {
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            match item.parse::<IpAddr>() {
                Ok(address) if !has(address.is_ipv6()) => {
                    problems.push(annotation(node, LISTEN, item, "the node has no address of this family"));
                }
                Ok(address) if address.is_multicast() => {
                    problems.push(annotation(node, LISTEN, item, "nobody can listen on a multicast address"));
                }
                Ok(address) if !list.contains(&address) => list.push(address),
                Ok(_) => {}
                Err(_) => problems.push(annotation(node, LISTEN, item, "this is no IP address")),
            }
        }
    }
    if list.is_empty() {
        list.extend(known.iter());
        list.extend(source.iter().filter(|address| known.get(address.is_ipv6()) != Some(*address)));
    }
    list
}

/// What is wrong with an annotation, or an item of it.
pub(super) fn annotation(node: &Node, name: &str, text: &str, why: &str) -> Problem {
    let text: String = text.chars().take(80).collect();
    Problem {
        reason: "InvalidAnnotation",
        message: format!("annotation {name} of Node {}: {text:?}: {why}", node.name),
    }
}

/// An AS number as Go's `ParseUint` reads it, base prefixes included.
///
/// # Errors
///
/// What is wrong with it.
pub fn asn(text: &str) -> Result<Asn, String> {
    let number = number(text).ok_or("this is no AS number; write one from 1 to 4294967294")?;
    match number {
        // RFC 7607, 6793, 7300.
        0 | 23456 | 65535 | u32::MAX => Err(format!("AS {number} is reserved; write another, such as 64512")),
        _ => Ok(Asn(number)),
    }
}

/// A cluster id: a number, or four in dotted form (RFC 4456 section 7). Both name the same.
fn cluster_id(text: &str) -> Result<RouterId, String> {
    let text = text.trim();
    let id = number(text).map(RouterId::from).or_else(|| text.parse().ok());
    match id {
        Some(id) if u32::from(id) != 0 => Ok(id),
        Some(_) => Err("a cluster id must not be 0".to_owned()),
        None => Err("a cluster id is a number up to 4294967295, or written like 10.0.0.1".to_owned()),
    }
}

fn number(text: &str) -> Option<u32> {
    let text = text.trim();
    let lower = text.to_ascii_lowercase();
    let (digits, radix) = match lower.get(..2) {
        Some("0x") => (&lower[2..], 16),
        Some("0o") => (&lower[2..], 8),
        Some("0b") => (&lower[2..], 2),
        _ => (&lower[..], 10),
    };
    // `from_str_radix` also takes a sign.
    digits.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric()).then_some(())?;
    u32::from_str_radix(digits, radix).ok()
}

/// The identifier that `--router-id=generate` makes: FNV-1a of 32 bits over the 16 bytes of the address, as
/// kube-router does, so that peers see the same router.
fn generate(address: IpAddr) -> RouterId {
    let bytes = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    };
    let hash =
        bytes.iter().fold(2_166_136_261_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(16_777_619));
    RouterId::from(hash.max(1))
}
