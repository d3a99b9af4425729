//! A cluster of one node: its API server, and the daemon on it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use ferroute_apiserver::{ApiServer, NodeSpec};
use ferroute_kit::Netns;

use super::{RECEIVER, RECEIVER_ASN, SPEAKER_ASN};
use crate::routers::ROUTER;

/// Name of the Node.
pub const NODE: &str = "n1";
/// Pods of it: the first route.
pub const PODS: &str = "10.128.0.0/24";

/// An API server in a namespace, with the Node.
pub fn api(inside: &Netns) -> Result<ApiServer> {
    let (node, pods) = (NodeSpec::new(NODE, [ROUTER.into()]), PODS.parse()?);
    let cluster_ips = "10.96.0.0/12".parse()?;
    inside
        .run(|| {
            let builder = ApiServer::builder().service_cidrs([cluster_ips]).controllers(false);
            builder.node(node.pod_cidrs([pods])).start()
        })
        .context("an API server")
}

/// The daemon.
pub struct Daemon {
    process: Child,
    folder: PathBuf,
    /// When it was started.
    pub begun: Instant,
}

impl Daemon {
    /// Starts it with one peer, the receiver. No service proxy and no policy: it says what Services are, and
    /// programs none.
    pub fn start(program: &Path, inside: &Netns, server: &ApiServer, flags: &[&str]) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("ferroute-bench-daemon-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let mut command = Command::new(program);
        command
            .arg(format!("--master={}", server.url()))
            .arg(format!("--hostname-override={NODE}"))
            .args(["--run-service-proxy=false", "--run-firewall=false", "--run-router=true"])
            .args(["--enable-overlay=false", "--enable-pod-egress=false", "--enable-cni=false"])
            .args(["--health-port=0", "--metrics-port=0"])
            .arg(format!("--cluster-asn={SPEAKER_ASN}"))
            .arg(format!("--peer-router-ips={RECEIVER}"))
            .arg(format!("--peer-router-asns={RECEIVER_ASN}"))
            .arg(format!("--admin-socket={}", folder.join("socket").display()))
            .args(flags)
            .stdout(Stdio::null())
            .stderr(File::create(folder.join("log"))?);
        let begun = Instant::now();
        let process =
            inside.run(|| command.spawn()).with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { process, folder, begun })
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}
