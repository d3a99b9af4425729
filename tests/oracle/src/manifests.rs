//! A cluster as YAML.

use serde::Serialize;

use crate::Cluster;

/// All objects as YAML documents, as `kubectl apply` and `ferroute --manifests` read them.
///
/// # Errors
/// When an object cannot be written as YAML.
pub fn manifests(cluster: &Cluster) -> anyhow::Result<String> {
    let mut documents = Vec::new();
    fn add<T: Serialize>(documents: &mut Vec<String>, objects: &[T]) -> anyhow::Result<()> {
        for object in objects {
            documents.push(serde_saphyr::to_string(object)?.trim_end().to_owned());
        }
        Ok(())
    }
    add(&mut documents, &cluster.nodes)?;
    add(&mut documents, &cluster.namespaces)?;
    add(&mut documents, &cluster.pods)?;
    add(&mut documents, &cluster.policies)?;
    let mut text = String::new();
    for (node, addresses) in &cluster.local_addresses {
        let list: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        text += &format!("# node {node} also has {}\n", list.join(", "));
    }
    text += &documents.join("\n---\n");
    text.push('\n');
    Ok(text)
}
