//! Wire objects to the values the rooms use: validated, defaults filled in, problems named.
//!
//! Three outcomes: the object is ours, it is not ours to serve, or it cannot be parsed and its
//! last good state stays. A value that is wrong only in part (one bad address among others) is
//! served without that part and carries a [`Problem`].

pub mod endpoints;
pub mod network_policy;
pub mod node;
pub mod secret;
pub mod service;
pub mod workload;

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use foldhash::{HashSet, HashSetExt};

use super::ObjectKey;
use super::service::{Problem, Protocol};
use super::wire::{ApiKind, Item, Meta};

/// What became of one object.
#[derive(Debug)]
pub enum Decoded<T> {
    /// To be stored.
    Ours(T),
    /// Not for us: what is known of it is forgotten.
    NotOurs,
    /// Cannot be parsed: what is known of it stays.
    Broken(Problem),
}

/// The longest name the API admits for any object (a DNS subdomain).
const MAX_NAME: usize = 253;

/// The key of an object, if it has a usable one.
pub fn key(meta: &Meta) -> Result<ObjectKey, Problem> {
    for (what, text) in [("metadata.name", &meta.name), ("metadata.namespace", &meta.namespace)] {
        if text.len() > MAX_NAME {
            return Err(Problem {
                reason: "InvalidName",
                message: format!(
                    "{what} has {} characters ({}...); the limit is {MAX_NAME}; the object is ignored, rename it",
                    text.chars().count(),
                    text.chars().take(40).collect::<String>()
                ),
            });
        }
    }
    if meta.name.is_empty() {
        return Err(Problem {
            reason: "InvalidName",
            message: format!(
                "an object in namespace {:?} has no metadata.name; it is ignored, name it",
                meta.namespace
            ),
        });
    }
    Ok(ObjectKey::new(meta.namespace.as_str(), meta.name.as_str()))
}

/// Refuses an object with fields of a wrong type.
pub fn whole<T: ApiKind>(item: &Item<T>) -> Result<(), Problem> {
    if item.wrong.is_empty() {
        return Ok(());
    }
    Err(Problem {
        reason: "Unparsable",
        message: format!(
            "{}; the last good state of this {} stays in force, correct the object",
            item.wrong.join("; "),
            T::KIND
        ),
    })
}

/// Parses an address that traffic may be sent to or taken on. Errors say why not.
pub fn usable_address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text.parse().map_err(|_| format!("{:?} is not an IP address", shortened(text)))?;
    let refusal = match address {
        IpAddr::V4(v4) if v4.is_unspecified() => "the unspecified address",
        IpAddr::V4(v4) if v4.is_loopback() => "a loopback address",
        IpAddr::V4(v4) if v4.is_multicast() || v4.is_broadcast() => "a multicast address",
        IpAddr::V4(v4) if v4.is_link_local() => "a link-local address",
        IpAddr::V6(v6) if v6.is_unspecified() => "the unspecified address",
        IpAddr::V6(v6) if v6.is_loopback() => "a loopback address",
        IpAddr::V6(v6) if v6.is_multicast() => "a multicast address",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => "a link-local address",
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => "an IPv4-mapped IPv6 address",
        _ => return Ok(address),
    };
    Err(format!("{address} is {refusal}"))
}

/// Text from an object for a message, with a bound on its length.
pub fn shortened(text: &str) -> String {
    const KEPT: usize = 80;
    if text.len() <= KEPT {
        return text.to_owned();
    }
    let mut kept: String = text.chars().take(KEPT).collect();
    kept.push_str("...");
    kept
}

/// `protocol`, empty meaning TCP.
pub fn protocol(text: &str) -> Option<Protocol> {
    match text {
        "" | "TCP" => Some(Protocol::Tcp),
        "UDP" => Some(Protocol::Udp),
        "SCTP" => Some(Protocol::Sctp),
        _ => None,
    }
}

/// The same, for policies.
pub fn policy_protocol(text: &str) -> Option<ferroute_policy::Protocol> {
    Some(match protocol(text)? {
        Protocol::Tcp => ferroute_policy::Protocol::Tcp,
        Protocol::Udp => ferroute_policy::Protocol::Udp,
        Protocol::Sctp => ferroute_policy::Protocol::Sctp,
    })
}

/// A port number 1 to 65535.
pub fn port(number: i64) -> Option<NonZeroU16> {
    u16::try_from(number).ok().and_then(NonZeroU16::new)
}

/// `None` for the empty text, which the API treats like an absent field.
pub fn given(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// Values that many objects repeat (node names, zones, hints, port lists), kept once.
pub struct Pool<T: ?Sized + std::hash::Hash + Eq> {
    known: HashSet<Arc<T>>,
    sweep_at: usize,
}

impl<T: ?Sized + std::hash::Hash + Eq> Default for Pool<T> {
    fn default() -> Self {
        Self { known: HashSet::new(), sweep_at: 1024 }
    }
}

impl<T: ?Sized + std::hash::Hash + Eq> Pool<T> {
    /// The shared copy of a value.
    pub fn share<Q>(&mut self, value: Q) -> Arc<T>
    where
        Q: std::borrow::Borrow<T> + Into<Arc<T>>,
    {
        if let Some(known) = self.known.get(value.borrow()) {
            return known.clone();
        }
        if self.known.len() >= self.sweep_at {
            // Values that only the pool still holds; doubling keeps the cost of sweeping constant
            // per insert.
            self.known.retain(|value| Arc::strong_count(value) > 1);
            self.sweep_at = (self.known.len() * 2).max(1024);
        }
        let shared: Arc<T> = value.into();
        self.known.insert(shared.clone());
        shared
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod policy_tests;
