//! BFD for peers that want it: one monitor for the speaker, one small task for each peer.
//!
//! The task tells the peer's task when the path broke. What that means there, RFC 5882 says: a session
//! that is up ends; of a peer that restarts gracefully, routes stay unless its BFD outlives its control
//! plane (section 4.3), for then the loss is not the restart's.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::bfd::{
    self, Monitor, MonitorConfig, MonitorError, PeerConfig as SessionConfig, PeerKey as SessionKey,
    SessionHandle, State,
};
use crate::peer::{Board, Command, PathStatus, PeerBfd, PeerConfig};
use crate::transport::scoped;

/// Pause before a session that could not be kept is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// The monitor, from the first peer that wants it to the speaker's stop.
#[derive(Debug, Default)]
pub(super) struct Detector {
    monitor: Mutex<Running>,
}

#[derive(Debug, Default)]
enum Running {
    #[default]
    NotYet,
    Yes(Monitor),
    Stopped,
}

impl Detector {
    /// Keeps a session with a peer until the task is aborted.
    pub(super) fn watch(
        self: &Arc<Self>,
        config: &PeerConfig,
        bfd: PeerBfd,
        board: Arc<Board>,
        commands: mpsc::UnboundedSender<Command>,
    ) -> JoinHandle<()> {
        let task = Task { detector: self.clone(), config: config.clone(), bfd, board, commands };
        tokio::spawn(task.run())
    }

    fn open(&self, session: SessionConfig) -> Result<SessionHandle, MonitorError> {
        let mut running = self.monitor.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*running, Running::NotYet) {
            *running = Running::Yes(Monitor::start(MonitorConfig::default())?);
        }
        match &*running {
            Running::Yes(monitor) => monitor.watch(session),
            Running::NotYet | Running::Stopped => Err(MonitorError::Ended),
        }
    }

    /// Tells all peers that the sessions end on purpose, and waits until they have heard it.
    pub(super) async fn stop(self: Arc<Self>) {
        let taken = {
            let mut running = self.monitor.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *running, Running::Stopped)
        };
        if let Running::Yes(monitor) = taken {
            // A panic in there has been reported by the panic hook.
            let _ = tokio::task::spawn_blocking(move || monitor.stop()).await;
        }
    }
}

struct Task {
    detector: Arc<Detector>,
    config: PeerConfig,
    bfd: PeerBfd,
    board: Arc<Board>,
    commands: mpsc::UnboundedSender<Command>,
}

impl Task {
    async fn run(self) {
        loop {
            match self.open().await {
                Ok(handle) => self.follow(&handle).await,
                Err(text) => {
                    let error = format!("no BFD session: {text}; tried again every {} s", RETRY.as_secs());
                    warn!(peer = %self.config.key, error);
                    self.board.set_path(Some(PathStatus {
                        state: State::Down,
                        since: Instant::now(),
                        error: Some(error),
                    }));
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn open(&self) -> Result<SessionHandle, String> {
        let session = self.session()?;
        let detector = self.detector.clone();
        // It waits for the monitor's thread.
        let opened = tokio::task::spawn_blocking(move || detector.open(session)).await;
        opened.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
    }

    fn session(&self) -> Result<SessionConfig, String> {
        let key = &self.config.key;
        let scoped = scoped(key.address, 0, key.interface.as_deref()).map_err(|error| error.to_string())?;
        let interface = match scoped {
            SocketAddr::V6(address) if address.scope_id() != 0 => Some(address.scope_id()),
            _ => None,
        };
        let PeerBfd { timers, hops, passive, graceful: _ } = self.bfd;
        let key = SessionKey { peer: key.address, local: self.config.source, interface, port: hops.port() };
        Ok(SessionConfig { key, hops, timers, passive })
    }

    /// Tells what becomes of a session, until its thread has ended.
    async fn follow(&self, handle: &SessionHandle) {
        let mut status = handle.status();
        let mut before: Option<bfd::Status> = None;
        loop {
            let now = *status.borrow_and_update();
            self.board.set_path(Some(PathStatus { state: now.state, since: now.since, error: None }));
            if let Some(why) = broken(before, now) {
                let why = format!("BFD session down: {why}");
                info!(peer = %self.config.key, why, "path to the peer broken");
                let independent = before.is_some_and(|before| before.peer_is_independent);
                // A task that has ended has no session to end.
                let _ = self.commands.send(Command::PathDown {
                    why,
                    independent,
                    restarts: self.bfd.graceful && !independent,
                });
            }
            before = Some(now);
            if status.changed().await.is_err() {
                return;
            }
        }
    }
}

/// Why the path counts as broken, if it went from up to down between two looks.
fn broken(before: Option<bfd::Status>, now: bfd::Status) -> Option<String> {
    let before = before.filter(|before| before.state == State::Up)?;
    match now.down {
        Some(reason) => reason.breaks_path().then(|| reason.to_string()),
        // Down and up again before anybody looked.
        None => (now.since != before.since).then(|| "it was down for a moment".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bfd::{Diagnostic, DownReason};

    #[test]
    fn a_path_breaks_only_from_up_and_not_on_purpose() {
        let begin = Instant::now();
        let status = |state, down, seconds| bfd::Status {
            state,
            down,
            peer_is_independent: false,
            since: begin + Duration::from_secs(seconds),
        };
        let up = status(State::Up, None, 1);
        let down = |reason| status(State::Down, Some(reason), 2);
        let lost = down(DownReason::DetectionTimeExpired);
        assert!(broken(Some(up), lost).is_some_and(|why| why.contains("detection time")));
        let signalled = down(DownReason::NeighbourDown(Diagnostic::DetectionTimeExpired));
        assert!(broken(Some(up), signalled).is_some());
        assert!(broken(Some(up), status(State::Up, None, 3)).is_some());
        assert_eq!(broken(Some(up), up), None);
        assert_eq!(broken(None, lost), None);
        assert_eq!(broken(Some(lost), lost), None);
        assert_eq!(broken(Some(up), down(DownReason::NeighbourAdminDown)), None);
        assert_eq!(broken(Some(up), down(DownReason::AdminDown)), None);
    }
}
