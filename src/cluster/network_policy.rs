//! NetworkPolicies as the rooms see them: the API's meaning with defaults filled in.

use std::sync::Arc;

use ferroute_policy::Policy;

use super::ObjectKey;
use super::service::Problem;

/// A NetworkPolicy, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Namespace and name.
    pub key: ObjectKey,
    /// `metadata.uid`, for events.
    pub uid: Arc<str>,
    /// What it means.
    pub policy: Arc<Policy>,
    /// What could not be honoured in this object; each allows nothing.
    pub problems: Vec<Problem>,
}
