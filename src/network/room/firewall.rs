//! Sets and chains of the pod network.

use std::net::IpAddr;
use std::time::Instant;

use ferroute_iptables::ipset::{self, Change, Sets};
use ipnet::IpNet;

use super::{Room, Whole};
use crate::chains;
use crate::network::egress;
use crate::network::error::Error;

impl Room {
    /// Sets before the rules that name them.
    pub(super) fn settle_firewall(&mut self, whole: Whole) -> Result<(), Error> {
        let families = self.kernel.families().to_vec();
        let pods: Vec<IpNet> = self.cluster.pods.iter().copied().collect();
        let nodes: Vec<IpAddr> = self.cluster.nodes.iter().copied().collect();
        let desired = egress::sets(&families, &pods, &nodes);
        let actual = self.kernel.read_sets()?;
        let ipset::Difference { mut changes, retype, destroy: _ } = ipset::diff(&actual, &desired);
        if self.cluster.blind {
            // A node that cannot be read keeps its place.
            changes.retain(|change| !matches!(change, Change::Delete { .. } | Change::Replace { .. }));
        }
        let mut replaced = false;
        if !retype.is_empty() {
            // The kernel destroys no set that a rule names.
            self.kernel.sync_chains(egress::rules(&egress::Facts::default(), &families), true)?;
            replaced = true;
            changes.extend(retype.into_iter().flat_map(|retype| retype.changes));
        }
        if whole.audit && !changes.is_empty() {
            self.drift(changes.len(), "ipsets differed from what was programmed, repairing");
        }
        if !changes.is_empty()
            && let Some(failed) = self.kernel.apply_sets(&changes, &mut Sets::new())?.into_iter().next()
        {
            return Err(Error::Set(Box::new(failed)));
        }
        let facts = self.machine.egress(&self.settings, &self.cluster);
        let check = whole.rules || replaced;
        let (before, begun) = (chains::writes(), Instant::now());
        let written = self.kernel.sync_chains(egress::rules(&facts, &families), check);
        self.chains_took = begun.elapsed();
        self.chains_written = matches!(written, Ok(1..));
        let written = written?;
        if check {
            self.chain_writes = before + written as u64;
        } else if self.chain_writes == before {
            self.chain_writes += written as u64;
        }
        if whole.audit && written > 0 {
            self.drift(written, "chains differed from what was programmed, repaired");
        }
        Ok(())
    }
}
