//! The smallest cluster that still shows a mismatch.

use k8s_openapi::api::networking::v1::{NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::judge::Cluster;

type Edit = Box<dyn Fn(&mut Cluster)>;

/// Takes away from a cluster whatever can go while `fails` stays true: policies, pods, namespaces,
/// nodes, then rules, peers, ports, exceptions, requirements and labels. Gives back the cluster as it
/// came when it does not fail at all.
pub fn shrink(mut cluster: Cluster, mut fails: impl FnMut(&Cluster) -> bool) -> Cluster {
    if !fails(&cluster) {
        return cluster;
    }
    loop {
        let before = cluster.clone();
        drop_chunks(&mut cluster, &mut fails, |it| &mut it.policies);
        drop_chunks(&mut cluster, &mut fails, |it| &mut it.pods);
        drop_chunks(&mut cluster, &mut fails, |it| &mut it.nodes);
        drop_chunks(&mut cluster, &mut fails, |it| &mut it.namespaces);
        for edit in edits(&cluster) {
            let mut smaller = cluster.clone();
            edit(&mut smaller);
            if smaller != cluster && fails(&smaller) {
                cluster = smaller;
            }
        }
        if cluster == before {
            return cluster;
        }
    }
}

/// Removes runs of a list, halves first, single members last.
fn drop_chunks<T>(
    cluster: &mut Cluster,
    fails: &mut impl FnMut(&Cluster) -> bool,
    list: impl Fn(&mut Cluster) -> &mut Vec<T>,
) {
    let mut size = list(cluster).len().div_ceil(2);
    while size > 0 {
        let mut at = 0;
        while at < list(cluster).len() {
            let mut smaller = cluster.clone();
            let members = list(&mut smaller);
            let end = (at + size).min(members.len());
            members.drain(at..end);
            if fails(&smaller) { *cluster = smaller } else { at += size }
        }
        size /= 2;
    }
}

/// Edits that each take one thing away, members of a list from the last to the first: what an edit
/// names is still there when the later ones of its list are gone, and if not, the edit does nothing.
fn edits(cluster: &Cluster) -> Vec<Edit> {
    let mut edits: Vec<Edit> = Vec::new();
    for (p, policy) in cluster.policies.iter().enumerate().rev() {
        let Some(spec) = &policy.spec else { continue };
        edits.push(Box::new(move |it| {
            let spec = it.policies.get_mut(p).and_then(|policy| policy.spec.as_mut());
            if let Some(spec) = spec {
                spec.policy_types = None;
            }
        }));
        selector_edits(&mut edits, spec.pod_selector.as_ref(), move |it| {
            it.policies.get_mut(p)?.spec.as_mut()?.pod_selector.as_mut()
        });
        for (r, rule) in spec.ingress.as_deref().unwrap_or_default().iter().enumerate().rev() {
            edits.push(Box::new(move |it| {
                let spec = it.policies.get_mut(p).and_then(|policy| policy.spec.as_mut());
                remove(spec.and_then(|spec| spec.ingress.as_mut()), r);
            }));
            peer_edits(&mut edits, rule.from.as_deref(), move |it| {
                it.policies.get_mut(p)?.spec.as_mut()?.ingress.as_mut()?.get_mut(r)?.from.as_mut()
            });
            port_edits(&mut edits, rule.ports.as_deref(), move |it| {
                it.policies.get_mut(p)?.spec.as_mut()?.ingress.as_mut()?.get_mut(r)?.ports.as_mut()
            });
        }
        for (r, rule) in spec.egress.as_deref().unwrap_or_default().iter().enumerate().rev() {
            edits.push(Box::new(move |it| {
                let spec = it.policies.get_mut(p).and_then(|policy| policy.spec.as_mut());
                remove(spec.and_then(|spec| spec.egress.as_mut()), r);
            }));
            peer_edits(&mut edits, rule.to.as_deref(), move |it| {
                it.policies.get_mut(p)?.spec.as_mut()?.egress.as_mut()?.get_mut(r)?.to.as_mut()
            });
            port_edits(&mut edits, rule.ports.as_deref(), move |it| {
                it.policies.get_mut(p)?.spec.as_mut()?.egress.as_mut()?.get_mut(r)?.ports.as_mut()
            });
        }
    }
    for (p, pod) in cluster.pods.iter().enumerate().rev() {
        for key in pod.metadata.labels.iter().flatten().map(|(key, _)| key.clone()) {
            edits.push(Box::new(move |it| {
                let labels = it.pods.get_mut(p).and_then(|pod| pod.metadata.labels.as_mut());
                labels.map(|labels| labels.remove(&key));
            }));
        }
        edits.push(Box::new(move |it| {
            let spec = it.pods.get_mut(p).and_then(|pod| pod.spec.as_mut());
            if let Some(spec) = spec {
                spec.init_containers = None;
            }
        }));
        let containers = pod.spec.as_ref().map_or(&[][..], |spec| &spec.containers);
        for (c, container) in containers.iter().enumerate().rev() {
            for port in (0..container.ports.iter().flatten().count()).rev() {
                edits.push(Box::new(move |it| {
                    let spec = it.pods.get_mut(p).and_then(|pod| pod.spec.as_mut());
                    let container = spec.and_then(|spec| spec.containers.get_mut(c));
                    remove(container.and_then(|container| container.ports.as_mut()), port);
                }));
            }
            edits.push(Box::new(move |it| {
                let spec = it.pods.get_mut(p).and_then(|pod| pod.spec.as_mut());
                // A pod has one container at least.
                if let Some(containers) = spec.map(|spec| &mut spec.containers)
                    && containers.len() > 1
                    && c < containers.len()
                {
                    containers.remove(c);
                }
            }));
        }
        for ip in (0..pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten()).count()).rev() {
            edits.push(Box::new(move |it| {
                let status = it.pods.get_mut(p).and_then(|pod| pod.status.as_mut());
                if let Some(status) = status {
                    remove(status.pod_ips.as_mut(), ip);
                    let first = status.pod_ips.iter().flatten().next();
                    status.pod_ip = first.map(|ip| ip.ip.clone());
                }
            }));
        }
    }
    for (n, namespace) in cluster.namespaces.iter().enumerate().rev() {
        for key in namespace.metadata.labels.iter().flatten().map(|(key, _)| key.clone()) {
            // The API server would not let it go.
            if key == "kubernetes.io/metadata.name" {
                continue;
            }
            edits.push(Box::new(move |it| {
                let labels = it.namespaces.get_mut(n).and_then(|one| one.metadata.labels.as_mut());
                labels.map(|labels| labels.remove(&key));
            }));
        }
    }
    edits
}

fn remove<T>(list: Option<&mut Vec<T>>, at: usize) {
    if let Some(list) = list
        && at < list.len()
    {
        list.remove(at);
    }
}

fn peer_edits(
    edits: &mut Vec<Edit>,
    peers: Option<&[NetworkPolicyPeer]>,
    find: impl Fn(&mut Cluster) -> Option<&mut Vec<NetworkPolicyPeer>> + Copy + 'static,
) {
    for (at, peer) in peers.unwrap_or_default().iter().enumerate().rev() {
        edits.push(Box::new(move |it| remove(find(it), at)));
        if peer.pod_selector.is_some() && peer.namespace_selector.is_some() {
            for pods in [true, false] {
                edits.push(Box::new(move |it| {
                    // One of the two must stay.
                    if let Some(peer) = find(it).and_then(|peers| peers.get_mut(at))
                        && peer.pod_selector.is_some()
                        && peer.namespace_selector.is_some()
                    {
                        if pods { peer.pod_selector = None } else { peer.namespace_selector = None }
                    }
                }));
            }
        }
        selector_edits(edits, peer.pod_selector.as_ref(), move |it| {
            find(it)?.get_mut(at)?.pod_selector.as_mut()
        });
        selector_edits(edits, peer.namespace_selector.as_ref(), move |it| {
            find(it)?.get_mut(at)?.namespace_selector.as_mut()
        });
        for except in (0..peer.ip_block.iter().flat_map(|block| block.except.iter().flatten()).count()).rev()
        {
            edits.push(Box::new(move |it| {
                let block = find(it).and_then(|peers| peers.get_mut(at)?.ip_block.as_mut());
                remove(block.and_then(|block| block.except.as_mut()), except);
            }));
        }
    }
}

fn port_edits(
    edits: &mut Vec<Edit>,
    ports: Option<&[NetworkPolicyPort]>,
    find: impl Fn(&mut Cluster) -> Option<&mut Vec<NetworkPolicyPort>> + Copy + 'static,
) {
    for at in (0..ports.unwrap_or_default().len()).rev() {
        edits.push(Box::new(move |it| remove(find(it), at)));
        edits.push(Box::new(move |it| {
            if let Some(port) = find(it).and_then(|ports| ports.get_mut(at)) {
                port.end_port = None;
            }
        }));
    }
}

fn selector_edits(
    edits: &mut Vec<Edit>,
    selector: Option<&LabelSelector>,
    find: impl Fn(&mut Cluster) -> Option<&mut LabelSelector> + Copy + 'static,
) {
    let Some(selector) = selector else { return };
    for at in (0..selector.match_expressions.iter().flatten().count()).rev() {
        edits.push(Box::new(move |it| remove(find(it).and_then(|it| it.match_expressions.as_mut()), at)));
    }
    for key in selector.match_labels.iter().flatten().map(|(key, _)| key.clone()) {
        edits.push(Box::new(move |it| {
            let labels = find(it).and_then(|it| it.match_labels.as_mut());
            labels.map(|labels| labels.remove(&key));
        }));
    }
}
