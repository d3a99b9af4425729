//! Pods whose network is being made: known from the container runtime before the API server tells
//! their addresses. Pure, time passed in.
//!
//! A claim lasts as long as its pod. It makes the pod local and gives it its addresses until the
//! watch reports them, and takes these addresses from every other pod: the runtime hands an address
//! out again while the API still shows it on the pod that had it before.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use crate::cluster::ObjectKey;
use crate::cluster::workload::{Phase, Pod};

/// A pod whose network is being made, as the container runtime names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartingPod {
    /// Namespace and name.
    pub key: ObjectKey,
    /// `metadata.uid`, where the runtime knows it. Without, a pod that replaces one of the same
    /// name may be taken for the old one until the watch reports it.
    pub uid: Option<Arc<str>>,
    /// The addresses it got.
    pub addresses: Vec<IpAddr>,
}

/// Why a starting pod's policies are not in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotProgrammed {
    /// The watch has not brought the pod in time, so its labels are not known.
    #[error(
        "the API server has not told this node of pod {0} in time, so its policies are not known; it stays closed \
         until it does"
    )]
    UnknownPod(ObjectKey),
    /// The first lists are not complete.
    #[error(
        "the cluster is not listed yet, so the policies of pod {0} are not known; it stays closed until it is"
    )]
    NotListed(ObjectKey),
    /// The kernel could not be written in time.
    #[error("the policies of pod {pod} are not in the kernel in time: {reason}")]
    NotWritten {
        /// The pod.
        pod: ObjectKey,
        /// What the last failure said.
        reason: String,
    },
    /// The room is stopping or busy.
    #[error("the policy room does not answer; the daemon is stopping or busy")]
    NoAnswer,
}

/// Where the answer goes.
pub(super) type Reply = SyncSender<Result<(), NotProgrammed>>;

struct Waiting {
    deadline: Instant,
    reply: Reply,
}

struct Claim {
    uid: Option<Arc<str>>,
    addresses: Vec<IpAddr>,
    waiting: Vec<Waiting>,
}

impl Claim {
    /// Whether a Pod object is the one that claims, and not one of the same name before or after.
    fn is_of(&self, pod: &Pod) -> bool {
        self.uid.as_ref().is_none_or(|uid| *uid == pod.uid)
    }
}

/// A pod whose network was taken away, while the API server still shows its addresses.
struct Stopped {
    uid: Option<Arc<str>>,
    addresses: Vec<IpAddr>,
}

impl Stopped {
    fn is_of(&self, pod: &Pod) -> bool {
        self.uid.as_ref().is_none_or(|uid| *uid == pod.uid)
    }
}

/// All claims.
#[derive(Default)]
pub struct Starting {
    claims: BTreeMap<ObjectKey, Claim>,
    holders: BTreeMap<IpAddr, ObjectKey>,
    stopped: BTreeMap<ObjectKey, Stopped>,
}

impl Starting {
    /// A pod claims its addresses; the answer goes to `reply`. Returns the pods whose addresses
    /// changed by it.
    pub(super) fn claim(&mut self, pod: StartingPod, deadline: Instant, reply: Reply) -> Vec<ObjectKey> {
        let mut changed = vec![pod.key.clone()];
        let mut waiting = Vec::new();
        if let Some(before) = self.claims.remove(&pod.key) {
            self.release_addresses(&pod.key, &before.addresses);
            // The runtime asks again when it gave up waiting for the first answer.
            waiting = before.waiting;
        }
        for address in &pod.addresses {
            if let Some(before) = self.holders.insert(*address, pod.key.clone()) {
                changed.push(before);
            }
        }
        if let Some(stopped) = self.stopped.get_mut(&pod.key) {
            // The same pod again, in a new sandbox.
            stopped.addresses.retain(|address| !pod.addresses.contains(address));
        }
        waiting.push(Waiting { deadline, reply });
        self.claims.insert(pod.key, Claim { uid: pod.uid, addresses: pod.addresses, waiting });
        changed
    }

    /// The runtime took these addresses away from a pod: its claim of them ends, and what the API
    /// server still shows of them is not true any more. `uid` and the addresses keep the end of an old
    /// pod, or of a pod's old sandbox, apart from a new one of the same name. Returns whether anything
    /// changed by it.
    pub(super) fn stop(&mut self, key: &ObjectKey, uid: Option<Arc<str>>, addresses: Vec<IpAddr>) -> bool {
        let same = |claim: &Claim| match (&claim.uid, &uid) {
            (Some(known), Some(uid)) => known == uid,
            _ => true,
        };
        let claim = self.claims.get(key).filter(|claim| same(claim));
        let is_claimed = claim.is_some_and(|claim| claim.addresses.iter().any(|ip| addresses.contains(ip)));
        if is_claimed {
            self.release(key);
        }
        let gone = |ip: &IpAddr| self.holders.get(ip) != Some(key);
        let addresses: Vec<IpAddr> = addresses.into_iter().filter(gone).collect();
        if addresses.is_empty() {
            return is_claimed;
        }
        self.stopped.insert(key.clone(), Stopped { uid, addresses });
        true
    }

    /// Whether the runtime took this address away from this pod.
    pub fn is_stopped(&self, address: IpAddr, pod: &Pod) -> bool {
        self.stopped
            .get(&pod.key)
            .is_some_and(|stopped| stopped.is_of(pod) && stopped.addresses.contains(&address))
    }

    fn release(&mut self, key: &ObjectKey) {
        if let Some(claim) = self.claims.remove(key) {
            self.release_addresses(key, &claim.addresses);
        }
    }

    fn release_addresses(&mut self, key: &ObjectKey, addresses: &[IpAddr]) {
        for address in addresses {
            if self.holders.get(address) == Some(key) {
                self.holders.remove(address);
            }
        }
    }

    /// Looks at a pod after the watch reported it, or that it is gone: a claim ends with its pod.
    pub fn observe(&mut self, key: &ObjectKey, pod: Option<&Pod>) {
        if self.stopped.get(key).is_some_and(|stopped| !pod.is_some_and(|pod| stopped.is_of(pod))) {
            self.stopped.remove(key);
        }
        let Some(claim) = self.claims.get(key) else { return };
        let over = match pod {
            Some(pod) => claim.is_of(pod) && matches!(pod.phase, Phase::Succeeded | Phase::Failed),
            // Not reported yet is not gone: someone waits for it.
            None => claim.waiting.is_empty(),
        };
        if over {
            self.release(key);
        }
    }

    /// The addresses a pod claims, if this Pod object is the one that does.
    pub fn addresses(&self, pod: &Pod) -> Option<&[IpAddr]> {
        let claim = self.claims.get(&pod.key)?;
        claim.is_of(pod).then_some(claim.addresses.as_slice())
    }

    /// Whether an address is claimed by another pod than this, or by another of the same name.
    pub fn is_taken(&self, address: IpAddr, pod: &Pod) -> bool {
        self.holders.get(&address).is_some_and(|holder| {
            *holder != pod.key || self.claims.get(holder).is_some_and(|claim| !claim.is_of(pod))
        })
    }

    /// Answers those whose pod is programmed, and those out of time. `known` finds the Pod object;
    /// `obstacle` says what stands against its policies being in the kernel, if anything does.
    pub(super) fn answer<'a>(
        &mut self,
        now: Instant,
        listed: bool,
        obstacle: impl Fn(&ObjectKey) -> Option<String>,
        known: impl Fn(&ObjectKey) -> Option<&'a Pod>,
    ) {
        for (key, claim) in &mut self.claims {
            if claim.waiting.is_empty() {
                continue;
            }
            let is_known = known(key).is_some_and(|pod| claim.is_of(pod));
            let outcome = if !listed {
                Err(NotProgrammed::NotListed(key.clone()))
            } else if !is_known {
                Err(NotProgrammed::UnknownPod(key.clone()))
            } else {
                match obstacle(key) {
                    Some(reason) => Err(NotProgrammed::NotWritten { pod: key.clone(), reason }),
                    None => Ok(()),
                }
            };
            claim.waiting.retain(|waiting| {
                let answered = outcome.is_ok() || waiting.deadline <= now;
                if answered {
                    // The asker may have gone.
                    let _ = waiting.reply.try_send(outcome.clone());
                }
                !answered
            });
        }
        // A claim outlives a "no": the pod opens as soon as it is known, unless the runtime takes
        // its network away.
    }

    /// When the next of those who wait is out of time.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.claims.values().flat_map(|claim| &claim.waiting).map(|waiting| waiting.deadline).min()
    }

    /// Pods that wait for their policies.
    pub fn waiting(&self) -> impl Iterator<Item = &ObjectKey> {
        self.claims.iter().filter(|(_, claim)| !claim.waiting.is_empty()).map(|(key, _)| key)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, sync_channel};
    use std::time::Duration;

    use super::*;

    fn pod(name: &str, uid: &str, phase: Phase) -> Pod {
        Pod {
            key: ObjectKey::new("shop", name),
            uid: uid.into(),
            labels: Arc::default(),
            ips: Vec::new(),
            host_ips: Vec::new(),
            host_network: false,
            phase,
            node: None,
            ports: Vec::new(),
            ready: false,
            terminating: false,
        }
    }

    fn claim(
        starting: &mut Starting,
        name: &str,
        uid: &str,
        address: &str,
    ) -> (Vec<ObjectKey>, Receiver<Result<(), NotProgrammed>>) {
        let (reply, answer) = sync_channel(1);
        let pod = StartingPod {
            key: ObjectKey::new("shop", name),
            uid: Some(uid.into()),
            addresses: vec![address.parse().unwrap()],
        };
        (starting.claim(pod, Instant::now() + Duration::from_secs(5), reply), answer)
    }

    #[test]
    fn a_claim_gives_addresses_to_its_pod_and_takes_them_from_others() {
        let mut starting = Starting::default();
        let (old, new) = (pod("old", "u1", Phase::Running), pod("new", "u2", Phase::Pending));
        let address = "10.1.0.5".parse().unwrap();
        let (changed, _) = claim(&mut starting, "old", "u1", "10.1.0.5");
        assert_eq!(changed, std::slice::from_ref(&old.key));
        let (changed, _) = claim(&mut starting, "new", "u2", "10.1.0.5");
        assert_eq!(changed, [new.key.clone(), old.key.clone()]);
        assert_eq!(starting.addresses(&new), Some(&[address][..]));
        assert!(starting.is_taken(address, &old) && !starting.is_taken(address, &new));
        // A pod of the same name with another uid is another pod.
        let before = pod("new", "u0", Phase::Running);
        assert_eq!(starting.addresses(&before), None);
        assert!(starting.is_taken(address, &before));
        starting.observe(&new.key, Some(&pod("new", "u0", Phase::Failed)));
        assert!(starting.addresses(&new).is_some(), "the end of an old pod is not its own");
        starting.observe(&new.key, Some(&pod("new", "u2", Phase::Succeeded)));
        assert_eq!(starting.addresses(&new), None);
        assert!(!starting.is_taken(address, &old));
    }

    #[test]
    fn the_runtime_takes_back_only_what_it_gave() {
        let mut starting = Starting::default();
        let key = ObjectKey::new("shop", "web-0");
        let _ = claim(&mut starting, "web-0", "u2", "10.1.0.5");
        let address: Vec<IpAddr> = vec!["10.1.0.5".parse().unwrap()];
        let is_held = |starting: &Starting| starting.addresses(&pod("web-0", "u2", Phase::Running)).is_some();
        // The end of an old pod of the same name, and of an old sandbox of the same pod.
        starting.stop(&key, Some("u1".into()), address.clone());
        starting.stop(&key, Some("u2".into()), vec!["10.1.0.4".parse().unwrap()]);
        assert!(is_held(&starting));
        assert!(starting.stop(&key, Some("u2".into()), address.clone()));
        assert!(!is_held(&starting));
        assert!(starting.is_stopped(address[0], &pod("web-0", "u2", Phase::Running)));
        assert!(!starting.is_stopped(address[0], &pod("web-0", "u3", Phase::Running)));
        // The same pod in a new sandbox with the same address.
        let _ = claim(&mut starting, "web-0", "u2", "10.1.0.5");
        assert!(!starting.is_stopped(address[0], &pod("web-0", "u2", Phase::Running)));
        starting.stop(&key, None, address.clone());
        assert!(starting.is_stopped(address[0], &pod("web-0", "u2", Phase::Running)));
        // Forgotten with its object.
        starting.observe(&key, None);
        assert!(!starting.is_stopped(address[0], &pod("web-0", "u2", Phase::Running)));
    }

    #[test]
    fn answers_say_what_is_missing() {
        let mut starting = Starting::default();
        let (now, late) = (Instant::now(), Instant::now() + Duration::from_secs(60));
        let known = pod("a", "u1", Phase::Pending);
        let other = pod("a", "u0", Phase::Running);
        for (at, listed, failing, object, expected) in [
            (now, true, None, None, None),
            (now, true, Some("locked"), Some(&known), None),
            (late, false, None, None, Some(Err("not listed"))),
            (late, true, None, None, Some(Err("has not told"))),
            (late, true, None, Some(&other), Some(Err("has not told"))),
            (late, true, Some("locked"), Some(&known), Some(Err("locked"))),
            (now, true, None, Some(&known), Some(Ok(()))),
        ] {
            let (_, answer) = claim(&mut starting, "a", "u1", "10.1.0.5");
            starting.answer(at, listed, |_| failing.map(str::to_owned), |_| object);
            match (answer.try_recv().ok(), expected) {
                (None, None) | (Some(Ok(())), Some(Ok(()))) => {}
                (Some(Err(error)), Some(Err(part))) => assert!(error.to_string().contains(part), "{error}"),
                (got, expected) => panic!("{got:?} instead of {expected:?}"),
            }
            assert_eq!(starting.next_deadline().is_some(), expected.is_none());
            starting.release(&known.key);
        }
    }

    #[test]
    fn an_unreported_pod_keeps_its_claim_while_someone_waits() {
        let mut starting = Starting::default();
        let (_, _answer) = claim(&mut starting, "a", "u1", "10.1.0.5");
        starting.observe(&ObjectKey::new("shop", "a"), None);
        assert_eq!(starting.waiting().count(), 1);
        starting.answer(Instant::now() + Duration::from_secs(60), true, |_| None, |_| None);
        assert!(starting.addresses(&pod("a", "u1", Phase::Pending)).is_some());
        starting.observe(&ObjectKey::new("shop", "a"), None);
        assert_eq!(starting.addresses(&pod("a", "u1", Phase::Pending)), None);
    }
}
