//! One Service gets and loses its only endpoint: from the write to the API until a peer has read the UPDATE.
//! The floor is that UPDATE itself, written to a connection between the same namespaces and read.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferroute_bgp::message::{Codec, Families};
use ferroute_kit::Netns;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::node::{Daemon, NODE, api};
use super::{PATIENCE, RECEIVER, namespaces};
use crate::report::spread;
use crate::routers::{ROUTER, establish, routes};

/// Services in the cluster, each with an address that is announced.
pub const SERVICES: u32 = 1000;
/// Changes in one run, each to and fro; the run's figure is their median.
const CHANGES: u32 = 50;
/// Between two changes.
const PAUSE: Duration = Duration::from_millis(20);
const SLICES: &str = "endpointslices.discovery.k8s.io";

/// One run: medians of its changes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Change {
    /// From the write of an endpoint until the announcement is read, in milliseconds.
    pub announced_ms: f64,
    /// From the removal of that endpoint until the withdrawal is read, in milliseconds.
    pub withdrawn_ms: f64,
    /// From the write of such an UPDATE until it is read, in milliseconds.
    pub floor_ms: f64,
}

/// Measures changes once.
///
/// # Errors
///
/// When the daemon does not start, or an UPDATE does not come.
pub fn measure(program: &Path) -> Result<Change> {
    let (outside, inside) = namespaces()?;
    let server = api(&inside)?;
    server.load("services", (0..SERVICES).map(service))?;
    server.load(SLICES, (0..SERVICES).map(|index| slice(index, &endpoints())))?;
    let flags = ["--advertise-external-ip", "--service-external-ip-range=10.200.0.0/16"];
    let daemon = Daemon::start(program, &inside, &server, &flags)?;
    let updates = listen(&outside).with_context(|| daemon.log())?;
    let wire = Wire::new(&outside, &inside)?;
    // The one that changes is somewhere in the middle.
    let index = SERVICES / 2;
    let prefix = [&[32][..], &address(index).octets()].concat();
    let mut missing: BTreeSet<Vec<u8>> =
        (0..SERVICES).map(|index| [&[32][..], &address(index).octets()].concat()).collect();
    while !missing.is_empty() {
        let (_, frame) = updates.wait(|_, new| !new.is_empty()).with_context(|| daemon.log())?;
        for prefix in routes(&frame).into_iter().flat_map(|(_, new)| prefixes(new)) {
            missing.remove(prefix);
        }
    }
    let (mut announced, mut withdrawn, mut floor) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..CHANGES {
        for (endpoints, times) in [(json!([]), &mut withdrawn), (endpoints(), &mut announced)] {
            std::thread::sleep(PAUSE);
            let wanted = |gone: &[u8], new: &[u8]| {
                prefixes(if endpoints == json!([]) { gone } else { new }).any(|one| one == prefix)
            };
            let begun = Instant::now();
            server.patch(SLICES, "default", &name(index), json!({"endpoints": endpoints}))?;
            let (at, frame) = updates.wait(wanted)?;
            times.push(at.duration_since(begun));
            std::thread::sleep(PAUSE);
            floor.push(wire.carry(&frame)?);
        }
    }
    let median = |times: Vec<Duration>| spread(times.iter().map(|time| time.as_secs_f64() * 1e3)).1;
    Ok(Change { announced_ms: median(announced), withdrawn_ms: median(withdrawn), floor_ms: median(floor) })
}

fn name(index: u32) -> String {
    format!("web-{index:04}")
}

fn address(index: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 200, 0, 0).to_bits() + 1 + index)
}

fn service(index: u32) -> Value {
    let cluster_ip = Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 1, 0).to_bits() + index).to_string();
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": name(index), "uid": format!("uid-{index}"),
            "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"type": "ClusterIP", "clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ipFamilies": ["IPv4"],
            "externalIPs": [address(index).to_string()],
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}]},
        "status": {"loadBalancer": {}},
    })
}

fn endpoints() -> Value {
    json!([{"addresses": ["10.128.0.9"], "nodeName": NODE,
        "conditions": {"ready": true, "serving": true, "terminating": false}}])
}

fn slice(index: u32, endpoints: &Value) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"namespace": "default", "name": name(index), "uid": format!("slice-{index}"),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"kubernetes.io/service-name": name(index)}},
        "addressType": "IPv4", "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        "endpoints": endpoints,
    })
}

/// The prefixes of a list, with their lengths in front (RFC 4271 section 4.3).
fn prefixes(mut list: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (first, after) = list.split_at_checked(1 + usize::from(list.first()?.div_ceil(8)))?;
        list = after;
        Some(first)
    })
}

/// UPDATEs with the time at which each was read.
struct Updates(Receiver<(Instant, Vec<u8>)>);

impl Updates {
    /// The first from here on of which this holds, given what it withdraws and announces.
    fn wait(&self, wanted: impl Fn(&[u8], &[u8]) -> bool) -> Result<(Instant, Vec<u8>)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.0.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((at, frame)) if routes(&frame).is_some_and(|(gone, new)| wanted(gone, new)) => {
                    return Ok((at, frame));
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("no UPDATE within {PATIENCE:?}"),
                Err(RecvTimeoutError::Disconnected) => bail!("the session ended"),
            }
        }
    }
}

/// Establishes the session and reads on a thread of its own.
fn listen(outside: &Netns) -> Result<Updates> {
    let (mut stream, mut reader) = establish(outside, 0, Instant::now() + PATIENCE)?;
    stream.set_read_timeout(None)?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let codec = Codec { families: Families::IPV4, four_octet_as: true, ..Codec::initial() };
        loop {
            let now = Instant::now();
            while let Ok(Some(frame)) = reader.next_frame(&codec) {
                if sender.send((now, frame.to_vec())).is_err() {
                    return;
                }
            }
            match stream.read(reader.space()) {
                Ok(filled) if filled > 0 => reader.filled(filled),
                _ => return,
            }
        }
    });
    Ok(Updates(receiver))
}

/// A connection from the speaker's namespace to the receiver's.
struct Wire {
    near: TcpStream,
    arrived: Receiver<(Instant, usize)>,
}

impl Wire {
    fn new(outside: &Netns, inside: &Netns) -> Result<Self> {
        let listener = outside.run(|| TcpListener::bind((RECEIVER, 0)))?;
        let address = listener.local_addr()?;
        let near = inside.run(|| TcpStream::connect(address))?;
        near.set_nodelay(true)?;
        let (mut far, from) = listener.accept()?;
        ensure!(from.ip() == ROUTER, "{from} instead of {ROUTER}");
        let (sender, arrived) = channel();
        std::thread::spawn(move || {
            let mut scrap = [0; 1 << 12];
            while let Ok(length) = far.read(&mut scrap) {
                if length == 0 || sender.send((Instant::now(), length)).is_err() {
                    return;
                }
            }
        });
        Ok(Self { near, arrived })
    }

    /// How long some octets take.
    fn carry(&self, octets: &[u8]) -> Result<Duration> {
        let begun = Instant::now();
        (&self.near).write_all(octets)?;
        let mut missing = octets.len();
        loop {
            let (at, length) = self.arrived.recv_timeout(PATIENCE)?;
            missing = missing.saturating_sub(length);
            if missing == 0 {
                return Ok(at.duration_since(begun));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_found_among_others() {
        let list = [24, 10, 128, 0, 32, 10, 200, 0, 7, 0];
        let all = [&[24, 10, 128, 0][..], &[32, 10, 200, 0, 7], &[0]];
        assert_eq!(prefixes(&list).collect::<Vec<_>>(), all);
        assert_eq!(prefixes(&list[..7]).collect::<Vec<_>>(), all[..1], "the second is cut");
    }
}
