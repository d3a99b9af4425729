//! What the process answers: probes and metrics over TCP; state and log level over a Unix socket
//! that only root can open. Answers are read from the rooms when asked for.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Read, Write as _};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::stat::{Mode, umask};
use serde::Serialize;

use crate::cluster::Cluster;
use crate::cluster::health::{KindHealth, KindReport};
use crate::config::Output;
use crate::duration::GoDuration;
use crate::health::{RoomHealth, Verdict, WatchHealth, judge};
use crate::http::{Answer, Method, Request, StatusCode};
use crate::log;
use crate::metrics::{self, ExportTime, Page};
use crate::report::{CurrentProblem, Reporter};
use crate::{netpol, network, proxy, routes};

/// How long a room may take to describe itself.
const STATUS_TIMEOUT: Duration = Duration::from_secs(20);
/// How long `ferroute status` waits for the daemon.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);
/// A room's loop turns every few seconds; one pass over a huge cluster on a slow machine, with
/// the xtables lock held by others, still ends well within this.
const TURN_LIMIT: Duration = Duration::from_secs(120);
/// An audit may take this long beyond its period before the kernel's state counts as unknown.
const SLACK: Duration = Duration::from_secs(60);

/// Everything that can be asked.
pub struct Desk {
    /// Name of the Node object.
    pub node: Arc<str>,
    /// When the process started.
    pub started: Instant,
    /// The same by the wall clock.
    pub started_at: SystemTime,
    /// The service proxy and its period (`--ipvs-sync-period`), where it runs.
    pub proxy: Option<(proxy::View, Duration)>,
    /// Network policy and its period (`--iptables-sync-period`), where it runs.
    pub netpol: Option<(netpol::View, Duration)>,
    /// Routes and their period (`--routes-sync-period`), where they run.
    pub routes: Option<(routes::View, Duration)>,
    /// The pod network and its period (`--injected-routes-sync-period`), where it runs.
    pub network: Option<(network::View, Duration)>,
    /// The watched state.
    pub cluster: Cluster,
    /// Problems of objects.
    pub reporter: Reporter,
    /// The log level.
    pub level: log::Level,
    /// Time spent on metrics.
    pub export_time: ExportTime,
}

/// The body of `/status`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    version: &'static str,
    node: Arc<str>,
    uptime_seconds: u64,
    live: bool,
    ready: bool,
    health: Vec<String>,
    watches: Vec<KindReport>,
    problems: Vec<CurrentProblem>,
    /// Desired, actual and difference; absent when the room does not run or did not answer in time.
    services: Option<proxy::Status>,
    /// The same for network policy.
    policies: Option<netpol::Status>,
    /// BGP sessions.
    #[serde(skip_serializing_if = "Option::is_none")]
    bgp: Option<routes::Status>,
    /// The pod network.
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<network::Status>,
}

impl Desk {
    /// Answers of the health port.
    pub fn health(&self, request: &Request) -> Answer {
        if let Some(refusal) = only_reads(request) {
            return refusal;
        }
        let verdict = self.verdict();
        match request.path.as_str() {
            // kube-router's path, words and status.
            "/healthz" if verdict.live => probe(StatusCode::OK, "OK", &verdict),
            "/healthz" => probe(StatusCode::INTERNAL_SERVER_ERROR, "Unhealthy", &verdict),
            "/livez" if verdict.live => probe(StatusCode::OK, "live", &verdict),
            "/livez" => probe(StatusCode::INTERNAL_SERVER_ERROR, "not live", &verdict),
            "/readyz" if verdict.ready => probe(StatusCode::OK, "ready", &verdict),
            "/readyz" => probe(StatusCode::SERVICE_UNAVAILABLE, "not ready", &verdict),
            _ => unknown("/healthz, /livez, /readyz"),
        }
    }

    /// Answers of the metrics port. Blocks while the kernel's counters are read.
    pub fn metrics(&self, request: &Request, path: &str) -> Answer {
        if let Some(refusal) = only_reads(request) {
            return refusal;
        }
        if request.path != path {
            return unknown(path);
        }
        let begun = Instant::now();
        let mut page = Page::default();
        metrics::build_info(&mut page);
        metrics::rooms(&mut page, &self.rooms(), begun);
        let mut current = BTreeMap::new();
        for problem in self.reporter.current() {
            *current.entry((problem.kind, problem.reason)).or_default() += 1;
        }
        metrics::problems(&mut page, &self.reporter.counters(), &current, self.reporter.dropped_events());
        self.watch_metrics(&mut page);
        if let Some((proxy, _)) = &self.proxy {
            proxy.metrics(page.text());
        }
        if let Some((netpol, _)) = &self.netpol {
            netpol.metrics(page.text());
        }
        if let Some((routes, _)) = &self.routes {
            routes.metrics(&mut page);
        }
        if let Some((network, _)) = &self.network {
            network.metrics(page.text());
        }
        let since_epoch = self.started_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        metrics::process(&mut page, since_epoch);
        self.export_time.observe(begun.elapsed());
        self.export_time.write(&mut page);
        Answer {
            status: StatusCode::OK,
            content_type: "text/plain; version=0.0.4; charset=utf-8",
            body: page.finish(),
        }
    }

    /// Answers of the Unix socket. Blocks while the rooms describe themselves.
    pub fn admin(&self, request: &Request) -> Answer {
        match (&request.method, request.path.as_str()) {
            (&Method::PUT, "/log-level") => self.set_level(&request.body),
            (&Method::GET, "/status") if request.query == "output=text" => {
                Answer::text(StatusCode::OK, self.status_text())
            }
            (&Method::GET, "/status") => match serde_json::to_string(&self.status()) {
                Ok(body) => Answer::json(body),
                Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
            },
            (&Method::GET, "/explain") => self.explain(&request.query),
            (&Method::GET, path) if path.starts_with("/bgp/") => self.bgp(path, &request.query),
            (_, "/healthz" | "/livez" | "/readyz") => self.health(request),
            _ => unknown(
                "GET /status, GET /explain, GET /bgp/..., PUT /log-level, GET /healthz, /livez, /readyz",
            ),
        }
    }

    /// `from=...&to=...`, each percent-encoded, and perhaps `&output=text`.
    fn explain(&self, query: &str) -> Answer {
        let bad = |text: String| Answer::text(StatusCode::BAD_REQUEST, text + "\n");
        let field = |name: &str| {
            let value = query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='))?;
            Some(percent_decoded(value))
        };
        let (Some(from), Some(to)) = (field("from"), field("to")) else {
            return bad("write /explain?from=...&to=...".to_owned());
        };
        let Some((netpol, _)) = &self.netpol else {
            return bad("network policy is off on this node (--run-firewall=false)".to_owned());
        };
        let question = match netpol::Question::parse(&from, &to) {
            Ok(question) => question,
            Err(error) => return bad(error.to_string()),
        };
        match netpol.explain(question, STATUS_TIMEOUT) {
            None => Answer::text(
                StatusCode::SERVICE_UNAVAILABLE,
                format!(
                    "network policy did not answer within {}s; it is busy or stuck\n",
                    STATUS_TIMEOUT.as_secs()
                ),
            ),
            Some(Err(error)) => bad(error.to_string()),
            Some(Ok(answer)) if field("output").as_deref() == Some("text") => {
                Answer::text(StatusCode::OK, answer.to_string())
            }
            Some(Ok(answer)) => match serde_json::to_string(&answer) {
                Ok(body) => Answer::json(body),
                Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
            },
        }
    }

    /// `/bgp/neighbors`, `/bgp/routes`, `/bgp/advertised?peer=...`, `/bgp/received?peer=...`, each perhaps
    /// with `output=text`.
    fn bgp(&self, path: &str, query: &str) -> Answer {
        let bad = |text: String| Answer::text(StatusCode::BAD_REQUEST, text + "\n");
        let field = |name: &str| {
            let value = query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='))?;
            Some(percent_decoded(value))
        };
        let Some((routes, _)) = &self.routes else {
            return bad("routes and BGP are off on this node; --run-router=true turns them on".to_owned());
        };
        let text = field("output").as_deref() == Some("text");
        let json = |body: serde_json::Result<String>| match body {
            Ok(body) => Answer::json(body),
            Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        };
        let name = path.trim_start_matches("/bgp/");
        if name == "neighbors" {
            let status = routes.status();
            return if text {
                Answer::text(StatusCode::OK, status.to_string())
            } else {
                json(serde_json::to_string(&status))
            };
        }
        let listing = match routes::Listing::parse(name, field("peer").as_deref()) {
            Ok(listing) => listing,
            Err(cure) => return bad(cure),
        };
        match routes.routes(&listing) {
            Err(error) => bad(error.to_string()),
            Ok(list) if text => Answer::text(StatusCode::OK, routes::status::table(&list)),
            Ok(list) => json(serde_json::to_string(&list)),
        }
    }

    fn set_level(&self, body: &[u8]) -> Answer {
        let level = std::str::from_utf8(body).ok().and_then(|text| text.trim().parse::<i32>().ok());
        let Some(level) = level else {
            return Answer::text(StatusCode::BAD_REQUEST, "write a number, for example 2\n");
        };
        match self.level.set(level) {
            Ok(()) => {
                tracing::info!(level, "log level changed");
                Answer::text(StatusCode::OK, format!("{level}\n"))
            }
            Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }

    fn rooms(&self) -> Vec<RoomHealth> {
        let room = |name, period: Duration, passes| RoomHealth {
            name,
            turn_limit: TURN_LIMIT,
            clean_limit: period + SLACK,
            passes,
        };
        let proxy = self.proxy.iter().map(|(view, period)| room("proxy", *period, view.health()));
        let netpol = self.netpol.iter().map(|(view, period)| room("netpol", *period, view.health()));
        let routes = self.routes.iter().map(|(view, period)| room("routes", *period, view.health()));
        let network = self.network.iter().map(|(view, period)| room("network", *period, view.health()));
        proxy.chain(netpol).chain(routes).chain(network).collect()
    }

    fn verdict(&self) -> Verdict {
        let watches: Vec<WatchHealth> = self
            .cluster
            .watch_health()
            .kinds()
            .into_iter()
            .map(|(kind, health)| WatchHealth {
                kind: kind.name(),
                listed: health.listed,
                error: health.last_error.filter(|_| !health.connected),
            })
            .collect();
        judge(&self.rooms(), &watches, Instant::now())
    }

    fn watch_metrics(&self, page: &mut Page) {
        let watches = self.cluster.watch_health().kinds();
        type Value = fn(&KindHealth) -> u64;
        let families: [(&str, &str, &str, Value); 4] = [
            ("ferroute_watch_connected", "gauge", "Whether a watch is up.", |h| u64::from(h.connected)),
            ("ferroute_watch_events_total", "counter", "Objects received, lists included.", |h| h.events),
            ("ferroute_watch_lists_total", "counter", "Complete lists.", |h| h.lists),
            ("ferroute_watch_errors_total", "counter", "Failed lists and watches.", |h| h.errors),
        ];
        for (name, kind, help, value) in families {
            page.family(name, kind, help);
            for (watched, health) in &watches {
                page.sample(name, &[("kind", watched.name())], value(health));
            }
        }
    }

    fn status(&self) -> Status {
        let verdict = self.verdict();
        Status {
            version: env!("CARGO_PKG_VERSION"),
            node: self.node.clone(),
            uptime_seconds: self.started.elapsed().as_secs(),
            live: verdict.live,
            ready: verdict.ready,
            health: verdict.lines.iter().map(ToString::to_string).collect(),
            watches: self.cluster.watch_health().report(),
            problems: self.reporter.current(),
            services: self.proxy.as_ref().and_then(|(proxy, _)| proxy.status(STATUS_TIMEOUT)),
            policies: self.netpol.as_ref().and_then(|(netpol, _)| netpol.status(STATUS_TIMEOUT)),
            bgp: self.routes.as_ref().map(|(routes, _)| routes.status()),
            network: self.network.as_ref().and_then(|(network, _)| network.status(STATUS_TIMEOUT)),
        }
    }

    fn status_text(&self) -> String {
        let status = self.status();
        let uptime = GoDuration::from_secs(u32::try_from(status.uptime_seconds).unwrap_or(u32::MAX));
        let word = |good: bool, word: &str| if good { word.to_owned() } else { format!("not {word}") };
        let mut text = format!(
            "ferroute {} on node {}, up {uptime}: {}, {}\n",
            status.version,
            status.node,
            word(status.live, "live"),
            word(status.ready, "ready")
        );
        // Writing to a String cannot fail.
        for line in &status.health {
            let _ = writeln!(text, "{line}");
        }
        if !status.problems.is_empty() {
            let _ = writeln!(text, "\nProblems of objects:");
        }
        for problem in &status.problems {
            let slash = if problem.namespace.is_empty() { "" } else { "/" };
            let (kind, namespace, name) = (problem.kind, &problem.namespace, &problem.name);
            let _ =
                writeln!(text, "  {kind} {namespace}{slash}{name}: {}: {}", problem.reason, problem.message);
        }
        let parts = [
            ("The service proxy", self.proxy.is_some(), status.services.as_ref().map(ToString::to_string)),
            ("Network policy", self.netpol.is_some(), status.policies.as_ref().map(ToString::to_string)),
            ("BGP", self.routes.is_some(), status.bgp.as_ref().map(ToString::to_string)),
            ("The pod network", self.network.is_some(), status.network.as_ref().map(ToString::to_string)),
        ];
        for (name, runs, part) in parts {
            match part {
                Some(part) => {
                    let _ = writeln!(text, "\n{}", part.trim_end());
                }
                None if runs => {
                    let seconds = STATUS_TIMEOUT.as_secs();
                    let _ = writeln!(text, "\n{name} did not answer within {seconds}s; it is busy or stuck.");
                }
                None => {}
            }
        }
        text
    }
}

fn probe(status: StatusCode, word: &str, verdict: &Verdict) -> Answer {
    // kube-router answers with the bare word; whoever compares it finds it on the first line.
    let mut body = word.to_owned();
    for line in &verdict.lines {
        let _ = write!(body, "\n{line}");
    }
    Answer::text(status, body + "\n")
}

fn only_reads(request: &Request) -> Option<Answer> {
    let reads = [Method::GET, Method::HEAD].contains(&request.method);
    (!reads).then(|| Answer::text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n"))
}

fn unknown(known: &str) -> Answer {
    Answer::text(StatusCode::NOT_FOUND, format!("unknown; there are: {known}\n"))
}

/// Why the Unix socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another daemon answers on it.
    #[error("--{flag}={path}: another ferroute is running on this machine; stop it first")]
    InUse {
        /// The flag that names the socket.
        flag: &'static str,
        /// Its value.
        path: PathBuf,
    },
    /// Something that is no socket has that name.
    #[error("--{flag}={path}: exists and is no socket; remove it or choose another path")]
    NoSocket {
        /// The flag that names the socket.
        flag: &'static str,
        /// Its value.
        path: PathBuf,
    },
    /// The system refused.
    #[error("--{flag}={path}: {source}; choose a path in a folder that root can write")]
    Io {
        /// The flag that names the socket.
        flag: &'static str,
        /// Its value.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `ferroute status` found no daemon.
    #[error("no ferroute answers on {path}: {source}; is the daemon running here, and are you root?")]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The daemon answered with an error.
    #[error("ferroute on {path} answered: {answer}")]
    Refused {
        /// The socket.
        path: PathBuf,
        /// Its words.
        answer: String,
    },
}

/// The name of an open Unix socket; gone when this is dropped.
#[derive(Debug)]
pub struct Bound(PathBuf);

impl Drop for Bound {
    fn drop(&mut self) {
        // Best effort: a socket left over is replaced by the next start.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Opens the Unix socket that a flag names, for root alone. A socket left over by a dead process is
/// replaced; one on which a daemon answers is not.
pub fn listen(flag: &'static str, path: &Path) -> Result<(UnixListener, Bound), SocketError> {
    let failed = |source| SocketError::Io { flag, path: path.to_owned(), source };
    if let Some(folder) = path.parent()
        && !folder.exists()
    {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(known) if !known.file_type().is_socket() => {
            return Err(SocketError::NoSocket { flag, path: path.to_owned() });
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(SocketError::InUse { flag, path: path.to_owned() });
        }
        Ok(_) => std::fs::remove_file(path).map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // The folder may be open to others: the socket must never be, not even for a moment.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    let listener = listener.map_err(failed)?;
    let bound = Bound(path.to_owned());
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok((listener, bound))
}

/// Asks the running daemon for its state.
pub fn ask_status(path: &Path, output: Output) -> Result<String, SocketError> {
    let query = match output {
        Output::Text => "?output=text",
        Output::Json => "",
    };
    ask(path, &format!("/status{query}"))
}

/// Asks the running daemon about BGP: `what` is `neighbors`, `routes`, `advertised` or `received`.
pub fn ask_bgp(path: &Path, output: Output, what: &str, peer: Option<&str>) -> Result<String, SocketError> {
    let text = if output == Output::Text { "&output=text" } else { "" };
    let peer = peer.map_or(String::new(), |peer| format!("&peer={}", percent_encoded(peer)));
    ask(path, &format!("/bgp/{what}?{peer}{text}"))
}

/// Asks the running daemon whether a connection is allowed, and why.
pub fn ask_explain(path: &Path, output: Output, from: &str, to: &str) -> Result<String, SocketError> {
    let text = if output == Output::Text { "&output=text" } else { "" };
    ask(path, &format!("/explain?from={}&to={}{text}", percent_encoded(from), percent_encoded(to)))
}

fn ask(path: &Path, target: &str) -> Result<String, SocketError> {
    let absent = |source| SocketError::NoDaemon { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).map_err(absent)?;
    stream.set_read_timeout(Some(CLIENT_TIMEOUT)).map_err(absent)?;
    stream.set_write_timeout(Some(CLIENT_TIMEOUT)).map_err(absent)?;
    stream.write_all(format!("GET {target} HTTP/1.0\r\n\r\n").as_bytes()).map_err(absent)?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(absent)?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    if head.split_whitespace().nth(1) != Some("200") {
        let answer = if body.is_empty() { head } else { body };
        return Err(SocketError::Refused { path: path.to_owned(), answer: answer.trim().to_owned() });
    }
    Ok(body.to_owned())
}

/// Text as part of a query (RFC 3986, 2.1): everything but unreserved characters is escaped.
fn percent_encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// And back; what is no escape stays as it is.
fn percent_decoded(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let escaped = (*first == b'%')
            .then(|| more.get(..2).and_then(|hex| std::str::from_utf8(hex).ok()))
            .flatten()
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match escaped {
            Some(byte) => {
                out.push(byte);
                rest = more.get(2..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("ferroute-admin-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        folder
    }

    #[test]
    fn the_socket_is_for_root_alone_and_for_one_daemon() {
        let folder = folder("socket");
        let path = folder.join("a.sock");
        let (listener, bound) = listen("admin-socket", &path).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&folder)), (0o600, 0o700));
        assert!(matches!(listen("admin-socket", &path), Err(SocketError::InUse { .. })));
        drop(listener);
        // A killed process removes nothing.
        std::mem::forget(bound);
        assert!(path.exists());
        drop(listen("admin-socket", &path).unwrap());
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(listen("admin-socket", &path), Err(SocketError::NoSocket { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn without_a_daemon_the_message_says_so() {
        let folder = folder("absent");
        let error = ask_status(&folder.join("a.sock"), Output::Json).unwrap_err();
        assert!(error.to_string().contains("is the daemon running here"), "{error}");
    }

    #[test]
    fn an_error_of_the_daemon_is_passed_on() {
        let folder = folder("refusal");
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("a.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            for answer in ["HTTP/1.0 404 Not Found\r\n\r\nunknown\n", "HTTP/1.0 200 OK\r\n\r\n{}"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 64];
                let length = stream.read(&mut request).unwrap();
                assert!(request[..length].starts_with(b"GET /status"));
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let error = ask_status(&path, Output::Text).unwrap_err();
        assert!(matches!(error, SocketError::Refused { answer, .. } if answer == "unknown"));
        assert_eq!(ask_status(&path, Output::Json).unwrap(), "{}");
        server.join().unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn queries_survive_the_way() {
        for text in ["shop/cart", "[fd00::1]:80/udp", "a b&c=d%", "\u{e4}"] {
            assert_eq!(percent_decoded(&percent_encoded(text)), text);
        }
        assert_eq!(percent_decoded("%zz%4"), "%zz%4");
    }
}
