//! The Service room's metrics in Prometheus text format.
//!
//! Series per Service are written straight from the kernel's counters at scrape time: they cannot
//! drift, and ten thousand of them cost a few milliseconds. Names are kube-router's, and
//! kube-proxy's where the meaning is the same.

use std::fmt::Display;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use ferroute_ipvs as ipvs;

use super::kernel::ServiceStatistics;
use super::work::{TABLES, Work};
use crate::metrics::{Histogram, escaped, head, line, lock};

/// Counters and gauges of the room.
#[derive(Default)]
pub(super) struct Numbers {
    pub(super) virtual_servers: AtomicU64,
    pub(super) draining: AtomicU64,
    pub(super) held: AtomicU64,
    pub(super) drift: AtomicU64,
    pub(super) expired_flows: AtomicU64,
    pub(super) passes: Mutex<Histogram>,
    pub(super) latency: Mutex<Histogram>,
    pub(super) changes: Mutex<Histogram>,
    pub(super) work: Mutex<Work>,
    /// Unix time of the last clean pass in milliseconds.
    pub(super) last_clean_unix_ms: AtomicU64,
}

pub(super) fn write(
    out: &mut String,
    numbers: &Numbers,
    (passes, failures): (u64, u64),
    services: &[ServiceStatistics],
) {
    let load = |number: &std::sync::atomic::AtomicU64| number.load(Ordering::Relaxed);
    let mut single = |name: &str, kind: &str, help: &str, value: &dyn Display| {
        head(out, name, kind, help);
        line(out, name, "", value);
    };
    single(
        "kube_router_controller_ipvs_services",
        "gauge",
        "Number of IPVS virtual servers that should exist",
        &load(&numbers.virtual_servers),
    );
    single(
        "ferroute_ipvs_draining_destinations",
        "gauge",
        "Destinations at weight 0 that finish their connections",
        &load(&numbers.draining),
    );
    single(
        "ferroute_proxy_held_objects",
        "gauge",
        "Kernel objects, and Services with their endpoints, kept for objects that cannot be read",
        &load(&numbers.held),
    );
    single(
        "ferroute_proxy_drift_repaired_total",
        "counter",
        "Kernel objects that differed from what was programmed and were put right",
        &load(&numbers.drift),
    );
    single(
        "ferroute_proxy_udp_flows_expired_total",
        "counter",
        "Tracked UDP flows deleted because their endpoint is gone",
        &load(&numbers.expired_flows),
    );
    let work = *lock(&numbers.work);
    head(out, "ferroute_netlink_messages_total", "counter", "Netlink messages sent, by table and purpose");
    for (table, messages) in TABLES.iter().zip(work.messages) {
        for (purpose, count) in [("write", messages.written), ("read", messages.asked)] {
            let labels = format!("{{table=\"{table}\",purpose=\"{purpose}\"}}");
            line(out, "ferroute_netlink_messages_total", &labels, count);
        }
    }
    let mut single = |name: &str, kind: &str, help: &str, value: &dyn Display| {
        head(out, name, kind, help);
        line(out, name, "", value);
    };
    single("ferroute_proxy_audits_total", "counter", "Audits of the kernel's tables", &work.audits);
    single(
        "ferroute_proxy_audit_seconds_total",
        "counter",
        "Time of these audits in seconds",
        &work.auditing.as_secs_f64(),
    );
    single(
        "ferroute_proxy_iptables_seconds_total",
        "counter",
        "Time spent in iptables programs in seconds",
        &work.rules.as_secs_f64(),
    );
    single(
        "ferroute_proxy_passes_total",
        "counter",
        "Passes after which the kernel held all that was wanted",
        &passes,
    );
    single("ferroute_proxy_pass_failures_total", "counter", "Passes that left something undone", &failures);
    single(
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "gauge",
        "Unix time of the last clean pass",
        &(load(&numbers.last_clean_unix_ms) as f64 / 1000.0),
    );
    let passes = lock(&numbers.passes).clone();
    passes.write(
        out,
        "kube_router_controller_ipvs_services_sync_time",
        "Time of one pass over changed or all Services in seconds",
    );
    passes.write(
        out,
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "Time of one pass over changed or all Services in seconds",
    );
    lock(&numbers.changes).write(
        out,
        "ferroute_proxy_change_duration_seconds",
        "Time from the decoding of a change to the kernel's last acknowledgement in seconds",
    );
    lock(&numbers.latency).write(
        out,
        "kubeproxy_network_programming_duration_seconds",
        "Time from a change of endpoints, as its EndpointSlice tells it, else from its decoding, to the kernel's last acknowledgement in seconds",
    );
    write_services(out, services);
}

type Field = (&'static str, &'static str, &'static str, fn(&ipvs::Statistics) -> u64);

const FIELDS: [Field; 10] = [
    ("service_total_connections", "counter", "Connections", |s| s.connections),
    ("service_packets_in", "counter", "Incoming packets", |s| s.incoming_packets),
    ("service_packets_out", "counter", "Outgoing packets", |s| s.outgoing_packets),
    ("service_bytes_in", "counter", "Incoming bytes", |s| s.incoming_bytes),
    ("service_bytes_out", "counter", "Outgoing bytes", |s| s.outgoing_bytes),
    ("service_pps_in", "gauge", "Incoming packets per second", |s| s.incoming_packets_rate),
    ("service_pps_out", "gauge", "Outgoing packets per second", |s| s.outgoing_packets_rate),
    ("service_cps", "gauge", "Connections per second", |s| s.connections_rate),
    ("service_bps_in", "gauge", "Incoming bytes per second", |s| s.incoming_bytes_rate),
    ("service_bps_out", "gauge", "Outgoing bytes per second", |s| s.outgoing_bytes_rate),
];

fn write_services(out: &mut String, services: &[ServiceStatistics]) {
    let labels: Vec<String> = services
        .iter()
        .map(|s| {
            format!(
                "{{svc_namespace=\"{}\",service_name=\"{}\",service_vip=\"{}\",protocol=\"{}\",port=\"{}\"}}",
                escaped(&s.service.namespace),
                escaped(&s.service.name),
                s.vip,
                s.protocol.to_string().to_lowercase(),
                s.port
            )
        })
        .collect();
    for (name, kind, help, field) in FIELDS {
        let name = format!("kube_router_{name}");
        head(out, &name, kind, help);
        for (service, labels) in services.iter().zip(&labels) {
            line(out, &name, labels, field(&service.stats));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::ServiceKey;
    use crate::cluster::service::Protocol;

    #[test]
    fn labels_are_escaped() {
        let mut out = String::new();
        write_services(
            &mut out,
            &[ServiceStatistics {
                service: ServiceKey::new("a\"b", "c"),
                vip: [10, 0, 0, 1].into(),
                protocol: Protocol::Udp,
                port: 53,
                stats: ipvs::Statistics { connections: 7, ..ipvs::Statistics::default() },
            }],
        );
        assert!(
            out.contains(
                "kube_router_service_total_connections{svc_namespace=\"a\\\"b\",service_name=\"c\",\
                 service_vip=\"10.0.0.1\",protocol=\"udp\",port=\"53\"} 7\n"
            ),
            "{out}"
        );
    }
}
