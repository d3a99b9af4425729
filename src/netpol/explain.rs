//! Whether a connection is allowed, and why: by what the policies mean, and by what the kernel
//! really holds. Parsing and judging are pure; the room reads the kernel.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ferroute_iptables::ipset::Sets;
use ferroute_iptables::{Builtin, Family, Ruleset};
use ferroute_policy::{Direction, Explanation, Flow, Index, Key, Packet, Protocol, Side, Verdict, trace};
use serde::Serialize;

use super::gather;
use crate::cluster::{ObjectKey, State};

/// One end of a connection, as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// `NAMESPACE/NAME` of a pod.
    Pod(ObjectKey),
    /// An address, of whatever.
    Address(IpAddr),
    /// Name of a node.
    Node(String),
}

/// A port by number, or by the name that the destination pod gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Port {
    /// Its number.
    Number(u16),
    /// Its name.
    Name(String),
}

/// May one end open a connection to the other?
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Who begins.
    pub from: End,
    /// Who is asked.
    pub to: End,
    /// On which port.
    pub port: Port,
    /// By which protocol.
    pub protocol: Protocol,
}

/// A question that has no answer, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unanswerable(pub String);

impl Question {
    /// Reads `from` (a pod, address or node) and `to` (the same, with `:PORT` and perhaps
    /// `/PROTOCOL` behind it).
    pub fn parse(from: &str, to: &str) -> Result<Self, Unanswerable> {
        let wrong = |text: String| Unanswerable(text);
        let (target, port) = to.rsplit_once(':').filter(|(target, _)| to.parse::<IpAddr>().is_err() && !target.is_empty()).ok_or_else(|| {
            wrong(format!(
                "{to:?} has no port: write NAMESPACE/POD:PORT, ADDRESS:PORT ([v6]:PORT) or NODE:PORT, with /udp or /sctp \
                 behind it for those"
            ))
        })?;
        let (port, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            other => return Err(wrong(format!("{other:?} is no protocol of policies: tcp, udp or sctp"))),
        };
        let port = match port.parse::<u16>() {
            Ok(0) => return Err(wrong(format!("{to:?}: 0 is not a port"))),
            Ok(number) => Port::Number(number),
            Err(_) if port.chars().any(char::is_alphabetic) => Port::Name(port.to_owned()),
            Err(_) => return Err(wrong(format!("{to:?}: {port:?} is not a port (1 to 65535, or a name)"))),
        };
        Ok(Self { from: End::parse(from)?, to: End::parse(target)?, port, protocol })
    }
}

impl End {
    fn parse(text: &str) -> Result<Self, Unanswerable> {
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = bare.parse() {
            return Ok(Self::Address(address));
        }
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self::Pod(ObjectKey::new(namespace, name)))
            }
            None if !text.is_empty() => Ok(Self::Node(text.to_owned())),
            _ => Err(Unanswerable(format!("{text:?} is no pod (NAMESPACE/NAME), address or node"))),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(key) => write!(f, "{key}"),
            Self::Address(address) => write!(f, "{address}"),
            Self::Node(name) => write!(f, "node {name}"),
        }
    }
}

/// The answer, family by family.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Who begins.
    pub from: String,
    /// Who is asked.
    pub to: String,
    /// On which port.
    pub port: u16,
    /// By which protocol.
    pub protocol: String,
    /// One per family that both ends have.
    pub paths: Vec<Path>,
}

/// One way a connection can go.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Path {
    /// Address of who begins.
    pub source: IpAddr,
    /// Address of who is asked.
    pub destination: IpAddr,
    /// Whether the policies allow it, on all nodes together.
    pub allowed: bool,
    /// Why, in words.
    pub reason: Vec<String>,
    /// What each pod's policies say.
    pub sides: Vec<SideAnswer>,
    /// What this node's kernel does with the first packet; absent when neither end is here.
    pub kernel: Option<KernelAnswer>,
    /// Whether the kernel does what the policies mean.
    pub agrees: bool,
}

/// What one pod's policies say.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SideAnswer {
    /// `egress` or `ingress`.
    pub direction: String,
    /// The pod.
    pub pod: String,
    /// Whether it runs on this node, whose kernel therefore judges it.
    pub local: bool,
    /// Policies that isolate it.
    pub isolated_by: Vec<String>,
    /// The policy whose rule allows the connection, and the rule's place in it, from 0.
    pub allowed_by: Option<(String, usize)>,
    /// Whether this side lets it pass.
    pub allows: bool,
}

/// What the kernel does with the first packet.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KernelAnswer {
    /// INPUT, FORWARD or OUTPUT.
    pub hook: &'static str,
    /// `accepted`, `refused`, `left to other rules`, or `unknown` with the reason in `error`.
    pub verdict: &'static str,
    /// Rules that matched, with their text.
    pub rules: Vec<String>,
    /// How many rules the packet was compared with.
    pub rules_met: usize,
    /// Why its way could not be followed.
    pub error: Option<String>,
}

/// What the kernel holds, read back.
pub struct KernelState {
    /// Chains and jumps by family.
    pub rulesets: BTreeMap<Family, Ruleset>,
    /// Sets of ours, and of the service proxy where rules of ours name them.
    pub sets: Sets,
}

/// An end with its addresses.
struct Resolved {
    addresses: Vec<IpAddr>,
    /// It is this node itself.
    own_node: bool,
}

/// Answers a question. `state` is the cluster, `index` the policies, `kernel` what was read back.
pub fn explain(
    question: &Question,
    node: &str,
    state: &State,
    index: &Index,
    kernel: &KernelState,
) -> Result<Answer, Unanswerable> {
    let from = resolve(&question.from, node, state, index)?;
    let to = resolve(&question.to, node, state, index)?;
    let port = match &question.port {
        Port::Number(number) => *number,
        Port::Name(name) => named_port(question, name, state)?,
    };
    let mut paths = Vec::new();
    for source in &from.addresses {
        for destination in to.addresses.iter().filter(|to| to.is_ipv4() == source.is_ipv4()) {
            let flow = Flow { source: *source, destination: *destination, protocol: question.protocol, port };
            paths.push(path(&flow, from.own_node, to.own_node, index, kernel));
        }
    }
    if paths.is_empty() {
        return Err(Unanswerable(format!(
            "{} and {} have no address of the same family: no connection is possible",
            question.from, question.to
        )));
    }
    Ok(Answer {
        from: question.from.to_string(),
        to: question.to.to_string(),
        port,
        protocol: question.protocol.to_string(),
        paths,
    })
}

fn resolve(end: &End, node: &str, state: &State, index: &Index) -> Result<Resolved, Unanswerable> {
    let own = node_addresses(state, node);
    match end {
        End::Pod(key) => {
            if let Some(pod) = index.pod(&gather::key(key)) {
                let own_node = pod.host_network && pod.local;
                return Ok(Resolved { addresses: pod.ips.clone(), own_node });
            }
            Err(Unanswerable(match state.pods.get(key) {
                Some(_) => format!("pod {key} has ended or has no address yet: nobody can talk to it"),
                None => format!("there is no pod {key}"),
            }))
        }
        End::Address(address) => {
            if let Some(service) = state.services.values().find(|service| {
                service.cluster_ips.contains(address)
                    || service.external_ips.contains(address)
                    || service.load_balancer_ips.contains(address)
            }) {
                return Err(Unanswerable(format!(
                    "{address} is Service {}: policies judge the endpoint that gets the connection; ask with a pod \
                     behind it and its port",
                    service.key
                )));
            }
            Ok(Resolved { addresses: vec![*address], own_node: own.contains(address) })
        }
        End::Node(name) => {
            let addresses = node_addresses(state, name);
            if addresses.is_empty() {
                return Err(Unanswerable(format!(
                    "no address of a node {name:?} is known here; write the address itself"
                )));
            }
            Ok(Resolved { addresses, own_node: name == node })
        }
    }
}

/// Addresses of a node: from its object where that is watched, else from a pod on it.
fn node_addresses(state: &State, name: &str) -> Vec<IpAddr> {
    if let Some(node) = state.nodes.get(name) {
        return node.internal_ips.iter().chain(&node.external_ips).copied().collect();
    }
    let on_it = |pod: &&std::sync::Arc<crate::cluster::workload::Pod>| pod.node.as_deref() == Some(name);
    state
        .pods
        .values()
        .filter(on_it)
        .find(|pod| !pod.host_ips.is_empty())
        .map(|pod| pod.host_ips.clone())
        .unwrap_or_default()
}

fn named_port(question: &Question, name: &str, state: &State) -> Result<u16, Unanswerable> {
    let End::Pod(key) = &question.to else {
        return Err(Unanswerable(format!("{name:?}: only pods have named ports; write a number")));
    };
    let port = state.pods.get(key).and_then(|pod| {
        pod.ports.iter().find(|port| *port.name == *name && port.protocol == question.protocol)
    });
    port.map(|port| port.port.get())
        .ok_or_else(|| Unanswerable(format!("pod {key} has no {} port named {name:?}", question.protocol)))
}

fn path(flow: &Flow, from_node: bool, to_node: bool, index: &Index, kernel: &KernelState) -> Path {
    let is_local = |key: &Key| index.pod(key).is_some_and(|pod| pod.is_enforced_here());
    let local_end = |ip: IpAddr| index.pods_with(ip).any(|(_, pod)| pod.is_enforced_here());
    let explanation = index.explain(flow, from_node && local_end(flow.destination));
    let mut sides = Vec::new();
    // This kernel judges the pods of this node only.
    let mut expected = true;
    if let Explanation::Judged { egress, ingress } = &explanation {
        for side in egress.iter().chain(ingress) {
            let local = is_local(&side.pod);
            expected &= side.allows() || !local;
            sides.push(answer(side, local));
        }
    }
    let hook = match (from_node, to_node) {
        (true, _) => Some(Builtin::Output),
        (_, true) => Some(Builtin::Input),
        _ => Some(Builtin::Forward),
    }
    .filter(|_| local_end(flow.source) || local_end(flow.destination));
    let kernel = hook.map(|hook| walk(flow, hook, from_node, to_node, kernel));
    let agrees = kernel.as_ref().is_none_or(|kernel| match kernel.verdict {
        "unknown" => false,
        verdict => (verdict != "refused") == expected,
    });
    Path {
        source: flow.source,
        destination: flow.destination,
        allowed: explanation.allows(),
        reason: explanation.to_string().lines().map(str::to_owned).collect(),
        sides,
        kernel,
        agrees,
    }
}

fn answer(side: &Side, local: bool) -> SideAnswer {
    SideAnswer {
        direction: match side.direction {
            Direction::Ingress => "ingress".to_owned(),
            Direction::Egress => "egress".to_owned(),
        },
        pod: side.pod.to_string(),
        local,
        isolated_by: side.isolated_by.iter().map(Key::to_string).collect(),
        allowed_by: side.allowed_by.as_ref().map(|(policy, rule)| (policy.to_string(), *rule)),
        allows: side.allows(),
    }
}

fn walk(flow: &Flow, hook: Builtin, from_node: bool, to_node: bool, kernel: &KernelState) -> KernelAnswer {
    let family = Family::of(flow.source);
    let unknown = |error: String| KernelAnswer {
        hook: hook.name(),
        verdict: "unknown",
        rules: Vec::new(),
        rules_met: 0,
        error: Some(error),
    };
    let Some(ruleset) = kernel.rulesets.get(&family) else {
        return unknown(format!("no policies are enforced for {family} on this node"));
    };
    let packet = Packet { flow: *flow, hook, local_source: from_node, local_destination: to_node };
    match trace(ruleset, &kernel.sets, &packet) {
        Err(error) => unknown(error.to_string()),
        Ok(trace) => {
            let text = |chain, index: &usize| {
                let rules = ruleset.chains.get(chain);
                rules.and_then(|rules| rules.get(*index)).map(|rule| rule.render(family)).unwrap_or_default()
            };
            KernelAnswer {
                hook: hook.name(),
                verdict: match trace.verdict {
                    Verdict::Accepted => "accepted",
                    Verdict::Refused => "refused",
                    Verdict::LeftToOthers => "left to other rules",
                },
                rules: trace
                    .path
                    .iter()
                    .map(|(chain, index)| format!("{chain} {}: {}", index + 1, text(chain, index)))
                    .collect(),
                rules_met: trace.rules_met,
                error: None,
            }
        }
    }
}

impl Answer {
    /// Whether every path is as the policies mean it in this kernel.
    pub fn agrees(&self) -> bool {
        self.paths.iter().all(|path| path.agrees)
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, path) in self.paths.iter().enumerate() {
            if at > 0 {
                writeln!(f)?;
            }
            let verdict = if path.allowed { "ALLOWED" } else { "REFUSED" };
            writeln!(
                f,
                "{verdict}  {} ({}) -> {} ({}) {} {}",
                self.from, path.source, self.to, path.destination, self.protocol, self.port
            )?;
            for line in &path.reason {
                writeln!(f, "  {line}")?;
            }
            match &path.kernel {
                None => writeln!(f, "  kernel: neither end is a pod of this node; ask on theirs")?,
                Some(kernel) => {
                    writeln!(
                        f,
                        "  kernel: {} in {} after {} rules",
                        kernel.verdict, kernel.hook, kernel.rules_met
                    )?;
                    for rule in &kernel.rules {
                        writeln!(f, "    {rule}")?;
                    }
                    if let Some(error) = &kernel.error {
                        writeln!(f, "    {error}")?;
                    }
                }
            }
            if path.sides.iter().any(|side| !side.local) && path.kernel.is_some() {
                let remote: Vec<&str> =
                    path.sides.iter().filter(|side| !side.local).map(|side| side.pod.as_str()).collect();
                writeln!(f, "  judged by another node's kernel: {}", remote.join(", "))?;
            }
            if !path.agrees {
                writeln!(f, "  KERNEL AND DESIRED STATE DIFFER; see ferroute status")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ferroute_policy::{Exempt, Options, Policy, Selector, UnknownPods};

    use super::*;
    use crate::cluster::workload::{NamedPort, Phase, Pod};

    #[test]
    fn questions_are_read_in_all_their_forms() {
        let question = |from: &str, to: &str| Question::parse(from, to).unwrap();
        let pod = |text: &str| End::Pod(ObjectKey::new("shop", text));
        let plain = question("shop/a", "shop/b:8080");
        assert_eq!(
            (plain.from, plain.to, plain.port, plain.protocol),
            (pod("a"), pod("b"), Port::Number(8080), Protocol::Tcp)
        );
        let named = question("10.0.0.1", "shop/b:web/UDP");
        assert_eq!(
            (named.from, named.port, named.protocol),
            (End::Address("10.0.0.1".parse().unwrap()), Port::Name("web".into()), Protocol::Udp)
        );
        assert_eq!(question("n1", "[fd00::1]:1/sctp").to, End::Address("fd00::1".parse().unwrap()));
        assert_eq!(question("n1", "n2:10250").to, End::Node("n2".into()));
        for (from, to, part) in [
            ("a/b", "shop/b", "has no port"),
            ("a/b", "fd00::1", "has no port"),
            ("a/b", "shop/b:0", "not a port"),
            ("a/b", "shop/b:70000", "not a port"),
            ("a/b", "shop/b:80/icmp", "no protocol"),
            ("a/b/c", "shop/b:80", "is no pod"),
            ("", "shop/b:80", "is no pod"),
        ] {
            let error = Question::parse(from, to).unwrap_err().to_string();
            assert!(error.contains(part), "{from} {to}: {error}");
        }
    }

    fn state() -> State {
        let mut state = State::default();
        for (name, ip, node) in [("a", "10.1.0.1", "n1"), ("b", "10.1.0.2", "n1"), ("c", "10.2.0.3", "n2")] {
            let pod = Pod {
                key: ObjectKey::new("shop", name),
                uid: name.into(),
                labels: Arc::new([("app".into(), name.into())].into()),
                ips: vec![ip.parse().unwrap()],
                host_ips: vec![format!("192.168.0.{}", &node[1..]).parse().unwrap()],
                host_network: false,
                phase: Phase::Running,
                node: Some(node.into()),
                ports: vec![NamedPort {
                    name: "web".into(),
                    protocol: Protocol::Tcp,
                    port: 80.try_into().unwrap(),
                }],
                ready: true,
                terminating: false,
            };
            state.pods.insert(pod.key.clone(), Arc::new(pod));
        }
        state
    }

    fn asked(from: &str, to: &str) -> Result<Answer, Unanswerable> {
        let state = state();
        let mut index = Index::new(Options {
            families: Family::BOTH.to_vec(),
            unknown_pods: UnknownPods::Deny,
            exempt: Exempt::Ranges { networks: Vec::new(), node_ports: None },
        });
        index.put_namespace(&"shop".into(), Some(Arc::default()));
        for (key, pod) in &state.pods {
            index.put_pod(&gather::key(key), gather::pod(pod, "n1", &Default::default()));
        }
        let policy = Policy { pod_selector: Selector::default(), ingress: Some(Vec::new()), egress: None };
        index.put_policy(&Key::new("shop", "deny"), Some(Arc::new(policy)));
        index.settle();
        let rulesets = Family::BOTH
            .into_iter()
            .filter_map(|family| Some((family, index.ruleset(family)?.clone())))
            .collect();
        let kernel = KernelState { rulesets, sets: index.sets().clone() };
        explain(&Question::parse(from, to)?, "n1", &state, &index, &kernel)
    }

    #[test]
    fn meaning_and_kernel_are_told_together() {
        let answer = asked("shop/a", "shop/b:web").unwrap();
        let path = &answer.paths[0];
        assert_eq!((answer.port, path.allowed, path.agrees), (80, false, true));
        let kernel = path.kernel.as_ref().unwrap();
        assert_eq!((kernel.verdict, kernel.hook), ("refused", "FORWARD"));
        assert_eq!(path.sides.len(), 2);
        assert_eq!(path.sides[1].isolated_by, ["shop/deny"]);
        let text = answer.to_string();
        assert!(text.starts_with("REFUSED  shop/a (10.1.0.1) -> shop/b (10.1.0.2) TCP 80\n"), "{text}");
        // The node itself always reaches its pods.
        let answer = asked("n2", "shop/b:80").unwrap();
        assert!(!answer.paths[0].allowed, "another node is no friend");
        // A pod of another node refuses, but not here.
        let answer = asked("shop/a", "shop/c:80").unwrap();
        let path = &answer.paths[0];
        assert!(!path.allowed && path.agrees);
        assert_eq!(path.kernel.as_ref().unwrap().verdict, "accepted");
        assert!(answer.to_string().contains("judged by another node's kernel: shop/c"));
        assert!(asked("192.168.0.9", "192.168.0.8:80").unwrap().paths[0].kernel.is_none());
        for (from, to, part) in [
            ("shop/gone", "shop/b:80", "there is no pod shop/gone"),
            ("nowhere", "shop/b:80", "no address of a node"),
            ("fd00::1", "shop/b:80", "no address of the same family"),
            ("shop/a", "shop/b:admin", "no TCP port named"),
            ("shop/a", "10.1.0.2:web", "only pods have named ports"),
        ] {
            let error = asked(from, to).unwrap_err().to_string();
            assert!(error.contains(part), "{from} {to}: {error}");
        }
    }
}
