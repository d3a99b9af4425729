//! Desired, actual and difference for people and programs: `ferroute status`, `ferroute plan`.

use std::collections::BTreeMap;
use std::fmt;

use ferroute_iptables::{Family, TableName};
use ferroute_policy::{Direction, Index, UnknownPods};
use serde::Serialize;

use super::exclude::Excluded;
use super::hold::Hold;
use super::kernel::Kernel;
use super::order;
use super::settings::Settings;
use super::starting::Starting;

/// The policy room at one moment.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Variant of iptables in use.
    pub iptables: String,
    /// Pod networks of this node.
    pub pod_networks: Vec<String>,
    /// Whether addresses in them that no known pod has are closed.
    pub unknown_pods_closed: bool,
    /// NetworkPolicies of the cluster.
    pub policies: usize,
    /// Those that select a pod of this node.
    pub enforced_policies: Vec<String>,
    /// Pods of this node that policies isolate.
    pub isolated: Vec<IsolatedPod>,
    /// Pods whose network is being made and whose policies are not in the kernel yet.
    pub starting: Vec<String>,
    /// Chains of ours, by family.
    pub chains: BTreeMap<String, usize>,
    /// Rules in them, by family.
    pub rules: BTreeMap<String, usize>,
    /// Entries of every set of ours, in the kernel.
    pub sets: BTreeMap<String, usize>,
    /// Seconds since the last clean pass.
    pub last_clean_pass_seconds: Option<f64>,
    /// Sets and rules that this kernel cannot take, and why; what they would allow is refused.
    pub left_out: Vec<String>,
    /// Pods that stay as they were found at the start, while an object cannot be read.
    pub held: Vec<String>,
    /// What would be written now to make actual equal desired; empty when they agree.
    pub difference: Vec<String>,
    /// What could not be read, and what failed last.
    pub errors: Vec<String>,
}

/// A pod that policies isolate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IsolatedPod {
    /// Namespace and name.
    pub pod: String,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// Policies that isolate it for ingress.
    pub ingress: Vec<String>,
    /// Policies that isolate it for egress.
    pub egress: Vec<String>,
}

impl Status {
    pub(super) fn gather(
        settings: &Settings,
        pod_networks: &[ipnet::IpNet],
        index: &Index,
        kernel: &mut Kernel,
        excluded: &mut Excluded,
        starting: &Starting,
        hold: &Hold,
    ) -> Self {
        let mut status = Self {
            iptables: kernel.variant().map(|variant| variant.to_string()).unwrap_or_default(),
            pod_networks: pod_networks.iter().map(ToString::to_string).collect(),
            unknown_pods_closed: settings.unknown_pods == UnknownPods::Deny,
            policies: index.policy_count(),
            enforced_policies: index.enforced_policies().map(ToString::to_string).collect(),
            isolated: isolated(index),
            starting: starting.waiting().map(ToString::to_string).collect(),
            held: hold.describe(),
            left_out: excluded.describe(),
            ..Self::default()
        };
        match kernel.read_sets() {
            Ok(actual) => {
                status.sets =
                    actual.iter().map(|(name, set)| (name.to_string(), set.entries().len())).collect();
                let mut changes = order::whole(&actual, index.sets());
                // What cannot be made is told already.
                let missing: Vec<_> = excluded.sets().copied().collect();
                changes.before.retain(|change| !missing.contains(&change.set()));
                hold.keep(&mut changes, &actual, index.sets());
                status.difference = changes.describe();
            }
            Err(error) => status.errors.push(error.to_string()),
        }
        for family in kernel.families().to_vec() {
            let Some(wanted) = index.ruleset(family) else { continue };
            let wanted = excluded.ruleset(family, wanted);
            match kernel.read_chains(family) {
                Ok(found) => {
                    status.chains.insert(family.to_string(), found.chains.len());
                    status.rules.insert(family.to_string(), found.chains.values().map(Vec::len).sum());
                    match kernel.plan_chains(&found, &wanted, family) {
                        Ok(plan) => status.difference.extend(
                            plan.describe()
                                .into_iter()
                                .map(|line| format!("{family} {}: {line}", TableName::Filter)),
                        ),
                        Err(error) => status.errors.push(error.to_string()),
                    }
                }
                Err(error) => status.errors.push(error.to_string()),
            }
        }
        status
    }

    /// Whether the kernel holds what is wanted.
    pub fn in_sync(&self) -> bool {
        self.difference.is_empty() && self.errors.is_empty()
    }
}

fn isolated(index: &Index) -> Vec<IsolatedPod> {
    let mut pods: BTreeMap<String, IsolatedPod> = BTreeMap::new();
    for (direction, key, policies) in index.isolated() {
        let name = key.to_string();
        let pod = pods.entry(name.clone()).or_insert_with(|| IsolatedPod {
            pod: name,
            addresses: index
                .pod(key)
                .map(|pod| pod.ips.iter().map(ToString::to_string).collect())
                .unwrap_or_default(),
            ..IsolatedPod::default()
        });
        let names = policies.iter().map(ToString::to_string).collect();
        match direction {
            Direction::Ingress => pod.ingress = names,
            Direction::Egress => pod.egress = names,
        }
    }
    pods.into_values().collect()
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let closed = if self.unknown_pods_closed { "closed" } else { "open" };
        let networks =
            if self.pod_networks.is_empty() { "none known".to_owned() } else { self.pod_networks.join(", ") };
        writeln!(
            f,
            "network policy: pod networks {networks}, unknown pods {closed}, iptables {}",
            self.iptables
        )?;
        let count = |of: &BTreeMap<String, usize>| {
            Family::BOTH
                .iter()
                .map(|family| of.get(&family.to_string()).copied().unwrap_or_default().to_string())
                .collect::<Vec<_>>()
                .join("+")
        };
        writeln!(
            f,
            "{} of {} policies select pods here; {} chains with {} rules (IPv4+IPv6), {} sets with {} entries",
            self.enforced_policies.len(),
            self.policies,
            count(&self.chains),
            count(&self.rules),
            self.sets.len(),
            self.sets.values().sum::<usize>()
        )?;
        for pod in &self.isolated {
            writeln!(f, "{} ({})", pod.pod, pod.addresses.join(", "))?;
            for (direction, policies) in [("ingress", &pod.ingress), ("egress", &pod.egress)] {
                if !policies.is_empty() {
                    writeln!(f, "  {direction} isolated by {}", policies.join(", "))?;
                }
            }
        }
        for pod in &self.starting {
            writeln!(f, "starting: {pod}")?;
        }
        for line in &self.left_out {
            writeln!(f, "left out, this kernel cannot take it: {line}")?;
        }
        for line in &self.held {
            writeln!(f, "held: {line}")?;
        }
        for error in &self.errors {
            writeln!(f, "error: {error}")?;
        }
        if let Some(seconds) = self.last_clean_pass_seconds {
            writeln!(f, "last clean pass {seconds:.1}s ago")?;
        }
        if self.difference.is_empty() && self.errors.is_empty() {
            writeln!(f, "{} isolated pods, kernel and desired state agree", self.isolated.len())
        } else {
            writeln!(f, "{} differences:", self.difference.len())?;
            for line in &self.difference {
                writeln!(f, "  {line}")?;
            }
            Ok(())
        }
    }
}
