//! The listening socket, its connections, and outages.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::routes::{self, Caller};
use crate::state::State;

/// Serves until the task is dropped. In an outage the socket is closed, so that connections are
/// refused, and comes back on the same port.
pub async fn run(state: Arc<State>, listener: TcpListener, tls: Option<TlsAcceptor>) -> io::Result<()> {
    let address = listener.local_addr()?;
    let mut listener = Some(listener);
    let mut outage = state.faults.outage.subscribe();
    loop {
        if *outage.borrow_and_update() {
            listener = None;
            let _ = outage.changed().await;
            continue;
        }
        let open = match listener.take() {
            Some(open) => open,
            None => reopen(address).await,
        };
        tokio::select! {
            accepted = open.accept() => match accepted {
                Ok((stream, _)) => {
                    let _ = stream.set_nodelay(true);
                    tokio::spawn(welcome(state.clone(), stream, tls.clone()));
                }
                // Out of descriptors or a connection that died in the queue: go on.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            _ = outage.changed() => {}
        }
        listener = Some(open);
    }
}

async fn reopen(address: SocketAddr) -> TcpListener {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn welcome(state: Arc<State>, stream: TcpStream, tls: Option<TlsAcceptor>) {
    match tls {
        None => connection(state, stream, Caller::default()).await,
        Some(acceptor) => match acceptor.accept(stream).await {
            Ok(stream) => {
                let verified = stream.get_ref().1.peer_certificates().is_some();
                connection(state, stream, Caller { verified }).await;
            }
            // A client that does not trust us ends here; tests count how often.
            Err(_) => state.faults.count("handshake", "failed"),
        },
    }
}

async fn connection<S>(state: Arc<State>, stream: S, caller: Caller)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut outage = state.faults.outage.subscribe();
    let service = service_fn(move |request| routes::handle(state.clone(), caller, request));
    let served =
        http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // Errors are the client's business: it went away, or a fault cut it off.
        _ = served => {}
        _ = outage.wait_for(|on| *on) => {}
    }
}
