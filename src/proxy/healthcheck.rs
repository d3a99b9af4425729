//! The health check node port servers: what an external load balancer asks to learn whether this
//! node has an endpoint of a Service with external traffic policy Local. Answers as kube-proxy
//! does: 200 or 503 with a JSON body.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::task::AbortHandle;

use crate::cluster::ServiceKey;

/// The servers that run, by port.
pub struct HealthServers {
    runtime: tokio::runtime::Handle,
    servers: BTreeMap<u16, Server>,
}

struct Server {
    service: ServiceKey,
    local: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl HealthServers {
    /// No servers yet; they will run on `runtime`.
    pub fn new(runtime: tokio::runtime::Handle) -> Self {
        Self { runtime, servers: BTreeMap::new() }
    }

    /// Makes exactly these servers run: port, Service, ready local endpoints. Returns the ports
    /// that could not be bound, to be tried again on the next pass.
    pub fn set(
        &mut self,
        wanted: BTreeMap<u16, (ServiceKey, usize)>,
    ) -> Vec<(ServiceKey, u16, std::io::Error)> {
        self.servers.retain(|port, server| {
            let keep = wanted.get(port).is_some_and(|(service, _)| *service == server.service);
            if !keep {
                server.task.abort();
            }
            keep
        });
        let mut failures = Vec::new();
        for (port, (service, local)) in wanted {
            if let Some(server) = self.servers.get(&port) {
                server.local.store(local, Ordering::Relaxed);
                continue;
            }
            match self.start(port, service.clone(), local) {
                Ok(server) => {
                    self.servers.insert(port, server);
                }
                Err(error) => failures.push((service, port, error)),
            }
        }
        failures
    }

    fn start(&self, port: u16, service: ServiceKey, local: usize) -> std::io::Result<Server> {
        let listener = bind(port)?;
        listener.set_nonblocking(true)?;
        let _entered = self.runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let local = Arc::new(AtomicUsize::new(local));
        let app = {
            let (service, local) = (service.clone(), local.clone());
            Router::new().fallback(get(move || {
                let answer = answer(&service, local.load(Ordering::Relaxed));
                async move { answer }
            }))
        };
        let task = self.runtime.spawn(async move {
            // Ends only when aborted: accept errors are retried inside.
            let _ = axum::serve(listener, app).await;
        });
        Ok(Server { service, local, task: task.abort_handle() })
    }
}

impl Drop for HealthServers {
    fn drop(&mut self) {
        for server in self.servers.values() {
            server.task.abort();
        }
    }
}

/// All addresses of both families, or of IPv4 where the kernel has no IPv6.
fn bind(port: u16) -> std::io::Result<std::net::TcpListener> {
    let listen = |address: SocketAddr| {
        let domain = socket2::Domain::for_address(address);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, Some(socket2::Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        // A restarted daemon must get its port back while old connections linger.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(128)?;
        Ok(std::net::TcpListener::from(socket))
    };
    listen((Ipv6Addr::UNSPECIFIED, port).into()).or_else(|error: std::io::Error| {
        if error.kind() == std::io::ErrorKind::AddrInUse {
            return Err(error);
        }
        listen((Ipv4Addr::UNSPECIFIED, port).into())
    })
}

/// kube-proxy's answer for a Service with `local` ready endpoints on this node.
fn answer(service: &ServiceKey, local: usize) -> Response {
    let status = if local > 0 { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::json!({
        "service": { "namespace": &*service.namespace, "name": &*service.name },
        "localEndpoints": local,
        "serviceProxyHealthy": true,
    });
    (
        status,
        [
            (header::CONTENT_TYPE.as_str(), "application/json".to_owned()),
            ("x-content-type-options", "nosniff".to_owned()),
            ("x-load-balancing-endpoint-weight", local.to_string()),
        ],
        body.to_string(),
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn fetch(port: u16) -> String {
        let mut stream = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn servers_answer_follow_and_stop() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let port =
            std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let key = ServiceKey::new("shop", "web");
        let mut servers = HealthServers::new(runtime.handle().clone());
        assert!(servers.set(BTreeMap::from([(port, (key.clone(), 300))])).is_empty());
        let text = fetch(port);
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        assert!(text.contains("\"localEndpoints\":300") && text.contains("\"name\":\"web\""), "{text}");
        servers.set(BTreeMap::from([(port, (key.clone(), 0))]));
        assert!(fetch(port).starts_with("HTTP/1.1 503"));
        let mut rival = HealthServers::new(runtime.handle().clone());
        assert_eq!(rival.set(BTreeMap::from([(port, (key, 1))])).len(), 1);
        servers.set(BTreeMap::new());
        assert!(servers.servers.is_empty());
    }
}
