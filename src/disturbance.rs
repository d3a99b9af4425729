//! Whether another program may have changed the host's rules since a room last looked: a cheap
//! question, asked often, so that reading all rules back can be rare.
//!
//! The legacy variant takes a lock file for every run, and inotify sees when it lets go of it, which is
//! after the write; the nft variant makes a new
//! generation of the rule set with every change, whose number one netlink message gives. Neither says
//! what changed or who did: what this process writes itself is to be followed by [`Disturbance::settle`].

use std::os::fd::AsFd;
use std::path::Path;

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

/// Watches one variant of iptables, from the moment it is opened.
pub struct Disturbance {
    source: Source,
}

enum Source {
    /// The lock file.
    Lock(Inotify),
    /// The rule set's generation, as last settled.
    Generation { socket: Socket, known: Option<u32> },
    /// Nothing tells: only audits see changes.
    None,
}

impl Disturbance {
    /// Starts watching. Where the host offers nothing to watch, nothing is ever seen.
    pub fn open(variant: Option<Variant>) -> Self {
        let source = match variant {
            Some(Variant::Legacy) => watch_lock(Path::new(LOCK)).map_or_else(
                |error| {
                    tracing::debug!(%error, lock = LOCK, "changes of rules are seen by audits only");
                    Source::None
                },
                Source::Lock,
            ),
            Some(Variant::Nft) => match Socket::open(Protocol::Netfilter) {
                Ok(socket) => Source::Generation { socket, known: None },
                Err(error) => {
                    tracing::debug!(%error, "changes of rules are seen by audits only");
                    Source::None
                }
            },
            None => Source::None,
        };
        let mut disturbance = Self { source };
        disturbance.settle();
        disturbance
    }

    /// The same for the legacy variant, unless none of its programs has run since this host booted: then
    /// there is nothing to watch yet, and the file to watch is not made.
    pub fn open_existing(variant: Variant) -> Option<Self> {
        (variant == Variant::Nft || Path::new(LOCK).exists()).then(|| Self::open(Some(variant)))
    }

    /// What happened so far is known, or was our own doing.
    pub fn settle(&mut self) {
        match &mut self.source {
            Source::Lock(lock) => {
                drain(lock);
            }
            Source::Generation { socket, known } => *known = generation(socket),
            Source::None => {}
        }
    }

    /// Whether something happened since [`Disturbance::settle`].
    pub fn is_seen(&mut self) -> bool {
        match &mut self.source {
            Source::Lock(lock) => is_readable(lock),
            Source::Generation { socket, known } => generation(socket) != *known,
            Source::None => false,
        }
    }
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
        let mut disturbance = Disturbance { source: Source::Lock(watch_lock(&path).unwrap()) };
        disturbance.settle();
        assert!(!disturbance.is_seen());
        let held = std::fs::File::open(&path).unwrap();
        assert!(!disturbance.is_seen(), "what it will write is not there yet");
        drop(held);
        assert!(disturbance.is_seen() && disturbance.is_seen());
        disturbance.settle();
        assert!(!disturbance.is_seen());
        std::fs::remove_file(path).unwrap();
        assert!(!Disturbance { source: Source::None }.is_seen());
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
