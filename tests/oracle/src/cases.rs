//! The cases of the upstream suite for NetworkPolicy, as data: `cases.yaml`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::judge::{Cluster, Protocol};

/// Namespaces of the suite.
pub const NAMESPACES: [&str; 3] = ["x", "y", "z"];
/// Pods in each namespace.
pub const PODS: [&str; 3] = ["a", "b", "c"];
/// Ports that every pod serves, by all protocols.
pub const PORTS: [u16; 2] = [80, 81];

/// A named case.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// As upstream calls it.
    pub name: String,
    /// One after the other; each finds what those before left.
    pub steps: Vec<Step>,
}

/// A change and what it leads to.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    #[serde(default)]
    apply: Vec<Value>,
    #[serde(default)]
    delete: Vec<String>,
    expect: BTreeMap<String, Vec<String>>,
}

/// A pod of the suite.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Member {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// The node it runs on.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

impl Member {
    fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// Whether one pod should reach another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expectation {
    /// Index of the sender in the members.
    pub from: usize,
    /// Index of the receiver.
    pub to: usize,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Destination port.
    pub port: u16,
    /// Whether it should.
    pub allowed: bool,
}

/// All cases.
///
/// # Errors
/// When the file of the cases is wrong.
pub fn all() -> Result<Vec<Case>> {
    // Namespace y is none of YAML 1.1's words for "true".
    let options = serde_saphyr::options! { strict_booleans: true };
    Ok(serde_saphyr::from_multiple_with_options(include_str!("cases.yaml"), options)?)
}

/// The suite's pods, dealt to nodes in turn. `addresses` gives the addresses for a node's index and
/// the number of the pod on it.
pub fn members(nodes: &[&str], mut addresses: impl FnMut(usize, usize) -> Vec<IpAddr>) -> Vec<Member> {
    let keys = NAMESPACES.iter().flat_map(|namespace| PODS.iter().map(move |pod| (*namespace, *pod)));
    keys.enumerate()
        .map(|(at, (namespace, name))| Member {
            namespace: namespace.into(),
            name: name.into(),
            node: nodes[at % nodes.len()].into(),
            addresses: addresses(at % nodes.len(), at / nodes.len()),
        })
        .collect()
}

/// The suite's namespaces and pods on these nodes, before any policy.
///
/// # Errors
/// When an object cannot be made.
pub fn base(nodes: Vec<Node>, members: &[Member]) -> Result<Cluster> {
    let mut cluster = Cluster { nodes, ..Cluster::default() };
    for name in NAMESPACES {
        let labels = BTreeMap::from([
            ("kubernetes.io/metadata.name".to_owned(), name.to_owned()),
            ("ns".to_owned(), name.to_owned()),
        ]);
        let metadata = ObjectMeta { name: Some(name.into()), labels: Some(labels), ..ObjectMeta::default() };
        cluster.namespaces.push(Namespace { metadata, ..Namespace::default() });
    }
    for member in members {
        let containers: Vec<Value> = PORTS
            .iter()
            .flat_map(|port| Protocol::ALL.map(|protocol| (port, protocol)))
            .map(|(port, protocol)| {
                let name = format!("{port}-{}", protocol.name().to_lowercase());
                let port = json!({
                    "name": format!("serve-{name}"), "containerPort": port, "protocol": protocol.name(),
                });
                let image = "registry.k8s.io/e2e-test-images/agnhost:2.53";
                json!({"name": format!("cont-{name}"), "image": image, "ports": [port]})
            })
            .collect();
        let ips: Vec<Value> = member.addresses.iter().map(|ip| json!({"ip": ip})).collect();
        let pod: Pod = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": member.name, "namespace": member.namespace, "labels": {"pod": member.name},
                "uid": format!("uid-{}-{}", member.namespace, member.name),
            },
            "spec": {"nodeName": member.node, "containers": containers},
            "status": {"phase": "Running", "podIP": member.addresses.first(), "podIPs": ips},
        }))?;
        cluster.pods.push(pod);
    }
    Ok(cluster)
}

impl Step {
    /// Makes its change.
    ///
    /// # Errors
    /// When the step names what there is not, or an object is malformed.
    pub fn apply(&self, cluster: &mut Cluster, members: &[Member]) -> Result<()> {
        for key in &self.delete {
            let before = cluster.policies.len();
            cluster.policies.retain(|policy| key_of(&policy.metadata) != *key);
            ensure!(cluster.policies.len() < before, "there is no policy {key} to delete");
        }
        for object in &self.apply {
            let mut object = object.clone();
            fill_in(&mut object, members)?;
            let kind = object["kind"].as_str().unwrap_or_default().to_owned();
            match kind.as_str() {
                "NetworkPolicy" => {
                    object["apiVersion"] = "networking.k8s.io/v1".into();
                    let policy: NetworkPolicy =
                        serde_json::from_value(object.clone()).with_context(|| object.to_string())?;
                    let key = key_of(&policy.metadata);
                    cluster.policies.retain(|policy| key_of(&policy.metadata) != key);
                    cluster.policies.push(policy);
                }
                "Namespace" | "Pod" => {
                    let metadata: ObjectMeta = serde_json::from_value(object["metadata"].take())?;
                    let key = key_of(&metadata);
                    let found = if kind == "Pod" {
                        cluster.pods.iter_mut().map(|pod| &mut pod.metadata).find(|it| key_of(it) == key)
                    } else {
                        cluster.namespaces.iter_mut().map(|it| &mut it.metadata).find(|it| key_of(it) == key)
                    };
                    let labels = &mut found.with_context(|| format!("there is no {kind} {key}"))?.labels;
                    labels.get_or_insert_default().extend(metadata.labels.into_iter().flatten());
                }
                _ => bail!("unknown kind in {object}"),
            }
        }
        Ok(())
    }

    /// What must hold once its change is in force.
    ///
    /// # Errors
    /// When a line cannot be read.
    pub fn expectations(&self, members: &[Member]) -> Result<Vec<Expectation>> {
        let mut expectations = Vec::new();
        for (on, lines) in &self.expect {
            let (protocol, port) =
                read_port(on).with_context(|| format!("{on:?} is no protocol and port"))?;
            let lines: Vec<(bool, &str, &str)> = lines
                .iter()
                .map(|line| read_line(line).with_context(|| format!("{line:?} is not 'yes FROM -> TO'")))
                .collect::<Result<_>>()?;
            for (from, sender) in members.iter().enumerate() {
                for (to, receiver) in members.iter().enumerate() {
                    let last = lines.iter().rev().find(|(_, sends, receives)| {
                        fits(sends, &sender.key()) && fits(receives, &receiver.key())
                    });
                    let allowed = from == to || last.is_none_or(|(allowed, _, _)| *allowed);
                    expectations.push(Expectation { from, to, protocol, port, allowed });
                }
            }
        }
        Ok(expectations)
    }
}

fn key_of(metadata: &ObjectMeta) -> String {
    let name = metadata.name.as_deref().unwrap_or_default();
    match &metadata.namespace {
        Some(namespace) => format!("{namespace}/{name}"),
        None => name.to_owned(),
    }
}

/// Puts addresses in the place of `{x/a 4}`.
fn fill_in(value: &mut Value, members: &[Member]) -> Result<()> {
    match value {
        Value::String(text) => {
            while let Some((before, rest)) = text.split_once('{') {
                let (inside, after) = rest.split_once('}').with_context(|| format!("no end in {text:?}"))?;
                let member = members.iter().find(|member| inside.starts_with(&member.key()));
                let address = member.and_then(|member| {
                    member.addresses.iter().find(|ip| ip.is_ipv4() == inside.ends_with(" 4"))
                });
                let address = address.with_context(|| format!("{inside:?} is no pod's address"))?;
                *text = format!("{before}{address}{after}");
            }
        }
        Value::Array(list) => list.iter_mut().try_for_each(|one| fill_in(one, members))?,
        Value::Object(fields) => fields.values_mut().try_for_each(|one| fill_in(one, members))?,
        _ => {}
    }
    Ok(())
}

fn read_port(text: &str) -> Option<(Protocol, u16)> {
    let (protocol, port) = text.split_once(' ')?;
    let protocol = Protocol::ALL.into_iter().find(|one| one.name() == protocol)?;
    Some((protocol, port.parse().ok()?))
}

fn read_line(line: &str) -> Option<(bool, &str, &str)> {
    let (word, pair) = line.split_once(' ')?;
    let (from, to) = pair.split_once(" -> ")?;
    let allowed = match word {
        "yes" => true,
        "no" => false,
        _ => return None,
    };
    Some((allowed, from, to))
}

/// `*`, `x/*` or `x/a`.
fn fits(pattern: &str, key: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == key, |start| key.starts_with(start))
}
