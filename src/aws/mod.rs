//! The source/destination check of an AWS instance, which drops packets of pods whose address is not the
//! instance's own. `--disable-source-dest-check` switches it off for this node's instance: in the
//! background, once, and on other nodes than AWS's never.

mod client;
mod credentials;
mod metadata;
mod signature;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use client::Client;
use metadata::Metadata;

use crate::cluster::service::Problem;
use crate::cluster::{Cluster, ObjectKey};
use crate::report::Reporter;

/// First and last delay between attempts, and between looks whether the Node says where it runs.
const DELAYS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// What the API of EC2 is called by.
const EC2_VERSION: &str = "2016-11-15";

/// Why the check could not be switched off.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer.
    #[error("{what} at {url} cannot be reached: {reason}")]
    Unreachable {
        /// Who was asked.
        what: &'static str,
        /// Where.
        url: String,
        /// In words.
        reason: String,
    },
    /// An answer that says no.
    #[error("{what} refuses {action}: {reason}")]
    Refused {
        /// Who was asked.
        what: &'static str,
        /// For what.
        action: String,
        /// Its code and words.
        reason: String,
    },
    /// An answer without what was asked for.
    #[error("{what} answers {action} without {missing}")]
    Incomplete {
        /// Who was asked.
        what: &'static str,
        /// For what.
        action: String,
        /// The field.
        missing: &'static str,
    },
    /// A credentials file that cannot be read.
    #[error("{variable}={path}: {source}")]
    File {
        /// The variable that names it.
        variable: &'static str,
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The Node is not this machine.
    #[error("the Node says instance {node}, the metadata of this machine {machine}")]
    OtherInstance {
        /// By `spec.providerID`.
        node: String,
        /// By the metadata service.
        machine: String,
    },
}

/// Where AWS is asked and by whom, in the variables of its own programs. Some are secrets.
#[derive(Clone)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// This process's.
    pub fn of_process() -> Self {
        let readable =
            |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        Self::of(std::env::vars_os().filter_map(readable))
    }

    /// These variables. Others than AWS's are not kept.
    pub fn of(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let ours = |(name, value): &(String, String)| name.starts_with("AWS_") && !value.is_empty();
        Self(variables.into_iter().filter(ours).collect())
    }

    fn get(&self, name: &str) -> Option<String> {
        self.0.get(name).cloned()
    }

    /// The address of a service of AWS.
    fn endpoint(&self, service: &str, metadata: &Metadata) -> String {
        self.get(&format!("AWS_ENDPOINT_URL_{}", service.to_uppercase()))
            .or_else(|| self.get("AWS_ENDPOINT_URL"))
            .unwrap_or_else(|| format!("https://{service}.{}.{}", metadata.region, metadata.domain))
    }
}

/// The instance of a Node on AWS by its `spec.providerID`, such as `aws:///eu-west-1a/i-0123456789abcdef0`.
fn instance(provider_id: &str) -> Option<&str> {
    let (_, instance) = provider_id.strip_prefix("aws:")?.rsplit_once('/')?;
    let plausible = instance.starts_with("i-")
        && instance.len() <= 64
        && instance.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    plausible.then_some(instance)
}

/// Waits until the Node says where it runs and, on AWS, tries until the check is off. What stands in the
/// way is an event on the Node.
pub async fn run(cluster: Cluster, node: Arc<str>, reporter: Reporter, environment: Environment) {
    let (key, mut delay) = (ObjectKey::new("", node.clone()), DELAYS.0);
    loop {
        let known = cluster.read().nodes.get(&node).cloned();
        if let Some(known) = known
            && let Some(provider) = &known.provider_id
        {
            let Some(instance) = instance(provider) else { return };
            match switch_off(instance, &environment).await {
                Ok(()) => {
                    tracing::info!(instance, "the source/destination check is off");
                    reporter.resolved("Node", &key);
                    return;
                }
                Err(error) => {
                    let message = format!(
                        "the source/destination check of instance {instance} may drop packets of pods, and it \
                         cannot be switched off: {error}; allow ec2:ModifyInstanceAttribute to this node's role, \
                         or switch it off yourself and set --disable-source-dest-check=false"
                    );
                    let problem = Problem { reason: "SourceDestCheck", message };
                    reporter.replace("Node", &key, &known.uid, std::slice::from_ref(&problem));
                }
            }
        }
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(DELAYS.1);
    }
}

/// Switches the source/destination check of this machine off, which must be that instance.
///
/// # Errors
/// Anything on the way; trying again is safe.
pub async fn switch_off(instance: &str, environment: &Environment) -> Result<(), Error> {
    let client = Client::new();
    let metadata = metadata::read(&client, environment).await?;
    if metadata.instance != instance {
        return Err(Error::OtherInstance { node: instance.to_owned(), machine: metadata.instance });
    }
    let credentials = credentials::find(&client, environment, &metadata).await?;
    let call = |action: &'static str, target: [(&'static str, &str); 1]| {
        let parameters = [("Action", action), ("SourceDestCheck.Value", "false"), ("Version", EC2_VERSION)];
        let body = client::form(parameters.into_iter().chain(target));
        client.call_ec2(action, environment.endpoint("ec2", &metadata), &metadata.region, &credentials, body)
    };
    match call("ModifyInstanceAttribute", [("InstanceId", instance)]).await {
        // Said of an instance with several: the one that carries the node's address is meant.
        Err(Error::Refused { reason, .. }) if reason.contains("multiple interfaces") => {
            let interface = &metadata.interface;
            call("ModifyNetworkInterfaceAttribute", [("NetworkInterfaceId", interface)]).await
        }
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_are_read_from_provider_ids() {
        for (text, expected) in [
            ("aws:///eu-west-1a/i-0123456789abcdef0", Some("i-0123456789abcdef0")),
            ("aws:///us-west-2-lax-1a/i-1", Some("i-1")),
            ("aws://i-1", Some("i-1")),
            // Fargate has no instance.
            ("aws:///eu-west-1a/61cb4f20c5-15e0/fargate-ip-10-0-0-1", None),
            ("gce://project/zone/i-1", None),
            ("aws:///eu-west-1a/i-1&Action=TerminateInstances", None),
            ("aws:", None),
            ("", None),
        ] {
            assert_eq!(instance(text), expected, "{text}");
        }
    }
}
