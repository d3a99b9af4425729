//! Secrets that this node's peers name: wanted from the cluster, and waited for at the start.

use std::time::{Duration, Instant};

use super::Room;
use crate::cluster::node::Node;
use crate::cluster::secret::Secrets;
use crate::routes::external;

/// How long the first pass waits for them. Peers that are told later would be no part of a restart: what
/// was learned from them would go and come back.
const WAIT: Duration = super::LONGEST_SLEEP;

impl Room {
    /// Says which Secrets are needed from now on.
    pub(super) fn want_secrets(&self, node: &Node, known: &Secrets) {
        // With peers by flags annotations name none.
        if !self.settings.external.peers.is_empty() {
            return;
        }
        let mut wanted = external::secrets(node, &known.namespace);
        // Peers that stay as they were, because their annotation cannot be read, keep following theirs.
        let kept = self.external.iter().filter_map(|peer| peer.secret.as_ref());
        wanted.extend(kept.map(|reference| reference.secret.clone()));
        self.subscription.cluster().want_secrets(wanted);
    }

    /// Whether all that is needed at the start has answered, or the wait is over.
    pub(super) fn has_secrets(&mut self) -> bool {
        if self.started {
            return true;
        }
        let since = *self.secrets_since.get_or_insert_with(Instant::now);
        let (node, known) = {
            let state = self.subscription.cluster().read();
            (state.nodes.get(&self.settings.node_name).cloned(), state.secrets.clone())
        };
        let Some(node) = node else { return true };
        self.want_secrets(&node, &known);
        let needed = external::secrets(&node, &known.namespace);
        let by_flags = !self.settings.external.peers.is_empty();
        by_flags || since.elapsed() >= WAIT || needed.iter().all(|key| known.get(key).is_some())
    }
}
