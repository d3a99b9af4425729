//! What all parts of the server share.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;

use crate::admission::services::Allocator;
use crate::faults::Faults;
use crate::registry::{Registry, Resource};
use crate::store::{Key, Store};
use crate::tls::Tls;

/// Who runs the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kubelet {
    /// The server: it assigns addresses, and reports pods ready after a delay.
    Simulated {
        /// From the assignment to a node to Ready.
        ready_after: Duration,
        /// From a deletion to the end of the pod (never more than its grace period).
        gone_after: Duration,
    },
    /// Somebody else: pods get a node and stay Pending until their status is written; a deleted pod
    /// stays until it is deleted with grace period 0.
    External,
}

impl Default for Kubelet {
    fn default() -> Self {
        Self::Simulated { ready_after: Duration::from_millis(50), gone_after: Duration::from_millis(200) }
    }
}

/// What the server was told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    pub listen: SocketAddr,
    pub service_cidrs: Vec<IpNet>,
    pub node_ports: std::ops::RangeInclusive<u16>,
    pub load_balancers: Vec<IpNet>,
    pub kubelet: Kubelet,
    pub controllers: bool,
    pub token_file: Option<PathBuf>,
    pub tls: Option<Tls>,
    pub bookmark_interval: Duration,
    pub history_limit: usize,
    /// Addresses and port of the API server for default/kubernetes; none leaves that Service out.
    pub advertise: Vec<IpAddr>,
    pub advertise_port: Option<u16>,
    pub git_version: String,
}

/// Resource, object and field manager.
type Manager = (String, Key, String);

/// The shared parts of a running server.
#[derive(Debug)]
pub struct State {
    pub settings: Settings,
    pub store: Store,
    pub faults: Faults,
    registry: RwLock<Registry>,
    allocator: Mutex<Allocator>,
    /// The last configuration each field manager applied, for server-side apply.
    applied: Mutex<HashMap<Manager, Value>>,
}

impl State {
    pub fn new(settings: Settings) -> Self {
        Self {
            store: Store::new(settings.history_limit),
            faults: Faults::default(),
            registry: RwLock::new(Registry::built_in()),
            allocator: Mutex::new(Allocator::new(&settings.service_cidrs, settings.node_ports.clone())),
            applied: Mutex::default(),
            settings,
        }
    }

    /// A resource by path parts.
    pub fn resource(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Resource>> {
        self.read(|registry| registry.get(group, version, plural))
    }

    /// Reads the registry.
    pub fn read<T>(&self, read: impl FnOnce(&Registry) -> T) -> T {
        read(&self.registry.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the registry.
    pub fn register(&self, change: impl FnOnce(&mut Registry)) {
        change(&mut self.registry.write().unwrap_or_else(PoisonError::into_inner));
    }

    pub fn allocator(&self) -> MutexGuard<'_, Allocator> {
        self.allocator.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn applied(&self) -> MutexGuard<'_, HashMap<Manager, Value>> {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
