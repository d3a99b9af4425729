//! Desired, actual and difference for people and programs: `ferroute status`, `ferroute plan`.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ferroute_ipvs as ipvs;
use serde::Serialize;

use super::desired::VipKind;
use super::drain::Drains;
use super::facts::Facts;
use super::hold::Hold;
use super::kernel::Kernel;
use super::ledger::Ledger;
use super::mirror::{self, Mirror, Scope};
use super::sets;
use super::settings::Settings;

/// The Service room at one moment.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Node name.
    pub node: String,
    /// Node addresses in use.
    pub addresses: Vec<IpAddr>,
    /// Service ranges bound as a whole.
    pub ranges: Vec<String>,
    /// Services in order of namespace and name.
    pub services: Vec<ServiceStatus>,
    /// Entries of every set of ours, in the kernel.
    pub sets: BTreeMap<String, usize>,
    /// What would be written now to make actual equal desired; empty when they agree.
    pub difference: Vec<String>,
    /// Objects that cannot be read and for whose sake kernel state of no known owner stays.
    pub held_for: Vec<String>,
    /// What could not be read.
    pub errors: Vec<String>,
}

/// One Service.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    /// Namespace and name.
    pub service: String,
    /// Its frontends.
    pub frontends: Vec<FrontendStatus>,
    /// What cannot be honoured as written.
    pub problems: Vec<String>,
}

/// One virtual server of a Service.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendStatus {
    /// Where the VIP comes from.
    pub kind: &'static str,
    /// Protocol, address and port, or mark.
    pub server: String,
    /// Who is served here: everybody, remote or local clients.
    pub clients: &'static str,
    /// Scheduler.
    pub scheduler: String,
    /// Session affinity in seconds.
    pub affinity_seconds: Option<u32>,
    /// Whether the virtual server is in the kernel as it should be.
    pub in_sync: bool,
    /// Endpoints wanted.
    pub desired: Vec<String>,
    /// Destinations in the kernel with their weight.
    pub actual: Vec<DestinationStatus>,
}

/// One destination in the kernel.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DestinationStatus {
    /// Address and port.
    pub destination: String,
    /// Weight; 0 drains.
    pub weight: u32,
}

impl Status {
    #[allow(clippy::too_many_arguments)]
    pub(super) fn gather(
        settings: &Settings,
        facts: &Facts,
        ledger: &Ledger,
        drains: &mut Drains,
        hold: &Hold,
        kernel: &mut Kernel,
        before: &Mirror,
    ) -> Self {
        let mut status = Self {
            node: facts.name.to_string(),
            addresses: facts.ipv4.into_iter().chain(facts.ipv6).collect(),
            ranges: facts.bound_ranges.iter().map(ToString::to_string).collect(),
            held_for: hold.causes().describe(),
            ..Self::default()
        };
        let actual = match kernel.read(settings, ledger, before) {
            Ok(actual) => actual,
            Err(error) => {
                status.errors.push(error.to_string());
                return status;
            }
        };
        let changes = mirror::diff(
            &actual,
            ledger,
            drains,
            hold,
            facts,
            kernel.device(),
            &Scope::All,
            settings.graceful_period,
            super::kernel::now,
        );
        status.difference = changes.describe();
        status.sets = actual.sets.iter().map(|(name, set)| (name.to_string(), set.entries().len())).collect();
        match kernel.rules_difference(&super::rules::desired(settings, facts, kernel.families())) {
            Ok(lines) => status.difference.extend(lines),
            Err(error) => status.errors.push(error.to_string()),
        }
        let mut keys: Vec<_> = ledger.service_keys().cloned().collect();
        keys.sort();
        for key in keys {
            let mut frontends = Vec::new();
            for frontend in ledger.frontends(&key) {
                let address = sets::server_key(frontend.address, frontend.protocol, frontend.port);
                let clients = if frontend.local_clients.is_some() { "remote" } else { "all" };
                let kind = kind_name(frontend.kind);
                frontends.push(frontend_status(kind, address, clients, ledger, &actual, &changes));
                if frontend.local_clients.is_some()
                    && let Some(mark) = ledger.mark(&key, &frontend)
                {
                    frontends.push(frontend_status(kind, mark, "local", ledger, &actual, &changes));
                }
            }
            status.services.push(ServiceStatus {
                service: key.to_string(),
                frontends,
                problems: ledger.problems(&key).into_iter().map(|problem| problem.message).collect(),
            });
        }
        status
    }

    /// Whether the kernel holds what is wanted.
    pub fn in_sync(&self) -> bool {
        self.difference.is_empty() && self.errors.is_empty()
    }
}

fn kind_name(kind: VipKind) -> &'static str {
    match kind {
        VipKind::ClusterIp => "ClusterIP",
        VipKind::NodePort => "NodePort",
        VipKind::ExternalIp => "ExternalIP",
        VipKind::LoadBalancerIp => "LoadBalancerIP",
    }
}

fn frontend_status(
    kind: &'static str,
    key: ipvs::VirtualServerKey,
    clients: &'static str,
    ledger: &Ledger,
    actual: &Mirror,
    changes: &mirror::Changes,
) -> FrontendStatus {
    let wanted = ledger.servers().get(&key);
    let present = actual.servers.get(&key);
    FrontendStatus {
        kind,
        server: key.to_string(),
        clients,
        scheduler: wanted.map(|server| server.scheduler.to_string()).unwrap_or_default(),
        affinity_seconds: wanted
            .filter(|server| server.flags.contains(ipvs::Flags::PERSISTENT))
            .map(|server| server.timeout),
        in_sync: !changes.servers.iter().chain(&changes.servers_last).any(|change| change.server() == key),
        desired: wanted
            .map(|server| server.destinations.iter().map(|d| d.key().to_string()).collect())
            .unwrap_or_default(),
        actual: present
            .map(|server| {
                let row = |d: &ipvs::Destination| DestinationStatus {
                    destination: d.key().to_string(),
                    weight: d.weight,
                };
                server.destinations.iter().map(row).collect()
            })
            .unwrap_or_default(),
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses: Vec<String> = self.addresses.iter().map(ToString::to_string).collect();
        writeln!(f, "node {} ({})", self.node, addresses.join(", "))?;
        if !self.ranges.is_empty() {
            writeln!(f, "service ranges bound: {}", self.ranges.join(", "))?;
        }
        for service in &self.services {
            writeln!(f, "{}", service.service)?;
            for front in &service.frontends {
                let sync = if front.in_sync { "" } else { "  NOT IN SYNC" };
                let affinity = front.affinity_seconds.map(|s| format!(" affinity {s}s")).unwrap_or_default();
                let clients = if front.clients == "all" {
                    String::new()
                } else {
                    format!(" ({} clients)", front.clients)
                };
                writeln!(
                    f,
                    "  {} {}{clients} {}{affinity}{sync}",
                    front.kind, front.server, front.scheduler
                )?;
                for destination in &front.actual {
                    let note = if destination.weight == 0 { "  draining" } else { "" };
                    writeln!(f, "    -> {}{note}", destination.destination)?;
                }
                if front.actual.is_empty() {
                    writeln!(f, "    -> no endpoints")?;
                }
            }
            for problem in &service.problems {
                writeln!(f, "  problem: {problem}")?;
            }
        }
        for object in &self.held_for {
            writeln!(
                f,
                "kept for {object}, which cannot be read: what the kernel held at the start; correct or delete it"
            )?;
        }
        for error in &self.errors {
            writeln!(f, "error: {error}")?;
        }
        if self.difference.is_empty() && self.errors.is_empty() {
            writeln!(f, "{} services, kernel and desired state agree", self.services.len())
        } else {
            writeln!(f, "{} differences:", self.difference.len())?;
            for line in &self.difference {
                writeln!(f, "  {line}")?;
            }
            Ok(())
        }
    }
}
