//! The policy room's metrics in Prometheus text format. Names are kube-router's where the meaning
//! is the same.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::metrics::{Histogram, head, line, lock};

/// Counters and gauges of the room.
#[derive(Default)]
pub(super) struct Numbers {
    /// Chains of policies and pods, over all families.
    pub(super) chains: AtomicU64,
    pub(super) sets: AtomicU64,
    pub(super) isolated: AtomicU64,
    pub(super) policies: AtomicU64,
    pub(super) enforced: AtomicU64,
    pub(super) excluded: AtomicU64,
    pub(super) drift: AtomicU64,
    pub(super) forgotten_flows: AtomicU64,
    pub(super) audits: AtomicU64,
    pub(super) chain_writes: AtomicU64,
    /// Netlink messages about sets, then flows: written and asked.
    pub(super) messages: Mutex<[(u64, u64); 2]>,
    pub(super) passes: Mutex<Histogram>,
    pub(super) latency: Mutex<Histogram>,
    pub(super) starting: Mutex<Histogram>,
    pub(super) chains_time: Mutex<Histogram>,
    /// By family (IPv4, IPv6): saves, restores, set changes.
    pub(super) saves: [Mutex<Histogram>; 2],
    pub(super) restores: [Mutex<Histogram>; 2],
    pub(super) set_changes: [Mutex<Histogram>; 2],
    /// Unix time of the last clean pass in milliseconds.
    pub(super) last_clean_unix_ms: AtomicU64,
}

pub(super) fn write(out: &mut String, numbers: &Numbers, (passes, failures): (u64, u64)) {
    let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
    for (name, kind, help, value) in [
        (
            "kube_router_controller_policy_chains",
            "gauge",
            "Active policy chains in iptables",
            load(&numbers.chains),
        ),
        ("kube_router_controller_policy_ipsets", "gauge", "Active policy ipsets", load(&numbers.sets)),
        (
            "ferroute_netpol_isolated_pods",
            "gauge",
            "Pods of this node that at least one policy isolates",
            load(&numbers.isolated),
        ),
        ("ferroute_netpol_policies", "gauge", "NetworkPolicies of the cluster", load(&numbers.policies)),
        (
            "ferroute_netpol_enforced_policies",
            "gauge",
            "NetworkPolicies that select a pod of this node",
            load(&numbers.enforced),
        ),
        (
            "ferroute_netpol_rules_left_out",
            "gauge",
            "Sets and rules that this kernel cannot take; what they would allow is refused",
            load(&numbers.excluded),
        ),
        (
            "ferroute_netpol_drift_repaired_total",
            "counter",
            "Kernel objects that differed from what was programmed and were put right",
            load(&numbers.drift),
        ),
        (
            "ferroute_netpol_flows_forgotten_total",
            "counter",
            "Tracked flows deleted because their pod is gone",
            load(&numbers.forgotten_flows),
        ),
        ("ferroute_netpol_audits_total", "counter", "Audits of the kernel's sets", load(&numbers.audits)),
        (
            "ferroute_netpol_chain_writes_total",
            "counter",
            "Atomic changes of iptables chains",
            load(&numbers.chain_writes),
        ),
        (
            "ferroute_netpol_passes_total",
            "counter",
            "Passes after which the kernel held all that was wanted",
            passes,
        ),
        ("ferroute_netpol_pass_failures_total", "counter", "Passes that left something undone", failures),
    ] {
        head(out, name, kind, help);
        line(out, name, "", value);
    }
    const MESSAGES: &str = "ferroute_netpol_netlink_messages_total";
    head(out, MESSAGES, "counter", "Netlink messages sent by the policy room, by table and purpose");
    for (table, (written, asked)) in ["ipset", "conntrack"].iter().zip(*lock(&numbers.messages)) {
        for (purpose, count) in [("write", written), ("read", asked)] {
            line(out, MESSAGES, &format!("{{table=\"{table}\",purpose=\"{purpose}\"}}"), count);
        }
    }
    const LAST: &str = "ferroute_netpol_last_clean_pass_timestamp_seconds";
    head(out, LAST, "gauge", "Unix time of the last clean pass");
    line(out, LAST, "", load(&numbers.last_clean_unix_ms) as f64 / 1000.0);
    for (name, help, histogram) in [
        (
            "kube_router_controller_iptables_sync_time",
            "Time of one pass over changed or all policies in seconds",
            &numbers.passes,
        ),
        (
            "kube_router_controller_policy_chains_sync_time",
            "Time to bring changed chains into the kernel in seconds",
            &numbers.chains_time,
        ),
        (
            "ferroute_netpol_enforcement_seconds",
            "Time from the decoding of a change to the kernel's last acknowledgement in seconds",
            &numbers.latency,
        ),
        (
            "ferroute_netpol_pod_start_seconds",
            "Time a starting pod waited for its policies in seconds",
            &numbers.starting,
        ),
        (
            "kube_router_controller_iptables_v4_save_time",
            "Time to read the IPv4 filter table in seconds",
            &numbers.saves[0],
        ),
        (
            "kube_router_controller_iptables_v6_save_time",
            "Time to read the IPv6 filter table in seconds",
            &numbers.saves[1],
        ),
        (
            "kube_router_controller_iptables_v4_restore_time",
            "Time to write the IPv4 filter table in seconds",
            &numbers.restores[0],
        ),
        (
            "kube_router_controller_iptables_v6_restore_time",
            "Time to write the IPv6 filter table in seconds",
            &numbers.restores[1],
        ),
        (
            "kube_router_controller_policy_ipset_v4_restore_time",
            "Time to change IPv4 ipsets in seconds",
            &numbers.set_changes[0],
        ),
        (
            "kube_router_controller_policy_ipset_v6_restore_time",
            "Time to change IPv6 ipsets in seconds",
            &numbers.set_changes[1],
        ),
    ] {
        lock(histogram).write(out, name, help);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_there_once_under_its_name() {
        let numbers = Numbers::default();
        numbers.chains.store(3, Ordering::Relaxed);
        lock(&numbers.latency).observe(std::time::Duration::from_millis(2));
        let mut out = String::new();
        write(&mut out, &numbers, (7, 1));
        for text in [
            "kube_router_controller_policy_chains 3\n",
            "ferroute_netpol_passes_total 7\n",
            "ferroute_netpol_enforcement_seconds_count 1\n",
            "ferroute_netpol_netlink_messages_total{table=\"ipset\",purpose=\"write\"} 0\n",
            "kube_router_controller_iptables_v6_restore_time_count 0\n",
        ] {
            assert!(out.contains(text), "{text} is missing in\n{out}");
        }
        let mut names: Vec<&str> = out.lines().filter_map(|l| l.strip_prefix("# TYPE ")).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
