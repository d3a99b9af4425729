//! The daemon's end of the CNI socket: one question and one answer per connection, with limits.
//!
//! Only root can open the socket (its mode), and only root is answered. A question waits in a thread
//! of its own, since the room's answer may take seconds and nothing else may wait for it.

mod attachments;

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::protocol::{Answer, Attachment, REQUEST_LIMIT, Reason, Request, VERSION, Verb};
use crate::cluster::ObjectKey;
use crate::supervise::panic_of;
use attachments::{Attachments, Held};

/// Questions answered at once; further ones wait in the kernel's queue. A node starts its pods
/// together after a reboot.
const CONNECTIONS: usize = 256;
/// A client has this long to send its question, and as long to take the answer.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait, whatever the client asks for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// The daemon gives up this much before the plugin does: its reason says more than a timeout.
const HEAD_START: Duration = Duration::from_millis(100);
/// A waiting thread needs little.
const STACK: usize = 256 << 10;

/// Who programs policy. Apart from the room so that a daemon without it, and a test, can stand in.
pub trait Enforcement: Send + Sync + 'static {
    /// Programs the policy of a pod that is about to start with these addresses; returns when it is
    /// in the kernel.
    ///
    /// # Errors
    /// Why that cannot be said after `timeout`.
    fn pod_starting(
        &self,
        pod: &ObjectKey,
        uid: Option<&str>,
        addresses: &[IpAddr],
        timeout: Duration,
    ) -> Result<(), NotEnforced>;

    /// The pod does not have these addresses any more. Does not wait.
    fn pod_gone(&self, pod: &ObjectKey, uid: Option<&str>, addresses: &[IpAddr]);

    /// Whether the pod's policy is in the kernel for these addresses.
    ///
    /// # Errors
    /// Why not, or why that cannot be said after `timeout`.
    fn is_enforced(
        &self,
        pod: &ObjectKey,
        addresses: &[IpAddr],
        timeout: Duration,
    ) -> Result<(), NotEnforced>;

    /// Whether a pod could be started.
    ///
    /// # Errors
    /// Why not.
    fn readiness(&self) -> Result<(), NotEnforced>;
}

/// Why a pod's policy is not known to be in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct NotEnforced {
    /// For the plugin.
    pub reason: Reason,
    /// For people: what, where and what to do.
    pub message: String,
}

/// A daemon whose firewall is switched off: no policy, nothing to wait for. It answers, so that pods
/// start although the plugin is still in the network configuration.
#[derive(Clone, Copy, Debug, Default)]
pub struct FirewallOff;

impl Enforcement for FirewallOff {
    fn pod_starting(
        &self,
        _: &ObjectKey,
        _: Option<&str>,
        _: &[IpAddr],
        _: Duration,
    ) -> Result<(), NotEnforced> {
        Ok(())
    }

    fn pod_gone(&self, _: &ObjectKey, _: Option<&str>, _: &[IpAddr]) {}

    fn is_enforced(&self, _: &ObjectKey, _: &[IpAddr], _: Duration) -> Result<(), NotEnforced> {
        Ok(())
    }

    fn readiness(&self) -> Result<(), NotEnforced> {
        Ok(())
    }
}

/// Serves for ever. A panic outside of [`Enforcement`] ends the server with an error, like that of any
/// room; one inside is the answer's failure.
///
/// # Errors
/// Only that panic.
pub async fn serve(listener: UnixListener, enforcement: Arc<dyn Enforcement>) -> anyhow::Result<()> {
    let desk = Arc::new(Desk { enforcement, attachments: Mutex::default() });
    let mut exchanges = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if exchanges.len() < CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    exchanges.spawn(exchange(stream, desk.clone()));
                }
                Err(error) => {
                    // Out of file descriptors, or a client that left at once: neither is for ever.
                    tracing::debug!(%error, "CNI connection not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(ended) = exchanges.join_next() => {
                if let Some(message) = ended.err().and_then(panic_of) {
                    anyhow::bail!("an answer to the CNI plugin panicked: {message}");
                }
            }
        }
    }
}

async fn exchange(mut stream: UnixStream, desk: Arc<Desk>) {
    let own = nix::unistd::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == own => {}
        _ => return,
    }
    let question = match tokio::time::timeout(TRANSFER_TIMEOUT, read_line(&mut stream)).await {
        Ok(Ok(line)) => line,
        // Silent, too slow or gone: nobody to answer.
        Ok(Err(_)) | Err(_) => return,
    };
    let answer = match understand(&question) {
        Ok(request) => answer_in_thread(desk, request).await,
        Err(message) => Answer::Failed { reason: Reason::Malformed, message },
    };
    let Ok(mut line) = serde_json::to_vec(&answer) else { return };
    line.push(b'\n');
    // A plugin that was killed takes no answer; its container will be deleted by a DEL.
    let _ = tokio::time::timeout(TRANSFER_TIMEOUT, stream.write_all(&line)).await;
}

async fn read_line(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let count = stream.read(&mut chunk).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let searched = line.len();
        line.extend(&chunk[..count]);
        if let Some(end) = line[searched..].iter().position(|byte| *byte == b'\n') {
            line.truncate(searched + end);
            return Ok(line);
        }
        if line.len() > REQUEST_LIMIT {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

fn understand(question: &[u8]) -> Result<Request, String> {
    #[derive(Deserialize)]
    struct Head {
        version: u32,
    }
    let unclear = |error: serde_json::Error| {
        format!(
            "the daemon does not understand the plugin ({error}); install the plugin of the daemon's version"
        )
    };
    let head: Head = serde_json::from_slice(question).map_err(unclear)?;
    if head.version != VERSION {
        return Err(format!(
            "the plugin speaks version {} of the CNI socket's protocol, the daemon version {VERSION}; install the \
             plugin of the daemon's version (ferroute cni install)",
            head.version
        ));
    }
    serde_json::from_slice(question).map_err(unclear)
}

async fn answer_in_thread(desk: Arc<Desk>, request: Request) -> Answer {
    let (reply, answered) = oneshot::channel();
    let thread = std::thread::Builder::new().name("cni answer".to_owned()).stack_size(STACK);
    let started = thread.spawn(move || {
        // The plugin may be gone.
        let _ = reply.send(desk.answer(&request));
    });
    let failed = |message| Answer::Failed { reason: Reason::Other, message };
    match started {
        Ok(_) => {
            answered.await.unwrap_or_else(|_| failed("the daemon failed to answer; see its log".to_owned()))
        }
        Err(error) => failed(format!("the daemon cannot start a thread to answer: {error}")),
    }
}

struct Desk {
    enforcement: Arc<dyn Enforcement>,
    attachments: Mutex<Attachments>,
}

impl Desk {
    fn answer(&self, request: &Request) -> Answer {
        let started = Instant::now();
        let wait = Duration::from_millis(request.timeout_ms).min(LONGEST_WAIT);
        let wait = wait.saturating_sub(HEAD_START.min(wait / 4));
        let (verb, outcome) = match &request.verb {
            Verb::Add(attachment) => ("ADD", self.add(&request.network, attachment, wait)),
            Verb::Check(attachment) => ("CHECK", self.check(attachment, wait)),
            Verb::Status => ("STATUS", self.enforcement.readiness()),
            Verb::Del(attachment) => {
                let told = held(&request.network, attachment);
                let mut attachments = self.attachments();
                let gone = attachments.end(&attachment.identity, told);
                // Told under the lock: an ADD of the same address then comes after it.
                gone.iter().for_each(|gone| self.gone(gone));
                ("DEL", Ok(()))
            }
            Verb::Gc { valid } => {
                let mut attachments = self.attachments();
                let gone = attachments.retain(&request.network, valid);
                gone.iter().for_each(|gone| self.gone(gone));
                ("GC", Ok(()))
            }
        };
        let pod = match &request.verb {
            Verb::Add(attachment) | Verb::Check(attachment) | Verb::Del(attachment) => {
                attachment.pod.as_ref().map(|pod| format!("{}/{}", pod.namespace, pod.name))
            }
            Verb::Gc { .. } | Verb::Status => None,
        };
        match outcome {
            Ok(()) => {
                tracing::debug!(verb, pod, took = ?started.elapsed(), "CNI call done");
                Answer::Done
            }
            Err(NotEnforced { reason, message }) => {
                tracing::warn!(verb, pod, took = ?started.elapsed(), error = message, "CNI call refused");
                Answer::Failed { reason, message }
            }
        }
    }

    fn add(&self, network: &str, attachment: &Attachment, wait: Duration) -> Result<(), NotEnforced> {
        let held = held(network, attachment).ok_or_else(no_pod)?;
        self.attachments().begin(attachment.identity.clone(), held.clone());
        self.enforcement.pod_starting(&held.pod, held.uid.as_deref(), &held.addresses, wait)
    }

    fn check(&self, attachment: &Attachment, wait: Duration) -> Result<(), NotEnforced> {
        let held = held("", attachment).ok_or_else(no_pod)?;
        self.enforcement.is_enforced(&held.pod, &held.addresses, wait)
    }

    fn gone(&self, held: &Held) {
        self.enforcement.pod_gone(&held.pod, held.uid.as_deref(), &held.addresses);
    }

    fn attachments(&self) -> MutexGuard<'_, Attachments> {
        // Plain data; a panic while it was held ends the process anyway.
        self.attachments.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn held(network: &str, attachment: &Attachment) -> Option<Held> {
    attachment.pod.as_ref().map(|pod| Held {
        network: network.to_owned(),
        pod: ObjectKey::new(pod.namespace.as_str(), pod.name.as_str()),
        uid: pod.uid.clone(),
        addresses: attachment.addresses.clone(),
    })
}

fn no_pod() -> NotEnforced {
    NotEnforced { reason: Reason::Malformed, message: "the plugin named no pod".to_owned() }
}

#[cfg(test)]
mod tests;
