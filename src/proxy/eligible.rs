//! Which endpoints count for a Service port: ready ones, else terminating ones that still serve;
//! narrowed by topology hints; and the subset on this node for the Local traffic policies.
//!
//! The rules are those of the EndpointSlice API (discovery.k8s.io/v1 `EndpointConditions`,
//! `EndpointHints`) and KEP-1669, KEP-4444, KEP-3015.

use std::net::IpAddr;
use std::sync::Arc;

use crate::cluster::endpoints::{Endpoint, Hints, Slice};
use crate::cluster::service::{Service, ServicePort};

/// An endpoint address and its target port.
pub type Target = (IpAddr, u16);

/// The endpoints of one Service port in one family, sorted and unique.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Eligible {
    /// Endpoints for traffic that may go anywhere in the cluster.
    pub cluster: Vec<Target>,
    /// Endpoints for traffic that must stay on this node.
    pub local: Vec<Target>,
    /// Whether `local` holds ready endpoints, not terminating ones that stand in for them.
    pub local_ready: bool,
}

struct Candidate<'a> {
    target: Target,
    ready: bool,
    /// Terminating but still serving: used only when nothing is ready.
    fallback: bool,
    local: bool,
    hints: Option<&'a Arc<Hints>>,
}

/// Selects the endpoints of `port` in one family for a node called `node` in `zone`.
pub fn eligible<'a>(
    service: &Service,
    port: &ServicePort,
    slices: impl Iterator<Item = &'a Slice>,
    ipv6: bool,
    node: &str,
    zone: Option<&str>,
) -> Eligible {
    let mut candidates: Vec<Candidate<'a>> = Vec::new();
    for slice in slices {
        for slice_port in slice.ports.iter() {
            if slice_port.name != port.name || slice_port.protocol != port.protocol {
                continue;
            }
            candidates.reserve(slice.endpoints.len());
            candidates.extend(
                slice
                    .endpoints
                    .iter()
                    .filter(|endpoint| endpoint.address.is_ipv6() == ipv6)
                    .map(|endpoint| candidate(service, endpoint, slice_port.port.get(), node)),
            );
        }
    }
    // An endpoint that moves from one slice to another is for a moment in both: the better wins.
    candidates.sort_by_key(|candidate| (candidate.target, !candidate.ready, !candidate.fallback));
    candidates.dedup_by_key(|candidate| candidate.target);

    Eligible {
        cluster: cluster_targets(&candidates, node, zone),
        local: targets(&candidates, |c| c.local),
        local_ready: candidates.iter().any(|c| c.local && c.ready),
    }
}

fn candidate<'a>(service: &Service, endpoint: &'a Endpoint, port: u16, node: &str) -> Candidate<'a> {
    Candidate {
        target: (endpoint.address, port),
        ready: endpoint.ready || service.publish_not_ready,
        fallback: endpoint.serving && endpoint.terminating,
        local: endpoint.node.as_deref() == Some(node),
        hints: endpoint.hints.as_ref(),
    }
}

/// Ready candidates that pass `wanted`, else terminating ones that serve and pass it.
fn targets(candidates: &[Candidate<'_>], wanted: impl Fn(&Candidate<'_>) -> bool) -> Vec<Target> {
    let pick = |usable: fn(&Candidate<'_>) -> bool| -> Vec<Target> {
        candidates.iter().filter(|c| usable(c) && wanted(c)).map(|c| c.target).collect()
    };
    let ready = pick(|c| c.ready);
    if ready.is_empty() { pick(|c| c.fallback) } else { ready }
}

/// Cluster-wide targets, narrowed by hints when every ready endpoint has them and at least one is
/// meant for this node (`forNodes`) or zone (`forZones`); else nobody would be served.
fn cluster_targets(candidates: &[Candidate<'_>], node: &str, zone: Option<&str>) -> Vec<Target> {
    let for_node = |c: &Candidate<'_>| c.hints.is_some_and(|h| h.nodes.iter().any(|n| **n == *node));
    let for_zone = |c: &Candidate<'_>| {
        zone.is_some_and(|zone| c.hints.is_some_and(|h| h.zones.iter().any(|z| **z == *zone)))
    };
    let ready = || candidates.iter().filter(|c| c.ready);
    let all_hint = |has: fn(&Hints) -> bool| ready().all(|c| c.hints.is_some_and(|h| has(h)));
    if all_hint(|h| !h.nodes.is_empty()) && ready().any(for_node) {
        targets(candidates, for_node)
    } else if all_hint(|h| !h.zones.is_empty()) && ready().any(for_zone) {
        targets(candidates, for_zone)
    } else {
        targets(candidates, |_| true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::fixture;

    /// One endpoint: host byte, flags (r ready, s serving, t terminating), node, zone hints, node hints.
    type Row = (u8, &'static str, &'static str, &'static [&'static str], &'static [&'static str]);

    fn slice(rows: &[Row]) -> Slice {
        let endpoints = rows
            .iter()
            .map(|(host, flags, node, zones, nodes)| {
                let names = |list: &[&str]| list.iter().map(|name| Arc::from(*name)).collect();
                Endpoint {
                    hints: (!zones.is_empty() || !nodes.is_empty())
                        .then(|| Arc::new(Hints { zones: names(zones), nodes: names(nodes) })),
                    ..fixture::endpoint(*host, flags, node)
                }
            })
            .collect();
        fixture::slice(&[("http", Protocol::Tcp, 8080)], endpoints)
    }

    use crate::cluster::service::Protocol;

    fn hosts(targets: &[Target]) -> Vec<u8> {
        targets
            .iter()
            .map(|(address, port)| {
                assert_eq!(*port, 8080);
                match address {
                    IpAddr::V4(v4) => v4.octets()[3],
                    IpAddr::V6(v6) => v6.octets()[15],
                }
            })
            .collect()
    }

    fn check(rows: &[Row], cluster: &[u8], local: &[u8]) {
        let service = fixture::service("web");
        let port = fixture::port("http", Protocol::Tcp, 80, None);
        let slice = slice(rows);
        let found = eligible(&service, &port, std::iter::once(&slice), false, "n1", Some("z1"));
        assert_eq!(
            (hosts(&found.cluster), hosts(&found.local)),
            (cluster.to_vec(), local.to_vec()),
            "{rows:?}"
        );
    }

    #[test]
    fn readiness_table() {
        check(&[(1, "rs", "n1", &[], &[]), (2, "rs", "n2", &[], &[])], &[1, 2], &[1]);
        check(&[(1, "", "n1", &[], &[]), (2, "rs", "n2", &[], &[])], &[2], &[]);
        // Terminating endpoints only where nothing is ready, for each view on its own.
        check(&[(1, "st", "n1", &[], &[]), (2, "rs", "n2", &[], &[])], &[2], &[1]);
        check(&[(1, "st", "n1", &[], &[]), (2, "t", "n2", &[], &[])], &[1], &[1]);
        check(&[(1, "s", "n1", &[], &[])], &[], &[]);
        check(&[], &[], &[]);
        // The same address twice: the better state wins, once.
        check(&[(1, "", "n1", &[], &[]), (1, "rs", "n1", &[], &[])], &[1], &[1]);
    }

    #[test]
    fn hints_table() {
        let z1: &[&str] = &["z1"];
        let z2: &[&str] = &["z2"];
        let n1: &[&str] = &["n1"];
        let n2: &[&str] = &["n2"];
        check(&[(1, "rs", "n1", z1, &[]), (2, "rs", "n2", z2, &[])], &[1], &[1]);
        // A ready endpoint without a hint, or no hint for our zone: hints are not used.
        check(&[(1, "rs", "n1", z1, &[]), (2, "rs", "n2", &[], &[])], &[1, 2], &[1]);
        check(&[(1, "rs", "n1", z2, &[]), (2, "rs", "n2", z2, &[])], &[1, 2], &[1]);
        // Node hints come first; the Local view knows no hints.
        check(&[(1, "rs", "n1", z1, n1), (2, "rs", "n2", z1, n2)], &[1], &[1]);
        check(&[(1, "rs", "n1", z1, n2), (2, "rs", "n2", z1, n2)], &[1, 2], &[1]);
        check(&[(1, "rs", "n2", z2, n1), (2, "rs", "n1", z1, n2)], &[1], &[2]);
    }

    #[test]
    fn ports_match_by_name_and_protocol_and_publish_not_ready_counts() {
        let mut service = fixture::service("web");
        let slice = slice(&[(1, "", "n1", &[], &[])]);
        let find = |service: &Service, name: &str, protocol, ipv6| {
            let port = fixture::port(name, protocol, 80, None);
            eligible(service, &port, std::iter::once(&slice), ipv6, "n1", None)
        };
        assert_eq!(find(&service, "http", Protocol::Tcp, false), Eligible::default());
        service.publish_not_ready = true;
        assert_eq!(hosts(&find(&service, "http", Protocol::Tcp, false).cluster), [1]);
        assert_eq!(find(&service, "http", Protocol::Udp, false), Eligible::default());
        assert_eq!(find(&service, "other", Protocol::Tcp, false), Eligible::default());
        assert_eq!(find(&service, "http", Protocol::Tcp, true), Eligible::default());
    }
}
