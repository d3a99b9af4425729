//! Whether another program may have changed the host's rules since a room last looked: a cheap
//! question, asked often, so that reading all rules back can be rare.
//!
//! The legacy variant takes a lock file for every run, and inotify sees when it lets go of it, which is
//! after the write; the nft variant makes a new generation of the rule set with every table it changes,
//! whose number one netlink message gives. Neither says what changed or who did: what this process writes
//! itself stands between [`Disturbance::begin_write`] and [`Disturbance::end_write`].

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use ferroute_iptables::Variant;
use ferroute_netlink::{Batch, Protocol, Socket, attributes};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::host::events::Watching;

/// `XT_LOCK_NAME` of iptables.
const LOCK: &str = "/run/xtables.lock";
/// NFNL_SUBSYS_NFTABLES with NFT_MSG_NEWGEN and NFT_MSG_GETGEN (linux/netfilter/nf_tables.h).
const NEW_GENERATION: u16 = 10 << 8 | 15;
const GET_GENERATION: u16 = 10 << 8 | 16;
/// NFTA_GEN_ID
const GENERATION_ID: u16 = 1;

/// Generations that all rooms of this process made: the others are strangers'.
static OWN_GENERATIONS: AtomicU32 = AtomicU32::new(0);

/// Watches one variant of iptables, from the moment it is opened.
pub struct Disturbance {
    source: Source,
    /// Something was seen, whatever the source tells now.
    seen: bool,
}

enum Source {
    /// The lock file.
    Lock(Inotify),
    /// The rule set's generation.
    Generation {
        socket: Socket,
        /// Strangers' generations, as last settled.
        known: Option<u32>,
        /// The generation before a write of ours.
        before: Option<u32>,
    },
    /// Nothing tells: only audits see changes.
    None,
}

impl Disturbance {
    /// Starts watching. Where the host offers nothing to watch, nothing is ever seen.
    pub fn open(variant: Variant) -> Self {
        let told = |error: &dyn std::fmt::Display| {
            tracing::debug!(%error, %variant, "changes of rules are seen by audits only");
        };
        let source = match variant {
            Variant::Legacy => {
                watch_lock(Path::new(LOCK)).map(Source::Lock).map_err(|error| told(&error)).ok()
            }
            Variant::Nft => Socket::open(Protocol::Netfilter)
                .map(|socket| Source::Generation { socket, known: None, before: None })
                .map_err(|error| told(&error))
                .ok(),
        };
        let mut disturbance = Self { source: source.unwrap_or(Source::None), seen: false };
        disturbance.settle();
        disturbance
    }

    /// The same for the legacy variant, unless none of its programs has run since this host booted: then
    /// there is nothing to watch yet, and the file to watch is not made.
    pub fn open_existing(variant: Variant) -> Option<Self> {
        (variant == Variant::Nft || Path::new(LOCK).exists()).then(|| Self::open(variant))
    }

    /// What happened so far is read next: nothing of it is to be told.
    pub fn settle(&mut self) {
        self.seen = false;
        match &mut self.source {
            Source::Lock(lock) => drain(lock),
            Source::Generation { socket, known, .. } => *known = strangers(socket),
            Source::None => {}
        }
    }

    /// Whether a stranger may have written since [`Disturbance::settle`].
    pub fn is_seen(&mut self) -> bool {
        self.seen |= match &mut self.source {
            Source::Lock(lock) => is_readable(lock),
            Source::Generation { socket, known, .. } => strangers(socket) != *known,
            Source::None => false,
        };
        self.seen
    }

    /// Other rooms of this process wrote. The lock file does not tell them from strangers: who came since it
    /// was last looked at is found by the audit.
    pub fn pass_over(&mut self) {
        if let Source::Lock(lock) = &self.source {
            drain(lock);
        }
    }

    /// This process is about to write. Writes must not overlap.
    pub fn begin_write(&mut self) {
        match &mut self.source {
            Source::Lock(lock) => self.seen |= is_readable(lock),
            Source::Generation { socket, before, .. } => *before = generation(socket),
            Source::None => {}
        }
    }

    /// It wrote this many tables. What else was written meanwhile in the nft form is seen; by the legacy form
    /// it is not.
    pub fn end_write(&mut self, tables: usize) {
        match &mut self.source {
            Source::Lock(lock) => drain(lock),
            Source::Generation { socket, before, .. } => {
                if let (Some(before), Some(after)) = (before.take(), generation(socket)) {
                    OWN_GENERATIONS.fetch_add(own_generations(before, after, tables), Ordering::AcqRel);
                }
            }
            Source::None => {}
        }
    }
}

/// Of the generations between two numbers, those that writing so many tables makes: one each.
fn own_generations(before: u32, after: u32, tables: usize) -> u32 {
    after.wrapping_sub(before).min(u32::try_from(tables).unwrap_or(u32::MAX))
}

/// Generations of the rule set that this process did not make.
fn strangers(socket: &mut Socket) -> Option<u32> {
    generation(socket).map(|generation| generation.wrapping_sub(OWN_GENERATIONS.load(Ordering::Acquire)))
}

fn watch_lock(path: &Path) -> std::io::Result<Inotify> {
    // Made as iptables makes it, where nobody has run yet.
    std::fs::OpenOptions::new().create(true).append(true).open(path)?;
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    // Not when it is opened: who reads then may be too early, and is told no more.
    watch.add_watch(path, AddWatchFlags::IN_CLOSE)?;
    Ok(watch)
}

/// Calls `wake` whenever a program of the legacy variant has run; `None` where the lock cannot be watched.
/// Dropping what is returned ends the watch.
pub fn watch(wake: impl Fn() + Send + 'static) -> Option<Watching> {
    watch_file(Path::new(LOCK), wake)
}

fn watch_file(path: &Path, wake: impl Fn() + Send + 'static) -> Option<Watching> {
    let told = |error: &dyn std::fmt::Display| {
        tracing::debug!(%error, lock = LOCK, "changes of rules are seen by looks only");
    };
    let lock = watch_lock(path).map_err(|error| told(&error)).ok()?;
    let ready = move |lock: &mut Inotify| {
        drain(lock);
        wake();
        Ok(())
    };
    Watching::spawn("rule-events", lock, ready, move |error| told(&error)).map_err(|error| told(&error)).ok()
}

fn is_readable(watch: &Inotify) -> bool {
    let mut ready = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
    poll(&mut ready, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

fn drain(watch: &Inotify) {
    // Ends with EAGAIN, the descriptor being non-blocking; any other failure leaves events, which
    // only cost an audit.
    while watch.read_events().is_ok_and(|events| !events.is_empty()) {}
}

fn generation(socket: &mut Socket) -> Option<u32> {
    let mut request = Batch::new();
    request.message(GET_GENERATION, 0, |body| body.raw(&[0; 4]));
    let answers = socket.dump(&request, |kind, payload| {
        if kind != NEW_GENERATION {
            return Ok(None);
        }
        for attribute in attributes(payload.get(4..).unwrap_or_default()) {
            let attribute = attribute?;
            if attribute.kind == GENERATION_ID {
                return Ok(Some(attribute.be32()?));
            }
        }
        Ok(None)
    });
    // A kernel without nf_tables gives the same answer each time: nothing is ever seen.
    answers.ok()?.into_iter().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_had_the_lock_is_seen_until_settled() {
        let path = std::env::temp_dir().join(format!("ferroute-lock-{}", std::process::id()));
        let mut disturbance = Disturbance { source: Source::Lock(watch_lock(&path).unwrap()), seen: false };
        disturbance.settle();
        assert!(!disturbance.is_seen());
        let held = std::fs::File::open(&path).unwrap();
        assert!(!disturbance.is_seen(), "what it will write is not there yet");
        drop(held);
        assert!(disturbance.is_seen() && disturbance.is_seen());
        disturbance.settle();
        assert!(!disturbance.is_seen());
        let run = || drop(std::fs::File::open(&path).unwrap());
        // Ours, then another room's.
        disturbance.begin_write();
        run();
        disturbance.end_write(1);
        assert!(!disturbance.is_seen());
        run();
        disturbance.pass_over();
        assert!(!disturbance.is_seen());
        // A stranger's before ours.
        run();
        disturbance.begin_write();
        run();
        disturbance.end_write(1);
        disturbance.pass_over();
        assert!(disturbance.is_seen());
        std::fs::remove_file(path).unwrap();
        assert!(!Disturbance { source: Source::None, seen: false }.is_seen());
    }

    #[test]
    fn of_the_generations_during_a_write_only_its_own_are_passed_over() {
        assert_eq!(own_generations(7, 9, 2), 2);
        assert_eq!(own_generations(7, 10, 2), 2, "a stranger's among them is seen");
        assert_eq!(own_generations(7, 8, 2), 1, "a table that was refused made none");
        assert_eq!(own_generations(u32::MAX, 0, 1), 1, "the number wraps");
    }

    #[test]
    fn who_had_the_lock_wakes_until_the_watch_ends() {
        let path = std::env::temp_dir().join(format!("ferroute-woken-{}", std::process::id()));
        let (wake, woken) = std::sync::mpsc::channel();
        let watching = watch_file(&path, move || wake.send(()).unwrap()).unwrap();
        drop(std::fs::File::open(&path).unwrap());
        woken.recv_timeout(std::time::Duration::from_secs(30)).unwrap();
        drop(watching);
        drop(std::fs::File::open(&path).unwrap());
        // The thread is gone, and its sender with it.
        assert!(woken.recv().is_err());
        std::fs::remove_file(path).unwrap();
    }
}
