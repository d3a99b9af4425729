//! The folder reader against real folders.

use super::*;
use crate::cluster::secret::Knowledge;

/// A folder that is gone when dropped.
pub(in crate::cluster) struct TempFolder(pub PathBuf);

impl TempFolder {
    pub(in crate::cluster) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ferroute-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn service(name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  clusterIP: {address}\n  selector: {{app: {name}}}\n  \
         ports: [{{port: 80, targetPort: web}}]\n"
    )
}

fn pod(name: &str, app: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {app}}}}}\nspec:\n  nodeName: n1\n  containers: \
         [{{name: c, ports: [{{name: web, containerPort: 8080}}]}}]\nstatus: {{podIPs: [{{ip: {address}}}]}}\n"
    )
}

async fn until(what: &str, cluster: &Cluster, condition: impl Fn(&super::super::State) -> bool) {
    for _ in 0..400 {
        if condition(&cluster.read()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not seen in 4 s: {what}");
}

fn names(state: &super::super::State) -> Vec<String> {
    let mut names: Vec<String> = state.services.keys().map(|key| key.to_string()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn follows_the_folder_and_keeps_what_broke() {
    let folder = TempFolder::new("folder");
    let path = |name: &str| folder.0.join(name);
    fs::write(path("a.yaml"), format!("{}---\n{}", service("one", "10.96.0.1"), service("two", "10.96.0.2")))
        .unwrap();
    fs::create_dir(path("deep")).unwrap();
    fs::write(path("deep/b.json"), r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"three","namespace":"shop"},"spec":{"clusterIP":"fd00::3","ports":[{"port":53,"protocol":"UDP"}]}}"#).unwrap();
    fs::write(path("ignored.txt"), "{{{").unwrap();
    let cluster = Cluster::new();
    let reporter = Reporter::new("n1");
    let interests = Interests::service_proxy();
    let (run, check) = (watch(folder.0.clone(), cluster.clone(), &interests, &reporter), async {
        until("first read", &cluster, |s| {
            s.has_listed(&[Kind::Service, Kind::EndpointSlice, Kind::ServiceCidr])
        })
        .await;
        assert_eq!(names(&cluster.read()), ["default/one", "default/two", "shop/three"]);
        // A document that breaks keeps what the file last gave; its neighbour goes on.
        fs::write(path("a.yaml"), format!("{}---\nkind: [\n", service("one", "10.96.0.9"))).unwrap();
        until("change beside the broken one", &cluster, |s| {
            s.services[&ObjectKey::new("default", "one")].cluster_ips
                == ["10.96.0.9".parse::<std::net::IpAddr>().unwrap()]
        })
        .await;
        assert_eq!(names(&cluster.read()), ["default/one", "default/two", "shop/three"]);
        let current = reporter.current();
        assert_eq!(current.len(), 1, "{current:?}");
        assert!(current[0].message.contains("a.yaml:9: unclosed"), "{}", current[0].message);
        // Whole again, one document less.
        fs::write(path("a.yaml"), service("one", "10.96.0.9")).unwrap();
        until("document removed", &cluster, |s| names(s) == ["default/one", "shop/three"]).await;
        assert!(reporter.current().is_empty());
        // A second owner is refused until the first gives the object up.
        fs::write(path("z.yaml"), service("one", "10.96.0.7")).unwrap();
        let duplicate = async {
            while reporter.current().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await
            }
        };
        tokio::time::timeout(Duration::from_secs(4), duplicate).await.unwrap();
        fs::remove_file(path("a.yaml")).unwrap();
        until("second file takes over", &cluster, |s| {
            s.services
                .get(&ObjectKey::new("default", "one"))
                .is_some_and(|s| s.cluster_ips == ["10.96.0.7".parse::<std::net::IpAddr>().unwrap()])
        })
        .await;
        fs::remove_dir_all(path("deep")).unwrap();
        fs::create_dir(path("new")).unwrap();
        fs::rename(path("z.yaml"), path("new/z.yml")).unwrap();
        until("removed folder", &cluster, |s| names(s) == ["default/one"]).await;
        // The folder itself goes: the last state stays.
        let aside = folder.0.with_extension("aside");
        fs::rename(&folder.0, &aside).unwrap();
        let noticed = async {
            while reporter.current().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await
            }
        };
        tokio::time::timeout(Duration::from_secs(8), noticed).await.unwrap();
        assert_eq!(names(&cluster.read()), ["default/one"]);
        fs::rename(&aside, &folder.0).unwrap();
        let resolved = async {
            while !reporter.current().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await
            }
        };
        tokio::time::timeout(Duration::from_secs(8), resolved).await.unwrap();
        assert_eq!(names(&cluster.read()), ["default/one"]);
    });
    tokio::select! {
        ended = run => panic!("reader ended: {ended:?}"),
        () = check => {}
    }
}

#[tokio::test]
async fn makes_endpoints_from_pods_only_where_there_are_no_slices() {
    let folder = TempFolder::new("pods");
    let path = |name: &str| folder.0.join(name);
    fs::write(
        path("all.yaml"),
        [
            service("web", "10.96.0.1"),
            pod("p1", "web", "10.1.0.1"),
            pod("p2", "web", "fd00:1::2"),
            pod("p3", "other", "10.1.0.3"),
        ]
        .join("---\n"),
    )
    .unwrap();
    let cluster = Cluster::new();
    let reporter = Reporter::new("n1");
    let interests = Interests::service_proxy();
    let key = ObjectKey::new("default", "web");
    let addresses = |state: &super::super::State| {
        let mut list: Vec<String> = state
            .slices
            .get(&key)
            .into_iter()
            .flat_map(|slices| slices.values())
            .flat_map(|slice| {
                slice.endpoints.iter().map(|e| format!("{} {}", e.address, slice.ports[0].port))
            })
            .collect();
        list.sort();
        list
    };
    let check = async {
        until("made", &cluster, |s| s.has_listed(&[Kind::EndpointSlice])).await;
        assert_eq!(addresses(&cluster.read()), ["10.1.0.1 8080", "fd00:1::2 8080"]);
        fs::write(path("slice.yaml"), "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s, labels: {kubernetes.io/service-name: web}}\naddressType: IPv4\nports: [{port: 1}]\nendpoints: [{addresses: [10.7.0.1]}]\n").unwrap();
        until("own slice wins", &cluster, |s| addresses(s) == ["10.7.0.1 1"]).await;
        fs::remove_file(path("slice.yaml")).unwrap();
        until("made again", &cluster, |s| addresses(s).len() == 2).await;
        fs::remove_file(path("all.yaml")).unwrap();
        until("gone", &cluster, |s| s.services.is_empty() && s.slices.is_empty()).await;
    };
    tokio::select! {
        ended = watch(folder.0.clone(), cluster.clone(), &interests, &reporter) => panic!("reader ended: {ended:?}"),
        () = check => {}
    }
}

#[tokio::test]
async fn a_folder_that_is_no_folder_is_an_error() {
    let folder = TempFolder::new("nofolder");
    let file = folder.0.join("x.yaml");
    fs::write(&file, "").unwrap();
    for path in [file, folder.0.join("missing")] {
        let ended =
            watch(path.clone(), Cluster::new(), &Interests::service_proxy(), &Reporter::new("n")).await;
        let error = ended.unwrap_err().to_string();
        assert!(error.contains("--manifests=") && error.contains(&*path.to_string_lossy()), "{error}");
    }
}

#[tokio::test]
async fn secrets_come_from_the_folder_and_are_never_quoted() {
    let folder = TempFolder::new("secrets");
    let path = folder.0.join("tor.yaml");
    let secret = |values: &str| {
        format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: tor}}\ntype: kubernetes.io/basic-auth\n{values}\n"
        )
    };
    fs::write(&path, secret("stringData: {password: hunter2}")).unwrap();
    let (cluster, reporter) = (Cluster::new(), Reporter::new("n1"));
    let (root, watched, told) = (folder.0.clone(), cluster.clone(), reporter.clone());
    let interests = Interests::routes();
    tokio::spawn(async move { watch(root, watched, &interests, &told).await });
    let (tor, other) = (ObjectKey::new("default", "tor"), ObjectKey::new("default", "other"));
    let value = |state: &super::super::State| match state.secrets.get(&tor) {
        Some(Knowledge::Present(secret)) => secret.value("password").map(<[u8]>::to_vec).ok(),
        _ => None,
    };
    until("the Secret", &cluster, |state| value(state) == Some(b"hunter2".to_vec())).await;
    until("all there are", &cluster, |state| state.secrets.get(&other) == Some(Knowledge::Missing)).await;
    fs::write(&path, secret("data: {password: aHVudGVyMw==}")).unwrap();
    until("its new value", &cluster, |state| value(state) == Some(b"hunter3".to_vec())).await;
    for broken in ["data: {password: 'hunter4}", "data: {password: hunter4: hunter4}", "data: [hunter4"] {
        fs::write(&path, secret(broken)).unwrap();
        until(broken, &cluster, |_| reporter.current().iter().any(|problem| problem.reason == "Unparsable"))
            .await;
        assert!(!format!("{:?}", reporter.current()).contains("hunter"), "{:?}", reporter.current());
        assert_eq!(value(&cluster.read()), Some(b"hunter3".to_vec()));
        fs::write(&path, secret("data: {password: aHVudGVyMw==}")).unwrap();
        until("mended", &cluster, |_| reporter.current().is_empty()).await;
    }
    fs::remove_file(&path).unwrap();
    until("that it is gone", &cluster, |state| state.secrets.get(&tor) == Some(Knowledge::Missing)).await;
}
