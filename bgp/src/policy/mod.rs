//! Import and export policy: which routes are taken and given, and how they change on the way.
//!
//! A [`Policy`] is plain data: ordered [`Statement`]s of [`Condition`]s and [`Action`]s. The first
//! statement that fits and decides ends it; one that fits without deciding changes the route and
//! goes on, and what follows sees the changed route. Around the policy stand the rules of the protocol, which no
//! policy can lift: [`import()`] refuses loops, [`export()`] knows reflection, well-known communities, next hops
//! and which attributes may cross the border of an AS.
//!
//! Without a policy an internal peer may send and get everything, an external one nothing (RFC 8212).

mod action;
mod condition;
mod export;
mod import;
mod prefix_set;

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

pub use action::{Action, Edit, NextHopChoice};
pub use condition::{Condition, NeighbourSet, Pattern, Source, Tag};
pub(crate) use export::DEFAULT_LOCAL_PREFERENCE;
pub use export::{Exporter, LearnedFrom, LocalAddresses, Outgoing, Withheld, export};
pub use import::{Importer, Refusal, import};
pub use prefix_set::{InvalidRange, PrefixRange, PrefixSet};

use crate::message::{Asn, Attributes, Community};

/// Whether a route may pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Disposition {
    /// It passes.
    Accept,
    /// It does not.
    Reject,
}

/// One rule of a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// Shown where the statement rejects a route.
    pub name: Arc<str>,
    /// All must hold; without any, every route fits.
    pub conditions: Vec<Condition>,
    /// What happens to a route that fits, in order.
    pub actions: Vec<Action>,
    /// What becomes of a route that fits; without, the next statement is asked.
    pub disposition: Option<Disposition>,
}

impl Statement {
    /// Draining neighbours lose their traffic: routes with the community of RFC 8326 get local
    /// preference 0. To stand before the statements that accept.
    pub fn graceful_shutdown() -> Self {
        Self {
            name: "graceful-shutdown".into(),
            conditions: vec![Condition::Community(vec![Pattern::Exact(Community::GRACEFUL_SHUTDOWN)])],
            actions: vec![Action::LocalPreference(0)],
            disposition: None,
        }
    }
}

/// An import or export policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Asked in order.
    pub statements: Vec<Statement>,
    /// What becomes of a route that no statement decided.
    pub otherwise: Disposition,
}

impl Policy {
    /// Everything passes unchanged.
    pub const fn accept_all() -> Self {
        Self { statements: Vec::new(), otherwise: Disposition::Accept }
    }

    /// Nothing passes.
    pub const fn reject_all() -> Self {
        Self { statements: Vec::new(), otherwise: Disposition::Reject }
    }

    /// What the policy says, and changes the route accordingly, whatever the outcome. `own` is this
    /// speaker's AS.
    pub fn evaluate(&self, subject: &mut Subject<'_>, own: Asn) -> Verdict {
        let mut next_hop = None;
        for (index, statement) in self.statements.iter().enumerate() {
            if !statement.conditions.iter().all(|condition| condition.holds(subject)) {
                continue;
            }
            for action in &statement.actions {
                action.apply(subject, own, &mut next_hop);
            }
            if let Some(disposition) = statement.disposition {
                let statement = Some(u16::try_from(index).unwrap_or(u16::MAX));
                return Verdict { disposition, statement, next_hop };
            }
        }
        Verdict { disposition: self.otherwise, statement: None, next_hop }
    }

    /// A number equal for prefixes that this policy cannot tell apart: one bit for each question about
    /// the prefix. Routes that share it, the attributes and the source share the verdict, so that a table of
    /// routes costs a few evaluations. None if there are too many questions.
    pub fn signature(&self, prefix: IpNet) -> Option<u64> {
        let mut answers = condition::Answers::default();
        let conditions = self.statements.iter().flat_map(|statement| &statement.conditions);
        for condition in conditions {
            if !condition.ask_prefix(prefix, &mut answers) {
                return None;
            }
        }
        Some(answers.bits)
    }
}

/// The peer that a policy is applied to, or that a route was learned from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its AS.
    pub asn: Asn,
}

/// A route on its way through a policy.
#[derive(Debug, Clone)]
pub struct Subject<'a> {
    /// Where it leads.
    pub prefix: IpNet,
    /// What is said of it; a copy is made at the first change.
    pub attributes: Cow<'a, Attributes>,
    /// Where it came from.
    pub source: Source,
    /// The originator's tag; 0 for learned routes.
    pub tag: u16,
    /// The peer it was learned from.
    pub learned_from: Option<&'a Neighbour>,
    /// The peer whose policy this is.
    pub neighbour: &'a Neighbour,
}

/// What a policy said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the route passes.
    pub disposition: Disposition,
    /// The statement that decided; none if it was the policy's own disposition.
    pub statement: Option<u16>,
    /// The next hop chosen last.
    pub next_hop: Option<NextHopChoice>,
}

#[cfg(test)]
mod tests;
