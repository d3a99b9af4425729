//! Numbers of the route room, under kube-router's names where they mean the same.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ferroute_bgp::fsm::State;
use ferroute_bgp::message::AfiSafi;

use super::advertise::{Difference, Tag};
use super::peers::Kind;
use super::view::View;
use crate::metrics::{Histogram, Page, lock};

/// What the room counts itself.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    peers: Mutex<Histogram>,
    /// Pod networks and VIPs advertised, VIPs withdrawn.
    said: [AtomicU64; 3],
}

impl Numbers {
    pub(super) fn peers_took(&self, time: Duration) {
        lock(&self.peers).observe(time);
    }

    pub(super) fn count(&self, difference: &Difference) {
        let pods = difference.advertise.iter().filter(|(_, tag)| *tag == Tag::PodCidr).count();
        let counts = [pods, difference.advertise.len() - pods, difference.withdraw.len()];
        for (counter, count) in self.said.iter().zip(counts) {
            counter.fetch_add(count as u64, Ordering::Relaxed);
        }
    }
}

impl View {
    /// Writes the room's metrics.
    pub fn metrics(&self, page: &mut Page) {
        let numbers = &self.shared.numbers;
        lock(&numbers.peers).write(
            page.text(),
            "kube_router_controller_bgp_internal_peers_sync_time",
            "Time to work out the BGP peers in seconds",
        );
        let name = "kube_router_controller_bgp_advertisements_sent";
        page.family(name, "counter", "Routes of this node advertised and withdrawn");
        for (kind, count) in ["pod-route", "advertise-vip", "withdraw-vip"].into_iter().zip(&numbers.said) {
            page.sample(name, &[("type", kind)], count.load(Ordering::Relaxed));
        }
        let (known, speaker) = (self.known(), self.speaker());
        let peers = speaker.as_ref().map(|speaker| speaker.peers()).unwrap_or_default();
        let name = "kube_router_controller_bgp_advertisements_received";
        page.family(name, "counter", "UPDATE messages received from the peers that there are");
        page.sample(name, &[], peers.iter().map(|peer| peer.received.update).sum::<u64>());
        let name = "ferroute_bgp_addresses_waiting";
        page.family(name, "gauge", "Addresses to be advertised that are not yet in the kernel");
        page.sample(name, &[], self.shared.waiting.load(Ordering::Relaxed));
        let name = "ferroute_bgp_listeners";
        page.family(name, "gauge", "Whether BGP connections are taken on an address");
        for listener in speaker.iter().flat_map(|speaker| speaker.listeners()) {
            let open = u64::from(listener.address.is_some());
            page.sample(name, &[("address", &listener.wanted.to_string())], open);
        }
        let name = "kube_router_bgp_peer_info";
        page.family(name, "gauge", "BGP peers: address, type, AS and state of the session");
        for peer in &peers {
            let kind = match known.peers.get(&peer.key) {
                Some(Kind::External) => "external",
                _ => "internal",
            };
            let asn = peer.received_open.as_ref().map_or(0, |open| open.asn.0).to_string();
            let state = peer.state.name().to_ascii_lowercase();
            let address = peer.key.to_string();
            page.sample(name, &[("address", &address), ("type", kind), ("asn", &asn), ("state", &state)], 1);
        }
        let name = "ferroute_bgp_session_up";
        page.family(name, "gauge", "Whether the session with a peer is established");
        for peer in &peers {
            let up = u64::from(peer.state == State::Established);
            page.sample(name, &[("address", &peer.key.to_string())], up);
        }
        let name = "ferroute_bgp_session_flaps_total";
        page.family(name, "counter", "Sessions with a peer that went down again");
        for peer in &peers {
            page.sample(name, &[("address", &peer.key.to_string())], peer.flaps);
        }
        let name = "ferroute_bgp_paths";
        page.family(name, "gauge", "Paths of a peer: received, accepted by policy, and sent to it");
        for peer in &peers {
            let address = peer.key.to_string();
            for (family, counts) in &peer.prefixes {
                let family = if *family == AfiSafi::Ipv4Unicast { "ipv4" } else { "ipv6" };
                for (kind, count) in
                    [("received", counts.received), ("accepted", counts.accepted), ("sent", counts.sent)]
                {
                    page.sample(name, &[("address", &address), ("family", family), ("kind", kind)], count);
                }
            }
        }
    }
}
