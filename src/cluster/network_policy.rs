//! NetworkPolicies as the rooms see them: the API's meaning with defaults filled in.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;

use super::ObjectKey;
use super::service::{Problem, Protocol};
use super::workload::Labels;

/// A NetworkPolicy, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Namespace and name.
    pub key: ObjectKey,
    /// `metadata.uid`, for events.
    pub uid: Arc<str>,
    /// `spec.podSelector`: the Pods of this namespace that it isolates.
    pub pod_selector: Selector,
    /// Ingress rules; `None` when the policy says nothing about ingress, empty denies all.
    pub ingress: Option<Vec<Rule>>,
    /// Egress rules; `None` when the policy says nothing about egress, empty denies all.
    pub egress: Option<Vec<Rule>>,
    /// What could not be honoured in this object.
    pub problems: Vec<Problem>,
}

/// One ingress or egress rule: traffic with any of the peers on any of the ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The other side; `None` (nothing written) is anybody.
    pub peers: Option<Vec<Peer>>,
    /// Destination ports; `None` (nothing written) is every port and protocol.
    pub ports: Option<Vec<PolicyPort>>,
}

/// One entry of `from` or `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Pods by labels.
    Pods {
        /// Namespaces by labels; `None` is the policy's own.
        namespaces: Option<Selector>,
        /// Pods by labels; an empty selector is all of them.
        pods: Selector,
    },
    /// Addresses.
    Block {
        /// `ipBlock.cidr`.
        cidr: IpNet,
        /// `ipBlock.except`, each inside `cidr`.
        except: Vec<IpNet>,
    },
}

/// One entry of `ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyPort {
    /// Transport protocol (default TCP).
    pub protocol: Protocol,
    /// Which ports.
    pub ports: PortMatch,
}

/// Which ports of a protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortMatch {
    /// Every port.
    Any,
    /// First to last, both included.
    Range(u16, u16),
    /// The number each destination Pod gives to this name; none for a Pod without it.
    Named(Box<str>),
}

/// A label selector: all requirements hold. Without any it selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// The requirements; `matchLabels` become [`Requirement::In`] with one value.
    pub requirements: Vec<Requirement>,
}

/// One requirement of a selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// The label is present and has one of the values.
    In(Box<str>, BTreeSet<Box<str>>),
    /// The label is absent or has none of the values.
    NotIn(Box<str>, BTreeSet<Box<str>>),
    /// The label is present.
    Exists(Box<str>),
    /// The label is absent.
    DoesNotExist(Box<str>),
}

impl Selector {
    /// Whether an object with these labels is selected.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::NotIn(key, values) => !labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::DoesNotExist(key) => !labels.contains_key(key),
        })
    }
}
