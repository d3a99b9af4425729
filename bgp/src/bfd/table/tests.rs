use std::time::Duration;

use super::super::packet::State;
use super::super::session::DownReason;
use super::*;

const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

fn config(peer: IpAddr, hops: Hops) -> PeerConfig {
    PeerConfig {
        key: PeerKey { peer, local: None, interface: None, port: hops.port() },
        hops,
        timers: Timers::new(Duration::from_millis(100), Duration::from_millis(100), 3).unwrap(),
        passive: false,
    }
}

fn from(source: IpAddr, destination: IpAddr, hops: Hops) -> Received {
    Received { source, destination, interface: 2, port: hops.port(), ttl: MAXIMUM_TTL }
}

/// Two tables joined by a wire without delay, and a clock that jumps from deadline to deadline.
struct Pair {
    a: Table,
    b: Table,
    now: Instant,
    hops: Hops,
    /// Whether packets from A arrive.
    a_to_b: bool,
}

impl Pair {
    fn new(hops: Hops) -> Self {
        let mut pair =
            Self { a: Table::default(), b: Table::default(), now: Instant::now(), hops, a_to_b: true };
        pair.a.add(config(B, hops), pair.now).unwrap();
        pair.b.add(config(A, hops), pair.now).unwrap();
        pair
    }

    fn step(&mut self) {
        let (mut to_b, mut to_a) = (Vec::new(), Vec::new());
        self.a.run(self.now, |_, _, packet| to_b.push(packet));
        self.b.run(self.now, |_, _, packet| to_a.push(packet));
        for packet in to_b.into_iter().filter(|_| self.a_to_b) {
            let _ = self.b.receive(&packet.encode(), &from(A, B, self.hops), self.now);
        }
        for packet in to_a {
            let _ = self.a.receive(&packet.encode(), &from(B, A, self.hops), self.now);
        }
    }

    fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.step();
            let next = [self.a.deadline(), self.b.deadline()].into_iter().flatten().min();
            match next {
                Some(next) if next <= end => self.now = self.now.max(next),
                _ => break,
            }
        }
        self.now = end;
    }
}

fn events(table: &mut Table) -> Vec<Event> {
    std::iter::from_fn(|| table.event().map(|(_, event)| event)).collect()
}

fn only(table: &Table) -> Discriminator {
    let mut all = table.discriminators();
    let one = all.next().unwrap();
    assert_eq!(all.next(), None);
    one
}

#[test]
fn comes_up_speeds_up_and_detects_in_time() {
    for hops in [Hops::Single, Hops::Multi { minimum_ttl: 0 }] {
        let mut pair = Pair::new(hops);
        pair.run_for(Duration::from_secs(3));
        assert_eq!(events(&mut pair.a), [Event::Up]);
        assert_eq!(events(&mut pair.b), [Event::Up]);
        let b = only(&pair.b);
        let (_, session, before) = pair.b.get(b).unwrap();
        assert_eq!(session.detection_time(), Duration::from_millis(300));
        pair.run_for(Duration::from_secs(10));
        let (_, _, after) = pair.b.get(b).unwrap();
        // 75 to 100 ms apart, with the mean at 87.5.
        let sent = after.sent - before.sent;
        assert!((100..=134).contains(&sent), "{sent} packets in 10 s");
        assert!(events(&mut pair.b).is_empty());

        pair.a_to_b = false;
        pair.run_for(Duration::from_millis(300));
        assert_eq!(events(&mut pair.b), [Event::Down(DownReason::DetectionTimeExpired)]);
        // A still hears B and learns from it.
        assert!(matches!(events(&mut pair.a)[..], [Event::Down(DownReason::NeighbourDown(_))]));
        pair.a_to_b = true;
        pair.run_for(Duration::from_secs(3));
        assert_eq!(events(&mut pair.b), [Event::Up]);
    }
}

#[test]
fn closes_without_harm_and_may_come_again() {
    let mut pair = Pair::new(Hops::Single);
    pair.run_for(Duration::from_secs(3));
    events(&mut pair.b);
    let a = only(&pair.a);
    pair.a.close(a, pair.now);
    assert_eq!((pair.a.len(), pair.a.is_empty()), (0, false));
    pair.run_for(Duration::from_millis(400));
    assert_eq!(events(&mut pair.b), [Event::Down(DownReason::NeighbourAdminDown)]);
    assert!(pair.a.is_empty());

    // The same peer again while the old session is still saying goodbye.
    let mut pair = Pair::new(Hops::Single);
    pair.run_for(Duration::from_secs(3));
    let a = only(&pair.a);
    pair.a.close(a, pair.now);
    pair.step();
    let again = pair.a.add(config(B, Hops::Single), pair.now).unwrap();
    assert_eq!(only(&pair.a), again);
    pair.run_for(Duration::from_secs(3));
    assert_eq!(pair.a.get(again).unwrap().1.state(), State::Up);
    assert_eq!(pair.a.add(config(B, Hops::Single), pair.now), Err(again));
}

#[test]
fn hears_a_peer_that_restarted() {
    let mut pair = Pair::new(Hops::Single);
    pair.run_for(Duration::from_secs(3));
    events(&mut pair.b);
    pair.a = Table::default();
    pair.a.add(config(B, Hops::Single), pair.now).unwrap();
    pair.run_for(Duration::from_secs(3));
    let seen = events(&mut pair.b);
    assert!(matches!(seen[..], [Event::Down(_), Event::Up]), "{seen:?}");
}

#[test]
fn believes_only_the_right_packets() {
    let now = Instant::now();
    let mut table = Table::default();
    let near = table.add(config(A, Hops::Single), now).unwrap();
    let far = table.add(config(A, Hops::Multi { minimum_ttl: 250 }), now).unwrap();
    let bound = PeerKey { interface: Some(7), local: Some(B), ..config(A, Hops::Single).key };
    let bound = PeerConfig { key: PeerKey { peer: B, ..bound }, ..config(A, Hops::Single) };
    let bound_id = table.add(bound, now).unwrap();

    let mut peer = Session::new(Timers::default(), false, Discriminator::new(9).unwrap(), 0, now);
    let hello = peer.transmit(now).unwrap();
    let single = from(A, B, Hops::Single);
    let multi = from(A, B, Hops::Multi { minimum_ttl: 0 });
    let addressed = |discriminator| Packet { your_discriminator: Some(discriminator), ..hello };
    let cases: [(Packet, Received, Result<Discriminator, Discard>); 11] = [
        (hello, single, Ok(near)),
        (hello, Received { ttl: 254, ..single }, Err(Discard::Ttl { ttl: 254, minimum: 255 })),
        (hello, multi, Ok(far)),
        (hello, Received { ttl: 250, ..multi }, Ok(far)),
        (hello, Received { ttl: 249, ..multi }, Err(Discard::Ttl { ttl: 249, minimum: 250 })),
        (hello, Received { source: B, ..single }, Err(Discard::UnknownPeer)),
        (hello, Received { source: B, interface: 7, ..single }, Ok(bound_id)),
        (addressed(near), single, Ok(near)),
        (addressed(near), Received { source: B, ..single }, Err(Discard::WrongPeer(near))),
        (addressed(far), single, Err(Discard::WrongPeer(far))),
        (
            addressed(Discriminator::new(1).unwrap()),
            single,
            Err(Discard::UnknownDiscriminator(Discriminator::new(1).unwrap())),
        ),
    ];
    for (packet, received, expected) in cases {
        assert_eq!(table.receive(&packet.encode(), &received, now), expected, "{received:?}");
    }
    let short = table.receive(&[0; 5], &single, now);
    assert_eq!(short, Err(Discard::Packet(PacketError::Truncated(5))));
    assert_eq!(table.get(near).unwrap().2.discarded, 2);
}

#[test]
fn passive_sessions_wait() {
    let now = Instant::now();
    let mut table = Table::default();
    let waiting = table.add(PeerConfig { passive: true, ..config(A, Hops::Single) }, now).unwrap();
    let mut sent = 0;
    table.run(now + Duration::from_secs(60), |_, _, _| sent += 1);
    assert_eq!((sent, table.deadline()), (0, None));
    let mut peer = Session::new(Timers::default(), false, Discriminator::new(9).unwrap(), 0, now);
    let hello = peer.transmit(now).unwrap();
    table.receive(&hello.encode(), &from(A, B, Hops::Single), now).unwrap();
    table.run(now, |_, _, _| sent += 1);
    assert_eq!((sent, table.get(waiting).unwrap().1.state()), (1, State::Init));
}
