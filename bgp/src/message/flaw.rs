//! What was wrong with a message, and what follows from it (RFC 7606).

use std::borrow::Cow;
use std::fmt;

use super::{Notification, NotificationError};

/// What an error in an UPDATE leads to (RFC 7606 section 2), weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// The attribute, or what it says of a family that is not in use, is left out.
    AttributeDiscard,
    /// All routes of the UPDATE are taken as withdrawn.
    TreatAsWithdraw,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AttributeDiscard => "attribute discard",
            Self::TreatAsWithdraw => "treat as withdraw",
        })
    }
}

/// An error in an UPDATE that the session survives. What follows from it has been done to the decoded
/// message: it is here to be logged and counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flaw {
    /// Type of the attribute, if one is to blame.
    pub attribute: Option<u8>,
    /// What followed.
    pub action: Action,
    /// The error in words.
    pub reason: Cow<'static, str>,
}

impl Flaw {
    /// How many of a message are kept; more say nothing new.
    pub const KEPT: usize = 16;

    /// Adds a flaw to a list; in a full list it takes a weaker one's place or is left out.
    pub(super) fn note(
        flaws: &mut Vec<Self>,
        attribute: impl Into<Option<u8>>,
        action: Action,
        reason: impl Into<Cow<'static, str>>,
    ) {
        let flaw = Self { attribute: attribute.into(), action, reason: reason.into() };
        if flaws.len() < Self::KEPT {
            flaws.push(flaw);
        } else if let Some(last) = flaws.last_mut().filter(|last| last.action < action) {
            *last = flaw;
        }
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.attribute {
            Some(code) => write!(f, "{}: {}: {}", self.action, attribute_name(code), self.reason),
            None => write!(f, "{}: {}", self.action, self.reason),
        }
    }
}

/// The name of an attribute type, for people.
pub fn attribute_name(code: u8) -> Cow<'static, str> {
    Cow::Borrowed(match code {
        1 => "ORIGIN",
        2 => "AS_PATH",
        3 => "NEXT_HOP",
        4 => "MULTI_EXIT_DISC",
        5 => "LOCAL_PREF",
        6 => "ATOMIC_AGGREGATE",
        7 => "AGGREGATOR",
        8 => "COMMUNITIES",
        9 => "ORIGINATOR_ID",
        10 => "CLUSTER_LIST",
        14 => "MP_REACH_NLRI",
        15 => "MP_UNREACH_NLRI",
        16 => "EXTENDED COMMUNITIES",
        17 => "AS4_PATH",
        18 => "AS4_AGGREGATOR",
        32 => "LARGE_COMMUNITY",
        code => return Cow::Owned(format!("attribute {code}")),
    })
}

/// An error that ends the session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}; session reset with {notification}")]
pub struct SessionReset {
    /// To be sent before closing.
    pub notification: Notification,
    /// The error in words.
    pub reason: Cow<'static, str>,
}

impl SessionReset {
    pub(super) fn new(
        error: NotificationError,
        data: impl Into<Vec<u8>>,
        reason: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { notification: Notification::with_data(error, data), reason: reason.into() }
    }
}
