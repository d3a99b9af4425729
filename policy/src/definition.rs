//! What fills a set that rules look at, and which entries one pod puts in.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use ferroute_iptables::ipset::{Entry, SetType};
use ferroute_iptables::{Family, Protocol as IpProtocol};
use ipnet::IpNet;

use crate::block::Block;
use crate::name;
use crate::{Key, Labels, Peer, Pod, Protocol, Requirement, Selector};

/// Labels of every namespace.
pub(crate) type Namespaces = BTreeMap<Arc<str>, Arc<Labels>>;

/// What fills one set.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Definition {
    /// Addresses of pods that selectors name.
    Pods { namespace: Arc<str>, peers: Vec<(Option<Selector>, Selector)> },
    /// Addresses of blocks.
    Blocks { blocks: Vec<(IpNet, Vec<IpNet>)> },
    /// Addresses and ports of pods that give a number to a name.
    Ports { whose: Whose, names: Vec<(Protocol, Box<str>)> },
}

/// Whose named ports count.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Whose {
    /// Pods of this node that a policy selects: for ingress.
    Targets { namespace: Arc<str>, selector: Selector },
    /// Destinations that a rule allows: for egress. `None` is every pod.
    Destinations { namespace: Arc<str>, peers: Option<Vec<Peer>> },
}

impl Definition {
    /// The set's name in IPv4, from what fills it: equal definitions of different rules share a set.
    /// `source` says which end of the packet it is compared with.
    pub(crate) fn name(&self, source: bool) -> String {
        match self {
            Self::Pods { namespace, peers } => {
                // Selectors of all namespaces name the same pods whatever namespace the policy is in.
                let own = peers.iter().any(|(namespaces, _)| namespaces.is_none());
                let mut text = String::new();
                for (namespaces, pods) in peers {
                    write_peer(&mut text, namespaces.as_ref(), pods);
                }
                name::members(source, &["pods", if own { namespace } else { "" }, &text])
            }
            Self::Blocks { blocks } => {
                let mut text = String::new();
                for (cidr, except) in blocks {
                    write_block(&mut text, *cidr, except);
                }
                name::members(source, &["blocks", &text])
            }
            Self::Ports { whose, names } => {
                let mut text = String::new();
                for (protocol, port) in names {
                    let _ = write!(text, "{protocol}:{port:?};");
                }
                let mut of = String::new();
                let (kind, namespace) = match whose {
                    Whose::Targets { namespace, selector } => {
                        write_selector(&mut of, selector);
                        ("targets", namespace)
                    }
                    Whose::Destinations { namespace, peers: None } => ("anybody", namespace),
                    Whose::Destinations { namespace, peers: Some(peers) } => {
                        for peer in peers {
                            match peer {
                                Peer::Pods { namespaces, pods } => {
                                    write_peer(&mut of, namespaces.as_ref(), pods);
                                }
                                Peer::Block { cidr, except } => write_block(&mut of, *cidr, except),
                            }
                        }
                        ("destinations", namespace)
                    }
                };
                name::members(source, &["ports", kind, namespace, &of, &text])
            }
        }
    }

    pub(crate) fn set_type(&self) -> SetType {
        match self {
            Self::Pods { .. } => SetType::HashIp,
            Self::Blocks { .. } => SetType::HashNet,
            Self::Ports { .. } => SetType::HashIpPort,
        }
    }

    /// Whether pods of a namespace can be in it.
    pub(crate) fn concerns(&self, namespace: &str, namespaces: &Namespaces) -> bool {
        let one = |own: &str, selector: Option<&Selector>| match selector {
            None => own == namespace,
            Some(selector) => namespaces.get(namespace).is_some_and(|labels| selector.matches(labels)),
        };
        match self {
            Self::Pods { namespace: own, peers } => {
                peers.iter().any(|(selector, _)| one(own, selector.as_ref()))
            }
            Self::Blocks { .. } => false,
            Self::Ports { whose: Whose::Targets { namespace: own, .. }, .. } => &**own == namespace,
            Self::Ports { whose: Whose::Destinations { peers: None, .. }, .. } => true,
            Self::Ports { whose: Whose::Destinations { namespace: own, peers: Some(peers) }, .. } => {
                peers.iter().any(|peer| match peer {
                    Peer::Pods { namespaces, .. } => one(own, namespaces.as_ref()),
                    Peer::Block { .. } => true,
                })
            }
        }
    }

    /// Entries of one pod, with their family.
    pub(crate) fn entries(&self, key: &Key, pod: &Pod, namespaces: &Namespaces) -> Vec<(Family, Entry)> {
        match self {
            Self::Pods { namespace, peers } => {
                let named = peers
                    .iter()
                    .any(|(scope, pods)| names(namespace, scope.as_ref(), pods, key, pod, namespaces));
                if !named {
                    return Vec::new();
                }
                addresses(pod).map(|ip| (Family::of(ip), Entry::Ip(ip))).collect()
            }
            Self::Blocks { .. } => Vec::new(),
            Self::Ports { whose, names: wanted } => {
                let mut entries = Vec::new();
                for ip in addresses(pod).filter(|ip| whose.includes(key, pod, *ip, namespaces)) {
                    for port in &pod.ports {
                        let asked = |(protocol, name): &(Protocol, Box<str>)| {
                            *protocol == port.protocol && *name == port.name
                        };
                        if wanted.iter().any(asked) {
                            let entry = Entry::IpPort(ip, ip_protocol(port.protocol), port.port.get());
                            if !entries.contains(&(Family::of(ip), entry)) {
                                entries.push((Family::of(ip), entry));
                            }
                        }
                    }
                }
                entries
            }
        }
    }
}

impl Whose {
    fn includes(&self, key: &Key, pod: &Pod, ip: IpAddr, namespaces: &Namespaces) -> bool {
        match self {
            Self::Targets { namespace, selector } => {
                pod.is_enforced_here() && key.namespace == *namespace && selector.matches(&pod.labels)
            }
            Self::Destinations { peers: None, .. } => true,
            Self::Destinations { namespace, peers: Some(peers) } => peers.iter().any(|peer| match peer {
                Peer::Pods { namespaces: scope, pods } => {
                    names(namespace, scope.as_ref(), pods, key, pod, namespaces)
                }
                Peer::Block { cidr, except } => Block { cidr: *cidr, except }.holds(ip),
            }),
        }
    }
}

/// Whether a peer of a policy in namespace `own` names a pod.
pub(crate) fn names(
    own: &str,
    scope: Option<&Selector>,
    pods: &Selector,
    key: &Key,
    pod: &Pod,
    namespaces: &Namespaces,
) -> bool {
    let in_scope = match scope {
        None => &*key.namespace == own,
        Some(selector) => namespaces.get(&key.namespace).is_some_and(|labels| selector.matches(labels)),
    };
    in_scope && pods.matches(&pod.labels)
}

/// A pod's addresses that a set can hold, each once.
pub(crate) fn addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> + '_ {
    pod.ips
        .iter()
        .enumerate()
        .filter(|(at, ip)| !ip.is_unspecified() && !pod.ips[..*at].contains(ip))
        .map(|(_, ip)| *ip)
}

/// The protocol as iptables and ipset know it.
pub(crate) fn ip_protocol(protocol: Protocol) -> IpProtocol {
    match protocol {
        Protocol::Tcp => IpProtocol::TCP,
        Protocol::Udp => IpProtocol::UDP,
        Protocol::Sctp => IpProtocol::SCTP,
    }
}

// Texts that name a definition. Keys and values are quoted, so that different definitions have different
// texts whatever they hold. Writing to a String cannot fail.

fn write_peer(text: &mut String, namespaces: Option<&Selector>, pods: &Selector) {
    if let Some(selector) = namespaces {
        text.push('{');
        write_selector(text, selector);
        text.push('}');
    }
    text.push('[');
    write_selector(text, pods);
    text.push(']');
}

fn write_selector(text: &mut String, selector: &Selector) {
    let mut requirements: Vec<&Requirement> = selector.requirements.iter().collect();
    requirements.sort();
    requirements.dedup();
    for requirement in requirements {
        let (sign, key, values) = match requirement {
            Requirement::In(key, values) => ("=", key, Some(values)),
            Requirement::NotIn(key, values) => ("!=", key, Some(values)),
            Requirement::Exists(key) => ("?", key, None),
            Requirement::DoesNotExist(key) => ("!?", key, None),
        };
        let _ = write!(text, "{key:?}{sign}");
        for value in values.into_iter().flatten() {
            let _ = write!(text, "{value:?}|");
        }
        text.push(';');
    }
}

fn write_block(text: &mut String, cidr: IpNet, except: &[IpNet]) {
    let _ = write!(text, "<{cidr}");
    for net in except {
        let _ = write!(text, "-{net}");
    }
    text.push('>');
}
