//! External peers as annotations of a Node name them. Pure; no message holds a secret.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ferroute_bgp::bfd::Timers;
use ferroute_bgp::message::Asn;
use ferroute_bgp::peer::PORT;
use ferroute_bgp::transport::Password;
use serde_json::{Map, Value};

use super::settings::{ExternalPeer, SecretReference, is_reserved};
use crate::cluster::ObjectKey;
use crate::cluster::node::Node;
use crate::cluster::secret::{Knowledge, Secrets};
use crate::cluster::service::Problem;

/// Annotation with a YAML list of peers.
pub const PEERS: &str = "kube-router.io/peers";
/// The older form: one annotation for each column.
pub const IPS: &str = "kube-router.io/peer.ips";
/// ASNs of `peer.ips`.
pub const ASNS: &str = "kube-router.io/peer.asns";
/// Ports of `peer.ips`.
pub const PORTS: &str = "kube-router.io/peer.ports";
/// Secrets of `peer.ips`, in base64.
pub const PASSWORDS: &str = "kube-router.io/peer.passwords";
/// Local addresses for `peer.ips`.
pub const LOCAL_IPS: &str = "kube-router.io/peer.localips";

/// The key of a Secret that holds the password unless another is named: that of type
/// `kubernetes.io/basic-auth`.
const SECRET_KEY: &str = "password";

/// Milliseconds between BFD packets unless said otherwise.
const BFD_INTERVAL: u64 = 1000;
/// BFD packets that may be missed unless said otherwise.
const BFD_MULTIPLIER: u64 = 3;
/// The port of BFD over one hop (RFC 5881 section 4).
const BFD_PORT: u64 = 3784;

/// The peers that a Node's annotations name. What cannot be read keeps its `last` good state: a
/// single peer the one with its address, an unreadable list all of it. A peer whose Secret has no password
/// for it keeps the one it had; without any it is left out.
pub fn annotated(node: &Node, secrets: &Secrets, last: &[ExternalPeer]) -> (Vec<ExternalPeer>, Vec<Problem>) {
    let mut reading = Reading { node, secrets, last, peers: Vec::new(), problems: Vec::new() };
    if let Some(text) = node.annotations.get(PEERS) {
        reading.list(text);
    } else {
        reading.columns();
    }
    (reading.peers, reading.problems)
}

/// The Secrets that the annotations of a Node name.
pub fn secrets(node: &Node, namespace: &str) -> BTreeSet<ObjectKey> {
    let text = node.annotations.get(PEERS).map_or("", |text| text);
    let entries = serde_saphyr::from_str::<Option<Vec<Value>>>(text).ok().flatten().unwrap_or_default();
    let peers = entries.iter().filter_map(|entry| entry_of(entry.as_object()?, namespace).ok());
    peers.filter_map(|peer| Some(peer.secret?.secret)).collect()
}

/// A secret in base64, blank for none.
///
/// # Errors
///
/// What is wrong, without the secret.
pub fn password(text: &str) -> Result<Option<Password>, String> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let bytes = STANDARD.decode(text).map_err(|_| "is not base64".to_owned())?;
    Password::new(&bytes).map(Some).map_err(|error| error.to_string())
}

/// The secrets of `--peer-router-passwords-file`: comma separated, perhaps with a newline at the end.
///
/// # Errors
///
/// What is wrong, without the secrets.
pub fn passwords(text: &str) -> Result<Vec<Option<Password>>, String> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let items = text.trim_end_matches(['\r', '\n']).split(',').enumerate();
    items.map(|(index, item)| password(item).map_err(|why| format!("item {} {why}", index + 1))).collect()
}

struct Reading<'a> {
    node: &'a Node,
    secrets: &'a Secrets,
    last: &'a [ExternalPeer],
    peers: Vec<ExternalPeer>,
    problems: Vec<Problem>,
}

impl Reading<'_> {
    fn problem(&mut self, annotation: &str, what: &str) {
        self.problems.push(Problem {
            reason: "InvalidPeer",
            message: format!("annotation {annotation} of Node {}: {what}", self.node.name),
        });
    }

    /// Everything stays as it was.
    fn keep_all(&mut self, annotation: &str, what: &str) {
        for peer in self.last {
            self.push(peer.clone());
        }
        self.problem(annotation, &format!("{what}; its peers stay as they were"));
    }

    fn list(&mut self, text: &str) {
        if text.trim().is_empty() {
            return;
        }
        let entries: Vec<Value> = match serde_saphyr::from_str::<Option<Vec<Value>>>(text) {
            Ok(entries) => entries.unwrap_or_default(),
            Err(error) => {
                // The parser's own words quote the text, and with it secrets.
                let line = error.location().map_or(1, |location| location.line());
                return self.keep_all(
                    PEERS,
                    &format!("line {line}: this is no YAML list of peers, each with remoteip and remoteasn"),
                );
            }
        };
        for (index, entry) in entries.iter().enumerate() {
            let known =
                entry.get("remoteip").and_then(Value::as_str).and_then(|text| text.trim().parse().ok());
            match entry
                .as_object()
                .ok_or_else(|| "write remoteip: and remoteasn:".to_owned())
                .and_then(|entry| entry_of(entry, &self.secrets.namespace))
            {
                Ok(peer) => self.push(peer),
                Err(why) => self.keep(PEERS, index, known, &why),
            }
        }
    }

    /// One peer stays as it was, if it was.
    fn keep(&mut self, annotation: &str, index: usize, known: Option<IpAddr>, why: &str) {
        let before = known.and_then(|address| self.last.iter().find(|peer| peer.address == address));
        let (who, fate) = match (known, before) {
            (Some(address), Some(_)) => (format!(" ({address})"), "stays as it was"),
            (Some(address), None) => (format!(" ({address})"), "is left out"),
            (None, _) => (String::new(), "is left out"),
        };
        if let Some(before) = before {
            self.push(before.clone());
        }
        self.problem(annotation, &format!("peer {}{who} {fate}: {why}", index + 1));
    }

    /// Adds a peer, with the password that its Secret holds.
    fn push(&mut self, mut peer: ExternalPeer) {
        let Some(reference) = &peer.secret else { return self.peers.push(peer) };
        let (name, key) = (&reference.secret, &reference.key);
        let why = match self.secrets.get(name) {
            // Before the first answer there is nothing to tell.
            None => None,
            Some(Knowledge::Missing) => Some(format!(
                "there is no Secret {name}; create it with the password as its key {key}: kubectl -n {} create secret \
                 generic {} --from-file={key}=FILE",
                name.namespace, name.name
            )),
            Some(Knowledge::Unreadable(why)) => Some(format!("Secret {name} cannot be read: {why}")),
            Some(Knowledge::Present(secret)) => {
                match secret
                    .value(key)
                    .and_then(|value| written(value).map_err(|why| format!("{key}: {why}")))
                {
                    Ok(password) => {
                        peer.password = Some(password);
                        return self.peers.push(peer);
                    }
                    Err(why) => Some(format!("Secret {name}: {why}")),
                }
            }
        };
        let before = self.last.iter().find(|last| last.address == peer.address);
        peer.password = before.and_then(|before| before.password.clone());
        let fate =
            if peer.password.is_some() { "keeps the password it had" } else { "is not dialled without one" };
        if let Some(why) = why {
            self.problems.push(Problem {
                reason: "PasswordMissing",
                message: format!(
                    "annotation {PEERS} of Node {}: no password for {}, which {fate}: {why}",
                    self.node.name, peer.address
                ),
            });
        }
        if peer.password.is_some() {
            self.peers.push(peer);
        }
    }

    fn columns(&mut self) {
        let items = |name: &str| -> Vec<String> {
            let text = self.node.annotations.get(name).map_or("", |text| text.trim());
            if text.is_empty() {
                Vec::new()
            } else {
                text.split(',').map(|item| item.trim().to_owned()).collect()
            }
        };
        let [ips, asns, ports, passwords, sources] = [IPS, ASNS, PORTS, PASSWORDS, LOCAL_IPS].map(items);
        if ips.is_empty() && asns.is_empty() {
            return;
        }
        for (name, list, optional) in [
            (ASNS, &asns, false),
            (PORTS, &ports, true),
            (PASSWORDS, &passwords, true),
            (LOCAL_IPS, &sources, true),
        ] {
            if list.len() != ips.len() && !(optional && list.is_empty()) {
                let none = if optional { "none, or " } else { "" };
                return self.keep_all(
                    name,
                    &format!("{} items for the {} of {IPS}; write {none}one for each", list.len(), ips.len()),
                );
            }
        }
        let item = |list: &[String], index: usize| list.get(index).cloned().unwrap_or_default();
        for index in 0..ips.len() {
            let known = ips[index].parse().ok();
            let column = |name: &'static str| move |why: String| (name, why);
            let peer = address(&ips[index]).map_err(column(IPS)).and_then(|address| {
                Ok(ExternalPeer {
                    address,
                    asn: remote_asn(&asns[index]).map_err(column(ASNS))?,
                    port: port(&item(&ports, index)).map_err(column(PORTS))?,
                    password: password(&item(&passwords, index))
                        .map_err(|why| (PASSWORDS, format!("its password {why}")))?,
                    secret: None,
                    source: source(&item(&sources, index), address).map_err(column(LOCAL_IPS))?,
                    bfd: None,
                })
            });
            match peer {
                Ok(peer) => self.push(peer),
                Err((name, why)) => self.keep(name, index, known, &why),
            }
        }
    }
}

/// One entry of the YAML list, its Secret not yet read. `namespace` is where Secrets may be read.
fn entry_of(entry: &Map<String, Value>, namespace: &str) -> Result<ExternalPeer, String> {
    // Numbers are often written where texts are meant, and the other way round.
    let text = |name: &str| match entry.get(name) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.trim().to_owned()),
        Some(Value::Number(number)) if name != "password" => Ok(number.to_string()),
        Some(_) => Err(format!("{name} is no text; put it in quotes")),
    };
    let address = address(&text("remoteip")?)?;
    let secret = match entry.get("passwordSecret") {
        None | Some(Value::Null) => None,
        Some(secret) => Some(reference(secret, namespace).map_err(|why| format!("passwordSecret: {why}"))?),
    };
    if secret.is_some() && !text("password")?.is_empty() {
        return Err("it has both password and passwordSecret; write one of them".to_owned());
    }
    Ok(ExternalPeer {
        address,
        asn: remote_asn(&text("remoteasn")?)?,
        port: port(&text("port")?)?,
        password: password(&text("password")?).map_err(|why| format!("password {why}"))?,
        secret,
        source: source(&text("localip")?, address)?,
        bfd: match entry.get("bfd") {
            None | Some(Value::Null) => None,
            Some(bfd) => bfd_of(bfd).map_err(|why| format!("bfd: {why}"))?,
        },
    })
}

/// The map `passwordSecret`. Only the namespace of this process: whoever may annotate a Node may not make it read the
/// Secrets of others.
fn reference(secret: &Value, own: &str) -> Result<SecretReference, String> {
    let map = secret.as_object().ok_or("write {name: NAME}")?;
    let text = |name: &str| match map.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.trim())),
        Some(_) => Err(format!("{name} is no text; put it in quotes")),
    };
    let name = text("name")?.ok_or("it has no name")?;
    match text("namespace")? {
        Some(namespace) if namespace != own => Err(format!(
            "namespace {:?}: Secrets are read in {own:?} only; put it there and leave the namespace out",
            shortened(namespace)
        )),
        _ => Ok(SecretReference {
            secret: ObjectKey::new(own, name),
            key: text("key")?.unwrap_or(SECRET_KEY).into(),
        }),
    }
}

/// A password as a Secret holds it. Files often end in a newline, passwords never do.
fn written(value: &[u8]) -> Result<Password, String> {
    let value = value.strip_suffix(b"\n").unwrap_or(value);
    Password::new(value.strip_suffix(b"\r").unwrap_or(value)).map_err(|error| error.to_string())
}

/// The map `bfd`: what is left out is the default of the flags, not their value.
fn bfd_of(bfd: &Value) -> Result<Option<Timers>, String> {
    let map = bfd.as_object().ok_or("write enabled: true")?;
    match map.get("enabled") {
        Some(Value::Bool(true)) => {}
        None | Some(Value::Null | Value::Bool(false)) => return Ok(None),
        Some(_) => return Err("enabled is true or false".to_owned()),
    }
    let number = |name: &str, default: u64| match map.get(name) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => value.as_u64().ok_or_else(|| format!("{name} is no number")),
    };
    timers(
        number("desired_min_tx_interval", BFD_INTERVAL)?,
        number("required_min_rx_interval", BFD_INTERVAL)?,
        number("detection_multiplier", BFD_MULTIPLIER)?,
        number("port", BFD_PORT)?,
    )
    .map(Some)
}

/// Timers of BFD: two intervals in milliseconds, the packets that may be missed, and the port, which
/// must be that of RFC 5881.
///
/// # Errors
///
/// What is wrong with them.
pub fn timers(transmit: u64, receive: u64, multiplier: u64, port: u64) -> Result<Timers, String> {
    if port != BFD_PORT {
        return Err(format!(
            "port {port}: BFD is spoken on {BFD_PORT} (RFC 5881), and 4784 over several hops"
        ));
    }
    let multiplier =
        u8::try_from(multiplier).map_err(|_| format!("detection multiplier {multiplier} is above 255"))?;
    Timers::new(Duration::from_millis(transmit), Duration::from_millis(receive), multiplier)
        .map_err(|error| error.to_string())
}

fn address(text: &str) -> Result<IpAddr, String> {
    match text.parse() {
        Ok(address) => Ok(address),
        Err(_) if text.is_empty() => Err("it has no address (remoteip)".to_owned()),
        Err(_) => Err(format!("{:?} is no IP address", shortened(text))),
    }
}

fn remote_asn(text: &str) -> Result<Asn, String> {
    match text.parse::<u32>() {
        Ok(number) if is_reserved(number) => {
            Err(format!("AS {number} is reserved; give the number that the peer really has"))
        }
        Ok(number) => Ok(Asn(number)),
        Err(_) if text.is_empty() => Err("it has no AS number (remoteasn)".to_owned()),
        Err(_) => Err(format!("{:?} is no AS number", shortened(text))),
    }
}

fn port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) | Err(_) if !text.is_empty() => {
            Err(format!("{:?} is no port; leave it out for 179", shortened(text)))
        }
        Ok(port) => Ok(port),
        Err(_) => Ok(PORT),
    }
}

fn source(text: &str, peer: IpAddr) -> Result<Option<IpAddr>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    match text.parse::<IpAddr>() {
        Ok(source) if source.is_ipv6() != peer.is_ipv6() => {
            Err(format!("local address {source} is not of the peer's family"))
        }
        Ok(source) => Ok(Some(source)),
        Err(_) => Err(format!("local address {:?} is no IP address", shortened(text))),
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests;
