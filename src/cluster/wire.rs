//! API objects as they travel: only the fields that are used, decoded from any JSON.
//!
//! A wrong type in one object must not end the watch of its kind or fail the page it came in, so
//! every type here decodes from whatever it meets: what does not fit is skipped and its path noted
//! in [`Item::wrong`]. Fields that are not named are skipped unparsed, which is what keeps a list of
//! 100,000 endpoints cheap. Nothing here judges values; that is `decode`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use kube::core::{DynamicResourceScope, ObjectMeta};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::Kind;

/// Paths of fields that had a type they cannot have, and where the decoder is now.
#[derive(Default)]
pub struct Wrong {
    path: Vec<Step>,
    found: Vec<String>,
}

enum Step {
    Field(&'static str),
    Index(usize),
}

/// More wrong fields than this in one object say nothing new.
const MAX_WRONG: usize = 8;

impl Wrong {
    fn note(&mut self, expected: &str) {
        if self.found.len() >= MAX_WRONG {
            return;
        }
        let mut text = String::new();
        for step in &self.path {
            match step {
                Step::Field(name) => {
                    if !text.is_empty() {
                        text.push('.');
                    }
                    text.push_str(name);
                }
                Step::Index(index) => text.push_str(&format!("[{index}]")),
            }
        }
        if text.is_empty() {
            text.push_str("the object");
        }
        text.push_str(" is not ");
        text.push_str(expected);
        self.found.push(text);
    }
}

/// A type that takes whatever JSON value it is given. `null` leaves the default, as in the API.
pub trait Shape: Default {
    /// What the value should be, for the message: "a number".
    const EXPECTED: &'static str;

    /// Takes a string; false if it does not fit.
    fn text(&mut self, _: &str) -> bool {
        false
    }

    /// Takes a whole number; false if it does not fit.
    fn number(&mut self, _: i64) -> bool {
        false
    }

    /// Takes a boolean; false if it does not fit.
    fn boolean(&mut self, _: bool) -> bool {
        false
    }

    /// Takes an array, reading it to its end whether it fits or not.
    fn list<'de, A: SeqAccess<'de>>(&mut self, mut items: A, wrong: &mut Wrong) -> Result<(), A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        wrong.note(Self::EXPECTED);
        Ok(())
    }

    /// Takes an object, reading it to its end whether it fits or not.
    fn map<'de, A: MapAccess<'de>>(&mut self, mut entries: A, wrong: &mut Wrong) -> Result<(), A::Error> {
        while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        wrong.note(Self::EXPECTED);
        Ok(())
    }
}

/// A place to decode one value into.
struct Slot<'a, T> {
    target: &'a mut T,
    wrong: &'a mut Wrong,
}

impl<'de, T: Shape> DeserializeSeed<'de> for Slot<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Shape> Visitor<'de> for Slot<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        if !self.target.boolean(value) {
            self.wrong.note(T::EXPECTED);
        }
        Ok(())
    }

    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        if !self.target.number(value) {
            self.wrong.note(T::EXPECTED);
        }
        Ok(())
    }

    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        if !i64::try_from(value).is_ok_and(|value| self.target.number(value)) {
            self.wrong.note(T::EXPECTED);
        }
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        self.wrong.note(T::EXPECTED);
        Ok(())
    }

    fn visit_str<E>(self, value: &str) -> Result<(), E> {
        if !self.target.text(value) {
            self.wrong.note(T::EXPECTED);
        }
        Ok(())
    }

    fn visit_bytes<E>(self, _: &[u8]) -> Result<(), E> {
        self.wrong.note(T::EXPECTED);
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<(), A::Error> {
        self.target.list(items, self.wrong)
    }

    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<(), A::Error> {
        self.target.map(entries, self.wrong)
    }
}

impl Shape for String {
    const EXPECTED: &'static str = "a string";

    fn text(&mut self, value: &str) -> bool {
        value.clone_into(self);
        true
    }
}

impl Shape for Option<i64> {
    const EXPECTED: &'static str = "a whole number";

    fn number(&mut self, value: i64) -> bool {
        *self = Some(value);
        true
    }
}

impl Shape for Option<bool> {
    const EXPECTED: &'static str = "a boolean";

    fn boolean(&mut self, value: bool) -> bool {
        *self = Some(value);
        true
    }
}

impl<T: Shape> Shape for Vec<T> {
    const EXPECTED: &'static str = "a list";

    fn list<'de, A: SeqAccess<'de>>(&mut self, mut items: A, wrong: &mut Wrong) -> Result<(), A::Error> {
        self.clear();
        loop {
            let mut item = T::default();
            wrong.path.push(Step::Index(self.len()));
            let more = items.next_element_seed(Slot { target: &mut item, wrong })?;
            wrong.path.pop();
            if more.is_none() {
                return Ok(());
            }
            self.push(item);
        }
    }
}

/// An object that is there, possibly empty; in the API an empty selector and none differ.
impl<T: Shape> Shape for Option<Box<T>> {
    const EXPECTED: &'static str = T::EXPECTED;

    fn list<'de, A: SeqAccess<'de>>(&mut self, items: A, wrong: &mut Wrong) -> Result<(), A::Error> {
        let mut value = T::default();
        value.list(items, wrong)?;
        *self = Some(Box::new(value));
        Ok(())
    }

    fn map<'de, A: MapAccess<'de>>(&mut self, entries: A, wrong: &mut Wrong) -> Result<(), A::Error> {
        let mut value = T::default();
        value.map(entries, wrong)?;
        *self = Some(Box::new(value));
        Ok(())
    }
}

/// Labels and annotations.
impl Shape for BTreeMap<Box<str>, Box<str>> {
    const EXPECTED: &'static str = "a map of strings";

    fn map<'de, A: MapAccess<'de>>(&mut self, mut entries: A, wrong: &mut Wrong) -> Result<(), A::Error> {
        self.clear();
        while let Some(name) = entries.next_key::<Cow<'de, str>>()? {
            let mut value = String::new();
            entries.next_value_seed(Slot { target: &mut value, wrong })?;
            self.insert(name.into(), value.into_boxed_str());
        }
        Ok(())
    }
}

/// On the object that stands for a static pod: the uid under which kubelet and runtime know that pod.
pub const MIRROR: &str = "kubernetes.io/config.mirror";
/// When the change that an EndpointSlice tells of happened, as its controller saw it (RFC 3339).
pub const LAST_CHANGE: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// The annotations that are ours to read; others can be large and are dropped on arrival.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OurAnnotations(pub BTreeMap<Box<str>, Box<str>>);

impl Shape for OurAnnotations {
    const EXPECTED: &'static str = "a map of strings";

    fn map<'de, A: MapAccess<'de>>(&mut self, mut entries: A, wrong: &mut Wrong) -> Result<(), A::Error> {
        self.0.clear();
        while let Some(name) = entries.next_key::<Cow<'de, str>>()? {
            if name.starts_with("kube-router.io/") || name == MIRROR || name == LAST_CHANGE {
                let mut value = String::new();
                entries.next_value_seed(Slot { target: &mut value, wrong })?;
                self.0.insert(name.into(), value.into_boxed_str());
            } else {
                entries.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

/// Values that nobody may see.
#[derive(Clone, Default)]
pub struct Hidden(pub BTreeMap<Box<str>, Box<str>>);

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Shape for Hidden {
    const EXPECTED: &'static str = <BTreeMap<Box<str>, Box<str>> as Shape>::EXPECTED;

    fn map<'de, A: MapAccess<'de>>(&mut self, entries: A, wrong: &mut Wrong) -> Result<(), A::Error> {
        self.0.map(entries, wrong)
    }
}

/// A number or a name (`IntOrString`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NumberOrName {
    /// Neither was given.
    #[default]
    Absent,
    /// A number.
    Number(i64),
    /// A name.
    Name(String),
}

impl Shape for NumberOrName {
    const EXPECTED: &'static str = "a number or a string";

    fn number(&mut self, value: i64) -> bool {
        *self = Self::Number(value);
        true
    }

    fn text(&mut self, value: &str) -> bool {
        *self = Self::Name(value.to_owned());
        true
    }
}

macro_rules! shape {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty = $json:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default)]
        #[allow(missing_docs)] // the fields are the API's own, under the API's names
        pub struct $name { $(pub $field: $type,)* }

        impl Shape for $name {
            const EXPECTED: &'static str = "an object";

            fn map<'de, A: MapAccess<'de>>(&mut self, mut entries: A, wrong: &mut Wrong) -> Result<(), A::Error> {
                while let Some(name) = entries.next_key::<Cow<'de, str>>()? {
                    match &*name {
                        $($json => {
                            wrong.path.push(Step::Field($json));
                            entries.next_value_seed(Slot { target: &mut self.$field, wrong })?;
                            wrong.path.pop();
                        })*
                        _ => {
                            entries.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(())
            }
        }
    };
}

shape! {
    /// `metadata`.
    Meta {
        name: String = "name",
        namespace: String = "namespace",
        uid: String = "uid",
        resource_version: String = "resourceVersion",
        generate_name: String = "generateName",
        creation_timestamp: String = "creationTimestamp",
        deletion_timestamp: String = "deletionTimestamp",
        labels: BTreeMap<Box<str>, Box<str>> = "labels",
        annotations: OurAnnotations = "annotations",
        owner_references: Vec<OwnerReference> = "ownerReferences",
    }
}
shape! {
    /// One of `metadata.ownerReferences`.
    OwnerReference { kind: String = "kind", name: String = "name", }
}
shape! {
    /// core/v1 Service.
    ServiceObject {
        metadata: Meta = "metadata",
        spec: ServiceSpec = "spec",
        status: ServiceStatus = "status",
    }
}
shape! {
    /// `spec` of a Service.
    ServiceSpec {
        kind: String = "type",
        cluster_ip: String = "clusterIP",
        cluster_ips: Vec<String> = "clusterIPs",
        external_ips: Vec<String> = "externalIPs",
        ports: Vec<ServicePortSpec> = "ports",
        selector: BTreeMap<Box<str>, Box<str>> = "selector",
        session_affinity: String = "sessionAffinity",
        session_affinity_config: SessionAffinityConfig = "sessionAffinityConfig",
        external_traffic_policy: String = "externalTrafficPolicy",
        internal_traffic_policy: String = "internalTrafficPolicy",
        health_check_node_port: Option<i64> = "healthCheckNodePort",
        load_balancer_source_ranges: Vec<String> = "loadBalancerSourceRanges",
        publish_not_ready_addresses: Option<bool> = "publishNotReadyAddresses",
    }
}
shape! {
    /// One of `spec.ports` of a Service.
    ServicePortSpec {
        name: String = "name",
        protocol: String = "protocol",
        port: Option<i64> = "port",
        target_port: NumberOrName = "targetPort",
        node_port: Option<i64> = "nodePort",
    }
}
shape! {
    /// `spec.sessionAffinityConfig`.
    SessionAffinityConfig { client_ip: ClientIpConfig = "clientIP", }
}
shape! {
    /// `spec.sessionAffinityConfig.clientIP`.
    ClientIpConfig { timeout_seconds: Option<i64> = "timeoutSeconds", }
}
shape! {
    /// `status` of a Service.
    ServiceStatus { load_balancer: LoadBalancerStatus = "loadBalancer", }
}
shape! {
    /// `status.loadBalancer`.
    LoadBalancerStatus { ingress: Vec<Ingress> = "ingress", }
}
shape! {
    /// One of `status.loadBalancer.ingress`.
    Ingress { ip: String = "ip", ip_mode: String = "ipMode", }
}
shape! {
    /// discovery.k8s.io/v1 EndpointSlice.
    SliceObject {
        metadata: Meta = "metadata",
        address_type: String = "addressType",
        ports: Vec<SlicePortSpec> = "ports",
        endpoints: Vec<EndpointSpec> = "endpoints",
    }
}
shape! {
    /// One of `ports` of an EndpointSlice.
    SlicePortSpec {
        name: String = "name",
        protocol: String = "protocol",
        port: Option<i64> = "port",
    }
}
shape! {
    /// One of `endpoints` of an EndpointSlice.
    EndpointSpec {
        addresses: Vec<String> = "addresses",
        conditions: Conditions = "conditions",
        node_name: String = "nodeName",
        hints: HintsSpec = "hints",
    }
}
shape! {
    /// `endpoints[].conditions`.
    Conditions {
        ready: Option<bool> = "ready",
        serving: Option<bool> = "serving",
        terminating: Option<bool> = "terminating",
    }
}
shape! {
    /// `endpoints[].hints`.
    HintsSpec { for_zones: Vec<Named> = "forZones", for_nodes: Vec<Named> = "forNodes", }
}
shape! {
    /// Something with only a name.
    Named { name: String = "name", }
}
shape! {
    /// core/v1 Node.
    NodeObject {
        metadata: Meta = "metadata",
        spec: NodeSpec = "spec",
        status: NodeStatus = "status",
    }
}
shape! {
    /// `spec` of a Node.
    NodeSpec {
        pod_cidr: String = "podCIDR",
        pod_cidrs: Vec<String> = "podCIDRs",
        provider_id: String = "providerID",
        taints: Vec<Taint> = "taints",
    }
}
shape! {
    /// One of `spec.taints` of a Node.
    Taint { key: String = "key", }
}
shape! {
    /// `status` of a Node.
    NodeStatus { addresses: Vec<NodeAddress> = "addresses", }
}
shape! {
    /// One of `status.addresses` of a Node.
    NodeAddress { kind: String = "type", address: String = "address", }
}
shape! {
    /// networking.k8s.io ServiceCIDR.
    ServiceCidrObject {
        metadata: Meta = "metadata",
        spec: ServiceCidrSpec = "spec",
        status: ServiceCidrStatus = "status",
    }
}
shape! {
    /// `spec` of a ServiceCIDR.
    ServiceCidrSpec { cidrs: Vec<String> = "cidrs", }
}
shape! {
    /// `status` of a ServiceCIDR.
    ServiceCidrStatus { conditions: Vec<Condition> = "conditions", }
}
shape! {
    /// One of `status.conditions`.
    Condition { kind: String = "type", status: String = "status", }
}
shape! {
    /// core/v1 Pod.
    PodObject {
        metadata: Meta = "metadata",
        spec: PodSpec = "spec",
        status: PodStatus = "status",
    }
}
shape! {
    /// `spec` of a Pod.
    PodSpec {
        node_name: String = "nodeName",
        host_network: Option<bool> = "hostNetwork",
        containers: Vec<Container> = "containers",
        init_containers: Vec<Container> = "initContainers",
    }
}
shape! {
    /// One container.
    Container { ports: Vec<ContainerPortSpec> = "ports", restart_policy: String = "restartPolicy", }
}
shape! {
    /// One of `ports` of a container.
    ContainerPortSpec {
        name: String = "name",
        protocol: String = "protocol",
        container_port: Option<i64> = "containerPort",
    }
}
shape! {
    /// `status` of a Pod.
    PodStatus {
        phase: String = "phase",
        pod_ip: String = "podIP",
        pod_ips: Vec<PodIp> = "podIPs",
        host_ip: String = "hostIP",
        host_ips: Vec<PodIp> = "hostIPs",
        conditions: Vec<Condition> = "conditions",
    }
}
shape! {
    /// One of `status.podIPs` or `status.hostIPs`.
    PodIp { ip: String = "ip", }
}
shape! {
    /// core/v1 Namespace.
    NamespaceObject { metadata: Meta = "metadata", }
}
shape! {
    /// networking.k8s.io/v1 NetworkPolicy.
    NetworkPolicyObject { metadata: Meta = "metadata", spec: NetworkPolicySpec = "spec", }
}
shape! {
    /// `spec` of a NetworkPolicy.
    NetworkPolicySpec {
        pod_selector: LabelSelector = "podSelector",
        policy_types: Vec<String> = "policyTypes",
        ingress: Vec<RuleSpec> = "ingress",
        egress: Vec<RuleSpec> = "egress",
    }
}
shape! {
    /// One ingress or egress rule; only one of `from` and `to` is used.
    RuleSpec {
        from: Vec<PeerSpec> = "from",
        to: Vec<PeerSpec> = "to",
        ports: Vec<PolicyPortSpec> = "ports",
    }
}
shape! {
    /// One of `from` or `to`.
    PeerSpec {
        pod_selector: Option<Box<LabelSelector>> = "podSelector",
        namespace_selector: Option<Box<LabelSelector>> = "namespaceSelector",
        ip_block: Option<Box<IpBlockSpec>> = "ipBlock",
    }
}
shape! {
    /// `ipBlock`.
    IpBlockSpec { cidr: String = "cidr", except: Vec<String> = "except", }
}
shape! {
    /// One of `ports` of a rule.
    PolicyPortSpec {
        protocol: String = "protocol",
        port: NumberOrName = "port",
        end_port: Option<i64> = "endPort",
    }
}
shape! {
    /// A label selector.
    LabelSelector {
        match_labels: BTreeMap<Box<str>, Box<str>> = "matchLabels",
        match_expressions: Vec<SelectorRequirement> = "matchExpressions",
    }
}
shape! {
    /// One of `matchExpressions`.
    SelectorRequirement {
        key: String = "key",
        operator: String = "operator",
        values: Vec<String> = "values",
    }
}

shape! {
    /// core/v1 Secret.
    SecretObject {
        metadata: Meta = "metadata",
        data: Hidden = "data",
        string_data: Hidden = "stringData",
    }
}

/// A kind as the API server names it.
pub trait ApiKind: Shape + Clone + fmt::Debug + Send + Sync + 'static {
    /// Which kind this is.
    const KIND: Kind;
    /// API group; empty for core.
    const GROUP: &'static str;
    /// Versions to try, the best first.
    const VERSIONS: &'static [&'static str];
    /// The name in paths.
    const PLURAL: &'static str;
    /// `metadata`.
    fn metadata(&self) -> &Meta;
    /// `metadata`, to fill in what a manifest leaves out.
    fn metadata_mut(&mut self) -> &mut Meta;
}

macro_rules! api_kind {
    ($type:ident, $kind:ident, $group:literal, $versions:expr, $plural:literal) => {
        impl ApiKind for $type {
            const KIND: Kind = Kind::$kind;
            const GROUP: &'static str = $group;
            const VERSIONS: &'static [&'static str] = $versions;
            const PLURAL: &'static str = $plural;
            fn metadata(&self) -> &Meta {
                &self.metadata
            }
            fn metadata_mut(&mut self) -> &mut Meta {
                &mut self.metadata
            }
        }
    };
}

api_kind!(ServiceObject, Service, "", &["v1"], "services");
api_kind!(SliceObject, EndpointSlice, "discovery.k8s.io", &["v1"], "endpointslices");
api_kind!(NodeObject, Node, "", &["v1"], "nodes");
api_kind!(ServiceCidrObject, ServiceCidr, "networking.k8s.io", &["v1", "v1beta1"], "servicecidrs");
api_kind!(PodObject, Pod, "", &["v1"], "pods");
api_kind!(NamespaceObject, Namespace, "", &["v1"], "namespaces");
api_kind!(NetworkPolicyObject, NetworkPolicy, "networking.k8s.io", &["v1"], "networkpolicies");
api_kind!(SecretObject, Secret, "", &["v1"], "secrets");

/// One decoded object, with what did not fit.
#[derive(Clone, Debug)]
pub struct Item<T> {
    /// The fields that fitted; the others hold their defaults.
    pub object: T,
    /// What did not fit: `spec.ports[0].port is not a whole number`.
    pub wrong: Vec<String>,
    /// The part of the metadata that the watcher reads.
    meta: ObjectMeta,
}

impl<T: ApiKind> Item<T> {
    /// An object that did not travel.
    pub fn new(object: T) -> Self {
        Self::assemble(object, Vec::new())
    }

    fn assemble(object: T, wrong: Vec<String>) -> Self {
        let metadata = object.metadata();
        let given = |text: &String| (!text.is_empty()).then(|| text.clone());
        let meta = ObjectMeta {
            name: given(&metadata.name),
            namespace: given(&metadata.namespace),
            resource_version: given(&metadata.resource_version),
            ..ObjectMeta::default()
        };
        Self { object, wrong, meta }
    }
}

impl<'de, T: ApiKind> Deserialize<'de> for Item<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut object = T::default();
        let mut wrong = Wrong::default();
        Slot { target: &mut object, wrong: &mut wrong }.deserialize(deserializer)?;
        Ok(Self::assemble(object, wrong.found))
    }
}

/// The API version in use; an index into [`ApiKind::VERSIONS`] would do, the text is clearer.
#[derive(Clone, Copy, Debug)]
pub struct Version(pub &'static str);

impl<T: ApiKind> kube::Resource for Item<T> {
    type DynamicType = Version;
    type Scope = DynamicResourceScope;

    fn kind(_: &Version) -> Cow<'_, str> {
        T::KIND.name().into()
    }

    fn group(_: &Version) -> Cow<'_, str> {
        T::GROUP.into()
    }

    fn version(version: &Version) -> Cow<'_, str> {
        version.0.into()
    }

    fn plural(_: &Version) -> Cow<'_, str> {
        T::PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}
