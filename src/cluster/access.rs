//! How the API server is reached: in-cluster service account, `--kubeconfig`, `--master`.
//!
//! | given | server | credentials |
//! |---|---|---|
//! | `--kubeconfig` | the file's | the file's |
//! | `--kubeconfig` and `--master` | `--master` | the file's |
//! | `--master` | `--master` | service account if this is a Pod, else none |
//! | neither | the Pod's environment | service account |
//!
//! The last row is refused when the environment names our own cluster IP: this process makes that
//! address work, so it cannot depend on it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Uri;
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use ipnet::IpNet;
use kube::client::ConfigExt;
use kube::config::{Kubeconfig, KubeconfigError};
use tower::util::MapRequestLayer;
use tower::{BoxError, ServiceBuilder};

use super::token::TokenFile;
use super::trouble::describe;

/// The server ends a watch after this; bookmarks every minute or so keep it alive until then.
pub const WATCH_SECONDS: u32 = 240;
/// Where Kubernetes mounts a Pod's token.
const TOKEN_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// A server that accepts no connection within this is away.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection on which a request or a watch hears nothing for this long is dead. Above the
/// length of a watch, which the server ends in time.
const READ_TIMEOUT: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 15);
/// The kernel asks after a silent peer this often, and gives it up after three questions.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Sent data that nobody acknowledges for this long ends the connection.
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);

/// What the flags say about the API server.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// `--kubeconfig`.
    pub kubeconfig: Option<PathBuf>,
    /// `--master`.
    pub master: Option<String>,
    /// Cluster IP ranges that this process itself serves; empty when the service proxy is off.
    pub own_cluster_ranges: Vec<IpNet>,
}

/// An access that cannot work as configured. Names the flag and the cure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig cannot be read or does not make sense.
    #[error("--kubeconfig={path}: {why}; give the path of a kubeconfig file that this user can read")]
    Kubeconfig {
        /// The flag's value.
        path: PathBuf,
        /// What is wrong with it; never its text, which holds secrets.
        why: String,
    },
    /// The kubeconfig asks for something that is not supported.
    #[error("--kubeconfig={path}: {what}")]
    Unsupported {
        /// The flag's value.
        path: PathBuf,
        /// What it asks for, and the cure.
        what: &'static str,
    },
    /// The server address is not a URL.
    #[error(
        "--master={value:?} is not the address of an API server ({why}); write http://HOST:PORT or https://HOST:PORT"
    )]
    Master {
        /// The flag's value, without credentials.
        value: String,
        /// What is wrong with it.
        why: String,
    },
    /// Neither flag was given and this is no Pod.
    #[error(
        "no API server configured: neither --kubeconfig nor --master is given and this process does not run in a \
         Pod ({0}); give one of them, or --manifests DIR to work from a folder"
    )]
    NotInCluster(String),
    /// The environment names an address that only works because of this process.
    #[error(
        "KUBERNETES_SERVICE_HOST is {address}, a cluster IP that this service proxy itself has to serve; give \
         --master=https://HOST:PORT with the API server's own address (or that of a load balancer in front of \
         it), or a --kubeconfig that names it"
    )]
    OwnClusterIp {
        /// The address from the environment.
        address: IpAddr,
    },
    /// The service account mounted into this Pod is not usable.
    #[error("service account of this Pod: {0}; mount it (automountServiceAccountToken) or give --kubeconfig")]
    ServiceAccount(String),
    /// TLS or the credentials could not be set up.
    #[error(
        "API server {server}: cannot set up the connection: {why}; check the certificates and credentials"
    )]
    Client {
        /// The server's address.
        server: String,
        /// What is wrong; never what a credential plugin printed.
        why: String,
    },
    /// There is no token where one should be.
    #[error(
        "token file {path}: {why}; let it hold the token alone (a Pod's is mounted by automountServiceAccountToken)"
    )]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong with it; never its text.
        why: String,
    },
}

/// What the process's surroundings say; apart from the flags so that tests can set it.
struct Surroundings {
    service_host: Option<String>,
    in_pod: bool,
}

impl Access {
    /// A client for this access. Does not talk to the server: one that is away is no error here.
    /// Call it inside a tokio runtime, whose tasks carry the requests.
    ///
    /// # Errors
    /// Only what is wrong with the configuration; retrying does not help.
    pub fn client(&self) -> Result<kube::Client, Error> {
        let surroundings = Surroundings {
            service_host: std::env::var("KUBERNETES_SERVICE_HOST").ok(),
            in_pod: Path::new(TOKEN_FILE).exists(),
        };
        let mut config = self.config(&surroundings)?;
        let server = config.cluster_url.to_string();
        tracing::info!(server, "API server");
        let token = token_file(&mut config)?;
        connect(config, token).map_err(|error| Error::Client { server, why: describe(&error) })
    }

    fn config(&self, surroundings: &Surroundings) -> Result<kube::Config, Error> {
        let master =
            self.master.as_deref().filter(|text| !text.is_empty()).map(server_address).transpose()?;
        let mut config = match (&self.kubeconfig, master) {
            (Some(path), master) => kubeconfig(path, master)?,
            (None, Some(server)) => {
                let mut config = if surroundings.in_pod {
                    // Reads token and CA again as they rotate. The environment's address is not
                    // needed, but this constructor insists on one.
                    service_account(surroundings)?
                } else {
                    tracing::info!("no service account here: requests to --master carry no credentials");
                    kube::Config::new(server.clone())
                };
                config.cluster_url = server;
                config
            }
            (None, None) => {
                let Some(host) = &surroundings.service_host else {
                    return Err(Error::NotInCluster("KUBERNETES_SERVICE_HOST is not set".to_owned()));
                };
                if let Ok(address) = host.parse::<IpAddr>()
                    && self.own_cluster_ranges.iter().any(|range| range.contains(&address))
                {
                    return Err(Error::OwnClusterIp { address });
                }
                service_account(surroundings)?
            }
        };
        if config.cluster_url.scheme_str() == Some("http") {
            // The client builds a TLS verifier even for plain http, and fails in an image without
            // CA certificates unless told that there are none to load.
            config.root_cert = Some(Vec::new());
            config.root_cert_file = None;
        }
        if config.accept_invalid_certs {
            // Nothing is verified, so no authority is needed, not even the image's own.
            tracing::warn!(
                "insecure-skip-tls-verify: whoever answers at the API server's address is believed; name its \
                 certificate-authority in the kubeconfig instead"
            );
            config.root_cert = Some(Vec::new());
            config.root_cert_file = None;
        }
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(READ_TIMEOUT);
        config.write_timeout = Some(UNACKNOWLEDGED);
        Ok(config)
    }
}

/// Takes the token file out of the configuration: the client would look at it once a minute only.
/// Where something else has precedence, the client does as it always does.
fn token_file(config: &mut kube::Config) -> Result<Option<TokenFile>, Error> {
    let auth = &mut config.auth_info;
    if auth.token.is_some() || (auth.username.is_some() && auth.password.is_some()) {
        return Ok(None);
    }
    let Some(path) = auth.token_file.take().map(PathBuf::from) else { return Ok(None) };
    TokenFile::open(&path).map(Some).map_err(|why| Error::Token { path, why })
}

fn kubeconfig(path: &Path, master: Option<Uri>) -> Result<kube::Config, Error> {
    let failed = |error: KubeconfigError| {
        let why = match &error {
            // The parser quotes the lines around the mistake, and tokens stand in such lines.
            KubeconfigError::Parse(mistake) => match mistake.location() {
                Some(at) => format!("line {} is not what a kubeconfig has there", at.line()),
                None => "it is not a kubeconfig".to_owned(),
            },
            other => other.to_string(),
        };
        Error::Kubeconfig { path: path.to_owned(), why }
    };
    let mut file = Kubeconfig::read_from(path).map_err(failed)?;
    if let Some(server) = &master {
        for cluster in &mut file.clusters {
            if let Some(cluster) = &mut cluster.cluster {
                cluster.server = Some(server.to_string());
            }
        }
    }
    let config = kube::Config::try_from(file).map_err(failed)?;
    if config.proxy_url.is_some() {
        return Err(Error::Unsupported {
            path: path.to_owned(),
            what: "its cluster has a proxy-url, which is not supported; remove it and give --master an address \
                   that is reached directly",
        });
    }
    Ok(config)
}

fn service_account(surroundings: &Surroundings) -> Result<kube::Config, Error> {
    if !surroundings.in_pod {
        return Err(Error::ServiceAccount(format!("{TOKEN_FILE} does not exist")));
    }
    kube::Config::incluster().map_err(|error| Error::ServiceAccount(error.to_string()))
}

/// `http(s)://HOST[:PORT]`, or `HOST:PORT` and an address, which mean http.
fn server_address(text: &str) -> Result<Uri, Error> {
    let wrong = |why: String| {
        let value = match text.rsplit_once('@') {
            // Whatever stands before an @ may be a password.
            Some((_, rest)) => format!("...@{rest}"),
            None => text.to_owned(),
        };
        Error::Master { value, why }
    };
    let full = if text.contains("://") {
        text.to_owned()
    } else {
        tracing::info!("--master has no scheme, http is used");
        match text.parse::<IpAddr>() {
            Ok(IpAddr::V6(address)) => format!("http://[{address}]"),
            _ => format!("http://{text}"),
        }
    };
    let uri: Uri = full.parse().map_err(|error: http::uri::InvalidUri| wrong(error.to_string()))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(wrong("the scheme is neither http nor https".to_owned()));
    }
    let Some(authority) = uri.authority() else { return Err(wrong("it names no host".to_owned())) };
    if authority.as_str().contains('@') {
        return Err(wrong("user and password do not belong into it; use a kubeconfig".to_owned()));
    }
    if authority.host().is_empty() || authority.host().chars().any(char::is_whitespace) {
        return Err(wrong("it names no host".to_owned()));
    }
    if let Some((_, port)) = authority.as_str().rsplit_once(':').filter(|(host, _)| {
        // The last colon of a bracketed address without a port is inside the brackets.
        !host.starts_with('[') || host.ends_with(']')
    }) && port.parse::<u16>().is_err()
    {
        return Err(wrong(format!("{port:?} is no port")));
    }
    Ok(uri)
}

/// kube's own client, but with TCP keepalive, so that a peer that vanished without a word is
/// noticed in half a minute, and without its log lines for every failed attempt.
fn connect(config: kube::Config, token: Option<TokenFile>) -> Result<kube::Client, kube::Error> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_keepalive(Some(KEEPALIVE));
    connector.set_keepalive_interval(Some(KEEPALIVE));
    connector.set_keepalive_retries(Some(3));
    connector.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(connector)?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    let transport = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .pool_idle_timeout(Duration::from_secs(60))
        .build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .option_layer(token.map(|token| {
            MapRequestLayer::new(move |mut request: http::Request<kube::client::Body>| {
                token.sign(request.headers_mut());
                request
            })
        }))
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(transport);
    Ok(kube::Client::new(service, config.default_namespace.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outside() -> Surroundings {
        Surroundings { service_host: None, in_pod: false }
    }

    fn access(kubeconfig: Option<&Path>, master: Option<&str>) -> Access {
        Access {
            kubeconfig: kubeconfig.map(Path::to_owned),
            master: master.map(str::to_owned),
            own_cluster_ranges: vec!["10.96.0.0/12".parse().unwrap()],
        }
    }

    #[test]
    fn master_takes_the_usual_forms() {
        for (text, expected) in [
            ("http://10.0.0.1:8080", "http://10.0.0.1:8080/"),
            ("https://api.example:6443", "https://api.example:6443/"),
            ("https://[2001:db8::1]:6443", "https://[2001:db8::1]:6443/"),
            ("https://[2001:db8::1]", "https://[2001:db8::1]/"),
            ("10.0.0.1:8080", "http://10.0.0.1:8080/"),
            ("2001:db8::1", "http://[2001:db8::1]/"),
        ] {
            assert_eq!(server_address(text).unwrap().to_string(), expected, "{text}");
        }
        for text in ["ftp://x", "http://", "http://a b", "http://x:99999", "http://x:y", "://", "/path"] {
            let error = server_address(text).unwrap_err().to_string();
            assert!(error.contains("--master") && error.contains("https://HOST:PORT"), "{text}: {error}");
        }
        let error = server_address("https://admin:secret@host:6443").unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn plain_master_outside_a_pod_is_anonymous() {
        let config = access(None, Some("http://10.0.0.1:8080")).config(&outside()).unwrap();
        assert_eq!(config.cluster_url.to_string(), "http://10.0.0.1:8080/");
        assert_eq!(config.root_cert, Some(Vec::new()));
        assert!(config.auth_info.token_file.is_none());
    }

    #[test]
    fn nothing_given_outside_a_pod_says_what_to_give() {
        let error = access(None, None).config(&outside()).unwrap_err().to_string();
        assert!(error.contains("--kubeconfig") && error.contains("--manifests"), "{error}");
    }

    #[test]
    fn our_own_cluster_ip_is_refused_unless_another_address_is_given() {
        let pod = Surroundings { service_host: Some("10.96.0.1".to_owned()), in_pod: true };
        let error = access(None, None).config(&pod).unwrap_err();
        assert!(matches!(error, Error::OwnClusterIp { .. }), "{error}");
        assert!(error.to_string().contains("--master=https://"));
        let mut other = access(None, None);
        other.own_cluster_ranges.clear();
        // Without the proxy the address is fine; the missing mount is what is left to complain about.
        assert!(matches!(other.config(&pod), Err(Error::ServiceAccount(_)) | Ok(_)));
    }

    #[test]
    fn master_overrides_the_kubeconfig_server() {
        let folder = TempFolder::new("access");
        let path = folder.0.join("config");
        std::fs::write(
            &path,
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n\
             clusters: [{name: k, cluster: {server: 'https://10.9.9.9:6443'}}]\nusers: [{name: u, user: {token: abc}}]\n",
        )
        .unwrap();
        let config = access(Some(&path), None).config(&outside()).unwrap();
        assert_eq!(config.cluster_url.to_string(), "https://10.9.9.9:6443/");
        let config = access(Some(&path), Some("http://127.0.0.1:1")).config(&outside()).unwrap();
        assert_eq!(config.cluster_url.to_string(), "http://127.0.0.1:1/");
        assert!(config.auth_info.token.is_some());
    }

    #[test]
    fn bad_kubeconfigs_name_flag_and_path() {
        let folder = TempFolder::new("bad-access");
        let path = folder.0.join("config");
        let check = |what: &str| {
            let error = access(Some(&path), None).config(&outside()).unwrap_err().to_string();
            assert!(error.contains("--kubeconfig=") && error.contains("config"), "{what}: {error}");
        };
        check("missing file");
        std::fs::write(&path, "{{{").unwrap();
        check("no YAML");
        std::fs::write(&path, "apiVersion: v1\nkind: Config\n").unwrap();
        check("empty");
        std::fs::write(&path, "users:\n- name: u\n  user:\n    token: {secret: [sesame}\n").unwrap();
        let error = access(Some(&path), None).config(&outside()).unwrap_err().to_string();
        assert!(error.contains("line 4") && !error.contains("sesame"), "{error}");
        std::fs::write(&path, "users:\n- name: u\n  user: sesame\n").unwrap();
        let error = access(Some(&path), None).config(&outside()).unwrap_err().to_string();
        assert!(!error.contains("sesame"), "{error}");
        std::fs::write(
            &path,
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n\
             clusters: [{name: k, cluster: {server: 'a b c'}}]\nusers: [{name: u, user: {}}]\n",
        )
        .unwrap();
        check("bad server");
    }

    use crate::cluster::file::tests::TempFolder;
}
