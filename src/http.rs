//! A small HTTP server for health, metrics and the admin socket: one request per connection, with
//! limits, so that a slow or silent client can hold neither the process nor the other clients.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;

pub use hyper::{Method, StatusCode};

use crate::supervise::panic_of;

/// Connections served at once; further ones wait in the kernel's queue.
const CONNECTIONS: usize = 64;
/// A client has this long to send its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// And this long for the whole exchange.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest request body taken; only a log level is ever sent.
const BODY_LIMIT: usize = 1024;

/// A request, as far as the answers need it.
#[derive(Clone, Debug)]
pub struct Request {
    /// GET, PUT, ...
    pub method: Method,
    /// Path without the query.
    pub path: String,
    /// What follows the question mark.
    pub query: String,
    /// The body; empty without one or when it is longer than any that is expected.
    pub body: Vec<u8>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: StatusCode,
    /// MIME type.
    pub content_type: &'static str,
    /// The body.
    pub body: String,
}

impl Answer {
    /// Plain text.
    pub fn text(status: StatusCode, body: impl Into<String>) -> Self {
        Self { status, content_type: "text/plain; charset=utf-8", body: body.into() }
    }

    /// JSON.
    pub fn json(body: String) -> Self {
        Self { status: StatusCode::OK, content_type: "application/json", body }
    }
}

/// Where connections come from.
pub enum Listener {
    /// A TCP port.
    Tcp(TcpListener),
    /// A Unix socket.
    Unix(UnixListener),
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Listener::Tcp(listener) => Box::new(listener.accept().await?.0),
            Listener::Unix(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

/// Opens a TCP port. The IPv6 wildcard takes IPv4 too, and becomes the IPv4 one on a machine
/// without IPv6.
pub fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    match bind_exactly(address) {
        Err(error)
            if address.ip().is_unspecified()
                && address.is_ipv6()
                && error.kind() != io::ErrorKind::AddrInUse
                && error.kind() != io::ErrorKind::PermissionDenied =>
        {
            bind_exactly(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()))
        }
        outcome => outcome,
    }
}

fn bind_exactly(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.bind(&address.into())?;
    socket.listen(128)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Serves for ever. A panic in `answer` ends the server with an error, like that of any room.
pub async fn serve<A, F>(listener: Listener, answer: A) -> anyhow::Result<()>
where
    A: Fn(Request) -> F + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let answer = Arc::new(answer);
    let mut exchanges = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if exchanges.len() < CONNECTIONS => match accepted {
                Ok(stream) => {
                    exchanges.spawn(exchange(stream, answer.clone()));
                }
                Err(error) => {
                    // Out of file descriptors, or a client that left at once: neither is for ever.
                    tracing::debug!(%error, "connection not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(ended) = exchanges.join_next() => {
                if let Some(message) = ended.err().and_then(panic_of) {
                    anyhow::bail!("an answer panicked: {message}");
                }
            }
        }
    }
}

async fn exchange<A, F>(stream: Box<dyn Stream>, answer: Arc<A>)
where
    A: Fn(Request) -> F + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let answer = answer.clone();
        async move {
            let request = take(request).await;
            let is_head = request.method == Method::HEAD;
            let answer = answer(request).await;
            let body = if is_head { Bytes::new() } else { Bytes::from(answer.body) };
            let mut response = hyper::Response::new(Full::new(body));
            *response.status_mut() = answer.status;
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(answer.content_type));
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // A client that goes away or talks nonsense is its own problem.
    let _ = tokio::time::timeout(EXCHANGE_TIMEOUT, connection).await;
}

async fn take(request: hyper::Request<Incoming>) -> Request {
    use http_body_util::{BodyExt, Limited};
    let (parts, body) = request.into_parts();
    let body = tokio::time::timeout(REQUEST_TIMEOUT, Limited::new(body, BODY_LIMIT).collect()).await;
    let body = body.ok().and_then(Result::ok).map(|body| body.to_bytes().to_vec()).unwrap_or_default();
    Request {
        method: parts.method,
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        body,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn server() -> SocketAddr {
        let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = Listener::Tcp(TcpListener::from_std(listener).unwrap());
        tokio::spawn(serve(listener, |request| async move {
            let text = format!("{} {} {}", request.method, request.path, request.body.len());
            Answer::text(StatusCode::OK, text)
        }));
        address
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn answers_and_closes() {
        let address = server().await;
        let text = ask(address, "GET /a?b HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(text.starts_with("HTTP/1.1 200 OK") && text.ends_with("GET /a 0"), "{text}");
        let text = ask(address, "HEAD /a HTTP/1.0\r\n\r\n").await;
        assert!(text.starts_with("HTTP/1.0 200 OK") && text.ends_with("\r\n\r\n"), "{text}");
        let text = ask(address, "PUT / HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc").await;
        assert!(text.ends_with("PUT / 3"), "{text}");
        let long = format!("PUT / HTTP/1.0\r\nContent-Length: 5000\r\n\r\n{}", "x".repeat(5000));
        assert!(ask(address, &long).await.ends_with("PUT / 0"));
        assert!(ask(address, "nonsense\r\n\r\n").await.starts_with("HTTP/1.1 400"));
    }

    #[tokio::test]
    async fn silent_clients_do_not_shut_the_others_out() {
        let address = server().await;
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS - 1 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let text = ask(address, "GET / HTTP/1.0\r\n\r\n").await;
        assert!(text.ends_with("GET / 0"), "{text}");
    }

    #[test]
    fn a_port_in_use_is_an_error() {
        let first = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let error = bind(first.local_addr().unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
