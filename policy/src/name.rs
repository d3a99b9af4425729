//! Names of chains and sets: functions of what they hold, so that a restart finds its own again.
//!
//! Prefixes and fixed names are kube-router's where it has the same thing.

use ferroute_iptables::{ChainName, Family, SetName, hashed};

use crate::Direction;

/// Longest part of a name behind the prefix is 16 characters of a hash; a unit test walks all forms.
fn chain(text: &str) -> ChainName {
    #[allow(clippy::expect_used)]
    ChainName::new(text).expect("fixed and hashed chain names are short enough")
}

/// A set's name in one family: IPv6 sets carry kube-router's `inet6:` prefix.
pub(crate) fn set(text: &str, family: Family) -> SetName {
    let name = match family {
        Family::V4 => text.to_owned(),
        Family::V6 => format!("inet6:{text}"),
    };
    // The longest are `inet6:`, nine characters of prefix and 16 of a hash: 31, the kernel's limit.
    #[allow(clippy::expect_used)]
    SetName::new(&name).expect("fixed and hashed set names are short enough")
}

/// Prefixes of every chain this crate writes; kube-router's own leftovers carry them too.
pub const CHAIN_PREFIXES: [&str; 5] =
    ["KUBE-ROUTER-INPUT", "KUBE-ROUTER-FORWARD", "KUBE-ROUTER-OUTPUT", "KUBE-POD-FW-", "KUBE-NWPLCY-"];

/// Beginnings of the IPv4 names of every set this crate writes; IPv6 twins have `inet6:` in front.
pub const SET_PREFIXES: [&str; 6] = [
    "KUBE-SRC-",
    "KUBE-DST-",
    "kube-router-isolated-",
    "kube-router-local-pods",
    "kube-router-pod-nets",
    "kube-router-pod-self",
];

/// What being in a set means for a pod of this node, beyond what rules of policies say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Gate {
    /// Its policies are in force.
    Isolated,
    /// It is known: not closed as an unknown address.
    Known,
}

impl Gate {
    /// The gate that a set is, if it is one. A pod goes through a gate only when all that its rules name is
    /// in the kernel, first [`Gate::Isolated`], then [`Gate::Known`]; and leaves in the opposite order before
    /// anything else of it goes.
    #[must_use]
    pub fn of(set: SetName) -> Option<Self> {
        let base = set.as_str().strip_prefix("inet6:").unwrap_or(set.as_str());
        if base == LOCAL_PODS {
            Some(Self::Known)
        } else if Direction::BOTH.into_iter().any(|direction| base == isolated(direction)) {
            Some(Self::Isolated)
        } else {
            None
        }
    }
}

pub(crate) const POD_NETS: &str = "kube-router-pod-nets";
pub(crate) const LOCAL_PODS: &str = "kube-router-local-pods";
pub(crate) const SELF: &str = "kube-router-pod-self";

pub(crate) fn isolated(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "kube-router-isolated-in",
        Direction::Egress => "kube-router-isolated-out",
    }
}

pub(crate) fn input() -> ChainName {
    chain("KUBE-ROUTER-INPUT")
}

pub(crate) fn forward() -> ChainName {
    chain("KUBE-ROUTER-FORWARD")
}

pub(crate) fn output() -> ChainName {
    chain("KUBE-ROUTER-OUTPUT")
}

/// Marks a packet as allowed by some rule.
pub(crate) fn allow() -> ChainName {
    chain("KUBE-NWPLCY-DEFAULT")
}

/// What is allowed whatever the policies.
pub(crate) fn common() -> ChainName {
    chain("KUBE-NWPLCY-COMMON")
}

/// Where packets find the chain of their pod; `bits` are the low bits of the pod's address so far.
pub(crate) fn dispatch(direction: Direction, bits: &str) -> ChainName {
    let root = match direction {
        Direction::Ingress => "KUBE-NWPLCY-INGRESS",
        Direction::Egress => "KUBE-NWPLCY-EGRESS",
    };
    if bits.is_empty() { chain(root) } else { chain(&format!("{root}-{bits}")) }
}

/// Rules of one policy in one direction.
#[must_use]
pub fn policy(direction: Direction, key: &crate::Key) -> ChainName {
    let direction = direction.to_string();
    chain(&hashed("KUBE-NWPLCY-", &[&direction, &key.namespace, &key.name]))
}

/// Policies of the pods that they select together in one direction; chain and set share the hash.
pub(crate) struct GroupNames {
    pub chain: ChainName,
    pub set: String,
}

pub(crate) fn group(direction: Direction, policies: &[crate::Key]) -> GroupNames {
    let direction_text = direction.to_string();
    let mut parts = vec!["pods", direction_text.as_str()];
    for key in policies {
        parts.extend([&*key.namespace, &*key.name]);
    }
    let hash = hashed("", &parts);
    let set = format!("{}{hash}", group_prefix(direction));
    GroupNames { chain: chain(&format!("KUBE-POD-FW-{hash}")), set }
}

/// The set of the pods that meet a group's chain, by the chain's name; `None` if it is no such chain.
#[must_use]
pub fn group_of(chain: ChainName, direction: Direction, family: Family) -> Option<SetName> {
    let hash = chain.as_str().strip_prefix("KUBE-POD-FW-")?;
    SetName::new(&match family {
        Family::V4 => format!("{}{hash}", group_prefix(direction)),
        Family::V6 => format!("inet6:{}{hash}", group_prefix(direction)),
    })
    .ok()
}

fn group_prefix(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "KUBE-DST-",
        Direction::Egress => "KUBE-SRC-",
    }
}

/// The chain that pods meet in a direction when exactly these policies, in order, isolate them.
#[must_use]
pub fn group_chain(direction: Direction, policies: &[crate::Key]) -> ChainName {
    group(direction, policies).chain
}

/// A set that a rule of a policy looks at: `parts` say what fills it.
pub(crate) fn members(source: bool, parts: &[&str]) -> String {
    hashed(if source { "KUBE-SRC-" } else { "KUBE-DST-" }, parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Key;

    #[test]
    fn gates_are_known_in_both_families() {
        for family in Family::BOTH {
            assert_eq!(Gate::of(set(LOCAL_PODS, family)), Some(Gate::Known));
            assert_eq!(Gate::of(set(isolated(Direction::Egress), family)), Some(Gate::Isolated));
            assert_eq!(Gate::of(set(POD_NETS, family)), None);
            assert_eq!(Gate::of(set(&members(true, &["x"]), family)), None);
        }
    }

    #[test]
    fn every_form_fits_the_kernel_and_carries_a_prefix() {
        let key = Key::new("n".repeat(253), "p".repeat(253));
        let mut chains = vec![input(), forward(), output(), allow(), common()];
        let mut sets = vec![POD_NETS.to_owned(), LOCAL_PODS.to_owned(), SELF.to_owned()];
        for direction in Direction::BOTH {
            chains.extend([
                dispatch(direction, ""),
                dispatch(direction, "01010101"),
                policy(direction, &key),
            ]);
            let group = group(direction, std::slice::from_ref(&key));
            chains.push(group.chain);
            sets.extend([
                group.set,
                isolated(direction).to_owned(),
                members(true, &["x"]),
                members(false, &["x"]),
            ]);
        }
        for chain in chains {
            assert!(CHAIN_PREFIXES.iter().any(|prefix| chain.as_str().starts_with(prefix)), "{chain}");
        }
        for name in sets {
            for family in Family::BOTH {
                set(&name, family);
            }
            assert!(SET_PREFIXES.iter().any(|prefix| name.starts_with(prefix)), "{name}");
        }
    }
}
