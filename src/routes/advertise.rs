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
use crate::cluster::service::{Service, TrafficPolicy};
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

/// The addresses of a Service that this node should advertise: those of a kind that is switched on, for
/// which somebody can answer. With policy Local that is a ready endpoint of this node; endpoints that
/// only stand in while they end are served but not advertised, so that clients go where somebody stays.
pub fn addresses(
    settings: &Settings,
    facts: &Facts,
    node: &Node,
    service: &Service,
    slices: Option<&Slices>,
) -> BTreeSet<(IpAddr, Tag)> {
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
        let answered = if policy == TrafficPolicy::Local { here } else { anywhere };
        if answered {
            wanted.insert((vip, tag));
        }
    }
    wanted
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
/// touches. An address that several Services want is announced as long as one of them does.
#[derive(Debug, Default)]
pub struct Announcements {
    by_service: HashMap<ServiceKey, BTreeSet<(IpAddr, Tag)>>,
    wanted: BTreeMap<IpAddr, BTreeMap<Tag, usize>>,
    pods: BTreeSet<IpNet>,
    announced: BTreeMap<IpNet, Tag>,
    /// Prefixes of which something may have changed since the last look.
    touched: BTreeSet<IpNet>,
}

impl Announcements {
    /// What a Service wants now; nothing when it is gone.
    pub fn put(&mut self, service: &ServiceKey, addresses: BTreeSet<(IpAddr, Tag)>) {
        let old = if addresses.is_empty() {
            self.by_service.remove(service)
        } else {
            self.by_service.insert(service.clone(), addresses.clone())
        }
        .unwrap_or_default();
        for (address, tag) in old.difference(&addresses) {
            if let Some(claims) = self.wanted.get_mut(address) {
                if let Some(count) = claims.get_mut(tag) {
                    *count -= 1;
                    if *count == 0 {
                        claims.remove(tag);
                    }
                }
                if claims.is_empty() {
                    self.wanted.remove(address);
                }
            }
            self.touched.insert(IpNet::from(*address));
        }
        for (address, tag) in addresses.difference(&old) {
            *self.wanted.entry(*address).or_default().entry(*tag).or_default() += 1;
            self.touched.insert(IpNet::from(*address));
        }
    }

    /// The pod networks of this node.
    pub fn put_pods(&mut self, networks: &[IpNet]) {
        let new: BTreeSet<IpNet> = networks.iter().map(IpNet::trunc).collect();
        self.touched.extend(self.pods.symmetric_difference(&new));
        self.pods = new;
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
        for prefix in std::mem::take(&mut self.touched) {
            let before = self.announced.get(&prefix).copied();
            match (before, self.tag(prefix, &ready)) {
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
        difference
    }

    fn tag(&self, prefix: IpNet, ready: impl Fn(IpAddr) -> bool) -> Option<Tag> {
        if self.pods.contains(&prefix) {
            return Some(Tag::PodCidr);
        }
        let address = prefix.addr();
        let claims = self.wanted.get(&address).filter(|_| prefix.prefix_len() == prefix.max_prefix_len())?;
        claims.keys().next().copied().filter(|_| ready(address))
    }

    /// All that is announced.
    pub fn announced(&self) -> impl Iterator<Item = (IpNet, Tag)> {
        self.announced.iter().map(|(prefix, tag)| (*prefix, *tag))
    }

    /// How many addresses are wanted and not announced.
    pub fn waiting(&self) -> usize {
        (self.wanted.len() + self.pods.len()).saturating_sub(self.announced.len())
    }
}

#[cfg(test)]
mod tests;
