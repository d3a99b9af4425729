//! Real kubectl, against this server.

// A test fails by panicking, in helpers too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use ferroute_apiserver::ApiServer;
use serde_json::Value;
use support::{SOON, dual_stack};

/// A home of its own: kubectl caches what a server at an address serves.
struct Kubectl {
    home: PathBuf,
}

impl Kubectl {
    fn new(server: &ApiServer, name: &str) -> Self {
        let home = std::env::temp_dir().join(format!("ferroute-kubectl-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&home).unwrap();
        server.kubeconfig(home.join("config")).unwrap();
        Self { home }
    }

    fn output(&self, arguments: &str) -> (bool, String) {
        let output = Command::new("kubectl")
            .args(arguments.split_whitespace())
            .env("HOME", &self.home)
            .env("KUBECONFIG", self.home.join("config"))
            .current_dir(&self.home)
            .stdin(Stdio::null())
            .output()
            .expect("kubectl is missing: install it, on Debian with `apt-get install kubernetes-client`");
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    fn run(&self, arguments: &str) -> String {
        let (ok, text) = self.output(arguments);
        assert!(ok, "kubectl {arguments}:\n{text}");
        text
    }

    fn apply(&self, manifest: &str) -> String {
        std::fs::write(self.home.join("manifest.yaml"), manifest).unwrap();
        self.run("apply -f manifest.yaml")
    }
}

impl Drop for Kubectl {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.home);
    }
}

const SHOP: &str = r#"
apiVersion: v1
kind: ServiceAccount
metadata: {name: shop}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: shop
  labels: {app: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      serviceAccountName: shop
      containers:
      - name: server
        image: "shop:1"
        ports: [{name: http, containerPort: 8080}]
        env: [{name: PORT, value: "8080"}]
        readinessProbe: {httpGet: {path: /, port: http}}
---
# a comment between documents
apiVersion: v1
kind: Service
metadata: {name: shop}
spec:
  type: NodePort
  selector: {app: shop}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: shop}
spec: {podSelector: {matchLabels: {app: shop}}, ingress: [{ports: [{port: 8080, protocol: TCP}]}]}
"#;

#[test]
fn kubectl_applies_reads_changes_and_deletes() {
    let server = dual_stack().start().unwrap();
    let kubectl = Kubectl::new(&server, "shop");
    let made = kubectl.apply(SHOP);
    assert_eq!(made.lines().filter(|l| l.ends_with(" created")).count(), 4, "{made}");
    let again = kubectl.apply(SHOP);
    assert_eq!(again.lines().filter(|l| l.ends_with(" unchanged")).count(), 4, "{again}");
    kubectl.run("rollout status deployment/shop --timeout=20s");
    let wide = kubectl.run("get pods -o wide");
    assert_eq!(wide.lines().filter(|l| l.contains("1/1") && l.contains("Running")).count(), 2, "{wide}");
    assert!(wide.contains("10.244."), "{wide}");
    let services = kubectl.run("get services -o wide");
    assert!(services.contains("NodePort") && services.contains("80:30000/TCP"), "{services}");
    let nodes = kubectl.run("get nodes -o wide");
    assert_eq!(nodes.lines().filter(|l| l.contains(" Ready ")).count(), 3, "{nodes}");
    let yaml = kubectl.run("get service shop -o yaml");
    assert!(
        yaml.contains("clusterIP: 10.96.1.0") && yaml.contains("internalTrafficPolicy: Cluster"),
        "{yaml}"
    );
    // A changed manifest: a port more, an env less, another image.
    let changed = SHOP
        .replace(
            "ports: [{name: http, port: 80, targetPort: http}]",
            "ports: [{name: http, port: 80, targetPort: http}, {name: alt, port: 81, targetPort: http}]",
        )
        .replace("env: [{name: PORT, value: \"8080\"}]", "env: []")
        .replace("shop:1", "shop:2");
    let configured = kubectl.apply(&changed);
    assert!(configured.contains("service/shop configured"), "{configured}");
    kubectl.run("rollout status deployment/shop --timeout=20s");
    let service = server.get("services", "default", "shop").unwrap();
    assert_eq!(service["spec"]["ports"][0]["nodePort"], 30_000, "the node port stays");
    assert_eq!(service["spec"]["ports"].as_array().unwrap().len(), 2);
    let shop = server.get("deployments.apps", "default", "shop").unwrap();
    let container = &shop["spec"]["template"]["spec"]["containers"][0];
    assert!(
        container["image"] == "shop:2" && container["env"].as_array().is_none_or(Vec::is_empty),
        "{container}"
    );
    let back = kubectl.apply(SHOP);
    assert!(back.contains("service/shop configured"), "{back}");
    assert_eq!(
        server.get("services", "default", "shop").unwrap()["spec"]["ports"].as_array().unwrap().len(),
        1
    );
    kubectl.run("rollout status deployment/shop --timeout=20s");

    kubectl.run("annotate service shop example.com/note=hello");
    kubectl.run("label service shop tier=front");
    assert!(kubectl.run("get service -l tier=front -o name").contains("service/shop"));
    kubectl.run("scale deployment shop --replicas=3");
    kubectl.run("rollout status deployment/shop --timeout=20s");
    kubectl.run("patch service shop -p {\"spec\":{\"sessionAffinity\":\"ClientIP\"}}");
    kubectl.run("patch service shop --type=json -p [{\"op\":\"add\",\"path\":\"/metadata/labels/j\",\"value\":\"1\"}]");
    for words in ["service shop", "deployment shop", "pods -l app=shop", "node node-1", "networkpolicy shop"]
    {
        let text = kubectl.run(&format!("describe {words}"));
        assert!(text.contains("Name:"), "{text}");
    }
    let described = kubectl.run("describe service shop");
    assert!(
        described.contains(":8080") && described.contains("10800") || described.contains("ClientIP"),
        "{described}"
    );
    let slices = kubectl.run("get endpointslices -o json");
    let slices: Value = serde_json::from_str(&slices).expect("JSON");
    assert!(
        slices["items"]
            .as_array()
            .unwrap()
            .iter()
            .any(|s| s["endpoints"].as_array().is_some_and(|e| e.len() == 3))
    );
    kubectl.run("apply --server-side --force-conflicts -f manifest.yaml");
    kubectl.run("delete pods -l app=shop");
    kubectl.run("delete -f manifest.yaml");
    server.wait_for("no pods", SOON, |s| s.list("pods", "default").is_empty()).unwrap();
    let (found, text) = kubectl.output("get service shop");
    assert!(!found && text.contains("NotFound"), "{text}");
}

#[test]
fn kubectl_shows_refusals_and_knows_custom_resources() {
    let server = dual_stack().start().unwrap();
    let kubectl = Kubectl::new(&server, "refusals");
    std::fs::write(
        kubectl.home.join("bad.yaml"),
        "---\n{apiVersion: v1, kind: Service, metadata: {name: bad}, spec: {ports: [{port: 80}, {port: 70000}]}}",
    )
    .unwrap();
    let (ok, text) = kubectl.output("apply -f bad.yaml");
    assert!(!ok && text.contains("must be between 1 and 65535"), "{text}");
    kubectl.apply(
        "---\n{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: pools.example.com},
          spec: {group: example.com, scope: Namespaced, names: {plural: pools, kind: Pool, shortNames: [pl]},
          versions: [{name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object}}}]}}",
    );
    kubectl.run("wait --for=condition=Established crd/pools.example.com --timeout=20s");
    kubectl.apply(
        "---\n{apiVersion: example.com/v1, kind: Pool, metadata: {name: p}, spec: {addresses: [192.0.2.0/24]}}",
    );
    let again = kubectl
        .apply("---\n{apiVersion: example.com/v1, kind: Pool, metadata: {name: p}, spec: {addresses: []}}");
    assert!(again.contains("configured"), "{again}");
    assert!(kubectl.run("get pl").contains("p "));
    kubectl.run("create configmap settings --from-literal=a=b --dry-run=client -o yaml");
    assert!(kubectl.run("version").contains("v1.33"));
}
