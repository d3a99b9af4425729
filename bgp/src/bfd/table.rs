//! All sessions of a speaker: which one a packet belongs to, whether it may be believed, and which
//! session has something to do next. Without clock and socket, like the sessions themselves.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::time::Instant;

use super::packet::{Discriminator, Packet, PacketError};
use super::session::{Event, Session, Timers};

/// UDP port of sessions over one hop (RFC 5881 section 4).
pub const SINGLE_HOP_PORT: u16 = 3784;
/// UDP port of sessions over several hops (RFC 5883 section 5).
pub const MULTIHOP_PORT: u16 = 4784;
/// The hop limit of a packet that no router has touched, and of every packet sent here.
pub const MAXIMUM_TTL: u8 = 255;

/// How far away a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hops {
    /// On the same link: packets must arrive with hop limit 255, which nobody further away can forge
    /// (RFC 5881 section 5).
    Single,
    /// Behind routers (RFC 5883): packets must arrive with at least this hop limit; 0 accepts all.
    Multi {
        /// Lowest hop limit accepted.
        minimum_ttl: u8,
    },
}

impl Hops {
    /// The port that the RFCs give to such sessions.
    pub const fn port(self) -> u16 {
        match self {
            Self::Single => SINGLE_HOP_PORT,
            Self::Multi { .. } => MULTIHOP_PORT,
        }
    }

    const fn minimum_ttl(self) -> u8 {
        match self {
            Self::Single => MAXIMUM_TTL,
            Self::Multi { minimum_ttl } => minimum_ttl,
        }
    }
}

/// What names a session before its discriminators are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerKey {
    /// Address of the peer.
    pub peer: IpAddr,
    /// Our address towards it; without it packets to any of our addresses belong to the session.
    pub local: Option<IpAddr>,
    /// Index of the interface to the peer; without it any. Link-local peers need it.
    pub interface: Option<u32>,
    /// UDP port on both sides.
    pub port: u16,
}

/// A session to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerConfig {
    /// With whom.
    pub key: PeerKey,
    /// How far away.
    pub hops: Hops,
    /// How fast.
    pub timers: Timers,
    /// Whether to stay silent until the peer speaks.
    pub passive: bool,
}

/// What the network says about a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Who sent it.
    pub source: IpAddr,
    /// Which of our addresses it was sent to.
    pub destination: IpAddr,
    /// Index of the interface it came in by.
    pub interface: u32,
    /// Our UDP port.
    pub port: u16,
    /// Hop limit on arrival.
    pub ttl: u8,
}

/// A packet that no session took, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Discard {
    /// It is no packet to work with.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// It has travelled too far.
    #[error("hop limit {ttl} is below {minimum}")]
    Ttl {
        /// On arrival.
        ttl: u8,
        /// What the session demands.
        minimum: u8,
    },
    /// It names a session that is not here.
    #[error("no session has discriminator {0}")]
    UnknownDiscriminator(Discriminator),
    /// It names a session with somebody else.
    #[error("session {0} is not with this peer")]
    WrongPeer(Discriminator),
    /// It names no session, and there is none with its sender.
    #[error("no session is configured with this peer")]
    UnknownPeer,
}

/// Packets of one session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Control packets sent.
    pub sent: u64,
    /// Control packets taken in.
    pub received: u64,
    /// Packets that named the session and were not believed.
    pub discarded: u64,
    /// Times the session came up.
    pub ups: u64,
    /// Times it went down again.
    pub downs: u64,
}

#[derive(Debug)]
struct Entry {
    config: PeerConfig,
    session: Session,
    counters: Counters,
    /// Its place in the timer queue.
    scheduled: Option<Instant>,
    /// When a session that is being removed has told its peer long enough.
    closing: Option<Instant>,
}

impl Entry {
    fn deadline(&self) -> Option<Instant> {
        [self.session.deadline(), self.closing].into_iter().flatten().min()
    }
}

/// The sessions of a speaker.
#[derive(Debug, Default)]
pub struct Table {
    sessions: HashMap<Discriminator, Entry>,
    by_peer: HashMap<(IpAddr, u16), Vec<Discriminator>>,
    timers: BTreeSet<(Instant, Discriminator)>,
    events: VecDeque<(Discriminator, Event)>,
    /// Discriminators must not be guessed by somebody who cannot see the packets: they are keyed hashes
    /// of a counter, under a key the system drew.
    random: RandomState,
    drawn: u64,
}

impl Table {
    /// Number of sessions, without those being closed.
    pub fn len(&self) -> usize {
        self.by_peer.values().map(Vec::len).sum()
    }

    /// Whether there is no session, not even one being closed.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Starts a session. One with the same key that is still being closed ends at once.
    ///
    /// # Errors
    ///
    /// The discriminator of the session that has this key already.
    pub fn add(&mut self, config: PeerConfig, now: Instant) -> Result<Discriminator, Discriminator> {
        let mut others = self.sessions.iter().filter(|(_, entry)| entry.config.key == config.key);
        let same = others.next().map(|(&discriminator, entry)| (discriminator, entry.closing.is_some()));
        match same {
            Some((discriminator, true)) => self.forget(discriminator),
            Some((discriminator, false)) => return Err(discriminator),
            None => {}
        }
        let discriminator = self.draw();
        let seed = self.random.hash_one((discriminator, self.drawn));
        let session = Session::new(config.timers, config.passive, discriminator, seed, now);
        let entry = Entry { config, session, counters: Counters::default(), scheduled: None, closing: None };
        self.sessions.insert(discriminator, entry);
        self.by_peer.entry((config.key.peer, config.key.port)).or_default().push(discriminator);
        self.touch(discriminator);
        Ok(discriminator)
    }

    fn draw(&mut self) -> Discriminator {
        loop {
            self.drawn += 1;
            if let Some(discriminator) = Discriminator::new(self.random.hash_one(self.drawn) as u32)
                && !self.sessions.contains_key(&discriminator)
            {
                return discriminator;
            }
        }
    }

    /// Ends a session: the peer is told "administratively down" for as long as it needs to hear it, so
    /// that it does not take the path for broken (RFC 5880 section 6.8.16).
    pub fn close(&mut self, discriminator: Discriminator, now: Instant) {
        let Some(entry) = self.sessions.get_mut(&discriminator) else { return };
        if entry.closing.is_some() {
            return;
        }
        let patience = entry.session.remote_detection_time();
        entry.session.set_admin_down(true);
        let heard = entry.session.remote_discriminator().is_some();
        entry.closing = Some(if heard { now + patience } else { now });
        let key = entry.config.key;
        self.unname(discriminator, key);
        self.touch(discriminator);
    }

    /// Takes other timers for a session.
    pub fn set_timers(&mut self, discriminator: Discriminator, timers: Timers) {
        if let Some(entry) = self.sessions.get_mut(&discriminator) {
            entry.config.timers = timers;
            entry.session.set_timers(timers);
            self.touch(discriminator);
        }
    }

    /// Holds a session down on purpose, or lets it go.
    pub fn set_admin_down(&mut self, discriminator: Discriminator, down: bool) {
        if let Some(entry) = self.sessions.get_mut(&discriminator)
            && entry.closing.is_none()
        {
            entry.session.set_admin_down(down);
            self.touch(discriminator);
        }
    }

    /// Takes in the payload of a UDP packet.
    ///
    /// # Errors
    ///
    /// [`Discard`] when no session may have it; nothing changed then but a counter.
    pub fn receive(
        &mut self,
        bytes: &[u8],
        received: &Received,
        now: Instant,
    ) -> Result<Discriminator, Discard> {
        let packet = Packet::decode(bytes)?;
        let discriminator = match packet.your_discriminator {
            Some(discriminator) => discriminator,
            None => self.find(received).ok_or(Discard::UnknownPeer)?,
        };
        let entry =
            self.sessions.get_mut(&discriminator).ok_or(Discard::UnknownDiscriminator(discriminator))?;
        if !belongs(&entry.config.key, received) {
            entry.counters.discarded += 1;
            return Err(Discard::WrongPeer(discriminator));
        }
        let minimum = entry.config.hops.minimum_ttl();
        if received.ttl < minimum {
            entry.counters.discarded += 1;
            return Err(Discard::Ttl { ttl: received.ttl, minimum });
        }
        entry.counters.received += 1;
        entry.session.receive(&packet, now);
        self.touch(discriminator);
        Ok(discriminator)
    }

    /// Lets time pass, and hands out every packet that is due.
    pub fn run(&mut self, now: Instant, mut send: impl FnMut(Discriminator, &PeerConfig, Packet)) {
        while let Some(&(deadline, discriminator)) = self.timers.first()
            && deadline <= now
        {
            let Some(entry) = self.sessions.get_mut(&discriminator) else {
                self.timers.pop_first();
                continue;
            };
            entry.session.advance(now);
            while let Some(packet) = entry.session.transmit(now) {
                entry.counters.sent += 1;
                send(discriminator, &entry.config, packet);
            }
            if entry.closing.is_some_and(|closing| closing <= now) {
                self.forget(discriminator);
            } else {
                self.touch(discriminator);
            }
        }
    }

    /// When [`Table::run`] next has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.timers.first().map(|&(deadline, _)| deadline)
    }

    /// The next change of a session, oldest first.
    pub fn event(&mut self) -> Option<(Discriminator, Event)> {
        self.events.pop_front()
    }

    /// A session, with how it was configured and what it counted.
    pub fn get(&self, discriminator: Discriminator) -> Option<(&PeerConfig, &Session, Counters)> {
        self.sessions.get(&discriminator).map(|entry| (&entry.config, &entry.session, entry.counters))
    }

    /// The discriminators of all sessions, those being closed included, in no particular order.
    pub fn discriminators(&self) -> impl Iterator<Item = Discriminator> {
        self.sessions.keys().copied()
    }

    fn find(&self, received: &Received) -> Option<Discriminator> {
        let candidates = self.by_peer.get(&(received.source, received.port))?;
        let mut fitting = candidates.iter().copied().filter(|discriminator| {
            self.sessions.get(discriminator).is_some_and(|entry| belongs(&entry.config.key, received))
        });
        fitting.next()
    }

    /// After anything that may have moved a session: collects its events and puts it at its new place
    /// in the timer queue.
    fn touch(&mut self, discriminator: Discriminator) {
        let Some(entry) = self.sessions.get_mut(&discriminator) else { return };
        while let Some(event) = entry.session.event() {
            match event {
                Event::Up => entry.counters.ups += 1,
                Event::Down(_) => entry.counters.downs += 1,
            }
            self.events.push_back((discriminator, event));
        }
        let deadline = entry.deadline();
        if deadline != entry.scheduled {
            if let Some(old) = entry.scheduled {
                self.timers.remove(&(old, discriminator));
            }
            if let Some(new) = deadline {
                self.timers.insert((new, discriminator));
            }
            entry.scheduled = deadline;
        }
    }

    fn forget(&mut self, discriminator: Discriminator) {
        if let Some(entry) = self.sessions.remove(&discriminator) {
            if let Some(scheduled) = entry.scheduled {
                self.timers.remove(&(scheduled, discriminator));
            }
            self.unname(discriminator, entry.config.key);
        }
    }

    fn unname(&mut self, discriminator: Discriminator, key: PeerKey) {
        if let Some(named) = self.by_peer.get_mut(&(key.peer, key.port)) {
            named.retain(|&other| other != discriminator);
            if named.is_empty() {
                self.by_peer.remove(&(key.peer, key.port));
            }
        }
    }
}

fn belongs(key: &PeerKey, received: &Received) -> bool {
    key.peer == received.source
        && key.port == received.port
        && key.local.is_none_or(|local| local == received.destination)
        && key.interface.is_none_or(|interface| interface == received.interface)
}

#[cfg(test)]
mod tests;
