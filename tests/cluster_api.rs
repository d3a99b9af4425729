//! The watches against the test API server with its controllers, as a daemon meets it.

use std::time::{Duration, Instant};

use ferroute::cluster::secret::Knowledge;
use ferroute::cluster::{Access, Cluster, Interests, Kind, ObjectKey, Source, State, run};
use ferroute::report::Reporter;
use ferroute_apiserver::{ApiServer, NodeSpec};

fn until(what: &str, cluster: &Cluster, condition: impl Fn(&State) -> bool) {
    let started = Instant::now();
    while !condition(&cluster.read()) {
        assert!(
            started.elapsed() < Duration::from_secs(15),
            "not seen in 15 s: {what}: {:?}",
            cluster.watch_health().report()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_deployment_and_its_service_arrive_and_a_bad_one_is_reported() -> Result<(), Box<dyn std::error::Error>> {
    let server = ApiServer::builder()
        .service_cidrs(["10.96.0.0/16".parse()?])
        .node(NodeSpec::new("n1", ["192.0.2.1".parse()?]))
        .start()?;
    server.apply(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: default}\nspec:\n  replicas: 3\n  \
         selector: {matchLabels: {app: web}}\n  template:\n    metadata: {labels: {app: web}}\n    spec: {containers: \
         [{name: c, image: x, ports: [{name: http, containerPort: 8080}]}]}\n---\napiVersion: v1\nkind: Service\n\
         metadata:\n  name: web\n  namespace: default\n  annotations: {kube-router.io/service.scheduler: no such one}\n\
         spec:\n  selector: {app: web}\n  ports: [{port: 80, targetPort: http}]\n",
    )?;
    let runtime = tokio::runtime::Runtime::new()?;
    let cluster = Cluster::new();
    let reporter = Reporter::new("n1");
    let access = Access { master: Some(server.url()), ..Access::default() };
    let mut interests = Interests::service_proxy();
    interests.kinds.extend([Kind::Pod, Kind::Namespace, Kind::NetworkPolicy]);
    runtime.spawn(run(Source::Api(access), cluster.clone(), interests.clone(), reporter.clone()));
    let key = ObjectKey::new("default", "web");
    until("everything", &cluster, |state| {
        let kinds: Vec<Kind> = interests.kinds.iter().copied().collect();
        let ready = state.slices.get(&key).map_or(0, |slices| {
            slices.values().flat_map(|slice| &slice.endpoints).filter(|endpoint| endpoint.ready).count()
        });
        state.has_listed(&kinds) && state.services.contains_key(&key) && ready == 3 && state.pods.len() == 3
    });
    assert!(cluster.read().namespaces.contains_key("default"));
    assert_eq!(cluster.read().nodes.len(), 1);
    let current = reporter.current();
    assert!(current.iter().any(|problem| problem.reason == "UnknownScheduler"), "{current:?}");
    let started = Instant::now();
    let event = loop {
        let events = server.list("events", "default");
        if let Some(event) = events.iter().find(|event| event["reason"] == "UnknownScheduler") {
            break event.clone();
        }
        assert!(started.elapsed() < Duration::from_secs(10), "no event was posted: {events:?}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(event["involvedObject"]["name"], "web");
    assert_eq!(event["source"]["component"], "ferroute");
    Ok(())
}

/// Secrets are asked for one by one, and only while somebody wants them.
#[test]
fn single_secrets_are_followed_while_they_are_wanted() -> Result<(), Box<dyn std::error::Error>> {
    let server = ApiServer::builder().service_cidrs(["10.96.0.0/16".parse()?]).start()?;
    let put = |name: &str, value: &str| {
        server.apply(&format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: default}}\ndata: {{password: {value}}}\n"
        ))
    };
    put("other", "c2VjcmV0")?;
    let runtime = tokio::runtime::Runtime::new()?;
    let cluster = Cluster::new();
    let access = Access { master: Some(server.url()), ..Access::default() };
    let interests = Interests::routes();
    runtime.spawn(run(Source::Api(access), cluster.clone(), interests, Reporter::new("n1")));
    let key = ObjectKey::new("default", "tor");
    let value = |state: &State| match state.secrets.get(&key) {
        Some(Knowledge::Present(secret)) => secret.value("password").map(<[u8]>::to_vec),
        other => Err(format!("{other:?}")),
    };
    until("the namespace", &cluster, |state| &*state.secrets.namespace == "default");
    assert_eq!(cluster.read().secrets.get(&key), None);
    cluster.want_secrets([key.clone()].into());
    until("that it is missing", &cluster, |state| state.secrets.get(&key) == Some(Knowledge::Missing));
    put("tor", "c2VjcmV0")?;
    until("its value", &cluster, |state| value(state) == Ok(b"secret".to_vec()));
    put("tor", "b3RoZXI=")?;
    until("its new value", &cluster, |state| value(state) == Ok(b"other".to_vec()));
    server.delete("secrets", "default", "tor")?;
    until("that it is gone", &cluster, |state| state.secrets.get(&key) == Some(Knowledge::Missing));
    assert_eq!(cluster.read().secrets.known.len(), 1, "nobody asked for the other one");
    cluster.want_secrets([].into());
    until("that it is forgotten", &cluster, |state| state.secrets.known.is_empty());
    Ok(())
}

/// Service account tokens are replaced in their file before they end; the server takes the new one only.
#[test]
fn a_rotated_token_is_picked_up() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::temp_dir().join(format!("ferroute-token-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let (theirs, ours, kubeconfig) =
        (folder.join("server"), folder.join("client"), folder.join("kubeconfig"));
    std::fs::write(&theirs, "first")?;
    std::fs::write(&ours, "first")?;
    let server = ApiServer::builder().service_cidrs(["10.96.0.0/16".parse()?]).token_file(&theirs).start()?;
    std::fs::write(
        &kubeconfig,
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: \"{}\"}}}}]\nusers: [{{name: u, user: {{tokenFile: {}}}}}]\n",
            server.url(),
            ours.display()
        ),
    )?;
    let runtime = tokio::runtime::Runtime::new()?;
    let cluster = Cluster::new();
    let access = Access { kubeconfig: Some(kubeconfig), ..Access::default() };
    let interests = Interests::service_proxy();
    runtime.spawn(run(Source::Api(access), cluster.clone(), interests, Reporter::new("n1")));
    until("the first list", &cluster, |state| state.has_listed(&[Kind::Service, Kind::EndpointSlice]));

    std::fs::write(&theirs, "second")?;
    std::fs::write(&ours, "second")?;
    server.faults().drop_watches(true);
    server.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: late, namespace: default}\nspec:\n  ports: [{port: 80}]\n",
    )?;
    // The client reads the file again when what it has is a minute old.
    let started = Instant::now();
    let key = ObjectKey::new("default", "late");
    while !cluster.read().services.contains_key(&key) {
        assert!(started.elapsed() < Duration::from_secs(120), "{:?}", cluster.watch_health().report());
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("seen {} s after the rotation", started.elapsed().as_secs());
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}
