//! What pods of this node are given: the bridge, its MTU, the network configuration.

use std::io;

use super::Room;
use crate::cluster::ObjectKey;
use crate::cluster::service::Problem;
use crate::cni::install;
use crate::network::cni_file;
use crate::network::egress::BRIDGE;
use crate::network::error::Error;

impl Room {
    /// The bridge is normally the bridge plugin's work; made early it has its MTU before the first pod.
    pub(super) fn settle_bridge(&mut self) -> Result<(), Error> {
        let wanted = self.machine.pod_mtu(&self.settings, &self.addresses).filter(|_| self.settings.auto_mtu);
        if self.machine.link(BRIDGE).is_none() {
            self.kernel.network().create_link(BRIDGE, "bridge")?;
            self.read_machine()?;
        }
        let Some(bridge) = self.machine.link(BRIDGE) else { return Ok(()) };
        if bridge.kind.as_deref() != Some("bridge") {
            return Err(Error::Kernel(format!("link {BRIDGE} is no bridge; remove it, pods need the name")));
        }
        let (index, now, is_up) = (bridge.index, bridge.mtu, bridge.is_up());
        // What it has counts, should the kernel refuse another.
        self.mtu = self.settings.auto_mtu.then_some(now);
        if !is_up {
            self.kernel.network().set_link_up(index)?;
        }
        if let Some(mtu) = wanted.filter(|mtu| *mtu != now) {
            self.kernel.network().set_mtu(index, mtu)?;
            tracing::info!(mtu, was = now, "MTU of pods");
            self.mtu = Some(mtu);
        }
        Ok(())
    }

    /// Keeps the network configuration, and tells on the Node what stands against it. That does not make
    /// the rest of the pod network incomplete: another program may configure pods.
    pub(super) fn settle_pods(&mut self) {
        let Some(node) = self.cluster.own.clone() else { return };
        let (name, pods) = (&node.name, self.cluster.own_pods());
        self.problems.clear();
        if pods.is_empty() {
            self.problems.push(Problem {
                reason: "PodCidrMissing",
                message: format!(
                    "Node {name} has no pod CIDR: no pods are routed to it. Let the controller manager give one \
                     (--allocate-node-cidrs), annotate the Node (kube-router.io/pod-cidrs), or use --run-router=false \
                     where another program makes the pod network"
                ),
            });
        } else if let Some(path) = &self.settings.cni_file {
            match cni_file::keep(path, &pods, self.mtu) {
                Ok(false) => {}
                Ok(true) => {
                    tracing::info!(file = %path.display(), ?pods, mtu = ?self.mtu, "network configuration written");
                }
                Err(error) => {
                    self.problems
                        .push(Problem { reason: "CniFileUnusable", message: unusable(name, &error) });
                }
            }
        }
        let key = ObjectKey::new("", name.clone());
        self.reporter.replace("Node", &key, &node.uid, &self.problems);
    }
}

fn unusable(node: &str, error: &install::Error) -> String {
    match error {
        install::Error::Io { path, source, .. } if source.kind() == io::ErrorKind::NotFound => format!(
            "there is no {} on Node {node}, so runtimes are not told its pod CIDRs and MTU: put the network \
             configuration there, name another file (environment KUBE_ROUTER_CNI_CONF_FILE), or use \
             --enable-cni=false where another program configures pods",
            path.display()
        ),
        error => {
            format!("pod CIDRs and MTU of Node {node} cannot be kept in the network configuration: {error}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_told_with_its_cure() {
        let missing = cni_file::keep(std::path::Path::new("/nowhere/10-x.conf"), &[], None).unwrap_err();
        let text = unusable("n1", &missing);
        for part in ["/nowhere/10-x.conf on Node n1", "KUBE_ROUTER_CNI_CONF_FILE", "--enable-cni=false"] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
        let text = unusable("n1", &install::Error::Busy { path: "/x".into() });
        assert!(text.starts_with("pod CIDRs and MTU of Node n1 cannot be kept"), "{text}");
    }
}
