use std::net::Ipv4Addr;

use super::*;
use crate::message::{Asn, RouterId};
use crate::peer::PeerKey;
use crate::session::tests::terms;
use crate::session::{Offer, PeerAsn, Restart};
use crate::speaker::RestartConfig;

/// A node that restarted, with peers by number.
struct Restarted {
    table: Table,
    restarting: Arc<AtomicBool>,
    /// What peers would be told and given, kept open.
    held: Vec<(mpsc::UnboundedReceiver<Command>, mpsc::Receiver<Batch>)>,
}

impl Restarted {
    fn new(peers: &[u32]) -> Self {
        let mut config = SpeakerConfig::new(Asn(65000), RouterId::from(100));
        let deferral = Duration::from_secs(600);
        let forwarding = Families::ALL;
        config.restart = Some(RestartConfig { time: 60, forwarding, restarted: true, deferral });
        let restarting = Arc::new(AtomicBool::new(true));
        let (_, control) = mpsc::unbounded_channel();
        let (_, inbox) = mpsc::channel(1);
        let table = Table::new(&config, restarting.clone(), control, inbox);
        let mut node = Self { table, restarting, held: Vec::new() };
        peers.iter().for_each(|number| node.add(*number, Initiative::Both));
        node
    }

    fn add(&mut self, number: u32, initiative: Initiative) {
        let address = IpAddr::V4(Ipv4Addr::from(number));
        let (commands, receiver) = mpsc::unbounded_channel();
        self.held.push((receiver, mpsc::channel(1).1));
        self.table.control(Control::Add {
            number,
            options: Box::new(PeerOptions::new(address)),
            initiative,
            restart_after: None,
            commands,
            board: Arc::new(Board::new(PeerKey { address, interface: None })),
        });
    }

    fn up(&mut self, number: u32, restarted: bool) {
        let with_restart = |asn, id| {
            let mut terms = terms(asn, id, PeerAsn::Any);
            terms.restart = Some(Restart { time: 60, forwarding: Families::ALL });
            terms
        };
        let open = with_restart(65001, number).open(Offer::Full, restarted);
        let negotiated = with_restart(65000, 100).agree(Offer::Full, &open).unwrap();
        let (routes, receiver) = mpsc::channel(1);
        self.held.push((mpsc::unbounded_channel().1, receiver));
        let up = FromPeer::Up { negotiated: Box::new(negotiated), local: None, routes };
        self.table.arrival(number, up);
    }

    fn end_of_rib(&mut self, number: u32, family: AfiSafi) {
        let update = Update { end_of_rib: Some(family), ..Update::default() };
        self.table.arrival(number, FromPeer::Updates(vec![update]));
    }

    fn ends_of_rib(&mut self, number: u32) {
        AfiSafi::SUPPORTED.into_iter().for_each(|family| self.end_of_rib(number, family));
    }

    fn is_waiting(&self) -> bool {
        self.restarting.load(Ordering::Relaxed)
    }
}

/// Peers are quick: the first may be through while the last is not yet configured.
#[test]
fn a_peer_that_is_through_before_all_are_known_is_not_waited_for() {
    let mut node = Restarted::new(&[1, 2, 3]);
    node.up(1, false);
    node.ends_of_rib(1);
    node.up(2, false);
    node.end_of_rib(2, AfiSafi::Ipv4Unicast);
    node.table.arrival(3, FromPeer::Failed);
    node.table.control(Control::PeersSet);
    assert!(node.is_waiting(), "the second has more to tell");
    node.end_of_rib(2, AfiSafi::Ipv6Unicast);
    assert!(!node.is_waiting());
}

#[test]
fn peers_that_are_not_there_or_restart_too_are_not_waited_for() {
    let mut node = Restarted::new(&[1, 2, 3, 4]);
    node.table.control(Control::PeersSet);
    node.up(1, true);
    node.table.arrival(2, FromPeer::Failed);
    node.up(3, false);
    node.table.arrival(3, FromPeer::Down { retain: true });
    assert!(node.is_waiting(), "the fourth was not heard of");
    // A peer of later, which nothing waits for.
    node.add(5, Initiative::Both);
    node.up(5, false);
    node.table.arrival(4, FromPeer::Gone);
    assert!(!node.is_waiting());
}

#[test]
fn the_wait_ends_in_time() {
    let mut node = Restarted::new(&[1]);
    node.add(2, Initiative::Passive);
    node.table.control(Control::PeersSet);
    node.up(1, false);
    // A peer that has to connect by itself has less time, and does not wake the task once that is over.
    let connected = node.table.deadline().unwrap();
    node.table.expire(connected);
    let until = node.table.deadline().unwrap();
    assert!(until > connected);
    node.table.expire(until - Duration::from_secs(1));
    assert!(node.is_waiting());
    node.table.expire(until);
    assert!(!node.is_waiting());
    assert_eq!(node.table.deadline(), None);
}
