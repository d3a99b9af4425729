//! Live or ready, and why not: a function over what the rooms report.
//!
//! *Live* means that every room's loop turns; a room that does not is stuck, and only a restart
//! helps. *Ready* means that a first clean pass is done and that the last one is recent: the kernel
//! holds what the cluster wants. Failing passes make a node unready, never dead: a restart would
//! not mend them. An API server that is away changes neither, for Services keep working.

use std::fmt;
use std::time::{Duration, Instant};

/// A room's passes so far; kept by the room.
#[derive(Clone, Debug)]
pub struct Passes {
    /// When the room was opened.
    pub started: Instant,
    /// When its loop last turned.
    pub last_turn: Instant,
    /// When everything wanted was last in the kernel.
    pub last_clean_pass: Option<Instant>,
    /// Clean passes so far.
    pub passes: u64,
    /// Passes that left something undone.
    pub failures: u64,
    /// What the newest failure said; `None` after a clean pass.
    pub last_error: Option<String>,
}

impl Passes {
    /// None yet, of a room opened now.
    pub fn new(now: Instant) -> Self {
        Self { started: now, last_turn: now, last_clean_pass: None, passes: 0, failures: 0, last_error: None }
    }

    /// A pass ended with everything wanted in the kernel.
    pub fn passed(&mut self, now: Instant) {
        self.last_clean_pass = Some(now);
        self.passes += 1;
        self.last_error = None;
    }
}

/// What one room reports.
#[derive(Clone, Debug)]
pub struct RoomHealth {
    /// The room's name.
    pub name: &'static str,
    /// Longest time between two turns of a loop that is not stuck.
    pub turn_limit: Duration,
    /// Longest age of the last clean pass.
    pub clean_limit: Duration,
    /// Its passes.
    pub passes: Passes,
}

/// What one watch reports.
#[derive(Clone, Debug)]
pub struct WatchHealth {
    /// The kind it watches.
    pub kind: &'static str,
    /// Whether the first list is complete.
    pub listed: bool,
    /// The last error, if the watch is failing now.
    pub error: Option<String>,
}

/// The answer to a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Every loop turns.
    pub live: bool,
    /// The kernel holds what the cluster wants.
    pub ready: bool,
    /// One line per room and watch, in their order.
    pub lines: Vec<Line>,
}

/// One line of a probe's body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Room or watch.
    pub name: String,
    /// Whether anything is wrong with it.
    pub good: bool,
    /// What it does or what is wrong.
    pub text: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {}: {}", if self.good { '+' } else { '-' }, self.name, self.text)
    }
}

/// Judges the process at the time `now`.
pub fn judge(rooms: &[RoomHealth], watches: &[WatchHealth], now: Instant) -> Verdict {
    let mut verdict = Verdict { live: true, ready: true, lines: Vec::new() };
    for room in rooms {
        let (live, ready, text) = judge_room(room, now);
        verdict.live &= live;
        verdict.ready &= live && ready;
        verdict.lines.push(Line { name: room.name.to_owned(), good: live && ready, text });
    }
    for watch in watches {
        let text = match (&watch.error, watch.listed) {
            (None, true) => "up to date".to_owned(),
            (None, false) => "waiting for the first list".to_owned(),
            (Some(error), true) => format!("keeping the last state: {error}"),
            (Some(error), false) => format!("no first list yet: {error}"),
        };
        let good = watch.error.is_none() && watch.listed;
        verdict.lines.push(Line { name: format!("watch of {}", watch.kind), good, text });
    }
    verdict
}

/// Live, ready, and why.
fn judge_room(room: &RoomHealth, now: Instant) -> (bool, bool, String) {
    let silent = now.saturating_duration_since(room.passes.last_turn);
    if silent > room.turn_limit {
        let text = format!(
            "stuck: its loop has not turned for {} (limit {})",
            words(silent),
            words(room.turn_limit)
        );
        return (false, false, text);
    }
    let error = room.passes.last_error.as_deref().map(|error| format!("; {error}")).unwrap_or_default();
    let Some(clean) = room.passes.last_clean_pass else {
        let age = words(now.saturating_duration_since(room.passes.started));
        let text =
            format!("no clean pass yet, {age} after the start, {} failed{error}", room.passes.failures);
        return (true, false, text);
    };
    let age = now.saturating_duration_since(clean);
    if age > room.clean_limit {
        let text = format!(
            "last clean pass {} ago (limit {}), {} of {} failed{error}",
            words(age),
            words(room.clean_limit),
            room.passes.failures,
            room.passes.passes + room.passes.failures
        );
        return (true, false, text);
    }
    let text = format!(
        "last clean pass {} ago, {} of {} failed{error}",
        words(age),
        room.passes.failures,
        room.passes.passes + room.passes.failures
    );
    (true, true, text)
}

/// Whole seconds are enough for people.
fn words(duration: Duration) -> String {
    format!("{}s", duration.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room() -> (RoomHealth, Instant) {
        let started = Instant::now();
        let room = RoomHealth {
            name: "proxy",
            turn_limit: Duration::from_secs(60),
            clean_limit: Duration::from_secs(360),
            passes: Passes::new(started),
        };
        (room, started)
    }

    #[test]
    fn live_and_ready_by_table() {
        let second = Duration::from_secs;
        // Seconds after the start: last turn, last clean pass, now; live, ready; a part of the text.
        for (turn, clean, now, live, ready, part) in [
            (0, None, 0, true, false, "no clean pass yet"),
            (50, None, 100, true, false, "100s after the start"),
            (0, None, 60, true, false, "no clean pass yet"),
            (0, None, 61, false, false, "not turned for 61s (limit 60s)"),
            (10, Some(10), 12, true, true, "last clean pass 2s ago"),
            (400, Some(40), 400, true, true, "last clean pass 360s ago"),
            (400, Some(39), 400, true, false, "(limit 360s)"),
            (10, Some(10), 80, false, false, "stuck"),
            // A clock read before the room's own: no underflow.
            (10, Some(10), 5, true, true, "0s ago"),
        ] {
            let (mut room, started) = room();
            room.passes.last_turn = started + second(turn);
            room.passes.last_clean_pass = clean.map(|clean| started + second(clean));
            let verdict = judge(&[room], &[], started + second(now));
            let text = verdict.lines[0].to_string();
            assert_eq!((verdict.live, verdict.ready), (live, ready), "{text}");
            assert!(text.contains(part), "{part:?} is missing in {text:?}");
            assert_eq!(text.starts_with("[+]"), live && ready, "{text}");
        }
    }

    #[test]
    fn a_failing_room_stays_live_and_says_why() {
        let (mut room, started) = room();
        room.passes.failures = 3;
        room.passes.last_error = Some("no such virtual server".to_owned());
        let verdict = judge(&[room], &[], started);
        assert!(verdict.live && !verdict.ready);
        assert!(verdict.lines[0].text.contains("3 failed; no such virtual server"));
    }

    #[test]
    fn a_lost_api_server_changes_nothing_but_the_text() {
        let (mut room, started) = room();
        room.passes.last_clean_pass = Some(started);
        let watch = |listed, error: Option<&str>| WatchHealth {
            kind: "Service",
            listed,
            error: error.map(str::to_owned),
        };
        for (watch, text) in [
            (watch(true, None), "[+] watch of Service: up to date"),
            (watch(false, None), "[-] watch of Service: waiting for the first list"),
            (watch(true, Some("refused")), "[-] watch of Service: keeping the last state: refused"),
            (watch(false, Some("refused")), "[-] watch of Service: no first list yet: refused"),
        ] {
            let verdict = judge(std::slice::from_ref(&room), &[watch], started);
            assert!(verdict.live && verdict.ready);
            assert_eq!(verdict.lines[1].to_string(), text);
        }
    }

    #[test]
    fn one_bad_room_is_enough() {
        let (mut good, started) = room();
        good.passes.last_clean_pass = Some(started);
        let (mut stuck, _) = room();
        stuck.name = "routes";
        stuck.passes.last_turn = started;
        let verdict = judge(&[good, stuck], &[], started);
        assert!(verdict.live && !verdict.ready);
    }
}
