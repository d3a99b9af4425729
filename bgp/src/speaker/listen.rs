//! Where peers connect to: listeners that come and go, with the keys of the peers on each.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use crate::peer::{Command, PeerKey};
use crate::transport::{Listener, Password, interface_name};

/// Pause before an address that cannot be listened on is tried again: it may appear, its port may
/// be given up.
const RETRY: Duration = Duration::from_secs(5);
/// Pause after a connection could not be accepted, as when there are too many open files.
const BREATH: Duration = Duration::from_millis(100);

/// An address that is to be listened on, and how that went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerStatus {
    /// As configured.
    pub wanted: SocketAddr,
    /// Where it listens, with the port that the kernel chose for port 0; `None` if it does not.
    pub address: Option<SocketAddr>,
    /// Why it does not, or which peers' passwords the kernel refused.
    pub error: Option<String>,
}

/// Where connections of peers go.
pub(super) type Directory = RwLock<HashMap<PeerKey, UnboundedSender<Command>>>;

/// All listeners.
#[derive(Debug)]
pub(super) struct Listeners {
    state: Arc<Mutex<State>>,
    directory: Arc<Directory>,
}

#[derive(Debug, Default)]
struct State {
    passwords: BTreeMap<IpAddr, Password>,
    slots: BTreeMap<SocketAddr, Slot>,
}

#[derive(Debug)]
struct Slot {
    listener: Option<Arc<Listener>>,
    error: Option<String>,
    task: JoinHandle<()>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Drop for Listeners {
    /// The tasks hold the state that holds them: this ends both.
    fn drop(&mut self) {
        lock(&self.state).slots.clear();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Whoever panicked under the lock left whole values: each is assigned at once.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Listeners {
    pub(super) fn new(directory: Arc<Directory>) -> Self {
        Self { state: Arc::default(), directory }
    }

    /// Listens on these addresses and no others. What cannot be listened on is tried again until it
    /// is not wanted any more.
    pub(super) fn set(&self, wanted: &[SocketAddr]) {
        let mut state = lock(&self.state);
        state.slots.retain(|address, _| wanted.contains(address));
        for &address in wanted {
            if state.slots.contains_key(&address) {
                continue;
            }
            let first = bind(address, &state.passwords);
            let (listener, error) = match first {
                Ok(listener) => (Some(listener), None),
                Err(error) => {
                    warn!(%error, "no connections are accepted there until it can be listened on");
                    (None, Some(error))
                }
            };
            let task =
                tokio::spawn(serve(address, listener.clone(), self.state.clone(), self.directory.clone()));
            state.slots.insert(address, Slot { listener, error, task });
        }
    }

    /// Demands a signature from a peer, or no longer, on all listeners.
    ///
    /// # Errors
    ///
    /// The kernel's refusal; the peer must not be let in then.
    pub(super) fn set_password(&self, peer: IpAddr, password: Option<&Password>) -> std::io::Result<()> {
        let mut state = lock(&self.state);
        match password {
            Some(password) => state.passwords.insert(peer, password.clone()),
            None => state.passwords.remove(&peer),
        };
        for slot in state.slots.values() {
            if let Some(listener) = &slot.listener {
                listener.set_password(peer, password)?;
            }
        }
        Ok(())
    }

    /// Addresses that are listened on.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        let state = lock(&self.state);
        state.slots.values().filter_map(|slot| Some(slot.listener.as_ref()?.address())).collect()
    }

    pub(super) fn status(&self) -> Vec<ListenerStatus> {
        let state = lock(&self.state);
        let status = state.slots.iter().map(|(wanted, slot)| ListenerStatus {
            wanted: *wanted,
            address: slot.listener.as_ref().map(|listener| listener.address()),
            error: slot.error.clone(),
        });
        status.collect()
    }
}

/// Binds with the keys in place before the first segment can arrive.
fn bind(address: SocketAddr, passwords: &BTreeMap<IpAddr, Password>) -> Result<Arc<Listener>, String> {
    let keys = passwords.iter().map(|(peer, password)| (*peer, password));
    Listener::bind(address, keys).map(Arc::new).map_err(|error| error.to_string())
}

async fn serve(
    address: SocketAddr,
    mut listener: Option<Arc<Listener>>,
    state: Arc<Mutex<State>>,
    directory: Arc<Directory>,
) {
    let listener = loop {
        if let Some(listener) = listener {
            break listener;
        }
        tokio::time::sleep(RETRY).await;
        let mut state = lock(&state);
        let outcome = bind(address, &state.passwords);
        let Some(slot) = state.slots.get_mut(&address) else { return };
        match outcome {
            Ok(bound) => {
                info!(%address, "listening after all");
                (slot.listener, slot.error) = (Some(bound.clone()), None);
                listener = Some(bound);
            }
            Err(error) => {
                slot.error = Some(error);
                listener = None;
            }
        }
    };
    info!(address = %listener.address(), "listening");
    loop {
        match listener.accept().await {
            Ok((stream, remote)) => introduce(stream, remote, &directory),
            Err(error) => {
                debug!(%error, "a connection could not be accepted");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
}

/// Hands a connection to its peer. A stranger's is closed: neighbours are configured on both sides.
fn introduce(stream: TcpStream, remote: SocketAddr, directory: &Directory) {
    let interface = match remote {
        SocketAddr::V6(remote) if remote.ip().is_unicast_link_local() => interface_name(remote.scope_id()),
        _ => None,
    };
    let key = PeerKey { address: remote.ip(), interface: interface.map(Into::into) };
    let directory = directory.read().unwrap_or_else(PoisonError::into_inner);
    match directory.get(&key) {
        // A peer that is just going away: the connection is closed.
        Some(commands) => drop(commands.send(Command::Accepted(stream))),
        None => debug!(peer = %key, "connection of a stranger closed"),
    }
}
