use proptest::prelude::*;

use super::*;

const STATES: [State; 4] = [State::AdminDown, State::Down, State::Init, State::Up];

fn timers(tx: u64, rx: u64, multiplier: u8) -> Timers {
    Timers::new(Duration::from_millis(tx), Duration::from_millis(rx), multiplier).unwrap()
}

fn discriminator(number: u32) -> Discriminator {
    Discriminator::new(number).unwrap()
}

fn session(now: Instant) -> Session {
    Session::new(timers(100, 100, 3), false, discriminator(1), 42, now)
}

/// What a peer with 100 ms both ways and multiplier 3 says in this state.
fn heard(state: State) -> Packet {
    Packet {
        diagnostic: Diagnostic::None,
        state,
        poll: false,
        final_: false,
        control_plane_independent: false,
        demand: false,
        detect_multiplier: 3,
        my_discriminator: discriminator(2),
        your_discriminator: Some(discriminator(1)),
        desired_min_tx: 100_000,
        required_min_rx: 100_000,
        required_min_echo_rx: 0,
    }
}

/// A session brought into a state by packets alone, its output and events drained.
fn in_state(state: State, now: Instant) -> Session {
    let mut session = session(now);
    match state {
        State::AdminDown => session.set_admin_down(true),
        State::Down => {}
        State::Init => session.receive(&heard(State::Down), now),
        State::Up => session.receive(&heard(State::Init), now),
    }
    assert_eq!(session.state(), state);
    while session.transmit(now).is_some() {}
    while session.event().is_some() {}
    session
}

fn events(session: &mut Session) -> Vec<Event> {
    std::iter::from_fn(|| session.event()).collect()
}

/// RFC 5880 section 6.8.6, all sixteen cells: our state, what is heard, the state after, the event.
#[test]
fn every_state_against_every_packet() {
    use State::{AdminDown, Down, Init, Up};
    let neighbour_down = Some(Event::Down(DownReason::NeighbourDown(Diagnostic::None)));
    let neighbour_admin = Some(Event::Down(DownReason::NeighbourAdminDown));
    let cells = [
        (AdminDown, AdminDown, AdminDown, None),
        (AdminDown, Down, AdminDown, None),
        (AdminDown, Init, AdminDown, None),
        (AdminDown, Up, AdminDown, None),
        (Down, AdminDown, Down, None),
        (Down, Down, Init, None),
        (Down, Init, Up, Some(Event::Up)),
        (Down, Up, Down, None),
        (Init, AdminDown, Down, None),
        (Init, Down, Init, None),
        (Init, Init, Up, Some(Event::Up)),
        (Init, Up, Up, Some(Event::Up)),
        (Up, AdminDown, Down, neighbour_admin),
        (Up, Down, Down, neighbour_down),
        (Up, Init, Up, None),
        (Up, Up, Up, None),
    ];
    assert_eq!(cells.len(), STATES.len() * STATES.len());
    let now = Instant::now();
    for (before, packet, after, event) in cells {
        let mut session = in_state(before, now);
        session.receive(&heard(packet), now);
        assert_eq!(session.state(), after, "{before} hears {packet}");
        assert_eq!(events(&mut session), event.into_iter().collect::<Vec<_>>(), "{before} hears {packet}");
        // Whatever changes the state is said at once.
        assert_eq!(session.transmit(now).map(|sent| sent.state), (before != after).then_some(after));
    }
}

#[test]
fn every_state_against_silence_and_administration() {
    use State::{AdminDown, Down, Init, Up};
    let now = Instant::now();
    let expired = Some(Event::Down(DownReason::DetectionTimeExpired));
    for (before, after, event) in
        [(AdminDown, AdminDown, None), (Down, Down, None), (Init, Down, None), (Up, Down, expired)]
    {
        let mut session = in_state(before, now);
        session.advance(now + Duration::from_secs(10));
        assert_eq!(session.state(), after, "{before} hears nothing");
        assert_eq!(events(&mut session), event.into_iter().collect::<Vec<_>>());
        assert_eq!(session.remote_discriminator(), None, "a lost peer is forgotten");
        let expected = if before == after { Diagnostic::None } else { Diagnostic::DetectionTimeExpired };
        if before != AdminDown {
            assert_eq!(session.diagnostic(), expected);
        }
    }
    let closed = Some(Event::Down(DownReason::AdminDown));
    for (before, event) in [(AdminDown, None), (Down, None), (Init, None), (Up, closed)] {
        let mut session = in_state(before, now);
        session.set_admin_down(true);
        assert_eq!(session.state(), AdminDown);
        assert_eq!(events(&mut session), event.into_iter().collect::<Vec<_>>());
        assert_eq!(session.diagnostic(), Diagnostic::AdminDown);
        session.set_admin_down(false);
        assert_eq!(session.state(), Down);
        session.receive(&heard(State::Init), now);
        assert_eq!(session.state(), Up);
    }
    for before in [Down, Init, Up] {
        let mut session = in_state(before, now);
        session.set_admin_down(false);
        assert_eq!(session.state(), before);
    }
}

#[test]
fn detects_after_the_agreed_time() {
    let now = Instant::now();
    // Our 100 ms against what the peer sends and its multiplier.
    for (peer_tx, multiplier, expected) in [(100_000, 3, 300), (10_000, 3, 300), (400_000, 5, 2000)] {
        let mut session = in_state(State::Up, now);
        let packet = Packet { desired_min_tx: peer_tx, detect_multiplier: multiplier, ..heard(State::Up) };
        session.receive(&packet, now);
        let expected = Duration::from_millis(expected);
        assert_eq!(session.detection_time(), expected);
        session.advance(now + expected - Duration::from_micros(1));
        assert_eq!(session.state(), State::Up);
        session.advance(now + expected);
        assert_eq!(session.state(), State::Down);
    }
}

/// The moments at which packets go out until `end`, with the packets.
fn sent_until(session: &mut Session, mut now: Instant, end: Instant) -> Vec<(Instant, Packet)> {
    let mut sent = Vec::new();
    while now <= end {
        while let Some(packet) = session.transmit(now) {
            sent.push((now, packet));
        }
        match session.periodic_deadline() {
            Some(deadline) => now = deadline,
            None => break,
        }
    }
    sent
}

#[test]
fn keeps_to_one_packet_a_second_until_up() {
    let now = Instant::now();
    for state in [State::AdminDown, State::Down, State::Init] {
        let mut session = in_state(state, now);
        assert_eq!(session.packet(false, false).desired_min_tx, SLOW, "{state}");
        let sent = sent_until(&mut session, now, now + Duration::from_secs(20));
        assert!((20..=27).contains(&sent.len()), "{} packets in {state}", sent.len());
    }
    let slow = Session::new(timers(2500, 100, 3), false, discriminator(1), 0, now);
    assert_eq!(slow.packet(false, false).desired_min_tx, 2_500_000);
}

#[test]
fn jitters_within_bounds() {
    let now = Instant::now();
    for (multiplier, least, most) in [(3, 75.0, 100.0), (1, 75.0, 90.0)] {
        let mut session = in_state(State::Up, now);
        session.set_timers(timers(100, 100, multiplier));
        session.receive(&Packet { final_: true, ..heard(State::Up) }, now);
        // The first interval was drawn under the old multiplier.
        let sent = sent_until(&mut session, now, now + Duration::from_secs(60)).split_off(1);
        let gaps: Vec<f64> =
            sent.windows(2).map(|pair| (pair[1].0 - pair[0].0).as_secs_f64() * 1000.0).collect();
        let (low, high) =
            gaps.iter().fold((f64::MAX, 0.0_f64), |(low, high), &gap| (low.min(gap), high.max(gap)));
        assert!(low >= least && high <= most, "{low} to {high} ms with multiplier {multiplier}");
        assert!(low < least + 2.0 && high > most - 2.0, "{low} to {high} ms does not use the range");
    }
}

#[test]
fn agrees_on_faster_packets_after_up_by_a_poll() {
    let now = Instant::now();
    let mut session = session(now);
    session.transmit(now).unwrap();
    session.receive(&heard(State::Init), now);
    let sent = session.transmit(now).unwrap();
    assert_eq!((sent.state, sent.poll, sent.desired_min_tx), (State::Up, true, 100_000));
    // Faster needs nobody's leave; P stays until it is answered.
    let sent = sent_until(&mut session, now, now + Duration::from_secs(1));
    assert!(sent.len() >= 10 && sent.iter().all(|(_, packet)| packet.poll));
    session.receive(&Packet { final_: true, ..heard(State::Up) }, now);
    let sent = sent_until(&mut session, now + Duration::from_secs(1), now + Duration::from_secs(2));
    assert!(sent.len() >= 9 && sent.iter().all(|(_, packet)| !packet.poll));
}

#[test]
fn slows_down_only_when_the_peer_agreed() {
    let now = Instant::now();
    let mut session = in_state(State::Up, now);
    session.receive(&Packet { final_: true, ..heard(State::Up) }, now);
    session.set_timers(timers(500, 100, 3));
    assert_eq!(session.transmit_interval(), 100_000);
    let sent = sent_until(&mut session, now, now + Duration::from_millis(100));
    let [(_, polled)] = sent[..] else { panic!("{sent:?}") };
    assert!(polled.poll && polled.desired_min_tx == 500_000);
    session.receive(&Packet { final_: true, ..heard(State::Up) }, now);
    assert_eq!(session.transmit_interval(), 500_000);

    // To expect packets sooner waits as well; to expect them later does not.
    session.set_timers(timers(500, 50, 3));
    assert_eq!(session.detection_time(), Duration::from_millis(300));
    session.receive(&Packet { final_: true, desired_min_tx: 50_000, ..heard(State::Up) }, now);
    assert_eq!(session.detection_time(), Duration::from_millis(150));
    session.set_timers(timers(500, 400, 3));
    assert_eq!(session.detection_time(), Duration::from_millis(1200));
}

#[test]
fn a_change_during_a_poll_gets_a_poll_of_its_own() {
    let now = Instant::now();
    let mut session = in_state(State::Up, now);
    session.receive(&Packet { final_: true, ..heard(State::Up) }, now);
    session.set_timers(timers(500, 100, 3));
    session.set_timers(timers(700, 100, 3));
    // The answer may be to the first values: nothing is settled by it.
    session.receive(&Packet { final_: true, ..heard(State::Up) }, now);
    assert_eq!(session.transmit_interval(), 100_000);
    let polls: Vec<bool> = sent_until(&mut session, now, now + Duration::from_millis(250))
        .iter()
        .map(|(_, packet)| packet.poll)
        .collect();
    assert_eq!(polls[..2], [false, true], "two sequences are told apart by a packet without P");
    session.receive(&Packet { final_: true, ..heard(State::Up) }, now);
    assert_eq!(session.transmit_interval(), 700_000);
}

#[test]
fn answers_polls_at_once_whatever_the_timers_say() {
    let now = Instant::now();
    for state in [State::Down, State::Init, State::Up] {
        let mut session = in_state(state, now);
        let mut question = heard(State::Up);
        question.poll = true;
        question.required_min_rx = 0;
        question.demand = true;
        session.receive(&question, now);
        assert!(session.deadline().is_some_and(|deadline| deadline <= now));
        let answer = session.transmit(now).unwrap();
        assert!(answer.final_ && !answer.poll, "P and F together are forbidden");
        assert_eq!(session.transmit(now), None);
    }
}

#[test]
fn respects_demand_mode_and_a_peer_that_wants_nothing() {
    let now = Instant::now();
    let end = now + Duration::from_secs(5);
    let mut session = in_state(State::Up, now);
    session.receive(&Packet { final_: true, demand: true, ..heard(State::Up) }, now);
    assert_eq!(sent_until(&mut session, now, end), []);
    assert_eq!(session.state(), State::Up);
    // A poll of ours is sent all the same, and ends the silence only until it is answered.
    session.set_timers(timers(200, 100, 3));
    assert!(sent_until(&mut session, now, end).iter().all(|(_, packet)| packet.poll));
    session.receive(&Packet { final_: true, demand: true, ..heard(State::Up) }, now);
    assert_eq!(sent_until(&mut session, now, end), []);
    // Demand mode holds only while both are up.
    session.receive(&Packet { demand: true, ..heard(State::Down) }, now);
    assert!(!sent_until(&mut session, now, end).is_empty());

    let mut session = in_state(State::Up, now);
    session.receive(&Packet { final_: true, required_min_rx: 0, ..heard(State::Up) }, now);
    assert_eq!(sent_until(&mut session, now, end), []);
}

#[test]
fn sends_no_faster_than_the_peer_can_hear() {
    let now = Instant::now();
    let mut session = in_state(State::Up, now);
    session.receive(&Packet { final_: true, required_min_rx: 1_000_000, ..heard(State::Up) }, now);
    let sent = sent_until(&mut session, now, now + Duration::from_secs(20));
    assert!((20..=27).contains(&sent.len()), "{}", sent.len());
}

#[test]
fn refuses_timers_that_do_not_fit() {
    let ms = Duration::from_millis;
    let interval = |name, interval| Err(TimersError::Interval { name, interval });
    assert_eq!(Timers::new(ms(0), ms(100), 3), interval("transmit", ms(0)));
    assert_eq!(Timers::new(ms(4_294_968), ms(100), 3), interval("transmit", ms(4_294_968)));
    assert_eq!(Timers::new(ms(100), ms(0), 3), interval("receive", ms(0)));
    assert_eq!(Timers::new(ms(100), ms(100), 0), Err(TimersError::ZeroMultiplier));
    assert!(Timers::new(ms(1), ms(4_294_967), 255).is_ok());
}

#[derive(Debug, Clone)]
enum Input {
    Packet(Packet),
    Pass(u64),
    AdminDown(bool),
    Timers(u64, u64, u8),
}

fn input() -> impl Strategy<Value = Input> {
    let interval = prop_oneof![Just(0_u32), 1000..2_000_000_u32, any::<u32>()];
    let packet = (0..4_usize, any::<[bool; 4]>(), 1..=255_u8, interval.clone(), interval).prop_map(
        |(state, [poll, final_, demand, independent], detect_multiplier, tx, rx)| {
            Input::Packet(Packet {
                poll,
                final_,
                demand,
                control_plane_independent: independent,
                detect_multiplier,
                desired_min_tx: tx,
                required_min_rx: rx,
                ..heard(STATES[state])
            })
        },
    );
    prop_oneof![
        8 => packet,
        4 => (0..3_000_000_u64).prop_map(Input::Pass),
        1 => any::<bool>().prop_map(Input::AdminDown),
        1 => (1..5000_u64, 1..5000_u64, 1..=255_u8).prop_map(|(tx, rx, multiplier)| Input::Timers(tx, rx, multiplier)),
    ]
}

proptest! {
    /// Laws that hold after any sequence of inputs.
    #[test]
    fn laws(inputs in prop::collection::vec(input(), 1..200), passive in any::<bool>()) {
        let mut now = Instant::now();
        let mut session = Session::new(timers(100, 100, 3), passive, discriminator(1), 7, now);
        let mut up = false;
        for input in inputs {
            match input {
                Input::Packet(packet) => session.receive(&packet, now),
                Input::Pass(microseconds) => now += Duration::from_micros(microseconds),
                Input::AdminDown(down) => session.set_admin_down(down),
                Input::Timers(tx, rx, multiplier) => session.set_timers(timers(tx, rx, multiplier)),
            }
            session.advance(now);
            let mut sent = 0;
            while let Some(packet) = session.transmit(now) {
                sent += 1;
                prop_assert!(sent <= 2, "one answer and one packet of its own at most");
                prop_assert!(!(packet.poll && packet.final_));
                prop_assert_eq!(packet.state, session.state());
                prop_assert!(packet.state == State::Up || packet.desired_min_tx >= SLOW);
                prop_assert!(packet.final_ || !passive || session.remote_discriminator().is_some());
                prop_assert_eq!(Packet::decode(&packet.encode()).ok(), Some(packet).filter(|packet| {
                    packet.your_discriminator.is_some() || !matches!(packet.state, State::Init | State::Up)
                }));
            }
            // Nothing is left to do now, so a caller that sleeps until the deadline never spins.
            prop_assert!(session.deadline().is_none_or(|deadline| deadline > now));
            for event in events(&mut session) {
                prop_assert_eq!(event == Event::Up, !up, "up and down take turns");
                up = !up;
            }
            prop_assert_eq!(up, session.state() == State::Up);
        }
    }
}
