//! One Service and its endpoints to what the kernel must hold for it. Pure: no clock, no kernel.
//!
//! A [`Frontend`] is one VIP, protocol and port. It has a virtual server for everybody and, when
//! clients on this node must see other endpoints than clients outside (external traffic policy
//! Local), a second one that the firewall mark selects for the local clients.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ferroute_ipvs as ipvs;
use ipnet::IpNet;

use super::eligible::{Target, eligible};
use super::facts::Facts;
use super::settings::Settings;
pub use crate::cluster::endpoints::Slices;
use crate::cluster::service::{Problem, Protocol, Service, ServicePort, ServiceType, TrafficPolicy};

/// Which field of the Service a VIP comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum VipKind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// A node address with the node port.
    NodePort,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancerIp,
}

impl VipKind {
    /// As messages name it.
    fn field(self) -> &'static str {
        match self {
            VipKind::ClusterIp => "cluster IP",
            VipKind::NodePort => "node address",
            VipKind::ExternalIp => "externalIPs entry",
            VipKind::LoadBalancerIp => "load-balancer IP",
        }
    }
}

/// One VIP, protocol and port of a Service.
#[derive(Clone, Debug, PartialEq)]
pub struct Frontend {
    /// Where the VIP comes from.
    pub kind: VipKind,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The VIP (or node address).
    pub address: IpAddr,
    /// Port on the VIP.
    pub port: u16,
    /// Index into `Service::ports`, to tell the ports' marks apart.
    pub port_index: u16,
    /// The virtual server found by address.
    pub server: Arc<ipvs::VirtualServer>,
    /// The virtual server for local clients, where it must differ.
    pub local_clients: Option<Arc<ipvs::VirtualServer>>,
    /// Packets of remote clients are dropped, not refused: this node has no endpoint for them but
    /// others do, so a retry may reach one of those (Kubernetes, external traffic policy Local).
    pub drop_remote: bool,
    /// Only these sources may use the VIP (`loadBalancerSourceRanges`), if any are given.
    pub sources: Option<Arc<[IpNet]>>,
}

/// Everything one Service asks of the kernel.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceState {
    /// VIPs with ports.
    pub frontends: Vec<Frontend>,
    /// Addresses of this node's endpoints that no pod CIDR covers: they count as local all the same.
    pub local_endpoints: BTreeSet<IpAddr>,
    /// Local endpoints that may talk to themselves through the Service.
    pub hairpin: BTreeSet<(Target, Protocol)>,
    /// Health check port and the number of ready local endpoints to answer with.
    pub health: Option<(u16, usize)>,
    /// What could not be honoured here (refused addresses, unknown schedulers).
    pub problems: Vec<Problem>,
    /// `metadata.creationTimestamp`: the older claimant of a frontend wins.
    pub created: i64,
}

/// Computes the state of one Service. `missing` names the schedulers this kernel does not have.
pub fn desired(
    service: &Service,
    slices: Option<&Slices>,
    facts: &Facts,
    settings: &Settings,
    missing: &BTreeSet<Box<str>>,
) -> ServiceState {
    let mut state = ServiceState { created: service.created, ..ServiceState::default() };
    let scheduling = Scheduling::of(service, missing, &mut state.problems);
    let vips = vips(service, facts, settings, &mut state.problems);
    let sources: Option<Arc<[IpNet]>> =
        (!service.source_ranges.is_empty()).then(|| service.source_ranges.as_slice().into());
    let hairpin = settings.hairpin_all || service.annotations.hairpin;
    let asks_for_local = [service.internal_policy, service.external_policy].contains(&TrafficPolicy::Local);
    // Per family: an endpoint with an address of each is one endpoint.
    let mut local_addresses = [BTreeSet::new(), BTreeSet::new()];

    for (index, port) in service.ports.iter().enumerate() {
        for ipv6 in [false, true] {
            if !vips.iter().any(|(_, vip)| vip.is_ipv6() == ipv6) {
                continue;
            }
            let found = eligible(
                service,
                port,
                slices.into_iter().flat_map(|slices| slices.values().map(AsRef::as_ref)),
                ipv6,
                &facts.name,
                facts.zone.as_deref(),
            );
            for (address, _) in &found.local {
                if found.local_ready {
                    local_addresses[usize::from(ipv6)].insert(*address);
                }
                if !facts.is_local_pod(*address) {
                    state.local_endpoints.insert(*address);
                }
            }
            if hairpin {
                state.hairpin.extend(found.local.iter().map(|target| (*target, port.protocol)));
            }
            let cluster = scheduling.server(&found.cluster, ipv6);
            let local = if !asks_for_local || found.local == found.cluster {
                cluster.clone()
            } else {
                scheduling.server(&found.local, ipv6)
            };
            for (kind, vip) in vips.iter().filter(|(_, vip)| vip.is_ipv6() == ipv6) {
                let Some(number) = frontend_port(*kind, port) else { continue };
                let (server, local_clients) = match kind {
                    VipKind::ClusterIp if service.internal_policy == TrafficPolicy::Local => (&local, None),
                    VipKind::ClusterIp => (&cluster, None),
                    _ if service.external_policy == TrafficPolicy::Local => {
                        (&local, (!Arc::ptr_eq(&local, &cluster)).then(|| cluster.clone()))
                    }
                    _ => (&cluster, None),
                };
                state.frontends.push(Frontend {
                    kind: *kind,
                    protocol: port.protocol,
                    address: *vip,
                    port: number,
                    port_index: u16::try_from(index).unwrap_or(u16::MAX),
                    server: server.clone(),
                    drop_remote: local_clients.is_some() && server.destinations.is_empty(),
                    local_clients,
                    sources: if *kind == VipKind::LoadBalancerIp { sources.clone() } else { None },
                });
            }
        }
    }
    for port in service.ports.iter().filter_map(|port| port.node_port) {
        if service.kind != ServiceType::ClusterIp && !settings.node_port_range.contains(&port.get()) {
            state.problems.push(Problem {
                reason: "NodePortOutsideRange",
                message: format!(
                    "node port {port} of Service {} is served, but lies outside --service-node-port-range \
                     {}-{}: give the API server's own range there",
                    service.key,
                    settings.node_port_range.start(),
                    settings.node_port_range.end()
                ),
            });
        }
    }
    let [ipv4, ipv6] = local_addresses.map(|addresses| addresses.len());
    state.health = service.health_check_node_port.map(|port| (port.get(), ipv4.max(ipv6)));
    drop_duplicates(service, &mut state);
    // It stays, ten thousand times.
    state.frontends.shrink_to_fit();
    state
}

fn frontend_port(kind: VipKind, port: &ServicePort) -> Option<u16> {
    match kind {
        VipKind::NodePort => port.node_port.map(Into::into),
        _ => Some(port.port.get()),
    }
}

/// Two VIPs of one Service may coincide (an external IP that is also a load-balancer IP): the
/// first is served; source ranges of any of them hold for the address.
fn drop_duplicates(service: &Service, state: &mut ServiceState) {
    if state.frontends.len() < 2 {
        return;
    }
    let mut seen: BTreeMap<(Protocol, IpAddr, u16), usize> = BTreeMap::new();
    let mut kept: Vec<Frontend> = Vec::with_capacity(state.frontends.len());
    for frontend in state.frontends.drain(..) {
        let key = (frontend.protocol, frontend.address, frontend.port);
        match seen.get(&key) {
            None => {
                seen.insert(key, kept.len());
                kept.push(frontend);
            }
            Some(&first) => {
                if kept[first].sources.is_none() {
                    kept[first].sources = frontend.sources;
                }
                if kept[first].port_index != frontend.port_index {
                    state.problems.push(Problem {
                        reason: "DuplicatePort",
                        message: format!(
                            "{} {}:{} of Service {} is asked for by two of its ports; the first one is served: \
                             give one of them another port",
                            frontend.protocol, frontend.address, frontend.port, service.key
                        ),
                    });
                }
            }
        }
    }
    state.frontends = kept;
}

/// The VIPs of a Service that pass validation.
pub fn vips(
    service: &Service,
    facts: &Facts,
    settings: &Settings,
    problems: &mut Vec<Problem>,
) -> Vec<(VipKind, IpAddr)> {
    let mut vips: Vec<(VipKind, IpAddr)> =
        service.cluster_ips.iter().map(|ip| (VipKind::ClusterIp, *ip)).collect();
    if service.ports.iter().any(|port| port.node_port.is_some()) && service.kind != ServiceType::ClusterIp {
        let has_family = |ipv6: bool| service.cluster_ips.iter().any(|ip| ip.is_ipv6() == ipv6);
        vips.extend(
            facts
                .node_port_addresses
                .iter()
                .filter(|ip| has_family(ip.is_ipv6()))
                .map(|ip| (VipKind::NodePort, *ip)),
        );
    }
    let mut admit = |kind: VipKind, list: &[IpAddr], ranges: &[IpNet], flag: &str, field: &str| {
        for ip in list {
            if !settings.strict_external_ips {
                vips.push((kind, *ip));
                continue;
            }
            let cure = if facts.cluster_ranges.iter().any(|range| range.contains(ip)) {
                "it lies in the cluster IP range, where an external address could take over a Service; use another"
                    .to_owned()
            } else if !ranges.iter().any(|range| range.contains(ip)) {
                format!(
                    "no {flag} covers it; add its range there, or set --strict-external-ip-validation=false"
                )
            } else {
                vips.push((kind, *ip));
                continue;
            };
            problems.push(Problem {
                reason: "ExternalAddressRefused",
                message: format!("{field} {ip} of Service {} is not served: {cure}", service.key),
            });
        }
    };
    admit(
        VipKind::ExternalIp,
        &service.external_ips,
        &settings.external_ip_ranges,
        "--service-external-ip-range",
        VipKind::ExternalIp.field(),
    );
    if !service.annotations.skip_lb_ips {
        admit(
            VipKind::LoadBalancerIp,
            &service.load_balancer_ips,
            &settings.load_balancer_ranges,
            "--loadbalancer-ip-range",
            VipKind::LoadBalancerIp.field(),
        );
    }
    vips.retain(|(kind, vip)| {
        let Some(node) = facts.other_machines.get(vip) else { return true };
        problems.push(Problem {
            reason: "NodeAddress",
            message: format!(
                "{} {vip} of Service {} is an address of node {node} and is served there only: here it would lead \
                 programs that speak to that machine elsewhere; use an address of no machine",
                kind.field(),
                service.key
            ),
        });
        false
    });
    if !facts.kernel_ipv6 && vips.iter().any(|(_, vip)| vip.is_ipv6()) {
        vips.retain(|(_, vip)| vip.is_ipv4());
        problems.push(Problem {
            reason: "IPv6Missing",
            message: format!(
                "the IPv6 addresses of Service {} are not served on node {}: its kernel has IPv6 switched off; \
                 boot it without ipv6.disable=1",
                service.key, facts.name
            ),
        });
    }
    vips
}

/// How the virtual servers of a Service spread their clients.
struct Scheduling {
    scheduler: ipvs::Scheduler,
    flags: ipvs::Flags,
    timeout: u32,
}

impl Scheduling {
    fn of(service: &Service, missing: &BTreeSet<Box<str>>, problems: &mut Vec<Problem>) -> Self {
        let mut scheduler = ipvs::Scheduler::RR;
        if let Some(name) = service.annotations.scheduler.as_deref() {
            match ipvs::Scheduler::ALL.into_iter().find(|scheduler| scheduler.name() == name) {
                None => problems.push(Problem {
                    reason: "UnknownScheduler",
                    message: format!(
                        "kube-router.io/service.scheduler {name:?} of Service {} is no IPVS scheduler; rr is used: \
                         choose one of {}",
                        service.key,
                        ipvs::Scheduler::ALL.map(|scheduler| scheduler.to_string()).join(", ")
                    ),
                }),
                Some(_) if missing.contains(name) => problems.push(Problem {
                    reason: "SchedulerMissing",
                    message: format!(
                        "this node's kernel has no IPVS scheduler {name} for Service {}; rr is used: load the module \
                         ip_vs_{name} there",
                        service.key
                    ),
                }),
                Some(known) => scheduler = known,
            }
        }
        let mut flags = ipvs::Flags::default();
        if scheduler == ipvs::Scheduler::MH || scheduler == ipvs::Scheduler::SH {
            flags |= ipvs::Flags::from_bits(service.annotations.sched_flags);
        }
        if service.affinity.is_some() {
            flags |= ipvs::Flags::PERSISTENT;
        }
        Self { scheduler, flags, timeout: service.affinity.unwrap_or(0) }
    }

    fn server(&self, targets: &[Target], ipv6: bool) -> Arc<ipvs::VirtualServer> {
        let family = if ipv6 { ipvs::Family::V6 } else { ipvs::Family::V4 };
        let options = ipvs::Options {
            scheduler: self.scheduler,
            flags: self.flags,
            timeout: self.timeout,
            netmask: ipvs::Netmask::host(family),
        };
        let destinations =
            targets.iter().map(|(address, port)| ipvs::Destination::masquerade(*address, *port, 1)).collect();
        Arc::new(ipvs::VirtualServer::new(options, destinations))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::endpoints::Slice;
    use crate::proxy::fixture;

    #[test]
    fn an_address_of_another_machine_is_no_vip_here() {
        let mut service = fixture::service("web");
        service.external_ips = vec![[203, 0, 113, 7].into(), [10, 10, 0, 11].into()];
        service.load_balancer_ips = vec![[203, 0, 113, 200].into()];
        let mut facts = fixture::facts();
        facts.other_machines.insert([203, 0, 113, 7].into(), Arc::from("n2"));
        facts.other_machines.insert([203, 0, 113, 200].into(), Arc::from("n3"));
        let mut settings = fixture::settings();
        settings.external_ip_ranges.push("10.10.0.0/24".parse().unwrap());
        let state = desired(&service, None, &facts, &settings, &BTreeSet::new());
        let served: Vec<String> = state.frontends.iter().map(|front| front.address.to_string()).collect();
        assert_eq!(served, ["10.96.0.10", "10.10.0.11"], "its own address it may serve");
        let told: Vec<&str> = state.problems.iter().map(|problem| problem.message.as_str()).collect();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(
            told[0].starts_with("externalIPs entry 203.0.113.7 of Service shop/web is an address of node n2")
        );
        assert!(told[1].starts_with("load-balancer IP 203.0.113.200"), "{told:?}");
    }

    fn compute(service: &Service, slice: Slice) -> ServiceState {
        let slices = Slices::from([(Arc::from("a"), Arc::new(slice))]);
        desired(service, Some(&slices), &fixture::facts(), &fixture::settings(), &BTreeSet::new())
    }

    /// `kind address:port -> destinations (| destinations for local clients)` per frontend.
    fn rows(state: &ServiceState) -> Vec<String> {
        let list = |server: &ipvs::VirtualServer| {
            server
                .destinations
                .iter()
                .map(|d| format!("{}:{}", d.address, d.port))
                .collect::<Vec<_>>()
                .join(",")
        };
        state
            .frontends
            .iter()
            .map(|f| {
                let mut row =
                    format!("{:?} {} {}:{} -> {}", f.kind, f.protocol, f.address, f.port, list(&f.server));
                if let Some(local) = &f.local_clients {
                    row += &format!(" | {}", list(local));
                }
                if f.drop_remote {
                    row += " drop";
                }
                row
            })
            .collect()
    }

    fn two_nodes() -> Slice {
        fixture::slice(
            &[("http", Protocol::Tcp, 8080)],
            vec![fixture::endpoint(1, "rs", "n1"), fixture::endpoint(2, "rs", "n2")],
        )
    }

    fn load_balancer() -> Service {
        Service {
            kind: ServiceType::LoadBalancer,
            ports: vec![fixture::port("http", Protocol::Tcp, 80, Some(30080))],
            external_ips: vec![[203, 0, 113, 5].into()],
            load_balancer_ips: vec![[203, 0, 113, 200].into()],
            ..fixture::service("web")
        }
    }

    #[test]
    fn every_kind_of_vip_gets_a_frontend() {
        let state = compute(&load_balancer(), two_nodes());
        let both = "10.244.1.1:8080,10.244.1.2:8080";
        assert_eq!(
            rows(&state),
            [
                format!("ClusterIp TCP 10.96.0.10:80 -> {both}"),
                format!("NodePort TCP 10.10.0.11:30080 -> {both}"),
                format!("ExternalIp TCP 203.0.113.5:80 -> {both}"),
                format!("LoadBalancerIp TCP 203.0.113.200:80 -> {both}"),
            ]
        );
        assert!(state.problems.is_empty());
        assert!(Arc::ptr_eq(&state.frontends[0].server, &state.frontends[3].server));
    }

    #[test]
    fn local_policies_split_remote_from_local_clients() {
        let external = Service { external_policy: TrafficPolicy::Local, ..load_balancer() };
        let state = compute(&external, two_nodes());
        let both = "10.244.1.1:8080,10.244.1.2:8080";
        assert_eq!(rows(&state)[0], format!("ClusterIp TCP 10.96.0.10:80 -> {both}"));
        for row in &rows(&state)[1..] {
            assert!(row.ends_with(&format!("-> 10.244.1.1:8080 | {both}")), "{row}");
        }
        // Nothing here: remote clients are dropped, local ones still served.
        let elsewhere =
            fixture::slice(&[("http", Protocol::Tcp, 8080)], vec![fixture::endpoint(2, "rs", "n2")]);
        let state = compute(&external, elsewhere);
        assert!(rows(&state)[1].ends_with("->  | 10.244.1.2:8080 drop"), "{:?}", rows(&state));
        // Nothing anywhere: refused, not dropped.
        let state = compute(&external, Slice::default());
        assert!(state.frontends.iter().all(|f| !f.drop_remote && f.local_clients.is_none()));
        // Internal policy Local: the cluster IP has only what is here, for every client.
        let internal = Service { internal_policy: TrafficPolicy::Local, ..load_balancer() };
        let state = compute(&internal, two_nodes());
        assert_eq!(rows(&state)[0], "ClusterIp TCP 10.96.0.10:80 -> 10.244.1.1:8080");
        assert_eq!(rows(&state)[1], format!("NodePort TCP 10.10.0.11:30080 -> {both}"));
    }

    #[test]
    fn families_do_not_mix() {
        let service = Service {
            cluster_ips: vec![[10, 96, 0, 10].into(), "fd00:96::10".parse().unwrap()],
            ports: vec![fixture::port("http", Protocol::Tcp, 80, Some(30080))],
            kind: ServiceType::NodePort,
            ..fixture::service("web")
        };
        let mut slice = two_nodes();
        slice.endpoints.push(fixture::endpoint6(7, "n1"));
        let state = compute(&service, slice);
        assert_eq!(
            rows(&state)[2..],
            [
                "ClusterIp TCP fd00:96::10:80 -> fd00:244:1::7:8080".to_owned(),
                "NodePort TCP fd00:10::11:30080 -> fd00:244:1::7:8080".to_owned(),
            ]
        );
    }

    #[test]
    fn external_addresses_outside_their_ranges_are_refused_with_the_cure() {
        let service = Service {
            external_ips: vec![[198, 51, 100, 1].into(), [10, 96, 7, 7].into(), [203, 0, 113, 9].into()],
            load_balancer_ips: vec![[198, 51, 100, 2].into()],
            ..load_balancer()
        };
        let state = compute(&service, two_nodes());
        let served: Vec<_> = state.frontends.iter().filter(|f| f.kind == VipKind::ExternalIp).collect();
        assert_eq!(served.len(), 1);
        let text: Vec<&str> = state.problems.iter().map(|p| p.message.as_str()).collect();
        assert_eq!(text.len(), 3);
        assert!(
            text[0].contains("198.51.100.1") && text[0].contains("--service-external-ip-range"),
            "{text:?}"
        );
        assert!(text[1].contains("10.96.7.7") && text[1].contains("cluster IP range"), "{text:?}");
        assert!(text[2].contains("198.51.100.2") && text[2].contains("--loadbalancer-ip-range"), "{text:?}");
        let open = Settings { strict_external_ips: false, ..fixture::settings() };
        let state = desired(&service, None, &fixture::facts(), &open, &BTreeSet::new());
        assert!(state.problems.is_empty() && state.frontends.len() == 6);
    }

    #[test]
    fn affinity_scheduler_and_flags() {
        let mut service = Service { affinity: Some(600), ..fixture::service("web") };
        service.annotations.scheduler = Some("mh".into());
        service.annotations.sched_flags = 0x08;
        let state = compute(&service, two_nodes());
        let server = &state.frontends[0].server;
        assert_eq!((server.scheduler, server.timeout), (ipvs::Scheduler::MH, 600));
        assert!(
            server.flags.contains(ipvs::Flags::PERSISTENT) && server.flags.contains(ipvs::Flags::MH_FALLBACK)
        );
        service.annotations.scheduler = Some("fancy".into());
        let state = compute(&service, two_nodes());
        assert_eq!(state.frontends[0].server.scheduler, ipvs::Scheduler::RR);
        assert!(state.problems[0].message.contains("fancy"));
        service.annotations.scheduler = Some("wlc".into());
        let state =
            desired(&service, None, &fixture::facts(), &fixture::settings(), &BTreeSet::from(["wlc".into()]));
        assert_eq!(state.problems[0].reason, "SchedulerMissing");
    }

    #[test]
    fn a_node_port_outside_its_range_is_served_and_told() {
        let service =
            Service { ports: vec![fixture::port("http", Protocol::Tcp, 80, Some(8080))], ..load_balancer() };
        let state = compute(&service, two_nodes());
        assert!(state.frontends.iter().any(|f| f.kind == VipKind::NodePort && f.port == 8080));
        assert_eq!(state.problems[0].reason, "NodePortOutsideRange");
    }

    #[test]
    fn health_counts_ready_local_endpoints_only() {
        let mut service = Service { external_policy: TrafficPolicy::Local, ..load_balancer() };
        service.health_check_node_port = std::num::NonZeroU16::new(32000);
        assert_eq!(compute(&service, two_nodes()).health, Some((32000, 1)));
        service.cluster_ips.push("fd00:96::10".parse().unwrap());
        let mut dual = two_nodes();
        dual.endpoints.push(fixture::endpoint6(1, "n1"));
        assert_eq!(compute(&service, dual).health, Some((32000, 1)), "one pod with two addresses");
        let ending = fixture::slice(&[("http", Protocol::Tcp, 8080)], vec![fixture::endpoint(1, "st", "n1")]);
        assert_eq!(compute(&service, ending).health, Some((32000, 0)));
    }

    #[test]
    fn one_address_under_two_titles_is_one_frontend_with_the_guard_of_both() {
        let mut settings = fixture::settings();
        settings.external_ip_ranges = settings.load_balancer_ranges.clone();
        let service = Service {
            external_ips: vec![[203, 0, 113, 200].into()],
            source_ranges: vec!["192.0.2.0/24".parse().unwrap()],
            ..load_balancer()
        };
        let state = desired(&service, None, &fixture::facts(), &settings, &BTreeSet::new());
        let shared: Vec<_> =
            state.frontends.iter().filter(|f| f.address == IpAddr::from([203, 0, 113, 200])).collect();
        assert_eq!(shared.len(), 1);
        assert!(shared[0].sources.is_some());
    }

    #[test]
    fn hairpin_and_local_endpoints_outside_the_pod_networks() {
        let mut service = fixture::service("web");
        service.annotations.hairpin = true;
        let mut slice = two_nodes();
        slice.endpoints[0].address = [10, 10, 0, 11].into();
        let state = compute(&service, slice);
        assert_eq!(state.local_endpoints, BTreeSet::from([[10, 10, 0, 11].into()]));
        assert_eq!(state.hairpin, BTreeSet::from([(([10, 10, 0, 11].into(), 8080), Protocol::Tcp)]));
    }
}
