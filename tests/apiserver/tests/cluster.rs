//! The controllers: workloads to pods, Services to addresses and slices.

// A test fails by panicking, in helpers too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use ferroute_apiserver::{ApiServer, Kubelet};
use serde_json::{Value, json};
use support::{SOON, dual_stack};

const SLICES: &str = "endpointslices.discovery.k8s.io";

fn deployment(name: &str, replicas: usize, image: &str) -> Value {
    json!({"kind": "Deployment", "apiVersion": "apps/v1", "metadata": {"name": name},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": [
                {"name": "c", "image": image, "ports": [{"name": "web", "containerPort": 8080}]}]}}}})
}

fn service(name: &str, spec: Value) -> Value {
    let mut service = json!({"kind": "Service", "apiVersion": "v1", "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": "web"}]}});
    if let (Some(target), Value::Object(more)) = (service["spec"].as_object_mut(), spec) {
        target.extend(more);
    }
    service
}

fn slices(server: &ApiServer, service: &str) -> Vec<Value> {
    let mut all = server.list(SLICES, "default");
    all.retain(|s| s["metadata"]["labels"]["kubernetes.io/service-name"] == service);
    all
}

fn endpoints(server: &ApiServer, service: &str) -> Vec<Value> {
    let lists = slices(server, service).into_iter();
    lists.flat_map(|s| s["endpoints"].as_array().cloned().unwrap_or_default()).collect()
}

fn ready(server: &ApiServer, service: &str) -> usize {
    endpoints(server, service).iter().filter(|e| e["conditions"]["ready"] == true).count()
}

#[test]
fn a_dual_stack_application_comes_alive() {
    let server = dual_stack().start().unwrap();
    server.apply_object(deployment("web", 6, "i:1")).unwrap();
    server.apply_object(service("web", json!({"ipFamilyPolicy": "PreferDualStack"}))).unwrap();
    server.wait_rolled_out(SOON).unwrap();
    server.wait_for("12 endpoints", SOON, |s| ready(s, "web") == 12).unwrap();
    let both = slices(&server, "web");
    assert_eq!(both.len(), 2);
    for slice in &both {
        assert_eq!(slice["ports"], json!([{"name": "", "port": 8080, "protocol": "TCP"}]));
        let nodes: BTreeSet<&str> =
            slice["endpoints"].as_array().unwrap().iter().map(|e| e["nodeName"].as_str().unwrap()).collect();
        assert_eq!(nodes.len(), 3, "pods spread over the nodes");
        assert!(slice["endpoints"][0]["zone"].is_string());
        let prefix = if slice["addressType"] == "IPv4" { "10.244." } else { "fd00:244:" };
        assert!(slice["endpoints"][0]["addresses"][0].as_str().unwrap().starts_with(prefix));
    }
    // A named target port that differs per pod makes another slice.
    let mut pod = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "odd", "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "c", "image": "i", "ports": [{"name": "web", "containerPort": 9090}]}]}});
    server.apply_object(pod.take()).unwrap();
    server
        .wait_for("two more slices", SOON, |s| slices(s, "web").len() == 4 && ready(s, "web") == 14)
        .unwrap();
    server.delete("services", "default", "web").unwrap();
    server.wait_for("no slices", SOON, |s| slices(s, "web").is_empty()).unwrap();
    server.delete("deployments.apps", "default", "web").unwrap();
    server.wait_for("only the odd pod", SOON, |s| s.list("pods", "default").len() == 1).unwrap();
}

#[test]
fn a_rolling_update_always_serves() {
    let server = dual_stack().start().unwrap();
    server.apply_object(deployment("web", 4, "i:1")).unwrap();
    server.apply_object(service("web", json!({}))).unwrap();
    server.wait_for("4 ready", SOON, |s| ready(s, "web") == 4).unwrap();
    server.apply_object(deployment("web", 4, "i:2")).unwrap();
    let (mut least, mut most, mut terminating) = (usize::MAX, 0, false);
    server
        .wait_for("the new image everywhere", SOON, |s| {
            let now = endpoints(s, "web");
            let count = now.iter().filter(|e| e["conditions"]["ready"] == true).count();
            (least, most) = (least.min(count), most.max(count));
            terminating |= now
                .iter()
                .any(|e| e["conditions"] == json!({"ready": false, "serving": true, "terminating": true}));
            let pods = s.list("pods", "default");
            pods.len() == 4 && pods.iter().all(|p| p["spec"]["containers"][0]["image"] == "i:2") && count == 4
        })
        .unwrap();
    server.wait_rolled_out(SOON).unwrap();
    assert!(least >= 3, "maxUnavailable 25 % of 4 is 1, but only {least} were ready");
    assert!(most <= 5, "maxSurge 25 % of 4 is 1, but {most} were ready");
    assert!(terminating, "no endpoint was seen terminating yet serving");
    let sets = server.list("replicasets.apps", "default");
    let mut sizes: Vec<i64> = sets.iter().map(|s| s["spec"]["replicas"].as_i64().unwrap()).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [0, 4]);
}

#[test]
fn sets_scale_and_keep_their_names() {
    let server = dual_stack().start().unwrap();
    let mut set = deployment("db", 3, "i:1");
    set["kind"] = "StatefulSet".into();
    set["spec"]["serviceName"] = "db".into();
    server.apply_object(set).unwrap();
    server.apply_object(service("db", json!({"clusterIP": "None"}))).unwrap();
    let mut agent = deployment("agent", 1, "i:1");
    agent["kind"] = "DaemonSet".into();
    agent["spec"]["template"]["spec"]["hostNetwork"] = true.into();
    server.apply_object(agent.clone()).unwrap();
    server.wait_rolled_out(SOON).unwrap();
    server.wait_for("3 endpoints", SOON, |s| ready(s, "db") == 3).unwrap();
    let names: BTreeSet<String> =
        endpoints(&server, "db").iter().map(|e| e["hostname"].to_string()).collect();
    assert_eq!(names, BTreeSet::from(["\"db-0\"", "\"db-1\"", "\"db-2\""].map(str::to_owned)));
    assert_eq!(slices(&server, "db")[0]["metadata"]["labels"]["service.kubernetes.io/headless"], "");
    server.patch("statefulsets.apps", "default", "db", json!({"spec": {"replicas": 1}})).unwrap();
    server.wait_for("db-0 alone", SOON, |s| endpoints(s, "db").len() == 1).unwrap();
    assert_eq!(endpoints(&server, "db")[0]["hostname"], "db-0");
    let hosts = |s: &ApiServer| -> BTreeSet<String> {
        let pods =
            s.list("pods", "default").into_iter().filter(|p| p["metadata"]["labels"]["app"] == "agent");
        pods.filter_map(|p| p["status"]["podIP"].as_str().map(str::to_owned)).collect()
    };
    assert_eq!(hosts(&server), BTreeSet::from(["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(str::to_owned)));
    server.add_node(&ferroute_apiserver::NodeSpec::new("late", ["192.0.2.9".parse().unwrap()])).unwrap();
    server.wait_for("a pod on the late node", SOON, |s| hosts(s).contains("192.0.2.9")).unwrap();
    agent["spec"]["template"]["spec"]["containers"][0]["image"] = "i:2".into();
    server.apply_object(agent).unwrap();
    server.wait_rolled_out(SOON).unwrap();
    assert!(
        server
            .list("pods", "default")
            .iter()
            .filter(|p| p["metadata"]["labels"]["app"] == "agent")
            .all(|p| p["spec"]["containers"][0]["image"] == "i:2")
    );
}

#[test]
fn an_external_kubelet_leads_pods_through_their_life() {
    let server = dual_stack().kubelet(Kubelet::External).start().unwrap();
    server.apply_object(deployment("web", 1, "i:1")).unwrap();
    server.apply_object(service("web", json!({}))).unwrap();
    let scheduled = |s: &ApiServer| {
        let pods = s.list("pods", "default");
        pods.first().is_some_and(|p| p["spec"]["nodeName"].is_string())
    };
    server.wait_for("a scheduled pod", SOON, scheduled).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let pod = server.list("pods", "default").remove(0);
    assert_eq!(pod["status"]["phase"], "Pending");
    let name = pod["metadata"]["name"].as_str().unwrap();
    let status = |ready: &str| {
        json!({"status": {"phase": "Running", "podIP": "10.0.0.7", "podIPs": [{"ip": "10.0.0.7"}],
            "conditions": [{"type": "Ready", "status": ready}]}})
    };
    server.patch_status("pods", "default", name, status("False")).unwrap();
    server.wait_for("an endpoint that is not ready", SOON, |s| endpoints(s, "web").len() == 1).unwrap();
    assert_eq!(ready(&server, "web"), 0);
    server.patch_status("pods", "default", name, status("True")).unwrap();
    server.wait_for("a ready endpoint", SOON, |s| ready(s, "web") == 1).unwrap();
    server.delete("pods", "default", name).unwrap();
    let first = |s: &ApiServer| endpoints(s, "web").first().map(|e| e["conditions"].clone());
    let ending = json!({"ready": false, "serving": true, "terminating": true});
    server.wait_for("a terminating endpoint", SOON, |s| first(s) == Some(ending.clone())).unwrap();
    server.delete_now("pods", "default", name).unwrap();
    server.wait_for("no endpoint", SOON, |s| endpoints(s, "web").is_empty()).unwrap();
    assert_eq!(slices(&server, "web").len(), 1, "a placeholder slice stays");
}

#[test]
fn services_get_addresses_ports_and_refusals() {
    let server = dual_stack().load_balancers(["203.0.113.0/29".parse().unwrap()]).start().unwrap();
    let create = |name: &str, spec: Value| server.create("services", "default", service(name, spec));
    let dual = create(
        "dual",
        json!({"type": "LoadBalancer", "ipFamilyPolicy": "RequireDualStack",
        "externalTrafficPolicy": "Local", "sessionAffinity": "ClientIP"}),
    )
    .unwrap();
    let spec = &dual["spec"];
    assert_eq!(spec["ipFamilies"], json!(["IPv4", "IPv6"]));
    assert_eq!(spec["clusterIPs"].as_array().unwrap().len(), 2);
    assert_eq!(spec["clusterIP"], spec["clusterIPs"][0]);
    assert_eq!(spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"], 10_800);
    assert_eq!(spec["internalTrafficPolicy"], "Cluster");
    let (node_port, health) = (&spec["ports"][0]["nodePort"], &spec["healthCheckNodePort"]);
    assert!(
        node_port.as_u64().unwrap() >= 30_000 && health.as_u64().unwrap() >= 30_000 && node_port != health
    );
    let ingress = |s: &ApiServer| {
        s.get("services", "default", "dual").unwrap()["status"]["loadBalancer"]["ingress"][0]["ip"].clone()
    };
    server.wait_for("a load-balancer address", SOON, |s| ingress(s) == "203.0.113.1").unwrap();
    let v6 = create("six", json!({"ipFamilies": ["IPv6"]})).unwrap();
    assert!(v6["spec"]["clusterIP"].as_str().unwrap().starts_with("fd00:96::"));
    assert_eq!(v6["spec"]["ports"][0]["protocol"], "TCP");
    let refused = |name: &str, spec: Value, field: &str| {
        let refusal = create(name, spec).expect_err(name);
        assert_eq!(refusal.code, 422, "{refusal}");
        let details = refusal.details.clone().unwrap();
        let fields: Vec<_> =
            details["causes"].as_array().unwrap().iter().map(|c| c["field"].clone()).collect();
        assert!(fields.contains(&json!(field)), "{name}: {refusal}");
    };
    refused("taken", json!({"clusterIP": spec["clusterIP"]}), "spec.clusterIPs[0]");
    refused("outside", json!({"clusterIP": "10.0.0.1"}), "spec.clusterIPs[0]");
    refused("no-address", json!({"clusterIP": "10.96.300.1"}), "spec.clusterIPs[0]");
    refused(
        "port-taken",
        json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": node_port}]}),
        "spec.ports[0].nodePort",
    );
    refused(
        "port-outside",
        json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": 80}]}),
        "spec.ports[0].nodePort",
    );
    refused(
        "twice",
        json!({"ports": [{"name": "a", "port": 80}, {"name": "b", "port": 80}]}),
        "spec.ports[1]",
    );
    refused("nameless", json!({"ports": [{"port": 80}, {"port": 81}]}), "spec.ports[0].name");
    refused("protocol", json!({"ports": [{"port": 80, "protocol": "ICMP"}]}), "spec.ports[0].protocol");
    refused("external", json!({"externalIPs": ["127.0.0.1"]}), "spec.externalIPs[0]");
    refused(&"n".repeat(10_000), json!({}), "metadata.name");
    // The same number for two protocols is two ports.
    create(
        "dns",
        json!({"ports": [{"name": "t", "port": 53}, {"name": "u", "port": 53, "protocol": "UDP"}]}),
    )
    .unwrap();
    let single = ApiServer::builder().start().unwrap();
    let refusal =
        single.create("services", "default", service("d", json!({"ipFamilyPolicy": "RequireDualStack"})));
    assert_eq!(refusal.unwrap_err().code, 422);
    // Updates keep what was assigned, and a change of type gives it back.
    let kept =
        server.patch("services", "default", "dual", json!({"spec": {"clusterIP": null, "clusterIPs": null}}));
    assert_eq!(kept.unwrap()["spec"]["clusterIP"], spec["clusterIP"]);
    let plain = server.patch("services", "default", "dual", json!({"spec": {"type": "ClusterIP"}})).unwrap();
    assert!(
        plain["spec"]["ports"][0]["nodePort"].is_null() && plain["spec"]["healthCheckNodePort"].is_null()
    );
    server.wait_for("no load-balancer address", SOON, |s| ingress(s).is_null()).unwrap();
    create("reuse", json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": node_port}]})).unwrap();
}

#[test]
fn traffic_distribution_becomes_hints() {
    let server = dual_stack().start().unwrap();
    server.apply_object(deployment("web", 3, "i:1")).unwrap();
    server.apply_object(service("web", json!({"trafficDistribution": "PreferClose"}))).unwrap();
    server.wait_for("3 ready", SOON, |s| ready(s, "web") == 3).unwrap();
    for endpoint in endpoints(&server, "web") {
        assert_eq!(endpoint["hints"], json!({"forZones": [{"name": endpoint["zone"]}]}));
    }
    server
        .patch("services", "default", "web", json!({"spec": {"trafficDistribution": "PreferSameNode"}}))
        .unwrap();
    let by_node = |s: &ApiServer| {
        endpoints(s, "web").iter().all(|e| e["hints"]["forNodes"] == json!([{"name": e["nodeName"]}]))
    };
    server.wait_for("hints by node", SOON, by_node).unwrap();
}

#[test]
fn many_endpoints_fill_several_slices() {
    let server = dual_stack().start().unwrap();
    server.apply_object(deployment("web", 230, "i:1")).unwrap();
    server.apply_object(service("web", json!({}))).unwrap();
    server.wait_for("230 ready", Duration::from_secs(60), |s| ready(s, "web") == 230).unwrap();
    let sizes: Vec<usize> =
        slices(&server, "web").iter().map(|s| s["endpoints"].as_array().unwrap().len()).collect();
    assert!(sizes.len() >= 3 && sizes.iter().all(|n| *n <= 100), "{sizes:?}");
}

#[test]
fn a_namespace_takes_its_objects_along() {
    let server = dual_stack().start().unwrap();
    let refusal = server.create("configmaps", "none", json!({"metadata": {"name": "m"}})).unwrap_err();
    assert_eq!((refusal.code, refusal.message.as_str()), (404, "namespaces \"none\" not found"));
    server.create("namespaces", "", json!({"metadata": {"name": "x"}})).unwrap();
    let mut web = deployment("web", 2, "i");
    web["metadata"]["namespace"] = "x".into();
    server.apply_object(web).unwrap();
    server.wait_rolled_out(SOON).unwrap();
    server.delete("namespaces", "", "x").unwrap();
    server.wait_for("the namespace is gone", SOON, |s| s.get("namespaces", "", "x").is_none()).unwrap();
    assert!(server.list("pods", "x").is_empty() && server.list("replicasets.apps", "x").is_empty());
}

#[test]
fn the_servers_own_service_always_comes_back() {
    let server = dual_stack().start().unwrap();
    let own = server.get("services", "default", "kubernetes").unwrap();
    assert_eq!(own["spec"]["clusterIP"], "10.96.0.1");
    let slice = server.get(SLICES, "default", "kubernetes").unwrap();
    assert_eq!(
        (&slice["endpoints"][0]["addresses"][0], &slice["ports"][0]["port"]),
        (&json!("127.0.0.1"), &json!(server.port()))
    );
    server.delete("services", "default", "kubernetes").unwrap();
    server.wait_for("it is back", SOON, |s| s.get("services", "default", "kubernetes").is_some()).unwrap();
}

/// Every field of an object in turn replaced by a value of another type.
fn deformed(object: &Value) -> Vec<Value> {
    let strange = [json!("text"), json!(7), json!([1]), json!({"a": 1}), json!(null), json!(true)];
    let mut found = Vec::new();
    let children: Vec<(String, Value)> = match object {
        Value::Object(map) => {
            map.iter().map(|(k, v)| (format!("/{}", k.replace('/', "~1")), v.clone())).collect()
        }
        Value::Array(list) => list.iter().enumerate().map(|(n, v)| (format!("/{n}"), v.clone())).collect(),
        _ => return found,
    };
    for (path, child) in children {
        for value in strange.iter().cloned().chain(deformed(&child)) {
            let mut copy = object.clone();
            *copy.pointer_mut(&path).unwrap() = value;
            found.push(copy);
        }
    }
    found
}

#[test]
fn malformed_objects_stop_nothing() {
    let server = dual_stack().load_balancers(["203.0.113.0/24".parse().unwrap()]).start().unwrap();
    let lb = service(
        "web",
        json!({"type": "LoadBalancer", "clusterIPs": ["10.96.9.9"], "clusterIP": "10.96.9.9"}),
    );
    let mut set = deployment("db", 1, "i");
    set["kind"] = "StatefulSet".into();
    let node = ferroute_apiserver::NodeSpec::new("odd", ["192.0.2.77".parse().unwrap()]).object();
    let pod = json!({"metadata": {"name": "p", "labels": {"app": "web"}, "ownerReferences": [{"uid": "u"}]},
        "spec": {"containers": [{"name": "c"}]}, "status": {"podIPs": [{"ip": "10.0.0.1"}]}});
    let kinds = [
        ("services", "default", lb),
        ("deployments.apps", "default", deployment("web", 1, "i")),
        ("statefulsets.apps", "default", set),
        ("nodes", "", node),
        ("pods", "default", pod),
    ];
    let mut sent = 0;
    for (resource, namespace, object) in &kinds {
        for strange in deformed(object) {
            // Refused or taken: both are fine, and so is what follows.
            let name = strange["metadata"]["name"].as_str().unwrap_or("web").to_owned();
            let _ = server.create(resource, namespace, strange.clone());
            let _ = server.patch(resource, namespace, &name, strange.clone());
            let _ = server.patch_status(resource, namespace, &name, strange);
            if sent % 3 == 0 {
                let _ = server.delete_now(resource, namespace, &name);
            }
            sent += 1;
        }
    }
    server.inflict(ferroute_apiserver::Fault::Compact { resource: None }).unwrap();
    println!("{sent} malformed objects");
    server.create("namespaces", "", json!({"metadata": {"name": "calm"}})).unwrap();
    let mut last = deployment("last", 2, "i");
    last["metadata"]["namespace"] = "calm".into();
    server.apply_object(last).unwrap();
    server
        .wait_for("the controllers still work", SOON, |s| {
            s.list("pods", "calm").iter().filter(|p| p["status"]["phase"] == "Running").count() == 2
        })
        .unwrap();
}
