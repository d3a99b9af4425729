//! What the room would change, for `ferroute status` and `ferroute plan`. Reads, never writes.
//!
//! Tunnels and learned routes are not in it: what they must be is told by BGP, and the room compares
//! them all the time.

use std::collections::HashSet;
use std::net::IpAddr;

use ferroute_iptables::ipset::{self, Change};
use ipnet::IpNet;

use super::cni_file;
use super::egress::{self, BRIDGE};
use super::error::Error;
use super::facts::{ClusterFacts, Machine};
use super::kernel::Kernel;
use super::node_address::{Host, NodeAddresses, reach};
use super::overlay;
use super::settings::{Reach, Settings};
use super::view::Status;
use crate::cluster::{Cluster, State};
use crate::host::rule::RuleChange;

/// What a room with these settings would change on this machine.
///
/// # Errors
/// When the kernel cannot be read.
pub fn plan(settings: &Settings, cluster: &Cluster) -> Result<Status, Error> {
    let mut kernel = Kernel::open()?;
    let (facts, vips) = {
        let state = cluster.read();
        (ClusterFacts::gather(&state, &settings.node_name), vips(&state))
    };
    if facts.own.is_none() {
        let problem = format!("there is no Node {}, so nothing is changed", settings.node_name);
        return Ok(Status { problems: vec![problem], ..Status::default() });
    }
    let machine = kernel.read_machine()?;
    let mut addresses = NodeAddresses::default();
    let host = Host { links: &machine.links, addresses: &machine.addresses, vips: &vips };
    addresses.update(&settings.addresses, facts.own.as_deref(), &host, reach);
    Ok(Status {
        addresses: addresses.describe(),
        address_problems: addresses.problems().collect(),
        mtu: machine.pod_mtu(settings, &addresses).filter(|_| settings.auto_mtu),
        difference: difference(&mut kernel, settings, &facts, &machine, &addresses)?,
        ..Status::default()
    })
}

/// Addresses of Services: no method may take one for the node's.
pub(super) fn vips(state: &State) -> HashSet<IpAddr> {
    let mut vips = HashSet::new();
    for service in state.services.values() {
        vips.extend(service.cluster_ips.iter().chain(&service.external_ips));
        vips.extend(service.load_balancer_ips.iter());
    }
    vips
}

/// One line for each thing that is not as it must be.
pub(super) fn difference(
    kernel: &mut Kernel,
    settings: &Settings,
    facts: &ClusterFacts,
    machine: &Machine,
    addresses: &NodeAddresses,
) -> Result<Vec<String>, Error> {
    let families = kernel.families().to_vec();
    let mut lines = Vec::new();
    let pods: Vec<IpNet> = facts.pods.iter().copied().collect();
    let nodes: Vec<IpAddr> = facts.nodes.iter().copied().collect();
    let sets = ipset::diff(&kernel.read_sets()?, &egress::sets(&families, &pods, &nodes));
    let retyped = sets.retype.iter().flat_map(|retype| &retype.changes);
    lines.extend(sets.changes.iter().chain(retyped).map(set_line));
    lines.extend(kernel.chain_difference(&egress::rules(&machine.egress(settings, facts), &families))?);
    let own = facts.own_pods();
    let routed = if settings.overlay == Reach::Off { &[][..] } else { &own };
    for change in overlay::diff_rules(&kernel.read_rules()?, routed) {
        lines.push(match change {
            RuleChange::Add(rule) => format!("add rule {rule}"),
            RuleChange::Delete(rule) => format!("delete rule {rule}"),
        });
    }
    let bridge = machine.link(BRIDGE);
    if bridge.is_none() {
        lines.push(format!("create bridge {BRIDGE}"));
    }
    let mut mtu = None;
    if settings.auto_mtu {
        let wanted = machine.pod_mtu(settings, addresses);
        let now = bridge.map(|bridge| bridge.mtu);
        if let Some(wanted) = wanted.filter(|wanted| now != Some(*wanted)) {
            lines.push(format!("set MTU {wanted} on {BRIDGE}"));
        }
        mtu = wanted.or(now);
    }
    if let Some(path) = settings.cni_file.as_ref().filter(|_| !own.is_empty())
        && let Ok(text) = std::fs::read_to_string(path)
        && let Ok(Some(_)) = cni_file::edit(&text, &own, mtu)
    {
        let list: Vec<String> = own.iter().map(ToString::to_string).collect();
        lines.push(format!("write pod CIDRs {} and the MTU into {}", list.join(", "), path.display()));
    }
    Ok(lines)
}

fn set_line(change: &Change) -> String {
    match change {
        Change::Create { set, kind, .. } => format!("create ipset {set} ({kind})"),
        Change::Add { set, entries } => format!("add {} entries to ipset {set}", entries.len()),
        Change::Delete { set, entries } => format!("delete {} entries from ipset {set}", entries.len()),
        Change::Replace { set, with } => format!("replace ipset {set} ({} entries)", with.entries().len()),
        Change::Destroy { set } => format!("destroy ipset {set}"),
    }
}
