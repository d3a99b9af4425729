//! Kubernetes NetworkPolicy (networking.k8s.io/v1): what it means, and how one node enforces it.
//!
//! The meaning, in prose. A pod is *isolated* in a direction as soon as one policy of its namespace that
//! speaks of that direction selects it. An isolated pod has only the traffic that some rule of some such
//! policy allows; directions never mix, and for traffic between two pods the egress of the one and the
//! ingress of the other must both allow it. A pod nobody selects has all traffic. Always allowed are: the
//! pod's own node to the pod, replies of allowed connections, a pod to itself, and ICMP.
//!
//! - [`Policy`], [`Pod`] and their parts: plain input.
//! - [`Index`]: takes pods, namespaces and policies as they change and keeps the chains and sets of this
//!   node, reporting what each change touched.
//! - [`Index::explain`]: what the policies mean for one connection; [`trace()`]: what chains and sets do to
//!   its first packet. Both must agree, and tests compare them with an oracle written apart.
//!
//! Pure: no clock, no IO, no kernel.

mod block;
mod chain;
mod compile;
mod definition;
mod explain;
mod held;
mod index;
mod members;
mod model;
mod name;
mod trace;

pub use chain::{Exempt, Options, ServiceSets, UnknownPods};
pub use explain::{Explanation, Flow, Side};
pub use held::Held;
pub use index::{Index, Touched};
pub use model::{
    Direction, Key, Labels, NamedPort, Peer, Pod, Policy, PolicyPort, PortMatch, Protocol, Requirement, Rule,
    Selector,
};
pub use name::{CHAIN_PREFIXES, Gate, SET_PREFIXES, group_chain, group_of, policy as policy_chain};
pub use trace::{Packet, Trace, TraceError, Verdict, trace};
