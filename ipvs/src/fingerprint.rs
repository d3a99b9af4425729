//! Whether the kernel's table may differ from a known one, at a fraction of the cost of a dump.
//!
//! `/proc/net/ip_vs` lists all servers and destinations in a few reads, but tells neither scheduler
//! flags nor timeouts, thresholds and tunnels: equal fingerprints mean that nothing came, went or got
//! another weight, scheduler or way of forwarding. Small tables only: the kernel seeks in quadratic time.

use std::hash::{BuildHasher, Hash};
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr};

use foldhash::fast::FixedState;

use crate::{Family, Flags, Forwarding, Protocol, Table, VirtualServerKey};

/// In the network namespace of the calling thread.
const PATH: &str = "/proc/thread-self/net/ip_vs";

/// What [`fingerprint`] and [`Listing::fingerprint`] agree on when the tables are alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fingerprint {
    /// Sum of the hashes of servers and destinations: without order.
    sum: u64,
    servers: usize,
    destinations: usize,
}

/// The kernel's listing; keeps its memory from one reading to the next.
#[derive(Debug, Default)]
pub struct Listing {
    bytes: Vec<u8>,
}

/// A server's line, or the part of its key that the line tells: a mark is listed without family.
#[derive(Clone, Copy, Hash)]
enum Place {
    Address(Protocol, IpAddr, u16),
    Mark(u32),
}

impl Fingerprint {
    fn server(&mut self, place: Place, scheduler: &[u8], persistent: bool) {
        self.servers += 1;
        self.add((place, scheduler, persistent));
    }

    fn destination(&mut self, place: Place, address: IpAddr, port: u16, forwarding: &[u8], weight: i64) {
        self.destinations += 1;
        self.add((place, address, port, forwarding, weight));
    }

    fn add(&mut self, what: impl Hash) {
        self.sum = self.sum.wrapping_add(FixedState::default().hash_one(what));
    }
}

/// The fingerprint of a table.
pub fn fingerprint(table: &Table) -> Fingerprint {
    let mut found = Fingerprint::default();
    for (key, server) in table {
        let place = match *key {
            VirtualServerKey::Address { protocol, address, port } => Place::Address(protocol, address, port),
            VirtualServerKey::Mark { mark, .. } => Place::Mark(mark),
        };
        let persistent = server.flags.contains(Flags::PERSISTENT);
        found.server(place, server.scheduler.name().as_bytes(), persistent);
        for destination in &server.destinations {
            // ip_vs_fwd_name in net/netfilter/ipvs/ip_vs_ctl.c
            let forwarding: &[u8] = match destination.forwarding {
                Forwarding::Masquerade => b"Masq",
                Forwarding::LocalNode => b"Local",
                Forwarding::Tunnel(_) => b"Tunnel",
                Forwarding::DirectRoute => b"Route",
                Forwarding::Bypass | Forwarding::Other(_) => b"Bypass",
            };
            let weight = i64::from(destination.weight);
            found.destination(place, destination.address, destination.port, forwarding, weight);
        }
    }
    found
}

impl Listing {
    /// Reads the listing and returns the fingerprint of the servers for which `is_ours` holds; a mark
    /// is asked for in both families. `None` where it cannot be read, or is not in the known form.
    pub fn fingerprint(&mut self, is_ours: impl FnMut(&VirtualServerKey) -> bool) -> Option<Fingerprint> {
        self.bytes.clear();
        std::fs::File::open(PATH).and_then(|mut file| file.read_to_end(&mut self.bytes)).ok()?;
        parse(&self.bytes, is_ours)
    }
}

fn parse(listing: &[u8], mut is_ours: impl FnMut(&VirtualServerKey) -> bool) -> Option<Fingerprint> {
    let mut found = Fingerprint::default();
    let mut server = None;
    // Three lines of heading.
    for line in listing.split(|byte| *byte == b'\n').skip(3).filter(|line| !line.is_empty()) {
        let mut words = line.split(|byte| *byte == b' ').filter(|word| !word.is_empty());
        let first = words.next()?;
        if first == b"->" {
            // Of a server that is not ours.
            let Some(place) = server else { continue };
            let (address, port) = address_and_port(words.next()?)?;
            let forwarding = words.next()?;
            let weight = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
            found.destination(place, address, port, forwarding, weight);
            continue;
        }
        let (place, ours) = if first == b"FWM" {
            let mark = u32::from_str_radix(std::str::from_utf8(words.next()?).ok()?, 16).ok()?;
            let ours = [Family::V4, Family::V6]
                .into_iter()
                .any(|family| is_ours(&VirtualServerKey::Mark { family, mark }));
            (Place::Mark(mark), ours)
        } else {
            let protocol = match first {
                b"TCP" => Protocol::Tcp,
                b"UDP" => Protocol::Udp,
                b"SCTP" => Protocol::Sctp,
                _ => return None,
            };
            let (address, port) = address_and_port(words.next()?)?;
            let ours = is_ours(&VirtualServerKey::Address { protocol, address, port });
            (Place::Address(protocol, address, port), ours)
        };
        server = ours.then_some(place);
        if ours {
            let scheduler = words.next()?;
            // One-packet scheduling is told of IPv4 only, so it does not count.
            found.server(place, scheduler, words.any(|word| word == b"persistent"));
        }
    }
    Some(found)
}

/// `0A600001:0050` or `[fd00:0096:0000:0000:0000:0000:0000:0001]:0050`.
fn address_and_port(word: &[u8]) -> Option<(IpAddr, u16)> {
    let (address, port) = std::str::from_utf8(word).ok()?.rsplit_once(':')?;
    let address = match address.strip_prefix('[') {
        Some(address) => IpAddr::V6(address.strip_suffix(']')?.parse().ok()?),
        None => IpAddr::V4(Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?)),
    };
    Some((address, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::{Destination, Netmask, Options, Scheduler, VirtualServer};

    /// As Linux 6.1 writes it.
    const LISTING: &str = "\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:01BB rr 
  -> C0A80001:192B      Masq    1      3          7         
  -> C0A80002:192B      Masq    0      0          0         
UDP  [fd00:0096:0000:0000:0000:0000:0000:000a]:0035 mh persistent 1080000 FFFFFFFF
  -> [fd00:0244:0000:0000:0000:0000:0000:0007]:14E9      Masq    1      0          0         
TCP  0A600009:0050 wlc ops 
  -> C0A80009:0050      Route   1      0          0         
FWM  40000001 rr 
  -> C0A80001:0050      Masq    1      0          0         
";

    fn server(scheduler: Scheduler, flags: Flags, to: Vec<Destination>) -> Arc<VirtualServer> {
        let options = Options { scheduler, flags, timeout: 10800, netmask: Netmask::host(Family::V4) };
        Arc::new(VirtualServer::new(options, to))
    }

    fn table() -> Table {
        let key = |protocol, address: &str, port| VirtualServerKey::Address {
            protocol,
            address: address.parse().unwrap(),
            port,
        };
        let to =
            |address: &str, port, weight| Destination::masquerade(address.parse().unwrap(), port, weight);
        [
            (
                key(Protocol::Tcp, "10.96.0.1", 443),
                server(
                    Scheduler::RR,
                    Flags::NONE,
                    vec![to("192.168.0.1", 6443, 1), to("192.168.0.2", 6443, 0)],
                ),
            ),
            (
                key(Protocol::Udp, "fd00:96::a", 53),
                server(Scheduler::MH, Flags::PERSISTENT, vec![to("fd00:244::7", 5353, 1)]),
            ),
            (
                VirtualServerKey::Mark { family: Family::V4, mark: 0x4000_0001 },
                server(Scheduler::RR, Flags::NONE, vec![to("192.168.0.1", 80, 1)]),
            ),
        ]
        .into_iter()
        .collect()
    }

    #[test]
    fn the_listing_of_a_table_has_its_fingerprint_whatever_strangers_have() {
        let table = table();
        let ours = |key: &VirtualServerKey| table.contains_key(key);
        assert_eq!(parse(LISTING.as_bytes(), ours), Some(fingerprint(&table)));
        assert_ne!(parse(LISTING.as_bytes(), |_| true), Some(fingerprint(&table)));
        let busy = LISTING.replace("3          7", "900        1");
        assert_eq!(parse(busy.as_bytes(), ours), Some(fingerprint(&table)), "connections do not count");
    }

    #[test]
    fn every_change_that_is_listed_changes_it() {
        let table = table();
        let ours = |key: &VirtualServerKey| table.contains_key(key);
        for (from, to) in [
            ("TCP  0A600001:01BB rr", "TCP  0A600001:01BB wrr"),
            ("TCP  0A600001:01BB rr \n", "TCP  0A600001:01BB rr persistent 100 FFFFFFFF\n"),
            ("C0A80001:192B      Masq    1 ", "C0A80001:192B      Masq    2 "),
            ("C0A80001:192B      Masq ", "C0A80001:192B      Route"),
            ("  -> C0A80002:192B      Masq    0      0          0         \n", ""),
            ("-> C0A80002:192B", "-> C0A80003:192B"),
            ("FWM  40000001 rr", "FWM  40000001 sh"),
            ("UDP  [fd00:0096", "UDP  [fd00:0097"),
        ] {
            assert!(LISTING.contains(from), "{from}");
            let changed = LISTING.replace(from, to);
            assert_ne!(parse(changed.as_bytes(), ours), Some(fingerprint(&table)), "{to}");
        }
    }

    #[test]
    fn another_form_is_no_listing() {
        for (from, to) in
            [("TCP  0A600001:01BB", "TCP  0A600001"), ("Masq    1 ", "Masq    x "), ("TCP ", "DCCP")]
        {
            assert_eq!(parse(LISTING.replace(from, to).as_bytes(), |_| true), None, "{to}");
        }
        assert_eq!(parse(b"", |_| true), Some(Fingerprint::default()));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(a\n|b\n|c\n)(TCP |FWM |->|\\[|\\]|:|0A| rr|Masq|\n| ){0,40}") {
            let _ = parse(text.as_bytes(), |_| true);
        }
    }
}
