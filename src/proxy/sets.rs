//! The ipsets of the Service room: their names, their types and which entries a Service puts in.
//!
//! All that changes with Services lives in these sets, so that the rules that name them never do.

use std::net::IpAddr;
use std::sync::LazyLock;

use ferroute_iptables as iptables;
use ferroute_iptables::ipset::{Entry, Extra, Options, SetType};
use ferroute_ipvs as ipvs;
use ipnet::IpNet;

use super::desired::{Frontend, ServiceState};
use super::facts::Facts;
use crate::cluster::service::Protocol;

/// What a set of ours is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Addresses of this host: daemons listen there, nothing is rejected.
    LocalAddresses,
    /// Every address a Service is served on.
    Vips,
    /// Every address, protocol and port a Service is served on.
    VipPorts,
    /// Service ranges that are bound as a whole.
    ServiceRanges,
    /// Pod networks of this node, and its endpoints outside them.
    LocalPods,
    /// Frontends whose local clients get a virtual server of their own, with its mark.
    Marks,
    /// Frontends whose remote clients are dropped for want of a local endpoint.
    DropRemote,
    /// Frontends that nobody serves: new clients are refused.
    Unserved,
    /// Frontends that only some sources may use.
    Guarded,
    /// The sources that may.
    Admitted,
    /// Local endpoints that may reach themselves: address, port, same address.
    Hairpin,
}

impl Role {
    /// All roles.
    pub const ALL: [Role; 11] = [
        Role::LocalAddresses,
        Role::Vips,
        Role::VipPorts,
        Role::ServiceRanges,
        Role::LocalPods,
        Role::Marks,
        Role::DropRemote,
        Role::Unserved,
        Role::Guarded,
        Role::Admitted,
        Role::Hairpin,
    ];

    /// The set's name in IPv4; the first three are kube-router's.
    pub fn name(self) -> &'static str {
        match self {
            Role::LocalAddresses => "kube-router-local-ips",
            Role::Vips => "kube-router-svip",
            Role::VipPorts => "kube-router-svip-prt",
            Role::ServiceRanges => "kube-router-svip-range",
            Role::LocalPods => "kube-router-local-nets",
            Role::Marks => "kube-router-svip-mark",
            Role::DropRemote => "kube-router-svip-drop",
            Role::Unserved => "kube-router-svip-none",
            Role::Guarded => "kube-router-svip-guard",
            Role::Admitted => "kube-router-svip-admit",
            Role::Hairpin => "kube-router-hairpin",
        }
    }

    fn set_type(self) -> SetType {
        match self {
            Role::LocalAddresses | Role::Vips => SetType::HashIp,
            Role::ServiceRanges | Role::LocalPods => SetType::HashNet,
            Role::VipPorts | Role::Marks | Role::DropRemote | Role::Unserved | Role::Guarded => {
                SetType::HashIpPort
            }
            Role::Admitted => SetType::HashIpPortNet,
            Role::Hairpin => SetType::HashIpPortIp,
        }
    }
}

/// One set: a role in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SetId {
    /// What it is for.
    pub role: Role,
    /// Its family.
    pub family: iptables::Family,
}

impl SetId {
    /// The set of a role that takes this address.
    pub fn of(role: Role, address: IpAddr) -> Self {
        Self { role, family: iptables::Family::of(address) }
    }

    /// Name in the kernel: IPv6 sets carry kube-router's `inet6:` prefix.
    pub fn name(self) -> iptables::SetName {
        // Asked for with every entry.
        static NAMES: LazyLock<[[iptables::SetName; 2]; Role::ALL.len()]> = LazyLock::new(|| {
            Role::ALL.map(|role| iptables::Family::BOTH.map(|family| SetId { role, family }.spelled()))
        });
        NAMES[self.role as usize][usize::from(self.family == iptables::Family::V6)]
    }

    fn spelled(self) -> iptables::SetName {
        let name = match self.family {
            iptables::Family::V4 => self.role.name().to_owned(),
            iptables::Family::V6 => format!("inet6:{}", self.role.name()),
        };
        // The longest name is 29 bytes; the kernel takes 31. A unit test walks all of them.
        #[allow(clippy::expect_used)]
        iptables::SetName::new(&name).expect("fixed names are short enough")
    }

    /// An empty set of this kind.
    pub fn empty(self) -> iptables::ipset::Set {
        let options = Options {
            // kube-router creates its three sets so; an equal set is adopted, not replaced.
            timeout: matches!(self.role, Role::LocalAddresses | Role::Vips | Role::VipPorts).then_some(0),
            skbinfo: self.role == Role::Marks,
            ..Options::default()
        };
        iptables::ipset::Set::new(self.role.set_type(), self.family, options)
    }
}

/// The entries one frontend needs; `mark` is that of its local clients.
pub fn frontend_entries(frontend: &Frontend, mark: Option<u32>) -> Vec<(SetId, Entry, Extra)> {
    let address = frontend.address;
    let protocol = iptables::Protocol(frontend.protocol.number());
    let set = |role| SetId::of(role, address);
    let front = Entry::IpPort(address, protocol, frontend.port);
    let plain = Extra::default();
    let mut entries = vec![(set(Role::Vips), Entry::Ip(address), plain), (set(Role::VipPorts), front, plain)];
    if let Some(mark) = mark {
        // IPVS compares the whole mark, so the whole mark is set.
        entries.push((set(Role::Marks), front, Extra::marked(mark, u32::MAX)));
    }
    if frontend.drop_remote {
        entries.push((set(Role::DropRemote), front, plain));
    } else if frontend.server.destinations.is_empty() {
        entries.push((set(Role::Unserved), front, plain));
    }
    if let Some(sources) = &frontend.sources {
        entries.push((set(Role::Guarded), front, plain));
        // Sources of the other family admit nobody here: the address stays closed to its own.
        for source in sources.iter().filter(|source| source.addr().is_ipv6() == address.is_ipv6()) {
            for net in without_zero_prefix(*source) {
                entries.push((
                    set(Role::Admitted),
                    Entry::IpPortNet(address, protocol, frontend.port, net),
                    plain,
                ));
            }
        }
    }
    entries
}

/// The entries a Service needs apart from its frontends.
pub fn service_entries(state: &ServiceState) -> Vec<(SetId, Entry, Extra)> {
    let locals = state.local_endpoints.iter().map(|address| {
        (SetId::of(Role::LocalPods, *address), Entry::Net(IpNet::from(*address)), Extra::default())
    });
    // By pod and port, so shared by the Services of both: past IPVS a packet no longer has its VIP. The
    // match that still knows it (`ipvs --vaddr`) takes a rule per frontend, and a bit of the mark would
    // need a second virtual server wherever local clients have one of their own.
    let hairpins = state.hairpin.iter().map(|((address, port), protocol)| {
        let entry = Entry::IpPortIp(*address, iptables::Protocol(protocol.number()), *port, *address);
        (SetId::of(Role::Hairpin, *address), entry, Extra::default())
    });
    locals.chain(hairpins).collect()
}

/// The entries this node itself needs, whatever the Services.
pub fn node_entries(facts: &Facts) -> Vec<(SetId, Entry)> {
    let mut entries = Vec::new();
    for address in &facts.local_addresses {
        if !address.is_unspecified() {
            entries.push((SetId::of(Role::LocalAddresses, *address), Entry::Ip(*address)));
        }
    }
    for (role, nets) in [(Role::ServiceRanges, &facts.bound_ranges), (Role::LocalPods, &facts.pod_cidrs)] {
        for net in nets.iter().flat_map(|net| without_zero_prefix(*net)) {
            entries.push((SetId::of(role, net.addr()), Entry::Net(net)));
        }
    }
    entries
}

/// ipset holds no network of prefix length 0; its two halves say the same.
fn without_zero_prefix(net: IpNet) -> Vec<IpNet> {
    let net = net.trunc();
    if net.prefix_len() > 0 {
        return vec![net];
    }
    net.subnets(1).map(Iterator::collect).unwrap_or_default()
}

/// The key of the virtual server at an address.
pub fn server_key(address: IpAddr, protocol: Protocol, port: u16) -> ipvs::VirtualServerKey {
    let protocol = match protocol {
        Protocol::Tcp => ipvs::Protocol::Tcp,
        Protocol::Udp => ipvs::Protocol::Udp,
        Protocol::Sctp => ipvs::Protocol::Sctp,
    };
    ipvs::VirtualServerKey::Address { protocol, address, port }
}

/// The Service protocol of a virtual server's.
pub fn service_protocol(protocol: ipvs::Protocol) -> Protocol {
    match protocol {
        ipvs::Protocol::Tcp => Protocol::Tcp,
        ipvs::Protocol::Udp => Protocol::Udp,
        ipvs::Protocol::Sctp => Protocol::Sctp,
    }
}

/// The family of a virtual server for an address.
pub fn family(address: IpAddr) -> ipvs::Family {
    if address.is_ipv6() { ipvs::Family::V6 } else { ipvs::Family::V4 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_fits_the_kernel_and_is_unique() {
        let names: std::collections::BTreeSet<String> = Role::ALL
            .into_iter()
            .flat_map(|role| {
                [iptables::Family::V4, iptables::Family::V6]
                    .map(|family| SetId { role, family }.name().to_string())
            })
            .collect();
        assert_eq!(names.len(), 22);
        for (place, role) in Role::ALL.into_iter().enumerate() {
            assert_eq!(role as usize, place, "names are found by their place");
            assert_eq!(SetId { role, family: iptables::Family::V4 }.name().as_str(), role.name());
        }
    }

    #[test]
    fn the_whole_internet_is_two_halves() {
        let halves = without_zero_prefix("0.0.0.0/0".parse().unwrap());
        assert_eq!(halves, ["0.0.0.0/1".parse::<IpNet>().unwrap(), "128.0.0.0/1".parse().unwrap()]);
        assert_eq!(
            without_zero_prefix("10.1.2.3/8".parse().unwrap()),
            ["10.0.0.0/8".parse::<IpNet>().unwrap()]
        );
    }
}
