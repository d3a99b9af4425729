//! The policy room as the CNI socket asks it.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::protocol::Reason;
use super::server::{Enforcement, NotEnforced};
use crate::cluster::ObjectKey;
use crate::netpol::{NotProgrammed, StartingPod, View};

/// A room whose loop has not turned for so long answers nobody in time.
const STUCK: Duration = Duration::from_secs(30);

impl Enforcement for View {
    fn pod_starting(
        &self,
        pod: &ObjectKey,
        uid: Option<&str>,
        addresses: &[IpAddr],
        timeout: Duration,
    ) -> Result<(), NotEnforced> {
        let starting =
            StartingPod { key: pod.clone(), uid: uid.map(Into::into), addresses: addresses.to_vec() };
        Ok(View::pod_starting(self, starting, timeout)?)
    }

    fn pod_gone(&self, pod: &ObjectKey, uid: Option<&str>, addresses: &[IpAddr]) {
        self.pod_stopped(pod.clone(), uid.map(Into::into), addresses.to_vec());
    }

    fn is_enforced(
        &self,
        pod: &ObjectKey,
        addresses: &[IpAddr],
        timeout: Duration,
    ) -> Result<(), NotEnforced> {
        Ok(self.is_programmed(pod.clone(), addresses.to_vec(), timeout)?)
    }

    fn readiness(&self) -> Result<(), NotEnforced> {
        let health = self.health();
        if health.last_clean_pass.is_none() {
            let why = health.last_error.unwrap_or_else(|| "the cluster has not been listed yet".to_owned());
            let message = format!("the daemon has not programmed policy since its start: {why}");
            return Err(NotEnforced { reason: Reason::Starting, message });
        }
        let stuck = Instant::now().saturating_duration_since(health.last_turn) > STUCK;
        match health.last_error {
            Some(why) => {
                let message = format!("policy is not in the kernel as the cluster wants it: {why}");
                Err(NotEnforced { reason: Reason::Failing, message })
            }
            None if stuck => {
                let message = format!("the policy room has not moved for {}s", STUCK.as_secs());
                Err(NotEnforced { reason: Reason::Failing, message })
            }
            None => Ok(()),
        }
    }
}

impl From<NotProgrammed> for NotEnforced {
    fn from(error: NotProgrammed) -> Self {
        let reason = match error {
            NotProgrammed::UnknownPod(_) => Reason::PodUnknown,
            NotProgrammed::NotListed(_) => Reason::Starting,
            NotProgrammed::NotWritten { .. } => Reason::NotProgrammed,
            NotProgrammed::NoAnswer => Reason::Failing,
        };
        Self { reason, message: error.to_string() }
    }
}
