//! CNI's commands: environment and standard input in, result or error JSON out.
//!
//! No runtime, no threads, no logger: the process lives for one question to the daemon. Nothing but
//! the result goes to standard output.
//!
//! | command | does | without the daemon |
//! |---|---|---|
//! | ADD | waits until the pod's policy is programmed, passes the previous result on | fails with code 11, or goes on, by `whenUnavailable` |
//! | DEL, GC | tells which addresses are free | succeeds |
//! | CHECK | asks whether the pod's policy is programmed | as ADD |
//! | STATUS | asks whether an ADD could be served | fails with code 50; succeeds where `whenUnavailable` is `allow` |
//! | VERSION | lists the versions spoken | does not ask |

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::time::Duration;

use serde_json::json;

use super::client::{self, Patience};
use super::netconf::{self, LIMIT, NEWEST, NetConf, Previous, VERSIONS, WhenUnavailable};
use super::protocol::{self, Answer, Attachment, Identity, Pod, Reason, Request, Verb};

/// A DEL or GC that the daemon does not take at once goes on without it.
const FAREWELL: Duration = Duration::from_secs(1);

/// The variables that CNI passes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `CNI_COMMAND`.
    pub command: Option<String>,
    /// `CNI_CONTAINERID`.
    pub container: Option<String>,
    /// `CNI_NETNS`.
    pub netns: Option<String>,
    /// `CNI_IFNAME`.
    pub interface: Option<String>,
    /// `CNI_ARGS`.
    pub args: Option<String>,
}

/// What the process prints and whether it failed (exit status 1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// For standard output.
    pub output: String,
    /// Whether `output` is an error.
    pub failed: bool,
}

/// CNI's error codes, as far as they are used here (CNI specification, section "Error").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Code {
    IncompatibleVersion = 1,
    InvalidEnvironment = 4,
    Io = 5,
    Decode = 6,
    InvalidConfiguration = 7,
    TryAgainLater = 11,
    Unavailable = 50,
    UnavailableAndDegraded = 51,
    /// Codes from 100 belong to plugins: the policy is not programmed although the pod runs.
    NotProgrammed = 100,
}

struct Failure {
    code: Code,
    message: String,
}

impl Failure {
    fn new(code: Code, message: impl fmt::Display) -> Self {
        Self { code, message: message.to_string() }
    }
}

impl From<netconf::Error> for Failure {
    fn from(error: netconf::Error) -> Self {
        let code = match error {
            netconf::Error::Decode(_) => Code::Decode,
            netconf::Error::Version(_) => Code::IncompatibleVersion,
            netconf::Error::Value { .. } => Code::InvalidConfiguration,
        };
        Self::new(code, error)
    }
}

impl Environment {
    /// The variables of this process. What is not UTF-8 is read as far as it is.
    pub fn of_process() -> Self {
        let get = |name| {
            std::env::var_os(name)
                .map(|value| value.to_string_lossy().into_owned())
                .filter(|value| !value.is_empty())
        };
        Self {
            command: get("CNI_COMMAND"),
            container: get("CNI_CONTAINERID"),
            netns: get("CNI_NETNS"),
            interface: get("CNI_IFNAME"),
            args: get("CNI_ARGS"),
        }
    }
}

/// Runs one command of CNI.
pub fn run(environment: &Environment, input: impl Read) -> Outcome {
    let mut bytes = Vec::new();
    // One byte more than allowed shows that there is more.
    let read = input.take(LIMIT as u64 + 1).read_to_end(&mut bytes);
    let outcome = match read {
        Ok(_) => execute(environment, &bytes),
        Err(error) => Err(Failure::new(
            Code::Io,
            format_args!("cannot read the network configuration from standard input: {error}"),
        )),
    };
    match outcome {
        Ok(output) => Outcome { output, failed: false },
        Err(Failure { code, message }) => {
            let version = netconf::version_for_errors(&bytes);
            let error = json!({"cniVersion": version, "code": code as u32, "msg": message});
            Outcome { output: format!("{error}\n"), failed: true }
        }
    }
}

fn execute(environment: &Environment, bytes: &[u8]) -> Result<String, Failure> {
    let command = match environment.command.as_deref() {
        Some(known @ ("ADD" | "DEL" | "CHECK" | "GC" | "STATUS" | "VERSION")) => known,
        Some(other) => {
            return Err(Failure::new(
                Code::InvalidEnvironment,
                format_args!("CNI_COMMAND={other}: unknown; there are ADD, DEL, CHECK, GC, STATUS, VERSION"),
            ));
        }
        None => {
            return Err(Failure::new(
                Code::InvalidEnvironment,
                "CNI_COMMAND is not set: a container runtime starts this program; to put it into a network \
                 configuration run `ferroute cni install`",
            ));
        }
    };
    if command == "VERSION" {
        return Ok(format!("{}\n", json!({"cniVersion": NEWEST, "supportedVersions": VERSIONS})));
    }
    let conf = NetConf::parse(bytes)?;
    // What the specification introduced later than the version in use cannot have been meant.
    let since = match command {
        "CHECK" => "0.4.0",
        "GC" | "STATUS" => "1.1.0",
        _ => VERSIONS[0],
    };
    // The versions listed compare like their text.
    if conf.version < since {
        return Err(Failure::new(
            Code::IncompatibleVersion,
            format_args!(
                "{command} needs cniVersion {since}, the network configuration has {}",
                conf.version
            ),
        ));
    }
    match command {
        "ADD" => add(environment, conf),
        "DEL" => del(environment, &conf),
        "CHECK" => check(environment, conf),
        "GC" => {
            farewell(&conf, Verb::Gc { valid: conf.valid.clone() });
            Ok(String::new())
        }
        _ => status(&conf),
    }
}

fn add(environment: &Environment, mut conf: NetConf) -> Result<String, Failure> {
    let (attachment, result) = attached(environment, &mut conf)?;
    // Without an address there is nothing that policy could select.
    if !attachment.addresses.is_empty() {
        let pod = pod_of(&attachment);
        confirm(&conf, Verb::Add(attachment)).map_err(|why| {
            refuse(&why, "was not started because its network policy cannot be confirmed", &pod)
        })?;
    }
    Ok(result)
}

fn check(environment: &Environment, mut conf: NetConf) -> Result<String, Failure> {
    let (attachment, _) = attached(environment, &mut conf)?;
    if !attachment.addresses.is_empty() {
        let pod = pod_of(&attachment);
        confirm(&conf, Verb::Check(attachment))
            .map_err(|why| refuse(&why, "may run without its network policy", &pod))?;
    }
    Ok(String::new())
}

fn del(environment: &Environment, conf: &NetConf) -> Result<String, Failure> {
    let identity = identity(environment)?;
    let (addresses, netns) = (addresses(conf), environment.netns.clone().unwrap_or_default());
    let pod = pod(environment).ok();
    farewell(conf, Verb::Del(Attachment { identity, netns, pod, addresses }));
    Ok(String::new())
}

fn status(conf: &NetConf) -> Result<String, Failure> {
    // A daemon that restarts is back before anybody should act on its absence.
    match confirm(conf, Verb::Status) {
        Ok(()) => Ok(String::new()),
        Err(Why::Refused { reason: Reason::Failing, message }) => {
            Err(Failure::new(Code::UnavailableAndDegraded, message))
        }
        Err(why) => Err(Failure::new(Code::Unavailable, format_args!("{why}; {CURE}"))),
    }
}

/// Why a pod cannot be taken as safe.
enum Why {
    Unreachable(client::Error),
    Refused { reason: Reason, message: String },
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(error) => error.fmt(f),
            Self::Refused { message, .. } => message.fmt(f),
        }
    }
}

const CURE: &str = "see that the ferroute pod of this node runs and is ready (kubectl -n kube-system get pods \
     -l k8s-app=ferroute -o wide), or take this step out with `ferroute cni uninstall`";

fn refuse(why: &Why, what: &str, pod: &str) -> Failure {
    match why {
        Why::Refused { reason: Reason::NotProgrammed, message } if what.starts_with("may run") => {
            Failure::new(Code::NotProgrammed, format_args!("pod {pod} {what}: {message}"))
        }
        // The daemon says itself what to do.
        Why::Refused { message, .. } => {
            Failure::new(Code::TryAgainLater, format_args!("pod {pod} {what}: {message}"))
        }
        Why::Unreachable(error) => {
            Failure::new(Code::TryAgainLater, format_args!("pod {pod} {what}: {error}; {CURE}"))
        }
    }
}

/// Asks the daemon and waits; what the configuration allows counts as yes.
fn confirm(conf: &NetConf, verb: Verb) -> Result<(), Why> {
    let answer = client::ask(&conf.socket, &request(conf, verb), conf.timeout, Patience::Persistent);
    let why = match answer {
        Ok(Answer::Done) => return Ok(()),
        Ok(Answer::Failed { reason, message }) => Why::Refused { reason, message },
        Err(error) => Why::Unreachable(error),
    };
    match conf.when_unavailable {
        WhenUnavailable::Allow => Ok(()),
        WhenUnavailable::Deny => Err(why),
    }
}

/// Tells the daemon; one that does not listen learns it from its watch.
fn farewell(conf: &NetConf, verb: Verb) {
    let _ = client::ask(&conf.socket, &request(conf, verb), conf.timeout.min(FAREWELL), Patience::Once);
}

fn request(conf: &NetConf, verb: Verb) -> Request {
    Request { version: protocol::VERSION, timeout_ms: 0, network: conf.network.clone(), verb }
}

fn addresses(conf: &NetConf) -> Vec<std::net::IpAddr> {
    conf.previous.as_ref().map(|previous| previous.addresses.clone()).unwrap_or_default()
}

fn pod_of(attachment: &Attachment) -> String {
    attachment.pod.as_ref().map(|pod| format!("{}/{}", pod.namespace, pod.name)).unwrap_or_default()
}

/// What ADD and CHECK are about, and the result to pass on.
fn attached(environment: &Environment, conf: &mut NetConf) -> Result<(Attachment, String), Failure> {
    let identity = identity(environment)?;
    let netns = required("CNI_NETNS", environment.netns.as_deref())?.to_owned();
    let pod = pod(environment)?;
    let Some(Previous { text, addresses }) = conf.previous.take() else {
        return Err(Failure::new(
            Code::InvalidConfiguration,
            "prevResult is missing from the network configuration: this plugin makes no interface; put it behind \
             the plugin that does (`ferroute cni install`)",
        ));
    };
    Ok((Attachment { identity, netns, pod: Some(pod), addresses }, format!("{text}\n")))
}

fn required<'a>(name: &str, value: Option<&'a str>) -> Result<&'a str, Failure> {
    value.ok_or_else(|| {
        Failure::new(
            Code::InvalidEnvironment,
            format_args!("{name} is not set; the container runtime sets it"),
        )
    })
}

/// The forms are the specification's ("Parameters").
fn identity(environment: &Environment) -> Result<Identity, Failure> {
    let invalid = |name: &str, value: &str| {
        Err(Failure::new(
            Code::InvalidEnvironment,
            format_args!("{name}={value:?} is not what CNI allows there"),
        ))
    };
    let container = required("CNI_CONTAINERID", environment.container.as_deref())?;
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if !container.bytes().all(is_word) || !container.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return invalid("CNI_CONTAINERID", container);
    }
    let interface = required("CNI_IFNAME", environment.interface.as_deref())?;
    let is_bad = |c: char| c == '/' || c == ':' || c.is_whitespace();
    if interface.len() > 15 || matches!(interface, "." | "..") || interface.contains(is_bad) {
        return invalid("CNI_IFNAME", interface);
    }
    Ok(Identity { container: container.to_owned(), interface: interface.to_owned() })
}

/// The pod that a Kubernetes runtime names in `CNI_ARGS` (`KEY=VALUE;KEY=VALUE`).
fn pod(environment: &Environment) -> Result<Pod, Failure> {
    let text = environment.args.as_deref().unwrap_or_default();
    let pairs: BTreeMap<&str, &str> = text.split(';').filter_map(|pair| pair.split_once('=')).collect();
    let get = |name| pairs.get(name).copied().filter(|value| !value.is_empty()).map(str::to_owned);
    match (get("K8S_POD_NAMESPACE"), get("K8S_POD_NAME")) {
        (Some(namespace), Some(name)) => Ok(Pod { namespace, name, uid: get("K8S_POD_UID") }),
        _ => Err(Failure::new(
            Code::InvalidEnvironment,
            "CNI_ARGS names no pod (K8S_POD_NAMESPACE=...;K8S_POD_NAME=...): this network configuration is for \
             Kubernetes pods; use another one for other containers",
        )),
    }
}

#[cfg(test)]
mod tests;
