//! Two monitors in one process, on loopback addresses.

use std::sync::atomic::{AtomicU16, Ordering};

use super::super::table::Hops;
use super::*;

/// Tests run side by side: each has a port of its own, outside of the range that sessions send from.
fn port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    20_000 + (std::process::id() % 1000) as u16 * 20 + NEXT.fetch_add(1, Ordering::Relaxed)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn config(local: &str, peer: &str, port: u16, hops: Hops) -> PeerConfig {
    let interval = Duration::from_millis(100);
    PeerConfig {
        key: PeerKey { peer: ip(peer), local: Some(ip(local)), interface: None, port },
        hops,
        timers: Timers::new(interval, interval, 3).unwrap(),
        passive: false,
    }
}

fn monitor(address: &str) -> Monitor {
    Monitor::start(MonitorConfig { listen: vec![ip(address)] }).unwrap()
}

/// Waits for a status, and returns when it was seen.
fn wait(handle: &SessionHandle, what: &str, wanted: impl Fn(&Status) -> bool) -> Instant {
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        if wanted(&handle.status.borrow()) {
            return Instant::now();
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("{what} did not come about: {:?}", *handle.status.borrow());
}

fn is_up(status: &Status) -> bool {
    status.state == State::Up
}

#[test]
fn comes_up_at_once_and_tells_a_planned_end_from_a_broken_path() {
    let port = port();
    let (a, b) = (monitor("127.0.0.1"), monitor("127.0.0.2"));
    let at_a = a.watch(config("127.0.0.1", "127.0.0.2", port, Hops::Single)).unwrap();
    let begin = Instant::now();
    let at_b = b.watch(config("127.0.0.2", "127.0.0.1", port, Hops::Single)).unwrap();
    wait(&at_b, "b up", is_up);
    wait(&at_a, "a up", is_up);
    assert!(begin.elapsed() < Duration::from_secs(2));
    // Faster packets are agreed on within two slow intervals.
    let end = Instant::now() + Duration::from_secs(5);
    while b.reports().unwrap()[0].detection_time != Duration::from_millis(300) {
        assert!(Instant::now() < end, "{:?}", b.reports());
        thread::sleep(Duration::from_millis(10));
    }
    drop(at_a);
    wait(&at_b, "the news", |status| status.down == Some(DownReason::NeighbourAdminDown));
    let at_a = a.watch(config("127.0.0.1", "127.0.0.2", port, Hops::Single)).unwrap();
    wait(&at_b, "b up again", is_up);
    wait(&at_a, "a up again", is_up);
    a.stop();
    wait(&at_b, "the news", |status| status.down == Some(DownReason::NeighbourAdminDown));
    assert!(matches!(at_a.set_admin_down(true), Err(MonitorError::Ended)));
    let report = b.reports().unwrap()[0];
    assert_eq!((report.counters.ups, report.counters.downs), (2, 2));
}

#[test]
fn refuses_what_it_cannot_do_by_name() {
    let port = port();
    let a = monitor("127.0.0.1");
    let near = config("127.0.0.1", "127.0.0.2", port, Hops::Single);
    let kept = a.watch(near).unwrap();
    assert!(matches!(a.watch(near), Err(MonitorError::Duplicate { .. })));
    let six = config("::1", "::1", port, Hops::Single);
    assert!(matches!(a.watch(six), Err(MonitorError::Family { .. })));
    let elsewhere = monitor("127.0.0.1");
    let error = elsewhere.watch(near).unwrap_err();
    assert!(error.to_string().contains("another BFD daemon"), "{error}");
    // The port is free as soon as the session is gone.
    drop(kept);
    let end = Instant::now() + Duration::from_secs(10);
    while elsewhere.watch(near).is_err() {
        assert!(Instant::now() < end, "the port stays taken");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_forged_or_far_packet_does_no_harm() {
    let port = port();
    let a = monitor("127.0.0.1");
    let kept = a.watch(config("127.0.0.1", "127.0.0.2", port, Hops::Single)).unwrap();
    // From the right address, but through a router: hop limit 64.
    let far = Stranger::bind("127.0.0.2:0");
    let packet = super::super::packet::Packet {
        diagnostic: Diagnostic::None,
        state: State::Down,
        poll: false,
        final_: false,
        control_plane_independent: false,
        demand: false,
        detect_multiplier: 3,
        my_discriminator: Discriminator::new(7).unwrap(),
        your_discriminator: None,
        desired_min_tx: 1_000_000,
        required_min_rx: 1_000_000,
        required_min_echo_rx: 0,
    };
    far.send(&packet.encode(), port);
    let end = Instant::now() + Duration::from_secs(10);
    while a.reports().unwrap()[0].counters.discarded == 0 {
        assert!(Instant::now() < end);
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(kept.status.borrow().state, State::Down);
    assert_eq!(a.reports().unwrap()[0].counters.received, 0);
    // The same with hop limit 255 is believed.
    far.0.set_ttl(255).unwrap();
    far.send(&packet.encode(), port);
    while a.reports().unwrap()[0].state != State::Init {
        assert!(Instant::now() < end);
        thread::sleep(Duration::from_millis(5));
    }
}

struct Stranger(std::net::UdpSocket);

impl Stranger {
    fn bind(address: &str) -> Self {
        Self(std::net::UdpSocket::bind(address).unwrap())
    }

    fn send(&self, bytes: &[u8], port: u16) {
        self.0.send_to(bytes, ("127.0.0.1", port)).unwrap();
    }
}
