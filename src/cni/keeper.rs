//! Keeps the plugin in the network configuration while the daemon runs: other programs write that
//! file too, at their start or when their settings change, and know nothing of us.
//!
//! The folder is watched; a rewrite is answered within a moment, and looked for every ten seconds
//! where the kernel announces nothing. A program that writes again and again is given way to, with
//! pauses that grow to five minutes: two writers in a loop would keep the runtime busy, and without
//! the plugin an unknown pod is still closed.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::{Map, Value};

use super::SOCKET;
use super::install::{self, Configured, Error};

/// Changes that the kernel does not announce are found this often.
const POLL: Duration = Duration::from_secs(10);
/// How fast a stop, or a room that became ready, is noticed.
const TICK: Duration = Duration::from_millis(500);
/// Writers truncate, write and close: one look after the last of it.
const GATHER: Duration = Duration::from_millis(50);
/// Repairs further apart than this are no fight.
const PEACE: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// The keeper of one folder. [`Keeper::run`] is its thread.
pub struct Keeper {
    folder: PathBuf,
    settings: Map<String, Value>,
    pace: Pace,
    /// What was last said about a failure; said once.
    told: Option<String>,
    done_once: bool,
    stop: Arc<AtomicBool>,
}

impl Keeper {
    /// `socket` is where the daemon answers.
    pub fn new(folder: PathBuf, socket: &Path) -> Self {
        let mut settings = Map::new();
        if socket != Path::new(SOCKET) {
            settings.insert("socket".to_owned(), Value::from(socket.to_string_lossy()));
        }
        let stop = Arc::default();
        Self { folder, settings, pace: Pace::default(), told: None, done_once: false, stop }
    }

    /// Ends [`Keeper::run`] when called.
    pub fn stop(&self) -> impl Fn() + Send + 'static {
        let stop = self.stop.clone();
        move || stop.store(true, Ordering::Release)
    }

    /// Runs until stopped. Begins when `is_ready`: a pod that the daemon cannot answer for yet had
    /// better start without the step than fail (it is unknown, and so closed).
    pub fn run(mut self, is_ready: impl Fn() -> bool) {
        let stop = self.stop.clone();
        let stopped = || stop.load(Ordering::Acquire);
        while !stopped() && !is_ready() {
            std::thread::sleep(TICK);
        }
        let watch = Watch::of(&self.folder);
        while !stopped() {
            let pause = self.look(Instant::now());
            let until = Instant::now() + pause.unwrap_or(POLL);
            while !stopped() && Instant::now() < until {
                let left = until.saturating_duration_since(Instant::now()).min(TICK);
                if watch.wait(left) && pause.is_none() {
                    break;
                }
            }
        }
    }

    /// One look; the time in which not to look again, if that was asked for.
    fn look(&mut self, now: Instant) -> Option<Duration> {
        match install::configure(&self.folder, &self.settings) {
            Ok(Configured { path, changed, skipped }) => {
                let file = path.display().to_string();
                self.told = None;
                if !changed {
                    if !std::mem::replace(&mut self.done_once, true) {
                        tracing::info!(file, "the CNI plugin is in the network configuration");
                    }
                    return None;
                }
                if std::mem::replace(&mut self.done_once, true) {
                    let pause = self.pace.repaired(now);
                    tracing::warn!(
                        file, not_again_for = ?pause,
                        "another program took the CNI plugin out of the network configuration; put it back"
                    );
                    return pause;
                }
                self.pace.repaired(now);
                tracing::info!(file, ?skipped, "put the CNI plugin into the network configuration");
                None
            }
            // Its completion is announced.
            Err(Error::Unfinished { .. }) => None,
            Err(error) => {
                self.tell(&error);
                None
            }
        }
    }

    fn tell(&mut self, error: &Error) {
        let text = error.to_string();
        if self.told.as_ref() != Some(&text) {
            tracing::warn!(error = text, "the CNI plugin is not in the network configuration; tried again");
            self.told = Some(text);
        }
    }
}

/// How long to leave the file alone after a repair.
#[derive(Debug, Default)]
struct Pace {
    last: Option<Instant>,
    pause: Duration,
}

impl Pace {
    /// Notes a repair; how long to wait before the next, if it came too soon after the one before.
    fn repaired(&mut self, now: Instant) -> Option<Duration> {
        let since = self.last.map(|last| now.saturating_duration_since(last));
        self.last = Some(now);
        if since.is_none_or(|since| since > self.pause + PEACE) {
            self.pause = Duration::ZERO;
            return None;
        }
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        Some(self.pause)
    }
}

/// Announcements of the kernel about a folder; none where it cannot be watched.
struct Watch(Option<Inotify>);

impl Watch {
    fn of(folder: &Path) -> Self {
        let open = || -> io::Result<Inotify> {
            // A folder that comes later is found by the periodic look, and watched after a restart.
            fs::create_dir_all(folder)?;
            let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
            let events = AddWatchFlags::IN_CLOSE_WRITE
                | AddWatchFlags::IN_MOVED_TO
                | AddWatchFlags::IN_MOVED_FROM
                | AddWatchFlags::IN_DELETE;
            inotify.add_watch(folder, events)?;
            Ok(inotify)
        };
        let inotify = open();
        if let Err(error) = &inotify {
            tracing::warn!(%error, folder = %folder.display(), "cannot watch the folder, looking every 10s");
        }
        Self(inotify.ok())
    }

    /// Waits for an announcement, gathers the flock; whether there was one.
    fn wait(&self, limit: Duration) -> bool {
        let Some(inotify) = &self.0 else {
            std::thread::sleep(limit);
            return false;
        };
        let mut fds = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        if !poll(&mut fds, limit).is_ok_and(|ready| ready > 0) {
            return false;
        }
        std::thread::sleep(GATHER);
        while inotify.read_events().is_ok_and(|events| !events.is_empty()) {}
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cni::PLUGIN;

    #[test]
    fn repairs_in_a_row_slow_down_and_peace_resets() {
        let mut pace = Pace::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(pace.repaired(at(0)), None);
        assert_eq!(pace.repaired(at(1)), Some(Duration::from_secs(1)));
        assert_eq!(pace.repaired(at(3)), Some(Duration::from_secs(2)));
        assert_eq!(pace.repaired(at(6)), Some(Duration::from_secs(4)));
        let mut now = 6;
        for _ in 0..20 {
            now += pace.pause.as_secs() + 1;
            pace.repaired(at(now));
        }
        assert_eq!(pace.pause, LONGEST_PAUSE);
        assert_eq!(pace.repaired(at(now + 361)), None);
        assert_eq!(pace.repaired(at(now + 362)), Some(FIRST_PAUSE));
    }

    #[test]
    fn a_rewritten_list_gets_the_plugin_back() {
        let folder = std::env::temp_dir().join(format!("ferroute-keeper-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let (list, ready) = (folder.join("10-a.conflist"), Arc::new(AtomicBool::new(false)));
        let text = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]}"#;
        fs::write(&list, text).unwrap();
        let keeper = Keeper::new(folder.clone(), Path::new("/run/other/cni.sock"));
        let (is_ready, stop) = (ready.clone(), keeper.stop());
        let thread = std::thread::spawn(move || keeper.run(|| is_ready.load(Ordering::Acquire)));
        let has = |wanted: bool, patience: Duration| {
            let deadline = Instant::now() + patience;
            while fs::read_to_string(&list).unwrap().contains(PLUGIN) != wanted {
                assert!(Instant::now() < deadline, "plugin in the list: not {wanted}");
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        std::thread::sleep(Duration::from_millis(100));
        has(false, Duration::ZERO);
        ready.store(true, Ordering::Release);
        has(true, Duration::from_secs(5));
        // In place, as some programs write: truncated first, complete later.
        fs::write(&list, "{\"cniVersion\":").unwrap();
        std::thread::sleep(Duration::from_millis(120));
        assert_eq!(fs::read_to_string(&list).unwrap(), "{\"cniVersion\":", "half a file is let alone");
        fs::write(&list, text).unwrap();
        // Well below the periodic look.
        has(true, Duration::from_secs(5));
        assert!(fs::read_to_string(&list).unwrap().contains("/run/other/cni.sock"));
        stop();
        thread.join().unwrap();
        fs::remove_dir_all(&folder).unwrap();
    }
}
