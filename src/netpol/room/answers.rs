//! Answers to what others ask the room: status, explanations, and whether a starting pod's policy is in
//! the kernel.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ferroute_iptables::ChainName;
use ferroute_iptables::ipset::Entry;
use ferroute_policy::{Exempt, Key, group_chain, policy_chain};

use super::{NEEDED, Room};
use crate::cluster::ObjectKey;
use crate::netpol::error::Error;
use crate::netpol::explain::{self, Answer, KernelState, Question, Unanswerable};
use crate::netpol::gather;
use crate::netpol::starting::NotProgrammed;
use crate::netpol::status::Status;
use crate::netpol::view::Request;

impl Room {
    pub(super) fn answer_requests(&mut self) {
        while let Ok(request) = self.requests.try_recv() {
            match request {
                Request::Status(reply) => {
                    let mut status = Status::gather(
                        &self.settings,
                        &self.networks,
                        &self.index,
                        &mut self.kernel,
                        &mut self.excluded,
                        &self.starting,
                        &self.hold,
                    );
                    status.last_clean_pass_seconds =
                        self.shared.last_clean_pass().map(|at| at.elapsed().as_secs_f64());
                    status.errors.extend(self.shared.last_error());
                    // The asker may have given up waiting.
                    let _ = reply.send(status);
                }
                Request::Explain(question, reply) => {
                    let _ = reply.send(self.explain(&question));
                }
                Request::Starting(pod, deadline, reply) => {
                    // Also of pods that claim nothing: the API server still shows the address on them.
                    for address in &pod.addresses {
                        let holders = self.index.pods_with(*address).map(|(key, _)| gather::object_key(key));
                        self.pending.pods.extend(holders);
                    }
                    let changed = self.starting.claim(pod, deadline, reply);
                    self.pending.pods.extend(changed);
                }
                Request::Programmed(key, addresses, reply) => {
                    let _ = reply.send(self.programmed(&key, &addresses));
                }
                Request::Stopped(key, uid, addresses) => {
                    // Of a pod that nobody knows nothing would ever end the memory.
                    let is_known = self.subscription.cluster().read().pods.contains_key(&key);
                    if self.starting.stop(&key, uid, addresses) {
                        if !is_known {
                            self.starting.observe(&key, None);
                        }
                        self.pending.pods.insert(key);
                    }
                }
            }
        }
    }

    pub(super) fn answer_starting(&mut self, listed: bool) {
        if self.starting.next_deadline().is_none() {
            return;
        }
        let waiting: Vec<_> = self.starting.waiting().cloned().collect();
        let obstacles: BTreeMap<_, _> = waiting
            .into_iter()
            .filter_map(|key| Some((key.clone(), self.obstacle(&gather::key(&key))?)))
            .collect();
        let state = self.subscription.cluster().read();
        self.starting.answer(
            Instant::now(),
            listed,
            |key| obstacles.get(key).cloned(),
            |key| state.pods.get(key).map(Arc::as_ref),
        );
    }

    fn programmed(&self, object: &ObjectKey, addresses: &[IpAddr]) -> Result<(), NotProgrammed> {
        let listed = self.subscription.cluster().read().has_listed(&NEEDED);
        if !listed || !self.adopted {
            return Err(NotProgrammed::NotListed(object.clone()));
        }
        let key = gather::key(object);
        if self.index.pod(&key).is_none() {
            return Err(NotProgrammed::UnknownPod(object.clone()));
        }
        let is_its_own =
            |ip: &IpAddr| self.index.pods_with(*ip).any(|(holder, pod)| *holder == key && pod.local);
        if let Some(foreign) = addresses.iter().find(|ip| !is_its_own(ip)) {
            let reason = format!("{foreign} is not known to be an address of it");
            return Err(NotProgrammed::NotWritten { pod: object.clone(), reason });
        }
        match self.obstacle(&key) {
            None => Ok(()),
            Some(reason) => Err(NotProgrammed::NotWritten { pod: object.clone(), reason }),
        }
    }

    /// What stands against a pod's policies being in the kernel, if anything does.
    fn obstacle(&self, key: &Key) -> Option<String> {
        let reason = || self.shared.last_error().unwrap_or_else(|| "the pass is not done".to_owned());
        if !self.adopted {
            return Some(reason());
        }
        let Some(pod) = self.index.pod(key) else {
            return Some("its addresses belong to another pod".to_owned());
        };
        let differs = |ip: &IpAddr| {
            let entry = Entry::Ip(*ip);
            self.index.sets().iter().any(|(name, set)| {
                set.entries().contains_key(&entry)
                    != self.mirror.get(name).is_some_and(|set| set.entries().contains_key(&entry))
            })
        };
        if pod.ips.iter().any(differs) {
            return Some(reason());
        }
        if self.unwritten.is_empty() && !self.unwritten_all {
            return None;
        }
        let in_kernel = |chain: ChainName| {
            self.kernel.families().iter().all(|family| self.kernel.has_chain(*family, chain))
        };
        let waits = |chain: ChainName| {
            self.unwritten.iter().any(|(_, name)| *name == chain) || self.unwritten_all && !in_kernel(chain)
        };
        let its_own =
            self.index.isolated().filter(|(_, pod, _)| *pod == key).any(|(direction, _, policies)| {
                waits(group_chain(direction, policies))
                    || policies.iter().any(|policy| waits(policy_chain(direction, policy)))
            });
        // The first chain of dispatch: without it nobody is judged.
        let dispatch = ChainName::new("KUBE-NWPLCY-INGRESS").is_ok_and(in_kernel);
        (its_own || self.unwritten_all && !dispatch).then(reason)
    }

    fn explain(&mut self, question: &Question) -> Result<Answer, Unanswerable> {
        let failed = |error: Error| Unanswerable(format!("the kernel cannot be read: {error}"));
        if !self.adopted {
            return Err(Unanswerable("the cluster is not listed yet, so nothing is decided".to_owned()));
        }
        let mut sets = self.kernel.read_sets().map_err(failed)?;
        if let Exempt::Sets(services) = gather::options(&self.settings, self.kernel.families()).exempt {
            for named in services.into_values() {
                for name in named.addresses.into_iter().chain([named.frontends]) {
                    if let Some(set) = self.kernel.read_set(name).map_err(failed)? {
                        sets.insert(name, set);
                    }
                }
            }
        }
        let mut rulesets = BTreeMap::new();
        for family in self.kernel.families() {
            let found = self.kernel.read_chains(*family).map_err(failed)?;
            if let Some(wanted) = self.index.ruleset(*family) {
                rulesets.insert(*family, found.rules(wanted, *family));
            }
        }
        let kernel = KernelState { rulesets, sets };
        let state = self.subscription.cluster().read();
        explain::explain(question, &self.settings.node_name, &state, &self.index, &kernel)
    }
}
