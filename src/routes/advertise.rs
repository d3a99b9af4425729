//! Nodes and Services to the routes of this node. Pure; which of several claims on an address counts,
//! and whether the proxy is ready for it, is settled in [`Announcements`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ferroute_bgp::message::{Attributes, NextHop};
use ferroute_bgp::speaker::Advertisement;
use ipnet::IpNet;

use super::settings::Settings;
use crate::cluster::ServiceKey;
use crate::cluster::node::Node;
use crate::cluster::service::{Problem, Service, TrafficPolicy};
use crate::proxy::desired::{Slices, VipKind, vips};
use crate::proxy::eligible::eligible;
use crate::proxy::facts::Facts;

/// What kind of route it is, for policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tag {
    /// A network of pods.
    PodCidr,
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `status.loadBalancer.ingress`.
    LoadBalancerIp,
}

impl Tag {
    /// Addresses of Services.
    pub const VIPS: [Self; 3] = [Self::ClusterIp, Self::ExternalIp, Self::LoadBalancerIp];

    /// As routes carry it; 0 is for learned ones.
    pub fn number(self) -> u16 {
        match self {
            Tag::PodCidr => 1,
            Tag::ClusterIp => 2,
            Tag::ExternalIp => 3,
            Tag::LoadBalancerIp => 4,
        }
    }
}

/// An address that a Service wants advertised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Claim {
    /// The address.
    pub address: IpAddr,
    /// What it is to the Service.
    pub tag: Tag,
    /// Only nodes with an endpoint take its traffic (policy Local), so that a range, which other nodes
    /// advertise too, cannot stand for it.
    pub local: bool,
}

/// The addresses of a Service that this node should advertise: those of a kind that is switched on, for
/// which somebody can answer. With policy Local that is a ready endpoint of this node; endpoints that
/// only stand in while they end are served but not advertised, so that clients go where somebody stays.
pub fn addresses(
    settings: &Settings,
    facts: &Facts,
    node: &Node,
    service: &Service,
    slices: Option<&Slices>,
) -> BTreeSet<Claim> {
    let [cluster, external, load_balancer] = service.annotations.advertise;
    let flags = settings.advertise;
    let on = |tag: Tag| match tag {
        Tag::PodCidr => false,
        Tag::ClusterIp => cluster.unwrap_or(flags.cluster_ips),
        Tag::ExternalIp => external.unwrap_or(flags.external_ips) && !node.excluded_from_external_lb,
        Tag::LoadBalancerIp => {
            load_balancer.unwrap_or(flags.load_balancer_ips) && !node.excluded_from_external_lb
        }
    };
    let mut wanted = BTreeSet::new();
    if !Tag::VIPS.into_iter().any(on) {
        return wanted;
    }
    // Told by the proxy already, or there is none and nobody served.
    let mut problems = Vec::new();
    // Whether somebody answers anywhere, and here; per family, asked once.
    let mut answers: [Option<(bool, bool)>; 2] = [None; 2];
    for (kind, vip) in vips(service, facts, &settings.services, &mut problems) {
        let (tag, policy) = match kind {
            VipKind::NodePort => continue,
            VipKind::ClusterIp => (Tag::ClusterIp, service.internal_policy),
            VipKind::ExternalIp => (Tag::ExternalIp, service.external_policy),
            VipKind::LoadBalancerIp => (Tag::LoadBalancerIp, service.external_policy),
        };
        if !on(tag) {
            continue;
        }
        let ipv6 = vip.is_ipv6();
        let (anywhere, here) = *answers[usize::from(ipv6)].get_or_insert_with(|| {
            let found = service.ports.iter().map(|port| {
                let slices = slices.into_iter().flat_map(|slices| slices.values().map(AsRef::as_ref));
                let found = eligible(service, port, slices, ipv6, &facts.name, facts.zone.as_deref());
                (!found.cluster.is_empty(), found.local_ready)
            });
            found.fold((false, false), |all, one| (all.0 | one.0, all.1 | one.1))
        });
        let local = policy == TrafficPolicy::Local;
        let answered = if local { here } else { anywhere };
        if answered {
            wanted.insert(Claim { address: vip, tag, local });
        }
    }
    wanted
}

/// Ranges that are announced whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    /// What each is.
    pub whole: BTreeMap<IpNet, Tag>,
    /// Announce the addresses inside as well.
    pub specifics: bool,
}

/// The ranges of Services that this node announces whole: those of the kinds that flags switch on. A range that
/// covers a node or its pods would lead their traffic here, and is left out and told.
pub fn ranges(settings: &Settings, facts: &Facts) -> (Ranges, Vec<Problem>) {
    let flags = settings.advertise;
    let mut ranges = Ranges { whole: BTreeMap::new(), specifics: flags.specifics };
    let mut problems = Vec::new();
    if !flags.ranges {
        return (ranges, problems);
    }
    let services = &settings.services;
    for (on, tag, list, name) in [
        (flags.cluster_ips, Tag::ClusterIp, &facts.cluster_ranges, "service-cluster-ip-range"),
        (flags.external_ips, Tag::ExternalIp, &services.external_ip_ranges, "service-external-ip-range"),
        (
            flags.load_balancer_ips,
            Tag::LoadBalancerIp,
            &services.load_balancer_ranges,
            "loadbalancer-ip-range",
        ),
    ] {
        // A range of one address is that address.
        let several = list.iter().filter(|range| on && range.prefix_len() < range.max_prefix_len());
        for range in several {
            let meets_pods =
                |pods: &&IpNet| pods.contains(&range.network()) || range.contains(&pods.network());
            if facts.bound_ranges.contains(range) && !facts.pod_cidrs.iter().any(|pods| meets_pods(&pods)) {
                ranges.whole.entry(*range).or_insert(tag);
            } else {
                problems.push(Problem {
                    reason: "RangeNotAdvertised",
                    message: format!(
                        "--advertise-ranges of Node {}: {range} is not advertised whole but address by address: it is \
                         the default of --{name}, or covers an address of a node or of pods; give the range of Services \
                         alone",
                        facts.name
                    ),
                });
            }
        }
    }
    (ranges, problems)
}

/// A route of this node: to one address or to a network of pods.
pub fn route(prefix: IpNet, tag: Tag, facts: &Facts) -> Advertisement {
    let address = if matches!(prefix, IpNet::V6(_)) { facts.ipv6 } else { facts.ipv4 };
    let mut attributes = Attributes::default();
    // Without a node address of the family, the session's own is told.
    if let Some(address) = address {
        attributes.next_hop = NextHop::from(address);
    }
    Advertisement { prefix: prefix.trunc(), path: 0, attributes: Arc::new(attributes), tag: tag.number() }
}

/// What changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Routes to advertise, or to advertise otherwise.
    pub advertise: Vec<(IpNet, Tag)>,
    /// Routes to withdraw.
    pub withdraw: Vec<IpNet>,
}

impl Difference {
    /// Whether nothing did.
    pub fn is_empty(&self) -> bool {
        self.advertise.is_empty() && self.withdraw.is_empty()
    }
}

/// All that is wanted and all that is announced, one change at a time: a change costs what it
/// touches. An address that several Services want is announced as long as one of them does. One inside a range
/// is announced by the range, which goes with the last of them: a node that serves nothing in a range should get
/// nothing of it.
#[derive(Debug, Default)]
pub struct Announcements {
    by_service: HashMap<ServiceKey, BTreeSet<Claim>>,
    /// How many claims there are, and how many of them are local.
    wanted: BTreeMap<IpAddr, BTreeMap<Tag, [usize; 2]>>,
    ranges: Ranges,
    /// Addresses of Services that are announced, each by itself or by its ranges.
    served: BTreeSet<IpAddr>,
    /// How many of them lie in each range.
    inside: BTreeMap<IpNet, usize>,
    pods: BTreeSet<IpNet>,
    announced: BTreeMap<IpNet, Tag>,
    /// Prefixes of which something may have changed since the last look.
    touched: BTreeSet<IpNet>,
}

impl Announcements {
    /// What a Service wants now; nothing when it is gone.
    pub fn put(&mut self, service: &ServiceKey, addresses: BTreeSet<Claim>) {
        let old = if addresses.is_empty() {
            self.by_service.remove(service)
        } else {
            self.by_service.insert(service.clone(), addresses.clone())
        }
        .unwrap_or_default();
        for Claim { address, tag, local } in old.difference(&addresses) {
            if let Some(claims) = self.wanted.get_mut(address) {
                if let Some(count) = claims.get_mut(tag) {
                    count[usize::from(*local)] -= 1;
                    if *count == [0; 2] {
                        claims.remove(tag);
                    }
                }
                if claims.is_empty() {
                    self.wanted.remove(address);
                }
            }
            self.touched.insert(IpNet::from(*address));
        }
        for Claim { address, tag, local } in addresses.difference(&old) {
            self.wanted.entry(*address).or_default().entry(*tag).or_default()[usize::from(*local)] += 1;
            self.touched.insert(IpNet::from(*address));
        }
    }

    /// The pod networks of this node.
    pub fn put_pods(&mut self, networks: &[IpNet]) {
        let new: BTreeSet<IpNet> = networks.iter().map(IpNet::trunc).collect();
        self.touched.extend(self.pods.symmetric_difference(&new));
        self.pods = new;
    }

    /// The ranges that are announced whole.
    pub fn put_ranges(&mut self, ranges: Ranges) {
        if ranges == self.ranges {
            return;
        }
        self.touch_wanted();
        self.touched.extend(self.ranges.whole.keys().chain(ranges.whole.keys()));
        self.ranges = ranges;
        let count = |range: &IpNet| self.served.iter().filter(|address| range.contains(*address)).count();
        self.inside = self.ranges.whole.keys().map(|range| (*range, count(range))).collect();
    }

    /// Something outside changed for these addresses: whether they are programmed.
    pub fn touch(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.touched.extend(addresses.into_iter().map(IpNet::from));
    }

    /// Something outside changed for all: the next hop, say. All are announced anew.
    pub fn touch_all(&mut self) {
        self.touched.extend(self.announced.keys());
        self.touched.extend(self.wanted.keys().map(|address| IpNet::from(*address)));
        self.announced.clear();
    }

    /// Something outside changed for all addresses of Services.
    pub fn touch_wanted(&mut self) {
        self.touched.extend(self.wanted.keys().map(|address| IpNet::from(*address)));
    }

    /// What has to be announced and withdrawn now; counts as done. `ready` says whether packets to an
    /// address of a Service would be served.
    pub fn difference(&mut self, ready: impl Fn(IpAddr) -> bool) -> Difference {
        let mut difference = Difference::default();
        let (mut singles, mut ranges) = (Vec::new(), BTreeSet::new());
        for prefix in std::mem::take(&mut self.touched) {
            if prefix.prefix_len() < prefix.max_prefix_len() || self.pods.contains(&prefix) {
                ranges.insert(prefix);
                continue;
            }
            let address = prefix.addr();
            let claims = self.wanted.get(&address).filter(|_| ready(address));
            let tag = claims.and_then(|claims| claims.keys().next().copied());
            let is_new = tag.is_some();
            let changed = if is_new { self.served.insert(address) } else { self.served.remove(&address) };
            let mut covered = false;
            for (range, count) in self.inside.iter_mut().filter(|(range, _)| range.contains(&address)) {
                covered = true;
                if changed {
                    *count = if is_new { *count + 1 } else { count.saturating_sub(1) };
                    ranges.insert(*range);
                }
            }
            let local = claims.is_some_and(|claims| claims.values().any(|[_, local]| *local > 0));
            singles.push((prefix, tag.filter(|_| !covered || local || self.ranges.specifics)));
        }
        // Now that all that is inside was counted.
        for range in ranges {
            let tag = if self.pods.contains(&range) {
                Some(Tag::PodCidr)
            } else {
                self.ranges.whole.get(&range).copied().filter(|_| self.inside.get(&range) > Some(&0))
            };
            self.settle(range, tag, &mut difference);
        }
        for (prefix, tag) in singles {
            self.settle(prefix, tag, &mut difference);
        }
        difference
    }

    fn settle(&mut self, prefix: IpNet, tag: Option<Tag>, difference: &mut Difference) {
        match (self.announced.get(&prefix).copied(), tag) {
            (before, Some(tag)) if before != Some(tag) => {
                self.announced.insert(prefix, tag);
                difference.advertise.push((prefix, tag));
            }
            (_, None) => {
                // Whatever it was before: a withdrawal of nothing is nothing.
                self.announced.remove(&prefix);
                difference.withdraw.push(prefix);
            }
            _ => {}
        }
    }

    /// All that is announced.
    pub fn announced(&self) -> impl Iterator<Item = (IpNet, Tag)> {
        self.announced.iter().map(|(prefix, tag)| (*prefix, *tag))
    }

    /// How many addresses are wanted and not announced.
    pub fn waiting(&self) -> usize {
        self.wanted.len().saturating_sub(self.served.len())
    }
}

#[cfg(test)]
mod tests;
