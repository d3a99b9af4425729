//! The watches against an API server that speaks TLS and asks who we are: certificates, tokens,
//! credential plugins, rights.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on shall say where

use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ferroute::cluster::{Access, Cluster, Interests, Kind, ObjectKey, Source, run};
use ferroute::report::Reporter;
use ferroute_apiserver::{ApiServer, Authority, Failure, Identity, Tls};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const ALL: [Kind; 4] = [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::ServiceCidr];
/// The longest wait between two attempts, and some.
const RETRIED: Duration = Duration::from_secs(45);

/// A folder of its own, gone at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ferroute-tls-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn server(authority: &Authority, names: &[IpAddr], token: Option<&Path>) -> ApiServer {
    let tls = Tls { identity: authority.server(names).unwrap(), client_authority: Some(authority.pem()) };
    let mut builder = ApiServer::builder().service_cidrs(["10.96.0.0/16".parse().unwrap()]).tls(tls);
    if let Some(path) = token {
        builder = builder.token_file(path);
    }
    builder.start().unwrap()
}

/// A kubeconfig for this server; `cluster` and `user` are YAML in braces, without them.
fn kubeconfig(folder: &Folder, server: &ApiServer, cluster: &str, user: &str) -> PathBuf {
    folder.write(
        "kubeconfig",
        &format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: \"{}\", {cluster}}}}}]\nusers: [{{name: u, user: {{{user}}}}}]\n",
            server.url()
        ),
    )
}

fn files(folder: &Folder, identity: &Identity) -> String {
    let certificate = folder.write("client.crt", &identity.certificate);
    let key = folder.write("client.key", &identity.key);
    format!("client-certificate: {}, client-key: {}", certificate.display(), key.display())
}

/// A daemon's watches; they end when dropped.
struct Watching {
    cluster: Cluster,
    _runtime: tokio::runtime::Runtime,
}

fn watch(kubeconfig: PathBuf) -> Watching {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let cluster = Cluster::new();
    let access = Access { kubeconfig: Some(kubeconfig), ..Access::default() };
    let interests = Interests::service_proxy();
    runtime.spawn(run(Source::Api(access), cluster.clone(), interests, Reporter::new("n1")));
    Watching { cluster, _runtime: runtime }
}

impl Watching {
    fn until(&self, what: &str, limit: Duration, condition: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !condition(self) {
            let report = self.cluster.watch_health().report();
            assert!(started.elapsed() < limit, "not seen in {limit:?}: {what}: {report:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn listed(&self, limit: Duration) {
        self.until("every list", limit, |watching| watching.cluster.read().has_listed(&ALL));
    }

    /// Waits until every watch has failed; what one of them says.
    fn trouble(&self, kind: Kind) -> String {
        let error = |watching: &Self| watching.cluster.watch_health().kinds().get(&kind)?.last_error.clone();
        self.until("trouble", Duration::from_secs(20), |watching| error(watching).is_some());
        assert!(!self.cluster.read().has_listed(&[kind]), "listed in spite of it");
        let text = error(self).unwrap();
        println!("{text}");
        text
    }
}

fn add_service(server: &ApiServer, name: &str) -> ObjectKey {
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec:\n  ports: [{{port: 80}}]\n"
    );
    server.apply(&text).unwrap();
    ObjectKey::new("default", name)
}

#[test]
fn client_certificates_are_credentials() {
    let folder = Folder::new("client");
    let authority = Authority::new("ours").unwrap();
    // Only the certificate can get in: nobody knows this token.
    let token = folder.write("token", "unknown");
    let server = server(&authority, &[HERE], Some(&token));
    let ca = format!("certificate-authority: {}", folder.write("ca.crt", &authority.pem()).display());
    let user = files(&folder, &authority.client("ferroute").unwrap());
    let watching = watch(kubeconfig(&folder, &server, &ca, &user));
    watching.listed(Duration::from_secs(20));
    let key = add_service(&server, "late");
    watching.until("a change", Duration::from_secs(20), |w| w.cluster.read().services.contains_key(&key));

    let stranger = Authority::new("stranger").unwrap().client("ferroute").unwrap();
    let user = files(&folder, &stranger);
    let text = watch(kubeconfig(&folder, &server, &ca, &user)).trouble(Kind::Service);
    assert!(text.contains("refuses the client certificate"), "{text}");
}

#[test]
fn a_server_that_cannot_be_trusted_is_named_with_the_cure() {
    let folder = Folder::new("trust");
    let (authority, stranger) = (Authority::new("ours").unwrap(), Authority::new("stranger").unwrap());
    let wrong = format!("certificate-authority: {}", folder.write("wrong.crt", &stranger.pem()).display());
    let right = format!("certificate-authority: {}", folder.write("right.crt", &authority.pem()).display());
    let ours = server(&authority, &[HERE], None);
    let elsewhere = server(&authority, &["192.0.2.1".parse().unwrap()], None);
    for (server, ca, word) in [(&ours, &wrong, "UnknownIssuer"), (&elsewhere, &right, "not valid for name")] {
        let text = watch(kubeconfig(&folder, server, ca, "")).trouble(Kind::EndpointSlice);
        assert!(
            text.contains(word) && text.contains("ca.crt") && text.contains("name the address"),
            "{text}"
        );
        assert!(server.faults().served("handshake", "failed") > 0, "it was our side that refused");
    }
    watch(kubeconfig(&folder, &ours, &right, "")).listed(Duration::from_secs(20));
    // Told to believe anybody, it does, whatever authorities this machine knows.
    let blind = "insecure-skip-tls-verify: true";
    watch(kubeconfig(&folder, &elsewhere, blind, "")).listed(Duration::from_secs(20));
    // A plain server behind an https address.
    let plain = ApiServer::builder().service_cidrs(["10.96.0.0/16".parse().unwrap()]).start().unwrap();
    let text = std::fs::read_to_string(kubeconfig(&folder, &plain, &right, "")).unwrap();
    let path = folder.write("kubeconfig", &text.replace("http://", "https://"));
    let text = watch(path).trouble(Kind::Node);
    assert!(text.contains("does not speak TLS"), "{text}");
}

#[test]
fn an_ended_token_is_told_and_its_successor_is_taken_at_once() {
    let folder = Folder::new("token");
    let authority = Authority::new("ours").unwrap();
    let theirs = folder.write("theirs", "new");
    let ours = folder.write("ours", "old");
    let server = server(&authority, &[HERE], Some(&theirs));
    let ca = format!("certificate-authority: {}", folder.write("ca.crt", &authority.pem()).display());
    let watching = watch(kubeconfig(&folder, &server, &ca, &format!("tokenFile: {}", ours.display())));
    let text = watching.trouble(Kind::Service);
    assert!(text.contains("Unauthorized (401)") && text.contains("token has ended"), "{text}");
    assert!(!text.contains("old"), "{text}");
    // Written with the line end that editors add.
    folder.write("ours", "new\n");
    watching.listed(RETRIED);

    folder.write("theirs", "newest");
    folder.write("ours", "newest");
    let rotated = Instant::now();
    server.faults().drop_watches(true);
    let key = add_service(&server, "late");
    watching
        .until("the late Service", Duration::from_secs(10), |w| w.cluster.read().services.contains_key(&key));
    println!("seen {:?} after the rotation", rotated.elapsed());
}

#[test]
fn a_credential_plugin_is_run_again_when_its_token_ends() {
    let folder = Folder::new("exec");
    let authority = Authority::new("ours").unwrap();
    let theirs = folder.write("theirs", "turn-1");
    let server = server(&authority, &[HERE], Some(&theirs));
    let ca = format!("certificate-authority: {}", folder.write("ca.crt", &authority.pem()).display());
    let count = folder.write("count", "");
    // Its tokens end within the minute before which the client renews them: one run per request.
    let plugin = folder.write(
        "plugin",
        &format!(
            "#!/bin/sh\necho x >>{count}\nend=$(date -u -d '+30 seconds' +%Y-%m-%dT%H:%M:%SZ)\n\
             printf '{{\"apiVersion\": \"client.authentication.k8s.io/v1\", \"kind\": \"ExecCredential\", \"status\": \
             {{\"token\": \"%s\", \"expirationTimestamp\": \"%s\"}}}}' \"$(cat {theirs})\" \"$end\"\n",
            count = count.display(),
            theirs = theirs.display()
        ),
    );
    std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).unwrap();
    let user = |command: &Path| {
        format!(
            "exec: {{apiVersion: client.authentication.k8s.io/v1, command: {}, interactiveMode: Never}}",
            command.display()
        )
    };
    let watching = watch(kubeconfig(&folder, &server, &ca, &user(&plugin)));
    watching.listed(Duration::from_secs(20));
    folder.write("theirs", "turn-2");
    server.faults().drop_watches(true);
    let key = add_service(&server, "late");
    watching.until("the late Service", RETRIED, |w| w.cluster.read().services.contains_key(&key));
    assert!(std::fs::read_to_string(&count).unwrap().lines().count() > 1);

    // One that fails is named with what it complained about, never with what it printed.
    let broken = folder.write("broken", "#!/bin/sh\necho sesame\necho 'the vault is locked' >&2\nexit 3\n");
    std::fs::set_permissions(&broken, std::fs::Permissions::from_mode(0o755)).unwrap();
    let access =
        Access { kubeconfig: Some(kubeconfig(&folder, &server, &ca, &user(&broken))), ..Access::default() };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _inside = runtime.enter();
    let error = access.client().err().expect("no client without credentials");
    let text = error.to_string();
    println!("{text}");
    assert!(
        text.contains("the vault is locked") && text.contains("broken") && !text.contains("sesame"),
        "{text}"
    );
}

#[test]
fn a_kind_that_rbac_forbids_is_named_and_the_others_go_on() {
    let folder = Folder::new("rbac");
    let authority = Authority::new("ours").unwrap();
    let server = server(&authority, &[HERE], None);
    let ca = format!("certificate-authority: {}", folder.write("ca.crt", &authority.pem()).display());
    for verb in ["list", "watch"] {
        server.faults().fail(Failure {
            resource: Some("endpointslices".into()),
            verb: Some(verb.into()),
            count: usize::MAX,
            status: 403,
            retry_after: None,
        });
    }
    let watching = watch(kubeconfig(&folder, &server, &ca, ""));
    let text = watching.trouble(Kind::EndpointSlice);
    for word in ["not allowed", "cannot ", "endpointslices", "discovery.k8s.io", "ClusterRole"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    watching.until("the other kinds", Duration::from_secs(10), |w| {
        w.cluster.read().has_listed(&[Kind::Service, Kind::Node, Kind::ServiceCidr])
    });
    let key = add_service(&server, "seen");
    watching.until("a Service", Duration::from_secs(10), |w| w.cluster.read().services.contains_key(&key));
    assert!(!watching.cluster.read().has_listed(&[Kind::EndpointSlice]));
    // The rule is added: no restart is needed.
    server.faults().clear();
    watching.listed(RETRIED);
}
