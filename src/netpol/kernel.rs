//! The room's kernel handles: dump and apply, and what is ours in each table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use ferroute_iptables::ipset::{self, Sets};
use ferroute_iptables::{ChainChanges, ChainName, Family, Found, Plan, Ruleset, SetName, TableName, Variant};
use ferroute_policy::{CHAIN_PREFIXES, SET_PREFIXES};

use super::error::Error;
use crate::chains::{Chains, Run};
use crate::host::conntrack::Conntrack;
use crate::host::kernel::{self, Presence};
use crate::host::{self, extension, sysctl};

/// Where policy lives.
const TABLE: TableName = TableName::Filter;

/// Beginnings of the names of every set of ours, in both families.
pub fn set_prefixes() -> Vec<String> {
    SET_PREFIXES.iter().flat_map(|prefix| [(*prefix).to_owned(), format!("inet6:{prefix}")]).collect()
}

/// The handles. Each belongs to the network namespace of the thread that opened it.
pub struct Kernel {
    sets: ipset::Handle,
    chains: Chains,
    conntrack: Conntrack,
    families: Vec<Family>,
    prefixes: Vec<String>,
    /// Sysctls whose refusal was told, so that it is told once.
    told: BTreeSet<String>,
}

impl Kernel {
    /// Opens every handle for writing; loads modules where that is allowed.
    pub fn open() -> Result<Self, Error> {
        for finding in kernel::inspect_for_policy() {
            match finding.present {
                Presence::Present => tracing::debug!(%finding, "kernel"),
                Presence::Missing if finding.name == "ipset" => {
                    return Err(Error::Kernel(finding.to_string()));
                }
                Presence::Missing | Presence::Unknown => tracing::warn!(%finding, "kernel"),
            }
        }
        let mut kernel = Self::open_to_read()?;
        kernel.inspect_rules();
        kernel.prepare();
        Ok(kernel)
    }

    /// Looks for what the rules need. A rule that cannot be written is left out and told on its policy, and
    /// tried again: the module may be loaded later.
    fn inspect_rules(&self) {
        let families: Vec<_> = self
            .families
            .iter()
            .map(|family| match family {
                Family::V4 => host::Family::V4,
                Family::V6 => host::Family::V6,
            })
            .collect();
        for finding in extension::inspect(&extension::OF_POLICY, &families, self.chains.uses_nft()) {
            match finding.present {
                Presence::Present => tracing::debug!(%finding, "kernel"),
                // The kernel loads it when a rule names it, if it has it.
                Presence::Unknown => tracing::info!(%finding, "kernel"),
                Presence::Missing => tracing::warn!(%finding, "kernel"),
            }
        }
    }

    /// How many entries each set on the host has. Cheap: no entry is read.
    pub fn set_sizes(&mut self) -> Result<BTreeMap<String, usize>, Error> {
        let headers = self.sets.headers()?;
        let size = |count| usize::try_from(count).unwrap_or(usize::MAX);
        Ok(headers.into_iter().map(|header| (header.name, size(header.elements))).collect())
    }

    /// Opens every handle for reading; nothing is made or changed.
    pub fn open_to_read() -> Result<Self, Error> {
        let mut families = vec![Family::V4];
        if Path::new("/proc/sys/net/ipv6").exists() {
            families.push(Family::V6);
        }
        let chains = Chains::open(&mut families, CHAIN_PREFIXES)?;
        Ok(Self {
            sets: ipset::Handle::open()?,
            chains,
            conntrack: Conntrack::open()?,
            families,
            prefixes: set_prefixes(),
            told: BTreeSet::new(),
        })
    }

    /// Families enforced: IPv6 only where the kernel and its iptables have it.
    pub fn families(&self) -> &[Family] {
        &self.families
    }

    /// The variant of iptables in use.
    pub fn variant(&self) -> Option<Variant> {
        self.chains.variant(Family::V4)
    }

    /// Makes the sysctls right; what is refused is told once.
    pub fn prepare(&mut self) {
        for applied in sysctl::Sysctls::of_host().apply_all(&sysctl::policy_settings()) {
            match &applied.outcome {
                sysctl::Outcome::AlreadyRight => {
                    self.told.remove(&applied.setting.key);
                }
                sysctl::Outcome::Written { .. } => tracing::info!(%applied, "sysctl"),
                sysctl::Outcome::Missing | sysctl::Outcome::Refused { .. } => {
                    if self.told.insert(applied.setting.key.clone()) {
                        tracing::warn!(%applied, "sysctl");
                    }
                }
            }
        }
    }

    /// Reads the sets of ours.
    pub fn read_sets(&mut self) -> Result<Sets, Error> {
        let prefixes: Vec<&str> = self.prefixes.iter().map(String::as_str).collect();
        Ok(self.sets.read(&prefixes)?)
    }

    /// Applies set changes; those that succeed are noted in `sets`.
    pub fn apply_sets(
        &mut self,
        changes: &[ipset::Change],
        sets: &mut Sets,
    ) -> Result<Vec<ipset::Failed>, Error> {
        Ok(self.sets.apply_noting(changes, sets)?)
    }

    /// Replaces sets of another type: our chains go first, since the kernel destroys no set that a
    /// rule names. The caller writes the chains again at once.
    pub fn retype(&mut self, retype: &[ipset::Retype]) -> Result<(), Error> {
        if let Some(failure) = self.chains.remove(false).failed.into_iter().next() {
            return Err(Error::Kernel(failure));
        }
        for step in retype {
            tracing::warn!(set = %step.set, from = %step.from, to = %step.to, "replacing a set of another type");
            if let Some(failure) = self.sets.apply(&step.changes)?.into_iter().next() {
                return Err(Error::Set(Box::new(failure)));
            }
        }
        Ok(())
    }

    /// Reads the chains of one family back and makes them right.
    pub fn settle_chains(
        &mut self,
        family: Family,
        wanted: &Ruleset,
    ) -> Result<Plan, ferroute_iptables::Error> {
        self.chains.settle(family, TABLE, wanted)
    }

    /// Changes single chains without reading.
    pub fn change_chains(
        &mut self,
        family: Family,
        changes: &ChainChanges,
    ) -> Result<Plan, ferroute_iptables::Error> {
        self.chains.change(family, TABLE, changes)
    }

    /// Leaves these chains of ours as they are.
    pub fn keep_chains(&mut self, chains: BTreeSet<ChainName>) {
        self.chains.keep(chains);
    }

    /// Whether a write of chains has a chance: see [`Chains::may_write`].
    pub fn may_write_chains(&mut self) -> bool {
        self.chains.may_write()
    }

    /// Whether another program may have written rules since [`Kernel::begin_chain_check`].
    pub fn are_chains_disturbed(&mut self) -> bool {
        self.chains.is_disturbed()
    }

    /// All chains are read next: see [`Chains::begin_check`].
    pub fn begin_chain_check(&mut self) {
        self.chains.begin_check();
    }

    /// Whether the kernel had a chain when it was last looked at.
    pub fn has_chain(&self, family: Family, chain: ChainName) -> bool {
        self.chains.is_known(family, TABLE, chain)
    }

    /// What the kernel holds of our chains now.
    pub fn read_chains(&self, family: Family) -> Result<Found, Error> {
        Ok(self.chains.read(family, TABLE)?)
    }

    /// The same of every family.
    pub fn read_all_chains(&self) -> Result<BTreeMap<Family, Found>, Error> {
        self.families.iter().map(|family| Ok((*family, self.read_chains(*family)?))).collect()
    }

    /// What would make the chains right.
    pub fn plan_chains(
        &self,
        found: &Found,
        wanted: &Ruleset,
        family: Family,
    ) -> Result<Plan, ferroute_iptables::PlanError> {
        self.chains.plan(found, wanted, family)
    }

    /// One set, ours or not.
    pub fn read_set(&mut self, name: SetName) -> Result<Option<ipset::Set>, Error> {
        Ok(self.sets.list(name)?)
    }

    /// Runs of iptables programs since this was last asked.
    pub fn take_runs(&mut self) -> Vec<Run> {
        self.chains.take_runs()
    }

    /// Forgets the flows of addresses that no pod has any more; returns how many.
    pub fn forget_flows(&mut self, addresses: &[IpAddr]) -> Result<usize, Error> {
        let done = self.conntrack.delete_of(addresses)?;
        for error in &done.failures {
            tracing::warn!(%error, "flow of a pod that is gone stays");
        }
        Ok(done.deleted)
    }

    /// Netlink messages about sets and about flows: written and asked.
    pub fn messages(&self) -> [(u64, u64); 2] {
        let split = |sent: u64, asked: u64| (sent.saturating_sub(asked), asked);
        [
            split(self.sets.messages_sent(), self.sets.requests_sent()),
            split(self.conntrack.messages_sent(), self.conntrack.requests_sent()),
        ]
    }
}
