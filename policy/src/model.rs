//! Policies, pods and namespaces as plain values: what the API objects say, defaults filled in.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::IpNet;

/// Labels of an object.
pub type Labels = BTreeMap<Box<str>, Box<str>>;

/// Namespace and name of a pod or policy.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// `metadata.namespace`
    pub namespace: Arc<str>,
    /// `metadata.name`
    pub name: Arc<str>,
}

impl Key {
    /// A key from its two parts.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Transport protocols that policies speak of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP, the API's default.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A container port with a name, as policies refer to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPort {
    /// `containerPort` name.
    pub name: Box<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// The number it stands for on this pod.
    pub port: NonZeroU16,
}

/// A pod that runs: completed and failed ones are not given to this crate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.labels`
    pub labels: Arc<Labels>,
    /// Every `status.podIPs`; those of the node when [`Pod::host_network`].
    pub ips: Vec<IpAddr>,
    /// Shares the node's addresses: never selected by a policy, and as a peer it is its node's addresses.
    pub host_network: bool,
    /// Runs on this node.
    pub local: bool,
    /// Named container ports.
    pub ports: Vec<NamedPort>,
}

impl Pod {
    /// Whether policies of this node's kernel can apply to it.
    #[must_use]
    pub fn is_enforced_here(&self) -> bool {
        self.local && !self.host_network && !self.ips.is_empty()
    }
}

/// A NetworkPolicy's meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// `spec.podSelector`: the pods of its namespace that it isolates.
    pub pod_selector: Selector,
    /// Ingress rules; `None` when the policy says nothing about ingress, empty allows nothing.
    pub ingress: Option<Vec<Rule>>,
    /// Egress rules; `None` when the policy says nothing about egress, empty allows nothing.
    pub egress: Option<Vec<Rule>>,
}

impl Policy {
    /// The rules of one direction.
    #[must_use]
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

/// Which way traffic goes, seen from the isolated pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
}

impl Direction {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// One ingress or egress rule: traffic with any of the peers on any of the ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The other side; `None` (nothing written) is anybody. An empty list (nothing valid was written) is
    /// nobody.
    pub peers: Option<Vec<Peer>>,
    /// Destination ports; `None` (nothing written) is every port and protocol. An empty list is none.
    pub ports: Option<Vec<PolicyPort>>,
}

/// One entry of `from` or `to`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
        /// `ipBlock.cidr`
        cidr: IpNet,
        /// `ipBlock.except`, each inside `cidr`.
        except: Vec<IpNet>,
    },
}

/// One entry of `ports`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PolicyPort {
    /// Protocol.
    pub protocol: Protocol,
    /// Which ports.
    pub ports: PortMatch,
}

/// Which ports of a protocol.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PortMatch {
    /// Every port.
    Any,
    /// First to last, both included.
    Range(u16, u16),
    /// The number each destination pod gives to this name; none for a pod without it.
    Named(Box<str>),
}

/// A label selector: all requirements hold. Without any it selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Selector {
    /// The requirements; `matchLabels` become [`Requirement::In`] with one value.
    pub requirements: Vec<Requirement>,
}

/// One requirement of a selector.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::NotIn(key, values) => !labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::DoesNotExist(key) => !labels.contains_key(key),
        })
    }
}
