//! The network configuration on a plugin's standard input.
//!
//! Read leniently: keys of others are passed over. What this plugin reads beside CNI's own keys:
//!
//! | key | default | meaning |
//! |---|---|---|
//! | `socket` | `/run/ferroute/cni.sock` | where the daemon listens |
//! | `timeout` | `"5s"` | how long an ADD waits; 100ms to 60s |
//! | `whenUnavailable` | `"deny"` | without an answer in time: fail (`deny`) or go on (`allow`) |

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::protocol::Identity;
use super::{SOCKET, spans};
use crate::duration::GoDuration;

/// Versions of the CNI specification this plugin speaks. The first that can chain is 0.3.0.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The newest of them.
pub const NEWEST: &str = "1.1.0";
/// Real configurations have a few kilobytes.
pub const LIMIT: usize = 1 << 20;

/// How long an ADD waits unless the configuration says otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(5);
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(60);

/// A network configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConf {
    /// `cniVersion`, one of [`VERSIONS`].
    pub version: &'static str,
    /// `name`.
    pub network: String,
    /// `socket`.
    pub socket: PathBuf,
    /// `timeout`.
    pub timeout: Duration,
    /// `whenUnavailable`.
    pub when_unavailable: WhenUnavailable,
    /// `prevResult`; absent where the plugin is not chained.
    pub previous: Option<Previous>,
    /// `cni.dev/valid-attachments` of a GC.
    pub valid: Vec<Identity>,
}

/// What happens to a pod whose policy cannot be confirmed in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenUnavailable {
    /// Its start fails; the kubelet tries again.
    #[default]
    Deny,
    /// It starts. Until the daemon knows it, `--netpol-unknown-pods` decides what it may do.
    Allow,
}

/// The result of the plugin before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Previous {
    /// The result to pass on: the bytes received, with the configuration's `cniVersion`.
    pub text: String,
    /// Every address in it.
    pub addresses: Vec<IpAddr>,
}

/// What is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No JSON object.
    #[error("the network configuration on standard input is no JSON object: {0}")]
    Decode(String),
    /// A version of the specification that is not spoken here.
    #[error("cniVersion {0:?} is not supported; supported are 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0")]
    Version(String),
    /// A key with a value that cannot be.
    #[error("{key}={value} in the network configuration: {cure}")]
    Value {
        /// The key.
        key: &'static str,
        /// The value as JSON.
        value: String,
        /// What to write instead.
        cure: &'static str,
    },
}

impl FromStr for WhenUnavailable {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "deny" => Ok(Self::Deny),
            "allow" => Ok(Self::Allow),
            _ => Err("write \"deny\" or \"allow\""),
        }
    }
}

impl WhenUnavailable {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Allow => "allow",
        }
    }
}

/// `timeout` as a plugin can keep it.
///
/// # Errors
/// What to write instead.
pub fn timeout(text: &str) -> Result<Duration, &'static str> {
    const CURE: &str = "write a duration from \"100ms\" to \"60s\"";
    let value = text.parse::<GoDuration>().ok().and_then(GoDuration::unsigned).ok_or(CURE)?;
    if (SHORTEST..=LONGEST).contains(&value) { Ok(value) } else { Err(CURE) }
}

impl NetConf {
    /// Reads a configuration.
    ///
    /// # Errors
    /// What is wrong with it, naming the key.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let (text, object) = decode(bytes)?;
        let version = version(&object)?;
        let text_of = |key| string(&object, key);
        let socket = match text_of("socket")? {
            None => PathBuf::from(SOCKET),
            Some(path) if path.starts_with('/') && path.len() <= 107 => PathBuf::from(path),
            Some(_) => return Err(wrong(&object, "socket", "write an absolute path of at most 107 bytes")),
        };
        let timeout = match text_of("timeout")? {
            None => TIMEOUT,
            Some(value) => timeout(value).map_err(|cure| wrong(&object, "timeout", cure))?,
        };
        let when_unavailable = match text_of("whenUnavailable")? {
            None => WhenUnavailable::default(),
            Some(word) => word.parse().map_err(|cure| wrong(&object, "whenUnavailable", cure))?,
        };
        Ok(Self {
            version,
            network: text_of("name")?.unwrap_or_default().to_owned(),
            socket,
            timeout,
            when_unavailable,
            previous: previous(text, &object, version)?,
            valid: valid(&object)?,
        })
    }
}

/// The `cniVersion` a reader of the answer expects, as far as it can be told.
pub fn version_for_errors(bytes: &[u8]) -> &'static str {
    decode(bytes).ok().and_then(|(_, object)| version(&object).ok()).unwrap_or(NEWEST)
}

fn decode(bytes: &[u8]) -> Result<(&str, Map<String, Value>), Error> {
    if bytes.len() > LIMIT {
        return Err(Error::Decode(format!("it is longer than {LIMIT} bytes")));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| Error::Decode(error.to_string()))?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok((text, object)),
        Ok(_) => Err(Error::Decode("it is another value".to_owned())),
        Err(error) => Err(Error::Decode(error.to_string())),
    }
}

/// Without the key a configuration is of 0.1.0, which knows no chains.
fn version(object: &Map<String, Value>) -> Result<&'static str, Error> {
    let given = string(object, "cniVersion")?.unwrap_or("0.1.0");
    VERSIONS.into_iter().find(|known| *known == given).ok_or_else(|| Error::Version(given.to_owned()))
}

fn string<'a>(object: &'a Map<String, Value>, key: &'static str) -> Result<Option<&'a str>, Error> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(wrong(object, key, "write a text")),
    }
}

fn wrong(object: &Map<String, Value>, key: &'static str, cure: &'static str) -> Error {
    let value = object.get(key).map(Value::to_string).unwrap_or_default();
    Error::Value { key, value: shorten(value), cure }
}

/// For a message: a value may be a megabyte.
fn shorten(mut text: String) -> String {
    const MOST: usize = 200;
    if text.len() > MOST {
        let end = (0..=MOST).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.push_str("...");
    }
    text
}

fn previous(
    text: &str,
    object: &Map<String, Value>,
    version: &'static str,
) -> Result<Option<Previous>, Error> {
    const KEY: &str = "prevResult";
    let result = match object.get(KEY) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(result)) => result,
        Some(_) => return Err(wrong(object, KEY, "a result is an object")),
    };
    let mut addresses = Vec::new();
    let ips = match result.get("ips") {
        None | Some(Value::Null) => &[][..],
        Some(Value::Array(ips)) => ips,
        Some(_) => return Err(wrong(result, "ips", "the addresses of a result are a list")),
    };
    for ip in ips {
        // 0.3.x and 0.4.0 have a "version" beside it, which says nothing new.
        let address = ip.get("address").and_then(Value::as_str).unwrap_or_default();
        let parsed = address.parse::<IpNet>().map(|net| net.addr()).or_else(|_| address.parse());
        match parsed {
            Ok(address) if !addresses.contains(&address) => addresses.push(address),
            Ok(_) => {}
            Err(_) => {
                return Err(wrong(result, "ips", "each needs an \"address\" such as \"10.244.1.2/24\""));
            }
        }
    }
    let span = spans::member(text, 0, KEY).map(|member| member.value);
    let Some(own) = span.and_then(|span| text.get(span)) else {
        return Err(wrong(object, KEY, "it cannot be found again in the text"));
    };
    Ok(Some(Previous { text: with_version(own, version), addresses }))
}

/// The result's text, its `cniVersion` that of the configuration.
fn with_version(result: &str, version: &str) -> String {
    let wanted = format!("\"{version}\"");
    match spans::member(result, 0, "cniVersion") {
        Some(member) if result.get(member.value.clone()) == Some(&wanted) => result.to_owned(),
        Some(member) => {
            let mut text = result.to_owned();
            text.replace_range(member.value, &wanted);
            text
        }
        None => {
            let is_empty = spans::members(result, 0).is_none_or(|members| members.is_empty());
            let comma = if is_empty { "" } else { "," };
            // The object's own brace is its first byte.
            format!("{{\"cniVersion\":{wanted}{comma}{}", result.get(1..).unwrap_or("}"))
        }
    }
}

fn valid(object: &Map<String, Value>) -> Result<Vec<Identity>, Error> {
    const KEY: &str = "cni.dev/valid-attachments";
    let list = match object.get(KEY) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(wrong(object, KEY, "the attachments are a list")),
    };
    list.iter()
        .map(|item| {
            let text = |key| item.get(key).and_then(Value::as_str).map(str::to_owned);
            match (text("containerID"), text("ifname")) {
                (Some(container), Some(interface)) => Ok(Identity { container, interface }),
                _ => Err(wrong(object, KEY, "each needs \"containerID\" and \"ifname\"")),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn parse(value: &Value) -> Result<NetConf, Error> {
        NetConf::parse(value.to_string().as_bytes())
    }

    #[test]
    fn results_of_every_version() {
        for (version, ips) in [
            (
                "0.3.0",
                json!([{"version": "4", "address": "10.1.2.3/24", "gateway": "10.1.2.1", "interface": 2}]),
            ),
            ("0.3.1", json!([{"version": "4", "address": "10.1.2.3/24"}])),
            ("0.4.0", json!([{"version": "4", "address": "10.1.2.3/24", "interface": 0}])),
            ("1.0.0", json!([{"address": "10.1.2.3/24", "interface": 0}])),
            ("1.1.0", json!([{"address": "10.1.2.3/24"}, {"address": "10.1.2.3/24"}])),
        ] {
            let conf = parse(&json!({
                "cniVersion": version, "name": "mynet", "type": "ferroute-cni",
                "prevResult": {"cniVersion": version, "interfaces": [], "ips": ips, "dns": {}},
            }))
            .unwrap();
            assert_eq!((conf.version, conf.network.as_str()), (version, "mynet"));
            assert_eq!(conf.previous.unwrap().addresses, ["10.1.2.3".parse::<IpAddr>().unwrap()]);
        }
        let dual = json!({"cniVersion": "1.0.0", "prevResult": {"ips": [
            {"address": "10.1.2.3/24"}, {"address": "fd00::7/64"}, {"address": "192.0.2.1"}]}});
        assert_eq!(
            parse(&dual).unwrap().previous.unwrap().addresses,
            ["10.1.2.3", "fd00::7", "192.0.2.1"].map(|ip| ip.parse::<IpAddr>().unwrap())
        );
        let without = json!({"cniVersion": "1.0.0", "prevResult": {"interfaces": [{"name": "eth0"}]}});
        assert_eq!(parse(&without).unwrap().previous.unwrap().addresses, [] as [IpAddr; 0]);
    }

    #[test]
    fn the_result_is_passed_on_byte_by_byte() {
        let result = r#"{ "zeta": 1e2,  "ips" : [ {"address":"10.0.0.1/8"} ], "cniVersion":"1.0.0", "alpha":{"b":1,"a":12345678901234567890123} }"#;
        let text = format!("{{\"prevResult\":{result},\"cniVersion\":\"1.0.0\",\"name\":\"n\"}}");
        assert_eq!(NetConf::parse(text.as_bytes()).unwrap().previous.unwrap().text, result);
        // A version of its own gives way to the configuration's; a missing one is put in.
        let newer = text.replace("\"cniVersion\":\"1.0.0\",\"name\"", "\"cniVersion\":\"1.1.0\",\"name\"");
        assert_eq!(
            NetConf::parse(newer.as_bytes()).unwrap().previous.unwrap().text,
            result.replace("\"1.0.0\"", "\"1.1.0\"")
        );
        for (result, wanted) in
            [("{}", r#"{"cniVersion":"0.4.0"}"#), (r#"{ "dns":{} }"#, r#"{"cniVersion":"0.4.0", "dns":{} }"#)]
        {
            let text = format!("{{\"cniVersion\":\"0.4.0\",\"prevResult\": {result}}}");
            assert_eq!(NetConf::parse(text.as_bytes()).unwrap().previous.unwrap().text, wanted);
        }
    }

    #[test]
    fn own_keys_and_their_defaults() {
        let conf = parse(&json!({"cniVersion": "1.1.0"})).unwrap();
        assert_eq!((conf.timeout, conf.when_unavailable), (Duration::from_secs(5), WhenUnavailable::Deny));
        assert_eq!((conf.socket, conf.previous), (PathBuf::from(SOCKET), None));
        let conf = parse(&json!({
            "cniVersion": "1.1.0", "socket": "/x/y", "timeout": "1m0s", "whenUnavailable": "allow",
            "cni.dev/valid-attachments": [{"containerID": "c", "ifname": "eth0"}], "runtimeConfig": {"k": []},
        }))
        .unwrap();
        assert_eq!((conf.timeout, conf.when_unavailable), (Duration::from_secs(60), WhenUnavailable::Allow));
        assert_eq!(conf.socket, PathBuf::from("/x/y"));
        assert_eq!(conf.valid, [Identity { container: "c".to_owned(), interface: "eth0".to_owned() }]);
    }

    #[test]
    fn every_mistake_names_its_key_and_the_cure() {
        for (key, value, cure) in [
            ("timeout", json!("5"), "100ms"),
            ("timeout", json!("61s"), "60s"),
            ("timeout", json!("-1s"), "100ms"),
            ("timeout", json!(5), "write a text"),
            ("socket", json!("relative"), "absolute"),
            ("socket", json!(format!("/{}", "x".repeat(107))), "107"),
            ("whenUnavailable", json!("perhaps"), "\"deny\" or \"allow\""),
            ("name", json!([1]), "write a text"),
            ("prevResult", json!("x"), "object"),
            ("cni.dev/valid-attachments", json!({}), "list"),
            ("cni.dev/valid-attachments", json!([{"ifname": "eth0"}]), "containerID"),
        ] {
            let error = parse(&json!({"cniVersion": "1.0.0", key: value})).unwrap_err().to_string();
            assert!(error.starts_with(key) && error.contains(cure), "{error}");
        }
        for ips in [json!({}), json!([{}]), json!([{"address": "10.0.0.300/8"}]), json!(["10.0.0.1/8"])] {
            let error = parse(&json!({"cniVersion": "1.0.0", "prevResult": {"ips": ips}})).unwrap_err();
            assert!(error.to_string().starts_with("ips="), "{error}");
        }
        let long = parse(&json!({"cniVersion": "1.0.0", "timeout": "ä".repeat(10_000)})).unwrap_err();
        assert!(long.to_string().len() < 400);
    }

    #[test]
    fn what_is_no_configuration() {
        for bytes in [&b""[..], b"[]", b"null", b"\xff\xfe", b"{\"cniVersion\":", b"{} {}"] {
            assert!(matches!(NetConf::parse(bytes), Err(Error::Decode(_))), "{bytes:?}");
            assert_eq!(version_for_errors(bytes), NEWEST);
        }
        assert!(matches!(NetConf::parse(&vec![b' '; LIMIT + 1]), Err(Error::Decode(_))));
        let deep = format!("{{\"prevResult\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
        assert!(matches!(NetConf::parse(deep.as_bytes()), Err(Error::Decode(_))));
        for version in [json!("2.0.0"), json!("1.0"), json!("0.2.0"), json!(""), Value::Null] {
            assert!(matches!(parse(&json!({"cniVersion": version})), Err(Error::Version(_))));
        }
        assert!(matches!(parse(&json!({"cniVersion": 1})), Err(Error::Value { key: "cniVersion", .. })));
        assert_eq!(version_for_errors(br#"{"cniVersion":"0.4.0"}"#), "0.4.0");
    }

    proptest! {
        #[test]
        fn no_input_panics(text in ".{0,200}", tail in any::<Vec<u8>>()) {
            let _ = NetConf::parse(text.as_bytes());
            let _ = NetConf::parse(&tail);
            let _ = NetConf::parse(format!(r#"{{"cniVersion":"1.0.0","prevResult":{{{text}}}}}"#).as_bytes());
        }
    }
}
