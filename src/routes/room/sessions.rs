//! Sessions and listeners: what of them is wrong, and what is right again.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ferroute_bgp::fsm::State;
use ferroute_bgp::speaker::Speaker;

use super::Room;
use crate::cluster::ObjectKey;
use crate::cluster::service::Problem;

/// A session may take this long to come up before its absence is a problem of the Node.
const PATIENCE: Duration = Duration::from_secs(15);

impl Room {
    /// Sessions that come and go wake the room, so that they are told at once.
    pub(super) fn follow_sessions(&self, speaker: &Speaker) {
        let (mut events, waker) = (speaker.events(), self.subscription.waker());
        let changed = self.sessions_changed.clone();
        tokio::spawn(async move {
            use tokio::sync::broadcast::error::RecvError;
            while !matches!(events.recv().await, Err(RecvError::Closed)) {
                changed.store(true, Ordering::Release);
                waker.wake();
            }
        });
    }

    pub(super) fn listener_problems(&self, speaker: &Speaker) -> Vec<Problem> {
        let failed =
            speaker.listeners().into_iter().filter_map(|status| Some((status.wanted, status.error?)));
        failed
            .map(|(address, error)| Problem {
                reason: "BgpPortTaken",
                message: format!(
                    "Node {} takes no BGP connections on {address}: {error}. Peers are dialled all the same; stop \
                     the other BGP speaker, or choose another --bgp-port",
                    self.settings.node_name
                ),
            })
            .collect()
    }

    /// Sessions that should be up and are not; those that came back are told as good news.
    pub(super) fn missing_sessions(&mut self, speaker: &Speaker) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut missing = BTreeSet::new();
        let name = self.settings.node_name.clone();
        for peer in speaker.peers() {
            let young = self.wanted.get(&peer.key).is_none_or(|since| since.elapsed() < PATIENCE);
            let who = format!("{} ({})", peer.key, peer.description);
            if peer.state == State::Established {
                if self.missing.contains(&peer.key) {
                    let message = format!("Node {name} has a BGP session with {who} again");
                    let news = Problem { reason: "BgpSessionUp", message };
                    let uid = self.node.as_deref().map(|node| node.uid.clone()).unwrap_or_default();
                    self.reporter.good_news("Node", &ObjectKey::new("", name.clone()), &uid, &news);
                }
            } else if !young || peer.flaps > 0 {
                let why = peer.last_error().map_or("the peer does not answer", |error| error.text.as_str());
                let message = format!("Node {name} has no BGP session with {who}: {why}");
                problems.push(Problem { reason: "BgpSessionDown", message });
                missing.insert(peer.key);
            }
        }
        self.missing = missing;
        problems
    }
}
