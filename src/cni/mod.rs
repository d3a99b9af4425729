//! The CNI step: a pod starts only when its policy is in the kernel.
//!
//! ```text
//!   kubelet -> runtime -> bridge -> ferroute-cni -> portmap ...       (one process per call)
//!                                       |  one JSON line each way
//!                                       v
//!             /run/ferroute/cni.sock: server --> enforcement: the room that programs policy
//! ```
//!
//! The plugin is the `ferroute` program under the name `ferroute-cni`, or `ferroute cni`. It never
//! changes a pod's network: it hands name and addresses of the pod to the daemon, waits (bounded)
//! until the pod's policy is programmed, and passes the previous plugin's result on.
//!
//! - [`netconf`]: the network configuration on standard input, and the previous result. Pure.
//! - [`plugin`]: CNI's commands and error codes (CNI specification 0.3.0 to 1.1.0).
//! - [`protocol`], [`client`]: what plugin and daemon say to each other.
//! - [`server`]: the daemon's end of the socket; `enforce`: the policy room behind it.
//! - [`spans`], [`conflist`]: edits of a network configuration list that leave every other byte as it
//!   was. Pure.
//! - [`install`]: program and configuration on a host's file system, atomically.
//! - [`keeper`]: puts the plugin back when another program rewrites the list.
//!
//! What the step promises holds for addresses that the previous result names. An address it does not
//! know stays closed by the room itself, with or without the plugin.

pub mod client;
pub mod conflist;
mod enforce;
pub mod install;
pub mod keeper;
pub mod netconf;
pub mod plugin;
pub mod protocol;
pub mod server;
pub mod spans;

/// The file name under which runtimes find the program, and the `type` in network configurations.
pub const PLUGIN: &str = "ferroute-cni";
/// Where the daemon listens unless `--cni-socket` says otherwise.
pub const SOCKET: &str = "/run/ferroute/cni.sock";
