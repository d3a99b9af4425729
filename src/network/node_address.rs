//! Which of this machine's addresses stands for the node: where BGP sessions to external peers start, what
//! other nodes send pod traffic to, where tunnels end. A machine may have one network for each. Pure, but for
//! [`reach`].
//!
//! Methods are Calico's (`IP_AUTODETECTION_METHOD`); the default is the Node object's InternalIP, as
//! kube-router has it. What is looked for on links passes over links that other programs made (pod
//! bridges, tunnels, VIP dummies), ports of a bridge or bond, and addresses that do not stay: floating
//! ones, VIPs, temporary and deprecated ones.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::str::FromStr;
use std::sync::LazyLock;

use ipnet::IpNet;
use regex::{Regex, RegexSet};

use crate::cluster::node::Node;
use crate::host::Family;
use crate::host::address::LinkAddress;
use crate::host::link::Link;

/// Names of links that no method but `interface=` and `cidr=` looks at: made by container runtimes,
/// other pod networks, tunnels, VIP holders; and ours.
pub const IGNORED_LINKS: [&str; 43] = [
    "^lo$",
    "^docker",
    "^cbr",
    "^dummy",
    "^podman",
    "^virbr",
    "^lxcbr",
    "^lxc",
    "^lxdbr",
    "^veth",
    "^br-[0-9a-f]{12}$",
    "^cali",
    "^tunl",
    "^ip6tnl",
    "^sit",
    "^gre",
    "^flannel",
    "^kube-ipvs",
    "^kube-dummy",
    "^kube-bridge",
    "^kube-tunnel",
    "^cni",
    r"^vxlan[.-].*cali",
    "^vxlan_sys_",
    "^genev_sys_",
    "^ovs-system$",
    "^br-int$",
    "^ovn-k8s-",
    "^nodelocaldns",
    r"^wireguard\.cali",
    "^wg",
    "^cilium",
    "^antrea",
    "^nerdctl",
    "^azv",
    "^eni[0-9a-f]{8,}",
    "^net[0-9]+$",
    "^ifb",
    "^macvtap",
    "^ipvl",
    "^erspan",
    "^ip6gre",
    "^tun-[0-9a-f]{11}$",
];

static IGNORED: LazyLock<RegexSet> = LazyLock::new(|| {
    // Constants; a unit test compiles them.
    #[allow(clippy::expect_used)]
    RegexSet::new(IGNORED_LINKS).expect("fixed patterns are regular expressions")
});

/// IFA_F_TEMPORARY in IPv6, IFA_F_SECONDARY in IPv4.
const TEMPORARY_OR_SECONDARY: u32 = 0x01;
/// IFA_F_DEPRECATED.
const DEPRECATED: u32 = 0x20;
/// IFA_F_NOPREFIXROUTE: set by programs that move an address from host to host.
const NO_PREFIX_ROUTE: u32 = 0x200;
/// RT_SCOPE_SITE; wider scopes have smaller numbers.
const SCOPE_SITE: u8 = 200;

/// Whether links of this name are passed over.
pub fn is_ignored(link: &str) -> bool {
    IGNORED.is_match(link)
}

/// How an address is chosen.
#[derive(Clone, Debug, Default)]
pub enum Method {
    /// The Node object's first InternalIP of the family, else its first ExternalIP.
    #[default]
    KubernetesInternalIp,
    /// The first fitting address, from the link with the highest index down.
    FirstFound,
    /// The address from which the kernel would speak to this host name or address.
    CanReach(Box<str>),
    /// On the first link that matches, in the order of the patterns.
    Interface(Vec<Regex>),
    /// As first-found, but for links that match.
    SkipInterface(Vec<Regex>),
    /// The first address in one of these networks, in their order.
    Cidr(Vec<IpNet>),
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn list(items: impl IntoIterator<Item = impl ToString>) -> String {
            items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(",")
        }
        match self {
            Method::KubernetesInternalIp => f.write_str("kubernetes-internal-ip"),
            Method::FirstFound => f.write_str("first-found"),
            Method::CanReach(host) => write!(f, "can-reach={host}"),
            Method::Interface(patterns) => write!(f, "interface={}", list(patterns)),
            Method::SkipInterface(patterns) => write!(f, "skip-interface={}", list(patterns)),
            Method::Cidr(networks) => write!(f, "cidr={}", list(networks)),
        }
    }
}

impl PartialEq for Method {
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}

/// A text that names no method.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no way to choose an address: {reason}; write kubernetes-internal-ip, first-found, can-reach=HOST, \
     interface=REGEX,..., skip-interface=REGEX,... or cidr=CIDR,..."
)]
pub struct UnknownMethod {
    text: String,
    reason: String,
}

impl FromStr for Method {
    type Err = UnknownMethod;

    fn from_str(text: &str) -> Result<Self, UnknownMethod> {
        let failed = |reason: String| UnknownMethod { text: text.to_owned(), reason };
        let (word, values) = match text.split_once('=') {
            None => (text, None),
            Some((word, values)) => (word, Some(values)),
        };
        let values = |what: &str| match values.map(str::trim) {
            None | Some("") => Err(failed(format!("{word} needs {what}"))),
            Some(values) => Ok(values),
        };
        fn each<T: FromStr<Err: fmt::Display>>(values: &str) -> Result<Vec<T>, String> {
            values
                .split(',')
                .map(|value| value.trim().parse().map_err(|error| format!("{value:?}: {error}")))
                .collect()
        }
        match word {
            "kubernetes-internal-ip" if text == word => Ok(Method::KubernetesInternalIp),
            "first-found" if text == word => Ok(Method::FirstFound),
            "can-reach" => Ok(Method::CanReach(values("a host name or address")?.into())),
            "interface" => each(values("a regular expression")?).map(Method::Interface).map_err(failed),
            "skip-interface" => {
                each(values("a regular expression")?).map(Method::SkipInterface).map_err(failed)
            }
            "cidr" => each(values("a network")?).map(Method::Cidr).map_err(failed),
            _ => Err(failed("there is no such method".to_owned())),
        }
    }
}

/// What an address is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Purpose {
    /// Where BGP sessions to external peers start and are accepted.
    Source,
    /// The next hop that other nodes are told.
    NextHop,
    /// The end of tunnels.
    Overlay,
}

impl Purpose {
    /// All of them.
    pub const ALL: [Purpose; 3] = [Purpose::Source, Purpose::NextHop, Purpose::Overlay];

    /// As in a message.
    pub fn words(self) -> &'static str {
        match self {
            Purpose::Source => "BGP source",
            Purpose::NextHop => "BGP next hop",
            Purpose::Overlay => "tunnel end",
        }
    }
}

/// One method for each purpose.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Methods {
    /// For [`Purpose::Source`].
    pub source: Method,
    /// For [`Purpose::NextHop`].
    pub next_hop: Method,
    /// For [`Purpose::Overlay`].
    pub overlay: Method,
}

impl Methods {
    /// The method of a purpose.
    pub fn of(&self, purpose: Purpose) -> &Method {
        match purpose {
            Purpose::Source => &self.source,
            Purpose::NextHop => &self.next_hop,
            Purpose::Overlay => &self.overlay,
        }
    }
}

/// An address that was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Chosen {
    /// The address.
    pub address: IpAddr,
    /// With the prefix length it has on its link; `None` when this machine does not have it.
    pub network: Option<IpNet>,
    /// Index of its link.
    pub link: Option<u32>,
}

/// No address fits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no {family} address by {method}: {reason}")]
pub struct NoAddress {
    /// IPv4 or IPv6.
    pub family: &'static str,
    /// The method as the user wrote it.
    pub method: String,
    /// What was missing, and the cure.
    pub reason: String,
}

/// This machine's links and addresses.
#[derive(Clone, Copy, Debug)]
pub struct Host<'a> {
    /// All links.
    pub links: &'a [Link],
    /// All addresses.
    pub addresses: &'a [LinkAddress],
    /// Addresses that are never the node's: VIPs of Services.
    pub vips: &'a HashSet<IpAddr>,
}

impl<'a> Host<'a> {
    fn link(&self, index: u32) -> Option<&'a Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// An address as this machine has it.
    pub fn find(&self, address: IpAddr) -> Chosen {
        let found = self.addresses.iter().find(|found| found.address.addr() == address);
        Chosen { address, network: found.map(|found| found.address), link: found.map(|found| found.link) }
    }

    /// Whether an address is fit to stand for the node. Addresses that somebody `named` by their link
    /// or network may be host addresses of a loopback or dummy link.
    fn is_fit(&self, found: &LinkAddress, family: Family, named: bool) -> bool {
        let address = found.address.addr();
        let Some(link) = self.link(found.link) else { return false };
        let is_host = found.address.prefix_len() == found.address.max_prefix_len();
        let carries_no_network = link.is_loopback() || link.kind.as_deref() == Some("dummy");
        let floats = is_host
            && found.flags & NO_PREFIX_ROUTE != 0
            && (family == Family::V6 || found.flags & TEMPORARY_OR_SECONDARY != 0);
        let is_temporary = family == Family::V6 && found.flags & TEMPORARY_OR_SECONDARY != 0;
        Family::of(address) == family
            && found.scope <= SCOPE_SITE
            && found.is_usable()
            && found.flags & DEPRECATED == 0
            && is_global(address)
            && link.is_up()
            && !floats
            && !is_temporary
            && (named || !(is_host && carries_no_network))
            && !self.vips.contains(&address)
    }

    /// The first fitting address of a link, IPv4 secondaries last.
    fn first_on(&self, link: &Link, family: Family, named: bool) -> Option<Chosen> {
        let of_link = || {
            self.addresses
                .iter()
                .filter(|found| found.link == link.index && self.is_fit(found, family, named))
        };
        let primary = of_link().find(|found| found.flags & TEMPORARY_OR_SECONDARY == 0);
        primary.or_else(|| of_link().next()).map(|found| self.find(found.address.addr()))
    }

    /// Links by falling index that no pattern passes over.
    fn eligible(&self) -> Vec<&'a Link> {
        let mut links: Vec<&Link> =
            self.links.iter().filter(|link| link.master.is_none() && !is_ignored(&link.name)).collect();
        links.sort_unstable_by_key(|link| std::cmp::Reverse(link.index));
        links
    }
}

/// Whether an address can be another host's way to us.
fn is_global(address: IpAddr) -> bool {
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !(is_link_local || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

/// Chooses. `reach` answers [`Method::CanReach`] with the address the kernel would speak from.
///
/// # Errors
/// When nothing fits, with what to do.
pub fn choose(
    method: &Method,
    family: Family,
    node: Option<&Node>,
    host: &Host<'_>,
    reach: impl FnOnce(&str, Family) -> io::Result<IpAddr>,
) -> Result<Chosen, NoAddress> {
    let name = if family == Family::V4 { "IPv4" } else { "IPv6" };
    let none = |reason: String| Err(NoAddress { family: name, method: method.to_string(), reason });
    let first = |skip: &[Regex]| {
        let passes = |link: &&Link| !skip.iter().any(|pattern| pattern.is_match(&link.name));
        host.eligible().into_iter().filter(passes).find_map(|link| host.first_on(link, family, false))
    };
    match method {
        Method::KubernetesInternalIp => match node {
            None => none(
                "the Node object is not known yet, or has another name; see --hostname-override".to_owned(),
            ),
            Some(node) => match node.address(family == Family::V6) {
                Some(address) => Ok(host.find(address)),
                None => none(format!(
                    "Node {} has neither InternalIP nor ExternalIP of that family; the kubelet (--node-ip) or the \
                     cloud provider sets them",
                    node.name
                )),
            },
        },
        Method::FirstFound => match first(&[]) {
            Some(chosen) => Ok(chosen),
            None => none("no link has a fitting address; name one with interface= or cidr=".to_owned()),
        },
        Method::SkipInterface(skip) => match first(skip) {
            Some(chosen) => Ok(chosen),
            None => none("no other link has a fitting address; name one with interface= or cidr=".to_owned()),
        },
        Method::CanReach(target) => match reach(target, family) {
            Ok(address) if Family::of(address) == family && is_global(address) => Ok(host.find(address)),
            Ok(address) => none(format!("the kernel would speak from {address}, which others cannot reach")),
            Err(error) => none(format!("{error}; see that there is a route, and that the name resolves")),
        },
        Method::Interface(patterns) => {
            let on = |pattern: &Regex| {
                let links = host.links.iter().filter(|link| pattern.is_match(&link.name));
                links.into_iter().find_map(|link| host.first_on(link, family, true))
            };
            match patterns.iter().find_map(on) {
                Some(chosen) => Ok(chosen),
                None => none("no link that matches has a fitting address (see `ip address`)".to_owned()),
            }
        }
        Method::Cidr(networks) => {
            let inside = |network: &IpNet| {
                let fits = |found: &&LinkAddress| {
                    network.contains(&found.address.addr()) && host.is_fit(found, family, true)
                };
                host.addresses.iter().find(fits).map(|found| host.find(found.address.addr()))
            };
            match networks.iter().find_map(inside) {
                Some(chosen) => Ok(chosen),
                None => none("no fitting address lies in it (see `ip address`)".to_owned()),
            }
        }
    }
}

/// The address from which the kernel would speak to a host now. Sends nothing, but may ask the
/// resolver.
///
/// # Errors
/// When the name has no address of the family, or there is no route.
pub fn reach(target: &str, family: Family) -> io::Result<IpAddr> {
    // The port does not matter; Calico's is 80.
    let mut targets = (target, 80).to_socket_addrs()?;
    let found = targets.find(|found| Family::of(found.ip()) == family);
    let found = found.ok_or_else(|| io::Error::other(format!("{target} has no address of that family")))?;
    let socket = UdpSocket::bind(SocketAddr::new(family.unspecified(), 0))?;
    socket.connect(found)?;
    Ok(socket.local_addr()?.ip())
}

/// Addresses of this node, by what they are for.
pub type Addresses = BTreeMap<(Purpose, Family), IpAddr>;

/// What was chosen, kept while links come and go: a node that changes its address by itself cuts its
/// pods off.
#[derive(Clone, Debug, Default)]
pub struct NodeAddresses {
    chosen: BTreeMap<(Purpose, Family), Chosen>,
    /// Told already, so that each is told once.
    problems: BTreeMap<(Purpose, Family), String>,
}

impl NodeAddresses {
    /// The address for a purpose.
    pub fn get(&self, purpose: Purpose, family: Family) -> Option<Chosen> {
        self.chosen.get(&(purpose, family)).copied()
    }

    /// All that was chosen.
    pub fn all(&self) -> Addresses {
        self.chosen.iter().map(|(key, chosen)| (*key, chosen.address)).collect()
    }

    /// One line for each, by purpose.
    pub fn describe(&self) -> Vec<String> {
        self.chosen
            .iter()
            .map(|((purpose, _), chosen)| format!("{} {}", purpose.words(), chosen.address))
            .collect()
    }

    /// What stands against a choice, by purpose and family, one line each.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        self.problems.iter().map(|((purpose, _), text)| format!("{}: {text}", purpose.words()))
    }

    /// Chooses again; returns whether anything changed. An address that was found on a link stays as long as
    /// the link has it, and also when it went and only another link could give one: that is told. The
    /// Node object's address is followed wherever it goes.
    pub fn update(
        &mut self,
        methods: &Methods,
        node: Option<&Node>,
        host: &Host<'_>,
        mut reach: impl FnMut(&str, Family) -> io::Result<IpAddr>,
    ) -> bool {
        let mut changed = false;
        for purpose in Purpose::ALL {
            for family in Family::BOTH {
                let method = methods.of(purpose);
                let key = (purpose, family);
                let before = self.get(purpose, family);
                // As long as the link has it, nothing is asked: a resolver may be slow.
                let still = before.filter(|_| *method != Method::KubernetesInternalIp);
                let still = still.map(|before| host.find(before.address)).filter(|now| now.link.is_some());
                let (after, problem) = match still {
                    Some(still) => (Some(still), None),
                    None => settle(method, before, choose(method, family, node, host, &mut reach)),
                };
                let is_missing_family = after.is_none();
                match problem {
                    Some(text) => {
                        if self.problems.get(&key) != Some(&text) && !is_missing_family {
                            tracing::warn!(purpose = purpose.words(), problem = text, "address of this node");
                        }
                        self.problems.insert(key, text);
                    }
                    None => {
                        self.problems.remove(&key);
                    }
                }
                if before != after {
                    changed = true;
                    let address = after.map(|chosen| chosen.address);
                    tracing::info!(purpose = purpose.words(), ?family, ?address, %method, "address of this node");
                    match after {
                        Some(chosen) => self.chosen.insert(key, chosen),
                        None => self.chosen.remove(&key),
                    };
                }
            }
        }
        changed
    }
}

/// What to use now, given what was used before and what would be chosen afresh.
fn settle(
    method: &Method,
    before: Option<Chosen>,
    found: Result<Chosen, NoAddress>,
) -> (Option<Chosen>, Option<String>) {
    let Some(before) = before else {
        return match found {
            Ok(chosen) => (Some(chosen), None),
            Err(error) => (None, Some(error.to_string())),
        };
    };
    if matches!(method, Method::KubernetesInternalIp) {
        return match found {
            Ok(chosen) => (Some(chosen), None),
            Err(error) => (Some(before), Some(format!("{error}; {} stays in use", before.address))),
        };
    }
    match found {
        // Renumbered in place.
        Ok(chosen) if chosen.link == before.link && chosen.link.is_some() => (Some(chosen), None),
        Ok(chosen) => (
            Some(before),
            Some(format!(
                "{} is gone from this machine and would be replaced by {} on another link; it stays in use until it \
                 comes back or the process is started again",
                before.address, chosen.address
            )),
        ),
        Err(error) => (
            Some(before),
            Some(format!("{} is gone from this machine ({error}); it stays in use", before.address)),
        ),
    }
}

#[cfg(test)]
mod tests;
