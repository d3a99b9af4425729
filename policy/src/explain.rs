//! Why one packet is allowed or refused, by the meaning of the policies alone: no chains, no sets.

use std::fmt;
use std::net::IpAddr;

use crate::block::Block;
use crate::definition::names;
use crate::{Direction, Index, Key, Peer, Pod, PortMatch, Protocol, Rule};

/// A connection attempt: first packet of TCP, UDP or SCTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Sender.
    pub source: IpAddr,
    /// Receiver, the endpoint's address when a Service was asked.
    pub destination: IpAddr,
    /// Protocol.
    pub protocol: Protocol,
    /// Destination port.
    pub port: u16,
}

/// What one pod's policies say about a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Side {
    /// Egress of the source or ingress of the destination.
    pub direction: Direction,
    /// Whose policies.
    pub pod: Key,
    /// Policies that isolate the pod in this direction; none: everything is allowed.
    pub isolated_by: Vec<Key>,
    /// The first rule that allows the flow: its policy and its place in the list, from 0.
    pub allowed_by: Option<(Key, usize)>,
}

impl Side {
    /// Whether this side lets the flow pass.
    #[must_use]
    pub fn allows(&self) -> bool {
        self.isolated_by.is_empty() || self.allowed_by.is_some()
    }
}

/// What policies say about a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Explanation {
    /// Source and destination are one pod: always allowed.
    Itself(Key),
    /// From a node to its own pod: always allowed.
    OwnNode(Key),
    /// As the sides say; an end that is no pod has none.
    Judged {
        /// Egress of the source.
        egress: Option<Side>,
        /// Ingress of the destination.
        ingress: Option<Side>,
    },
}

impl Explanation {
    /// Whether the flow passes.
    #[must_use]
    pub fn allows(&self) -> bool {
        match self {
            Self::Itself(_) | Self::OwnNode(_) => true,
            Self::Judged { egress, ingress } => egress.iter().chain(ingress).all(Side::allows),
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { direction, pod, isolated_by, allowed_by } = self;
        write!(f, "{direction} of {pod}: ")?;
        if isolated_by.is_empty() {
            return write!(f, "allowed, no policy isolates it");
        }
        match allowed_by {
            Some((policy, rule)) => write!(f, "allowed by {policy}, {direction} rule {rule}")?,
            None => write!(f, "refused, no rule allows it")?,
        }
        let names: Vec<String> = isolated_by.iter().map(Key::to_string).collect();
        write!(f, " (isolated by {})", names.join(", "))
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Itself(pod) => write!(f, "{pod} to itself: always allowed"),
            Self::OwnNode(pod) => write!(f, "the node of {pod} to its own pod: always allowed"),
            Self::Judged { egress: None, ingress: None } => {
                write!(f, "neither end is a pod: policies say nothing")
            }
            Self::Judged { egress, ingress } => {
                let sides: Vec<String> = egress.iter().chain(ingress).map(Side::to_string).collect();
                write!(f, "{}", sides.join("\n"))
            }
        }
    }
}

impl Index {
    /// What the policies say about a flow. `own_node` says that the source is the destination pod's node.
    ///
    /// Where several pods have an address (one is being replaced), the first by name that policies can
    /// select stands for it.
    #[must_use]
    pub fn explain(&self, flow: &Flow, own_node: bool) -> Explanation {
        let source = self.selectable(flow.source);
        let destination = self.selectable(flow.destination);
        if let (Some((from, _)), Some((to, _))) = (source, destination)
            && from == to
        {
            return Explanation::Itself(from.clone());
        }
        if let Some((pod, _)) = destination.filter(|_| own_node) {
            return Explanation::OwnNode(pod.clone());
        }
        let side =
            |direction, end: Option<(&Key, &Pod)>| end.map(|(key, pod)| self.side(direction, key, pod, flow));
        Explanation::Judged {
            egress: side(Direction::Egress, source),
            ingress: side(Direction::Ingress, destination),
        }
    }

    /// The pod behind an address that policies can select.
    fn selectable(&self, ip: IpAddr) -> Option<(&Key, &Pod)> {
        self.pods_with(ip).find(|(_, pod)| !pod.host_network)
    }

    fn side(&self, direction: Direction, key: &Key, pod: &Pod, flow: &Flow) -> Side {
        let mut side = Side { direction, pod: key.clone(), isolated_by: Vec::new(), allowed_by: None };
        for (name, policy) in self.policies.get(&key.namespace).into_iter().flatten() {
            let Some(rules) = policy.rules(direction) else { continue };
            if !policy.pod_selector.matches(&pod.labels) {
                continue;
            }
            let policy = Key::new(key.namespace.clone(), name.clone());
            if side.allowed_by.is_none() {
                let other = match direction {
                    Direction::Ingress => flow.source,
                    Direction::Egress => flow.destination,
                };
                let allowing = rules.iter().position(|rule| self.rule_allows(rule, &policy, other, flow));
                side.allowed_by = allowing.map(|rule| (policy.clone(), rule));
            }
            side.isolated_by.push(policy);
        }
        // What they allow is not known here, only to the kernel.
        let held = self.held.iter().filter(|(policy, held)| {
            policy.namespace == key.namespace && held.isolates(direction) && held.selects(&pod.labels)
        });
        side.isolated_by.extend(held.map(|(policy, _)| policy.clone()));
        side
    }

    fn rule_allows(&self, rule: &Rule, policy: &Key, other: IpAddr, flow: &Flow) -> bool {
        let peers = rule.peers.as_ref().is_none_or(|peers| {
            peers.iter().any(|peer| match peer {
                Peer::Block { cidr, except } => Block { cidr: *cidr, except }.holds(other),
                Peer::Pods { namespaces, pods } => self.pods_with(other).any(|(key, pod)| {
                    names(&policy.namespace, namespaces.as_ref(), pods, key, pod, &self.namespaces)
                }),
            })
        });
        peers
            && rule.ports.as_ref().is_none_or(|ports| {
                ports.iter().filter(|port| port.protocol == flow.protocol).any(|port| match &port.ports {
                    PortMatch::Any => true,
                    PortMatch::Range(first, last) => (*first..=*last).contains(&flow.port),
                    PortMatch::Named(name) => self.pods_with(flow.destination).any(|(_, pod)| {
                        pod.ports.iter().any(|port| {
                            port.name == *name
                                && port.protocol == flow.protocol
                                && port.port.get() == flow.port
                        })
                    }),
                })
            })
    }
}
