//! Every state against every event, and the stories that span several.

use std::fmt::Write;

use super::*;
use crate::message::{Asn, Cease, Families, NotificationError, OpenError};
use crate::session::tests::terms;
use crate::session::{Offer, PeerAsn, Restart};

const FIRST: ConnectionId = ConnectionId(1);
const SECOND: ConnectionId = ConnectionId(2);

/// This side is AS 65000 with identifier 10, the peer AS 65001 with identifier `id`.
fn settings(initiative: Initiative) -> Settings {
    Settings {
        terms: terms(65000, 10, PeerAsn::Exactly(Asn(65001))),
        initiative,
        longest_pause: Duration::from_secs(30),
    }
}

fn peer_open(id: u32) -> Open {
    terms(65001, id, PeerAsn::Any).open(Offer::Full, false)
}

struct Run {
    machine: Machine,
    now: Instant,
}

impl Run {
    fn new(initiative: Initiative) -> Self {
        Self { machine: Machine::new(settings(initiative), 1), now: Instant::now() }
    }

    fn on(&mut self, event: Event) -> Vec<Action> {
        self.machine.handle(event, self.now)
    }

    fn all(&mut self, events: impl IntoIterator<Item = Event>) -> &mut Self {
        for event in events {
            self.on(event);
        }
        self
    }

    /// Waits until the next deadline and lets it happen.
    fn wait(&mut self) -> Vec<Action> {
        let deadline = self.machine.deadline().expect("nothing to wait for");
        assert!(deadline >= self.now, "a deadline in the past");
        self.now = deadline;
        self.on(Event::Tick)
    }

    fn after(&mut self, seconds: u64) -> Vec<Action> {
        self.now += Duration::from_secs(seconds);
        self.on(Event::Tick)
    }

    fn established(initiative: Initiative) -> Self {
        let mut run = Self::new(initiative);
        let opened = if initiative == Initiative::Passive { Event::Accepted } else { Event::Dialed };
        run.all([Event::Start, opened(FIRST), Event::Open(FIRST, peer_open(20)), Event::Keepalive(FIRST)]);
        assert_eq!(run.machine.state(), State::Established);
        run
    }
}

/// Actions in a word each.
fn words(actions: &[Action]) -> String {
    let mut text = String::new();
    for action in actions {
        if !text.is_empty() {
            text.push(' ');
        }
        match action {
            Action::Dial => text.push_str("dial"),
            Action::AbandonDial => text.push_str("abandon"),
            Action::Send(id, Message::Notification(notification)) => {
                let (code, subcode) = notification.error.numbers();
                write!(text, "{}!{code}/{subcode}", id.0).unwrap();
            }
            Action::Send(id, message) => write!(text, "{}!{}", id.0, message.name()).unwrap(),
            Action::Close(id) => write!(text, "{}.close", id.0).unwrap(),
            Action::Up(id, _) => write!(text, "{}.up", id.0).unwrap(),
            Action::Down(down) => text.push_str(if down.retain { "down-retain" } else { "down" }),
            Action::Failed(_) => text.push_str("failed"),
        }
    }
    text
}

fn all_events() -> Vec<(&'static str, Event)> {
    let malformed = Notification::new(NotificationError::from_numbers(1, 1));
    vec![
        ("Start", Event::Start),
        ("Stop", Event::Stop(Shutdown::Administrative("bye".into()))),
        ("Dialed", Event::Dialed(SECOND)),
        ("DialFailed", Event::DialFailed("refused".into())),
        ("Accepted", Event::Accepted(SECOND)),
        ("Closed", Event::Closed(FIRST, None)),
        ("Open", Event::Open(FIRST, peer_open(20))),
        ("BadOpen", Event::Open(FIRST, Open { asn: Asn(65002), ..peer_open(20) })),
        ("Keepalive", Event::Keepalive(FIRST)),
        ("Update", Event::Update(FIRST)),
        ("Refresh", Event::Refresh(FIRST)),
        ("Notification", Event::Notification(FIRST, Notification::cease(Cease::AdministrativeShutdown))),
        ("Malformed", Event::Malformed(FIRST, malformed, "bad marker".into())),
        ("SendStalled", Event::SendStalled(FIRST)),
        (
            "Abort",
            Event::Abort {
                notification: Notification::cease(Cease::MaximumPrefixes),
                why: "too many".into(),
                pause: Pause::UntilStarted,
            },
        ),
        ("Tick", Event::Tick),
    ]
}

fn all_states() -> Vec<(&'static str, Run)> {
    let mut stopped = Run::new(Initiative::Both);
    stopped.all([]);
    let mut held = Run::new(Initiative::Both);
    held.all([Event::Start, Event::Dialed(FIRST), Event::Keepalive(FIRST)]);
    let mut connect = Run::new(Initiative::Both);
    connect.all([Event::Start]);
    let mut active = Run::new(Initiative::Both);
    active.all([Event::Start, Event::DialFailed("refused".into())]);
    let mut passive = Run::new(Initiative::Passive);
    passive.all([Event::Start]);
    let mut open_sent = Run::new(Initiative::Both);
    open_sent.all([Event::Start, Event::Dialed(FIRST)]);
    let mut open_confirm = Run::new(Initiative::Passive);
    open_confirm.all([Event::Start, Event::Accepted(FIRST), Event::Open(FIRST, peer_open(20))]);
    vec![
        ("Idle/stopped", stopped),
        ("Idle/held", held),
        ("Connect", connect),
        ("Active", active),
        ("Active/passive", passive),
        ("OpenSent", open_sent),
        ("OpenConfirm/passive", open_confirm),
        ("Established", Run::established(Initiative::DialOnly)),
    ]
}

/// What comes out: `state event -> state: actions`.
const TABLE: &str = include_str!("table.txt");

#[test]
fn every_state_against_every_event() {
    let mut table = String::new();
    for (state, run) in all_states() {
        for (name, event) in all_events() {
            let mut machine = run.machine.clone();
            let actions = words(&machine.handle(event, run.now));
            let line = format!("{state:20} {name:12} -> {:12} {actions}", machine.state().name());
            writeln!(table, "{}", line.trim_end()).unwrap();
        }
    }
    if table != TABLE {
        println!("{table}");
    }
    for (line, (found, wanted)) in table.lines().zip(TABLE.lines()).enumerate() {
        assert_eq!(found, wanted, "line {}", line + 1);
    }
    assert_eq!(table.lines().count(), TABLE.lines().count());
}

#[test]
fn a_session_comes_up_and_is_kept() {
    let mut run = Run::new(Initiative::Both);
    assert_eq!(words(&run.on(Event::Start)), "dial");
    assert_eq!(words(&run.on(Event::Dialed(FIRST))), "1!OPEN");
    assert_eq!(words(&run.on(Event::Open(FIRST, peer_open(20)))), "1!KEEPALIVE");
    assert_eq!(words(&run.on(Event::Keepalive(FIRST))), "1.up");
    for _ in 0..10 {
        let before = run.now;
        assert_eq!(words(&run.wait()), "1!KEEPALIVE");
        let pause = run.now - before;
        assert!((22..=30).contains(&pause.as_secs()), "keepalive after {pause:?}, a third of 90 s is 30");
        assert_eq!(words(&run.on(Event::Keepalive(FIRST))), "");
    }
}

#[test]
fn silence_ends_the_session_at_the_hold_time() {
    let mut run = Run::established(Initiative::Both);
    assert_eq!(words(&run.after(89)), "1!KEEPALIVE");
    assert_eq!(run.machine.state(), State::Established);
    let actions = run.after(1);
    assert_eq!(words(&actions), "1!4/0 1.close down-retain failed");
    let Some(Action::Failed(cause)) = actions.last() else { panic!() };
    assert_eq!(cause.to_string(), "nothing heard from the peer for 90 s (hold time)");
}

#[test]
fn an_update_or_refresh_keeps_the_session_too() {
    for event in [Event::Update(FIRST), Event::Refresh(FIRST)] {
        let mut run = Run::established(Initiative::Both);
        run.after(60);
        run.on(event);
        run.after(60);
        assert_eq!(run.machine.state(), State::Established);
    }
}

#[test]
fn hold_time_zero_is_no_timer_at_all() {
    let mut run = Run::new(Initiative::Both);
    let open = Open { hold_time: 0, ..peer_open(20) };
    run.all([Event::Start, Event::Dialed(FIRST), Event::Open(FIRST, open), Event::Keepalive(FIRST)]);
    assert_eq!(run.machine.deadline(), None);
    assert_eq!(words(&run.after(1_000_000)), "");
    assert_eq!(run.machine.state(), State::Established);
}

#[test]
fn a_peer_that_connects_and_says_nothing_is_left() {
    let mut run = Run::new(Initiative::Passive);
    run.all([Event::Start, Event::Accepted(FIRST)]);
    assert_eq!(words(&run.after(OPEN_WAIT.as_secs() - 1)), "");
    let actions = run.after(1);
    assert_eq!(words(&actions), "1!4/0 1.close failed");
    let Some(Action::Failed(cause)) = actions.last() else { panic!("{actions:?}") };
    assert!(
        cause.to_string().starts_with("connected, but no OPEN came from the peer within 60 s"),
        "{cause}"
    );
}

#[test]
fn dials_are_repeated_with_growing_pauses() {
    let mut run = Run::new(Initiative::Both);
    run.on(Event::Start);
    let mut limits = [1, 2, 4, 8, 16, 30, 30, 30].into_iter();
    for _ in 0..8 {
        assert_eq!(words(&run.on(Event::DialFailed("refused".into()))), "failed");
        let before = run.now;
        assert_eq!(words(&run.wait()), "dial");
        let (pause, limit) = ((run.now - before).as_secs_f64(), f64::from(limits.next().unwrap()));
        assert!(pause <= limit && pause > 0.74 * limit, "{pause} s where {limit} s are the most");
    }
    // A connection begins anew.
    run.all([Event::Dialed(FIRST), Event::Closed(FIRST, None)]);
    let before = run.now;
    run.wait();
    assert!(run.now - before <= Duration::from_secs(1));
}

#[test]
fn sessions_that_fail_soon_are_repeated_ever_later() {
    let mut run = Run::new(Initiative::Both);
    run.on(Event::Start);
    let mut last = Duration::ZERO;
    for number in 1..=4 {
        let id = ConnectionId(number);
        run.all([Event::Dialed(id), Event::Open(id, peer_open(20)), Event::Keepalive(id)]);
        assert_eq!(run.machine.state(), State::Established);
        run.on(Event::Open(id, peer_open(20)));
        assert_eq!(run.machine.state(), State::Idle);
        assert_eq!(
            words(&run.on(Event::Accepted(ConnectionId(100 + number)))),
            format!("{}.close", 100 + number)
        );
        let before = run.now;
        assert_eq!(words(&run.wait()), "dial");
        assert!(run.now - before > last);
        last = run.now - before;
    }
    // One that lasted forgives.
    run.all([Event::Dialed(FIRST), Event::Open(FIRST, peer_open(20)), Event::Keepalive(FIRST)]);
    run.after(STABLE.as_secs());
    run.on(Event::Closed(FIRST, None));
    let before = run.now;
    run.wait();
    assert!(run.now - before <= FIRST_PAUSE);
}

#[test]
fn pauses_of_peers_differ() {
    let pauses: std::collections::BTreeSet<Duration> = (1..50)
        .map(|seed| {
            let now = Instant::now();
            let mut machine = Machine::new(settings(Initiative::Both), seed);
            machine.handle(Event::Start, now);
            machine.handle(Event::DialFailed(String::new()), now);
            machine.deadline().unwrap() - now
        })
        .collect();
    assert!(pauses.len() > 40, "{} of 49 differ", pauses.len());
}

#[test]
fn passive_peers_never_dial_and_dial_only_peers_never_accept() {
    let mut run = Run::new(Initiative::Passive);
    assert_eq!(words(&run.on(Event::Start)), "");
    run.all([Event::Accepted(FIRST), Event::Closed(FIRST, None)]);
    assert_eq!((run.machine.state(), run.machine.deadline()), (State::Active, None));
    let mut run = Run::new(Initiative::DialOnly);
    run.on(Event::Start);
    assert_eq!(words(&run.on(Event::Accepted(FIRST))), "1.close");
}

/// Two connections with both OPENs, in either order: which survives, by identifier and AS.
#[test]
fn of_two_connections_that_of_the_higher_identifier_is_kept() {
    // The peer's identifier and AS; whether our own connection (1) is kept. Ours are 10 and 65000.
    for (id, asn, ours) in [(9, 65001, true), (11, 65001, false), (10, 65001, false), (10, 64999, true)] {
        for own_first in [true, false] {
            let mut settings = settings(Initiative::Both);
            settings.terms.peer_asn = PeerAsn::External;
            let mut machine = Machine::new(settings, 1);
            let now = Instant::now();
            let open = Open { asn: Asn(asn), ..peer_open(id) };
            machine.handle(Event::Start, now);
            machine.handle(Event::Dialed(FIRST), now);
            machine.handle(Event::Accepted(SECOND), now);
            let order = if own_first { [FIRST, SECOND] } else { [SECOND, FIRST] };
            let mut actions = Vec::new();
            for connection in order {
                actions.extend(machine.handle(Event::Open(connection, open.clone()), now));
            }
            let (kept, lost) = if ours { (FIRST, SECOND) } else { (SECOND, FIRST) };
            let collision = Action::Send(lost, Message::Notification(Notification::cease(Cease::Collision)));
            assert!(actions.contains(&collision) && actions.contains(&Action::Close(lost)), "{actions:?}");
            assert!(!actions.contains(&Action::Close(kept)));
            let up = machine.handle(Event::Keepalive(kept), now);
            assert_eq!(words(&up), format!("{}.up", kept.0), "peer {id} AS {asn}, own first {own_first}");
        }
    }
}

/// Two machines that dial each other at once always end with one session, the same on both sides.
#[test]
fn two_that_dial_each_other_agree() {
    for order in 0..16_u32 {
        let now = Instant::now();
        let mut a = Machine::new(settings(Initiative::Both), 1);
        let mut b = Machine::new(
            Settings { terms: terms(65001, 20, PeerAsn::Exactly(Asn(65000))), ..settings(Initiative::Both) },
            2,
        );
        // Connection 1 is dialed by a, 2 by b; messages in flight per connection and direction.
        let mut queues: [Vec<(ConnectionId, bool, Message)>; 2] = [Vec::new(), Vec::new()];
        let mut closed = std::collections::BTreeSet::new();
        let mut up = Vec::new();
        let mut pending: Vec<(bool, Event)> = vec![
            (true, Event::Start),
            (false, Event::Start),
            (true, Event::Dialed(FIRST)),
            (false, Event::Accepted(FIRST)),
            (false, Event::Dialed(SECOND)),
            (true, Event::Accepted(SECOND)),
        ];
        if order & 1 != 0 {
            pending.swap(2, 4);
            pending.swap(3, 5);
        }
        let mut pick = order >> 1;
        loop {
            let (to_a, event) = if pending.is_empty() {
                let first = (pick & 1) as usize;
                pick = pick.rotate_right(1);
                let queue = if queues[first].is_empty() { 1 - first } else { first };
                if queues[queue].is_empty() {
                    break;
                }
                let (id, to_a, message) = queues[queue].remove(0);
                let event = match message {
                    Message::Open(open) => Event::Open(id, open),
                    Message::Keepalive => Event::Keepalive(id),
                    Message::Notification(notification) => Event::Notification(id, notification),
                    other => panic!("{other:?}"),
                };
                (to_a, event)
            } else {
                pending.remove(0)
            };
            let machine = if to_a { &mut a } else { &mut b };
            for action in machine.handle(event, now) {
                match action {
                    Action::Send(id, message) => queues[(id.0 - 1) as usize].push((id, !to_a, message)),
                    Action::Close(id) => {
                        closed.insert(id);
                    }
                    Action::Up(id, _) => up.push((to_a, id)),
                    Action::Down(_) => up.retain(|(side, _)| *side != to_a),
                    _ => {}
                }
            }
        }
        up.sort();
        // B has the higher identifier.
        assert_eq!(up, [(false, SECOND), (true, SECOND)], "order {order}");
        assert!(closed.contains(&FIRST) && !closed.contains(&SECOND));
    }
}

#[test]
fn an_established_session_is_kept_unless_the_peer_can_restart() {
    // Without graceful restart.
    let mut run = Run::new(Initiative::Both);
    let plain = terms(65001, 20, PeerAsn::Any).open(Offer::Essential, false);
    run.all([Event::Start, Event::Dialed(FIRST), Event::Open(FIRST, plain.clone()), Event::Keepalive(FIRST)]);
    run.on(Event::Accepted(SECOND));
    assert_eq!(words(&run.on(Event::Open(SECOND, plain))), "2!6/7 2.close");
    assert_eq!(run.machine.established(), Some(FIRST));
    // With it the old connection is dead and the routes stay.
    let mut run = Run::established(Initiative::Both);
    run.on(Event::Accepted(SECOND));
    assert_eq!(words(&run.on(Event::Open(SECOND, peer_open(20)))), "1.close down-retain 2!KEEPALIVE");
    assert_eq!(words(&run.on(Event::Keepalive(SECOND))), "2.up");
    // It had connected before there was a session: it has not restarted.
    let mut run = Run::new(Initiative::Both);
    run.all([Event::Start, Event::Dialed(FIRST), Event::Open(FIRST, peer_open(20))]);
    run.all([Event::Accepted(SECOND), Event::Keepalive(FIRST)]);
    assert_eq!(words(&run.on(Event::Open(SECOND, peer_open(20)))), "2!6/7 2.close");
    assert_eq!(run.machine.established(), Some(FIRST));
}

#[test]
fn a_peer_that_connects_anew_has_given_up_its_last_attempt() {
    let mut run = Run::new(Initiative::Passive);
    run.all([Event::Start, Event::Accepted(FIRST)]);
    assert_eq!(words(&run.on(Event::Accepted(SECOND))), "1!6/7 1.close 2!OPEN");
}

#[test]
fn a_peer_that_knows_no_capabilities_is_met_with_fewer() {
    let refuse = |run: &mut Run, id, subcode| {
        run.on(Event::Dialed(id));
        run.on(Event::Notification(id, Notification::new(NotificationError::Open(subcode))));
        assert_eq!(words(&run.wait()), "dial");
    };
    let offered = |run: &mut Run, id| match run.on(Event::Dialed(id)).pop() {
        Some(Action::Send(_, Message::Open(open))) => (open.capabilities.len(), open.four_octet_as),
        other => panic!("{other:?}"),
    };
    let mut run = Run::new(Initiative::Both);
    run.on(Event::Start);
    refuse(&mut run, FIRST, OpenError::UnsupportedCapability);
    assert_eq!(offered(&mut run.clone_run(), SECOND), (2, true), "families only");
    refuse(&mut run, SECOND, OpenError::UnsupportedParameter);
    assert_eq!(offered(&mut run.clone_run(), FIRST), (0, false), "nothing");
    // That was not it either: everything again.
    refuse(&mut run, FIRST, OpenError::UnsupportedParameter);
    assert!(offered(&mut run, SECOND).0 > 4);
}

impl Run {
    fn clone_run(&self) -> Self {
        Self { machine: self.machine.clone(), now: self.now }
    }
}

#[test]
fn what_a_notification_does_to_the_routes() {
    // (peer keeps sessions over notifications, what ends it, routes stay, what the peer is told)
    let cease = |subcode| Notification::cease(subcode);
    let abort =
        |subcode| Event::Abort { notification: cease(subcode), why: String::new(), pause: Pause::Growing };
    let cases: [(bool, Event, bool, &str); 12] = [
        (true, Event::Closed(FIRST, None), true, ""),
        (false, Event::Closed(FIRST, None), true, ""),
        (true, Event::Notification(FIRST, cease(Cease::AdministrativeReset)), true, ""),
        (false, Event::Notification(FIRST, cease(Cease::AdministrativeReset)), false, ""),
        (true, Event::Notification(FIRST, cease(Cease::AdministrativeShutdown).hard()), false, ""),
        (true, Event::Stop(Shutdown::Administrative("x".into())), false, "6/9"),
        (false, Event::Stop(Shutdown::Administrative("x".into())), false, "6/2"),
        (true, Event::Stop(Shutdown::Changed), true, "6/6"),
        (true, Event::Stop(Shutdown::Silent), true, ""),
        (true, abort(Cease::MaximumPrefixes), false, "6/9"),
        (false, abort(Cease::MaximumPrefixes), false, "6/1"),
        (true, abort(Cease::OutOfResources), true, "6/8"),
    ];
    for (notification, event, retain, told) in cases {
        let mut run = Run::new(Initiative::Both);
        let mut open = peer_open(20);
        for capability in &mut open.capabilities {
            if let crate::message::Capability::GracefulRestart(restart) = capability {
                restart.notification = notification;
            }
        }
        run.all([Event::Start, Event::Dialed(FIRST), Event::Open(FIRST, open), Event::Keepalive(FIRST)]);
        let label = format!("{event:?}");
        let actions = run.on(event);
        let down = actions.iter().find_map(|action| match action {
            Action::Down(down) => Some(down.retain),
            _ => None,
        });
        assert_eq!(down, Some(retain), "{label}");
        let sent = actions.iter().find_map(|action| match action {
            Action::Send(_, Message::Notification(notification)) => {
                let (code, subcode) = notification.error.numbers();
                Some(format!("{code}/{subcode}"))
            }
            _ => None,
        });
        assert_eq!(sent.unwrap_or_default(), told, "{label}");
    }
}

#[test]
fn the_restart_bit_is_sent_while_it_is_true() {
    let mut settings = settings(Initiative::Both);
    settings.terms.restart = Some(Restart { time: 90, forwarding: Families::ALL });
    let mut machine = Machine::new(settings, 1);
    let now = Instant::now();
    let said = |machine: &mut Machine| {
        machine.handle(Event::Start, now);
        let actions = machine.handle(Event::Dialed(FIRST), now);
        machine.handle(Event::Stop(Shutdown::Silent), now);
        let Some(Action::Send(_, Message::Open(open))) = actions.first() else { panic!("{actions:?}") };
        open.capabilities.iter().find_map(|capability| match capability {
            crate::message::Capability::GracefulRestart(restart) => Some(restart.restarted),
            _ => None,
        })
    };
    machine.set_restarted(true);
    assert_eq!(said(&mut machine), Some(true));
    machine.set_restarted(false);
    assert_eq!(said(&mut machine), Some(false));
}

#[test]
fn a_pause_until_started_lasts() {
    let mut run = Run::established(Initiative::Both);
    let actions = run.on(Event::Abort {
        notification: Notification::cease(Cease::MaximumPrefixes),
        why: "peer sent more than 10 prefixes".into(),
        pause: Pause::UntilStarted,
    });
    let Some(Action::Failed(cause)) = actions.last() else { panic!("{actions:?}") };
    assert!(
        cause.to_string().starts_with("peer sent more than 10 prefixes: sent NOTIFICATION cease"),
        "{cause}"
    );
    assert_eq!(run.machine.deadline(), None);
    assert_eq!(words(&run.after(1_000_000)), "");
    assert_eq!(words(&run.on(Event::Start)), "dial");
    run = Run::established(Initiative::Both);
    run.on(Event::Abort {
        notification: Notification::cease(Cease::MaximumPrefixes),
        why: String::new(),
        pause: Pause::For(Duration::from_secs(600)),
    });
    assert_eq!(words(&run.after(599)), "");
    assert_eq!(words(&run.after(1)), "dial");
}
