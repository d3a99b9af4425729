//! What plugin and daemon say to each other: one JSON object per line, one question and one answer
//! per connection.
//!
//! The program on the host may be older or newer than the daemon: unknown fields are passed over,
//! and a question of another [`VERSION`] gets an answer that says so.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Version of this protocol.
pub const VERSION: u32 = 1;
/// Longest question, in bytes. A GC with 1,000 attachments takes 100 KiB.
pub const REQUEST_LIMIT: usize = 512 << 10;
/// Longest answer, in bytes.
pub const ANSWER_LIMIT: usize = 64 << 10;

/// One call of the plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// [`VERSION`] of who asks.
    pub version: u32,
    /// How long the plugin still waits, in milliseconds.
    pub timeout_ms: u64,
    /// Name of the network.
    pub network: String,
    /// What it wants.
    #[serde(flatten)]
    pub verb: Verb,
}

/// What the plugin wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "camelCase")]
pub enum Verb {
    /// Program the pod's policy; answer when it is in the kernel.
    Add(Attachment),
    /// Its addresses are free.
    Del(Attachment),
    /// Is its policy in the kernel?
    Check(Attachment),
    /// Forget every attachment of this network that is not listed.
    Gc {
        /// Container ids and interface names that exist.
        valid: Vec<Identity>,
    },
    /// Could an ADD be served?
    Status,
}

/// Which interface of which container.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_IFNAME`.
    pub interface: String,
}

/// One interface of one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// Container and interface.
    #[serde(flatten)]
    pub identity: Identity,
    /// `CNI_NETNS`; empty on a DEL whose namespace is gone.
    pub netns: String,
    /// The pod; `None` only on a DEL whose runtime names none.
    pub pod: Option<Pod>,
    /// Every address of the previous result.
    pub addresses: Vec<IpAddr>,
}

/// The pod as the runtime names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`; older runtimes do not give it.
    pub uid: Option<String>,
}

/// The daemon's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "camelCase")]
pub enum Answer {
    /// Done; of a question: yes.
    Done,
    /// Not done; of a question: no.
    Failed {
        /// Why, for the plugin.
        reason: Reason,
        /// Why, for people: what, where and what to do.
        message: String,
    },
}

/// Why something was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reason {
    /// The cluster has not been listed yet: no pod can be started safely.
    Starting,
    /// The last passes failed: the kernel may not hold what the cluster wants.
    Failing,
    /// The API server has not told of this pod in time.
    PodUnknown,
    /// The policy is not in the kernel (in time).
    NotProgrammed,
    /// The daemon does not understand the question.
    Malformed,
    /// A reason this version does not know.
    #[serde(other)]
    Other,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add() -> Request {
        Request {
            version: VERSION,
            timeout_ms: 5000,
            network: "mynet".to_owned(),
            verb: Verb::Add(Attachment {
                identity: Identity { container: "c1".to_owned(), interface: "eth0".to_owned() },
                netns: "/var/run/netns/x".to_owned(),
                pod: Some(Pod {
                    namespace: "shop".to_owned(),
                    name: "cart-0".to_owned(),
                    uid: Some("u".to_owned()),
                }),
                addresses: vec!["10.244.1.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            }),
        }
    }

    #[test]
    fn the_words_on_the_socket_stay() {
        let text = serde_json::to_string(&add()).unwrap();
        assert_eq!(
            text,
            r#"{"version":1,"timeoutMs":5000,"network":"mynet","verb":"add","container":"c1","interface":"eth0","netns":"/var/run/netns/x","pod":{"namespace":"shop","name":"cart-0","uid":"u"},"addresses":["10.244.1.2","fd00::2"]}"#
        );
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), add());
        let status = Request { version: 1, timeout_ms: 1, network: String::new(), verb: Verb::Status };
        assert_eq!(
            serde_json::from_str::<Request>(&serde_json::to_string(&status).unwrap()).unwrap(),
            status
        );
        let gc = Request { verb: Verb::Gc { valid: vec![] }, ..status };
        assert_eq!(serde_json::from_str::<Request>(&serde_json::to_string(&gc).unwrap()).unwrap(), gc);
    }

    #[test]
    fn a_newer_partner_is_understood_as_far_as_possible() {
        let text = r#"{"answer":"failed","reason":"tooHot","message":"m","temperature":99}"#;
        let answer: Answer = serde_json::from_str(text).unwrap();
        assert_eq!(answer, Answer::Failed { reason: Reason::Other, message: "m".to_owned() });
        assert_eq!(serde_json::from_str::<Answer>(r#"{"answer":"done","x":1}"#).unwrap(), Answer::Done);
    }
}
