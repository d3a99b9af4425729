//! ferroute: one node network agent for Kubernetes.
//!
//! The rooms, in the order data flows through them:
//!
//! - [`cluster`]: what the API server (or a folder of YAML) says, as trimmed values of our own;
//!   every change names the keys it touches and wakes the rooms that read them.
//! - [`proxy`]: Services to IPVS virtual servers, sets, local routes and the proxy firewall.
//! - [`netpol`]: NetworkPolicies to iptables chains and sets.
//! - [`routes`]: BGP: peers, policies and the routes of this node, for a speaker of the `bgp` crate.
//! - [`network`]: the pod network: node addresses, learned routes, tunnels, masquerade.
//! - [`chains`], [`schedule`], [`disturbance`]: what every room that writes the kernel shares.
//! - [`host`]: this machine's kernel: links, routes, sysctls, conntrack; dump and apply only.
//! - [`config`]: the command line, as typed values.
//! - [`daemon`]: the composition of the rooms; start and stop. Around it [`supervise`] (named tasks),
//!   [`health`], [`metrics`], [`admin`] with [`http`], [`log`], [`capabilities`], [`cleanup`].
//!
//! A pass is six words, the same in every room: wake, desired, actual, diff, apply, check.
//! `desired` and `diff` are pure functions over plain data; only handles touch the kernel.

pub mod admin;
pub mod aws;
pub mod capabilities;
pub mod chains;
pub mod cleanup;
pub mod cluster;
pub mod cni;
pub mod config;
pub mod daemon;
pub mod disturbance;
pub mod duration;
pub mod health;
pub mod host;
pub mod http;
pub mod log;
pub mod metrics;
pub mod netpol;
pub mod network;
pub mod proxy;
pub mod report;
pub mod routes;
pub mod schedule;
pub mod supervise;
