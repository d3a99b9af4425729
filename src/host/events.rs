//! Changes of links, addresses and routes, as the kernel reports them.
//!
//! Subscribe first, then dump: what changes between the two is then reported, not missed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use ferroute_netlink::{DecodeError, Protocol, Socket};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::address::{LinkAddress, RTM_DELADDR, RTM_NEWADDR};
use super::link::{Link, RTM_DELLINK, RTM_NEWLINK};
use super::route::{RTM_DELROUTE, RTM_NEWROUTE, Route};
use super::rule::RTM_DELRULE;
use super::{Error, Family};

/// RTNLGRP_LINK.
const GROUP_LINK: u32 = 1;
/// RTNLGRP_IPV4_IFADDR.
const GROUP_IPV4_ADDRESS: u32 = 5;
/// RTNLGRP_IPV4_ROUTE.
const GROUP_IPV4_ROUTE: u32 = 7;
/// RTNLGRP_IPV4_RULE.
const GROUP_IPV4_RULE: u32 = 8;
/// RTNLGRP_IPV6_IFADDR.
const GROUP_IPV6_ADDRESS: u32 = 9;
/// RTNLGRP_IPV6_ROUTE.
const GROUP_IPV6_ROUTE: u32 = 11;
/// RTNLGRP_IPV6_RULE.
const GROUP_IPV6_RULE: u32 = 19;

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A link is new or changed.
    Link(Link),
    /// A link is gone, and with it its addresses and routes (IPv4 routes without events of their
    /// own).
    LinkGone(Link),
    /// An address is new or changed.
    Address(LinkAddress),
    /// An address is gone. IPv4 routes that preferred it as source go with it.
    AddressGone(LinkAddress),
    /// A route is new or replaced.
    Route(Route),
    /// A route is gone.
    RouteGone(Route),
    /// A policy-routing rule is gone.
    RuleGone,
    /// Events were lost, or one could not be read: everything may have changed.
    Overrun,
}

impl Event {
    /// Reads one notification; `None` for what is none of ours.
    pub fn decode(kind: u16, payload: &[u8]) -> Result<Option<Self>, DecodeError> {
        Ok(match kind {
            RTM_NEWLINK | RTM_DELLINK => {
                // Bridges announce their ports with AF_BRIDGE messages of the same type, which
                // say nothing about the link itself.
                if payload.first().is_some_and(|&family| family != 0) {
                    return Ok(None);
                }
                let link = Link::decode(payload)?;
                Some(if kind == RTM_NEWLINK { Event::Link(link) } else { Event::LinkGone(link) })
            }
            RTM_NEWADDR => LinkAddress::decode(payload)?.map(Event::Address),
            RTM_DELADDR => LinkAddress::decode(payload)?.map(Event::AddressGone),
            RTM_NEWROUTE => Route::decode(payload)?.map(Event::Route),
            RTM_DELRULE => Some(Event::RuleGone),
            RTM_DELROUTE => Route::decode(payload)?.map(Event::RouteGone),
            _ => None,
        })
    }
}

/// What to hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Links of any kind.
    pub links: bool,
    /// Addresses of both families.
    pub addresses: bool,
    /// Routes of both families and all tables; on a router with a full table this is a flood.
    pub routes: bool,
    /// Policy-routing rules of both families that go.
    pub rules: bool,
}

impl Interest {
    /// Links, addresses and routes.
    pub const ALL: Interest = Interest { links: true, addresses: true, routes: true, rules: false };

    fn groups(self) -> impl Iterator<Item = u32> {
        [
            (self.links, GROUP_LINK),
            (self.addresses, GROUP_IPV4_ADDRESS),
            (self.addresses, GROUP_IPV6_ADDRESS),
            (self.routes, GROUP_IPV4_ROUTE),
            (self.routes, GROUP_IPV6_ROUTE),
            (self.rules, GROUP_IPV4_RULE),
            (self.rules, GROUP_IPV6_RULE),
        ]
        .into_iter()
        .filter_map(|(wanted, group)| wanted.then_some(group))
    }
}

/// A subscription to the changes of one network namespace.
#[derive(Debug)]
pub struct Events {
    socket: Socket,
}

impl Events {
    /// Subscribes in the network namespace of the calling thread.
    pub fn subscribe(interest: Interest) -> Result<Self, Error> {
        let action = "subscribe to network changes";
        let mut socket =
            Socket::open(Protocol::Route).map_err(|source| Error::Transport { action, source })?;
        for group in interest.groups() {
            socket.join(group).map_err(|source| Error::Transport { action, source })?;
        }
        Ok(Self { socket })
    }

    /// Waits at most `timeout` (for ever when `None`) and hands every event that has arrived to
    /// `event`. Returns how many there were; lost events are reported as [`Event::Overrun`].
    pub fn wait(&mut self, timeout: Option<Duration>, mut event: impl FnMut(Event)) -> Result<usize, Error> {
        let mut count = 0;
        let received =
            self.socket.receive_events(timeout, |kind, payload| match Event::decode(kind, payload) {
                Ok(None) => {}
                Ok(Some(decoded)) => {
                    count += 1;
                    event(decoded);
                }
                Err(_) => {
                    count += 1;
                    event(Event::Overrun);
                }
            });
        match received {
            Ok(_) => Ok(count),
            Err(ferroute_netlink::Error::Overrun | ferroute_netlink::Error::Decode(_)) => {
                event(Event::Overrun);
                Ok(count + 1)
            }
            Err(source) => Err(Error::Transport { action: "wait for network changes", source }),
        }
    }

    /// Moves the subscription to a thread of its own that sleeps until something changes and calls
    /// `event`, which must not block for long: while it runs, events queue in the kernel. Dropping
    /// the returned handle ends the thread.
    ///
    /// When waiting itself fails, `failed` is called with the reason and the thread ends.
    pub fn spawn(
        self,
        mut event: impl FnMut(Event) + Send + 'static,
        failed: impl FnOnce(Error) + Send + 'static,
    ) -> io::Result<Watching> {
        let take = move |events: &mut Self| events.wait(Some(Duration::ZERO), &mut event).map(drop);
        Watching::spawn("network-events", self, take, failed)
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Watching {
    /// A thread of this name that sleeps until `source` can be read and calls `take` then, which must leave
    /// nothing to read. When waiting or taking fails, `failed` is called with the reason and the thread ends.
    pub fn spawn<S: AsFd + Send + 'static>(
        name: &str,
        mut source: S,
        mut take: impl FnMut(&mut S) -> Result<(), Error> + Send + 'static,
        failed: impl FnOnce(Error) + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, stopped) = UnixStream::pair()?;
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            loop {
                let mut ready = [
                    PollFd::new(source.as_fd(), PollFlags::POLLIN),
                    PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
                ];
                match poll(&mut ready, PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(errno) => {
                        let source = ferroute_netlink::Error::Receive { source: errno };
                        return failed(Error::Transport { action: "wait for changes", source });
                    }
                }
                if ready[1].any().unwrap_or(true) {
                    return;
                }
                if let Err(error) = take(&mut source) {
                    return failed(error);
                }
            }
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

/// A thread that waits for changes; dropping it ends the thread.
#[derive(Debug)]
pub struct Watching {
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Watching {
    fn drop(&mut self) {
        // Closing our end wakes the thread.
        self.stop.take();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic in the callback has been printed by its own thread.
            let _ = thread.join();
        }
    }
}

impl Event {
    /// The family concerned; `None` for links and for lost events, which concern both.
    pub fn family(&self) -> Option<Family> {
        match self {
            Event::Address(address) | Event::AddressGone(address) => Some(Family::of(address.address.addr())),
            Event::Route(route) | Event::RouteGone(route) => Some(Family::of(route.key.destination.addr())),
            Event::Link(_) | Event::LinkGone(_) | Event::RuleGone | Event::Overrun => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_bridge_port_message_is_no_link_event() {
        let mut payload = [0u8; 16];
        assert!(matches!(Event::decode(RTM_NEWLINK, &payload), Ok(Some(Event::Link(_)))));
        assert!(matches!(Event::decode(RTM_DELLINK, &payload), Ok(Some(Event::LinkGone(_)))));
        payload[0] = 7;
        assert_eq!(Event::decode(RTM_NEWLINK, &payload), Ok(None));
    }

    #[test]
    fn unknown_messages_are_passed_over_and_short_ones_refused() {
        assert_eq!(Event::decode(28, &[]), Ok(None));
        assert!(Event::decode(RTM_NEWADDR, &[2]).is_err());
    }

    #[test]
    fn interest_chooses_groups() {
        assert_eq!(Interest::ALL.groups().collect::<Vec<_>>(), [1, 5, 9, 7, 11]);
        let addresses = Interest { links: false, addresses: true, routes: false, rules: false };
        assert_eq!(addresses.groups().collect::<Vec<_>>(), [5, 9]);
        let rules = Interest { addresses: false, rules: true, ..addresses };
        assert_eq!(rules.groups().collect::<Vec<_>>(), [8, 19]);
    }

    proptest! {
        #[test]
        fn any_notification_is_survived(kind in 14u16..30, bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Event::decode(kind, &bytes);
        }
    }
}
