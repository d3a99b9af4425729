//! The resources this server knows, built in and registered.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

/// One resource in one served version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// API group, empty for the core group.
    pub group: String,
    /// Served version, such as `v1`.
    pub version: String,
    /// Plural name, as in paths.
    pub plural: String,
    /// Kind of its objects.
    pub kind: String,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// Short names kubectl accepts.
    pub short_names: Vec<String>,
    /// Categories, such as `all`.
    pub categories: Vec<String>,
    /// Whether `/status` is written apart from the rest.
    pub status: bool,
    /// Whether `/scale` is served.
    pub scale: bool,
    /// Comes from a CustomResourceDefinition: lists are replaced whole by patches.
    pub custom: bool,
    /// Where its objects are kept: `plural.group`, or that of another group for aliases.
    pub storage: String,
}

impl Resource {
    /// A resource without subresources, aliases or short names.
    pub fn new(group: &str, version: &str, plural: &str, kind: &str, namespaced: bool) -> Self {
        Self {
            group: group.into(),
            version: version.into(),
            plural: plural.into(),
            kind: kind.into(),
            namespaced,
            short_names: Vec::new(),
            categories: Vec::new(),
            status: false,
            scale: false,
            custom: false,
            storage: qualify(plural, group),
        }
    }

    /// Serves `/status` apart from the main resource.
    #[must_use]
    pub fn with_status(mut self) -> Self {
        self.status = true;
        self
    }

    /// `group/version`, or the version alone in the core group.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// `plural.group`, as error texts name it.
    pub fn qualified(&self) -> String {
        qualify(&self.plural, &self.group)
    }

    /// The singular name: the kind in lower case.
    pub fn singular(&self) -> String {
        self.kind.to_lowercase()
    }
}

fn qualify(plural: &str, group: &str) -> String {
    if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") }
}

/// All served resources, by group, version and plural name.
#[derive(Debug)]
pub struct Registry {
    resources: BTreeMap<(String, String, String), Arc<Resource>>,
}

/// group/version, plural, kind, and letters: n namespaced, s status, c scale, a in category "all".
const BUILT_IN: &[(&str, &str, &str, &str, &str)] = &[
    ("v1", "namespaces", "Namespace", "s", "ns"),
    ("v1", "nodes", "Node", "s", "no"),
    ("v1", "pods", "Pod", "nsa", "po"),
    ("v1", "services", "Service", "nsa", "svc"),
    ("v1", "endpoints", "Endpoints", "n", "ep"),
    ("v1", "configmaps", "ConfigMap", "n", "cm"),
    ("v1", "secrets", "Secret", "n", ""),
    ("v1", "serviceaccounts", "ServiceAccount", "n", "sa"),
    ("v1", "events", "Event", "n", "ev"),
    ("v1", "persistentvolumes", "PersistentVolume", "s", "pv"),
    ("v1", "persistentvolumeclaims", "PersistentVolumeClaim", "ns", "pvc"),
    ("v1", "replicationcontrollers", "ReplicationController", "nsca", "rc"),
    ("v1", "resourcequotas", "ResourceQuota", "ns", "quota"),
    ("v1", "limitranges", "LimitRange", "n", "limits"),
    ("v1", "podtemplates", "PodTemplate", "n", ""),
    ("apps/v1", "deployments", "Deployment", "nsca", "deploy"),
    ("apps/v1", "replicasets", "ReplicaSet", "nsca", "rs"),
    ("apps/v1", "statefulsets", "StatefulSet", "nsca", "sts"),
    ("apps/v1", "daemonsets", "DaemonSet", "nsa", "ds"),
    ("apps/v1", "controllerrevisions", "ControllerRevision", "n", ""),
    ("batch/v1", "jobs", "Job", "nsa", ""),
    ("batch/v1", "cronjobs", "CronJob", "nsa", "cj"),
    ("autoscaling/v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", "nsa", "hpa"),
    ("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget", "ns", "pdb"),
    ("discovery.k8s.io/v1", "endpointslices", "EndpointSlice", "n", ""),
    ("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy", "n", "netpol"),
    ("networking.k8s.io/v1", "ingresses", "Ingress", "ns", "ing"),
    ("networking.k8s.io/v1", "ingressclasses", "IngressClass", "", ""),
    ("networking.k8s.io/v1", "servicecidrs", "ServiceCIDR", "s", ""),
    ("networking.k8s.io/v1", "ipaddresses", "IPAddress", "", "ip"),
    ("coordination.k8s.io/v1", "leases", "Lease", "n", ""),
    ("events.k8s.io/v1", "events", "Event", "n", "ev"),
    ("rbac.authorization.k8s.io/v1", "roles", "Role", "n", ""),
    ("rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding", "n", ""),
    ("rbac.authorization.k8s.io/v1", "clusterroles", "ClusterRole", "", ""),
    ("rbac.authorization.k8s.io/v1", "clusterrolebindings", "ClusterRoleBinding", "", ""),
    ("storage.k8s.io/v1", "storageclasses", "StorageClass", "", "sc"),
    ("storage.k8s.io/v1", "csidrivers", "CSIDriver", "", ""),
    ("storage.k8s.io/v1", "csinodes", "CSINode", "", ""),
    ("storage.k8s.io/v1", "volumeattachments", "VolumeAttachment", "s", ""),
    ("scheduling.k8s.io/v1", "priorityclasses", "PriorityClass", "", "pc"),
    ("node.k8s.io/v1", "runtimeclasses", "RuntimeClass", "", ""),
    ("apiregistration.k8s.io/v1", "apiservices", "APIService", "s", ""),
    ("apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition", "s", "crd"),
    (
        "admissionregistration.k8s.io/v1",
        "validatingwebhookconfigurations",
        "ValidatingWebhookConfiguration",
        "",
        "",
    ),
    (
        "admissionregistration.k8s.io/v1",
        "mutatingwebhookconfigurations",
        "MutatingWebhookConfiguration",
        "",
        "",
    ),
];

impl Registry {
    /// The built-in resources.
    pub fn built_in() -> Self {
        let mut registry = Self { resources: BTreeMap::new() };
        for (group_version, plural, kind, letters, short) in BUILT_IN {
            let (group, version) = group_version.rsplit_once('/').unwrap_or(("", group_version));
            let mut resource = Resource::new(group, version, plural, kind, letters.contains('n'));
            resource.status = letters.contains('s');
            resource.scale = letters.contains('c');
            if letters.contains('a') {
                resource.categories.push("all".into());
            }
            if !short.is_empty() {
                resource.short_names.push((*short).into());
            }
            if *group_version == "events.k8s.io/v1" {
                resource.storage = "events".into();
            }
            registry.insert(resource);
        }
        registry
    }

    /// Serves a resource, replacing one of the same group, version and plural name.
    pub fn insert(&mut self, resource: Resource) {
        let key = (resource.group.clone(), resource.version.clone(), resource.plural.clone());
        self.resources.insert(key, Arc::new(resource));
    }

    /// Serves what a CustomResourceDefinition (apiextensions.k8s.io/v1) declares.
    pub fn insert_definition(&mut self, definition: &Value) {
        let spec = &definition["spec"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let words = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
        };
        for version in spec["versions"].as_array().into_iter().flatten() {
            if version["served"] == Value::Bool(false) {
                continue;
            }
            let names = &spec["names"];
            let mut resource = Resource::new(
                &text(&spec["group"]),
                &text(&version["name"]),
                &text(&names["plural"]),
                &text(&names["kind"]),
                spec["scope"] == "Namespaced",
            );
            resource.short_names = words(&names["shortNames"]);
            resource.categories = words(&names["categories"]);
            resource.status = version["subresources"]["status"].is_object();
            resource.scale = version["subresources"]["scale"].is_object();
            resource.custom = true;
            self.insert(resource);
        }
    }

    /// Stops serving what a deleted CustomResourceDefinition declared.
    pub fn remove_definition(&mut self, definition: &Value) {
        let group = &definition["spec"]["group"];
        let plural = &definition["spec"]["names"]["plural"];
        self.resources
            .retain(|_, r| !(r.custom && *group == r.group.as_str() && *plural == r.plural.as_str()));
    }

    /// Looks up by path parts.
    pub fn get(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Resource>> {
        self.resources.get(&(group.to_owned(), version.to_owned(), plural.to_owned())).cloned()
    }

    /// Looks up by an object's `apiVersion` and `kind`.
    pub fn of_kind(&self, api_version: &str, kind: &str) -> Option<Arc<Resource>> {
        self.resources.values().find(|r| r.kind == kind && r.api_version() == api_version).cloned()
    }

    /// Looks up by `plural` or `plural.group`, any version.
    pub fn named(&self, name: &str) -> Option<Arc<Resource>> {
        self.resources.values().find(|r| r.qualified() == name).cloned()
    }

    /// All resources, ordered by group, version, plural.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources.values()
    }
}
