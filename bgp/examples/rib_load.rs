//! Routes through the RIB: in from one peer, chosen, out to another. Prints time and memory.
//!
//!     cargo run --release -p ferroute-bgp --example rib_load -- [PREFIXES [PREFIXES-PER-ATTRIBUTE-SET]]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

use ferroute_bgp::decision::Options;
use ferroute_bgp::message::{
    Announcement, AsPath, Asn, Attributes, Community, Families, NextHop, Nlri, RouterId, Update,
};
use ferroute_bgp::policy::{LocalAddresses, Policy};
use ferroute_bgp::rib::{PeerId, PeerOptions, Rib, Session};
use ipnet::{IpNet, Ipv4Net};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u32>());
    let mut next = |default| match arguments.next() {
        None => default,
        Some(Ok(number)) if number > 0 => number,
        Some(_) => {
            eprintln!("usage: rib_load [PREFIXES [PREFIXES-PER-ATTRIBUTE-SET]], both numbers above 0");
            std::process::exit(64);
        }
    };
    let (prefixes, per_set) = (next(100_000), next(10));

    let updates: Vec<Update> = (0..prefixes)
        .step_by(per_set as usize)
        .map(|first| {
            let nlri = first..prefixes.min(first + per_set);
            Update {
                announced: vec![Announcement {
                    attributes: Arc::new(attributes(first / per_set)),
                    nlri: nlri.map(|index| Nlri::new(prefix(index))).collect(),
                }],
                ..Update::default()
            }
        })
        .collect();
    let withdrawals: Vec<Update> = updates
        .iter()
        .map(|update| Update { withdrawn: update.announced[0].nlri.clone(), ..Update::default() })
        .collect();

    let mut rib = Rib::new(Asn(65000), id(1), id(1), Options::default());
    let (sender, receiver) = (peer(&mut rib, 10, 65010), peer(&mut rib, 20, 65020));
    let before = resident();
    let sets = updates.len();
    let begin = Instant::now();
    for update in updates {
        // The update goes as the RIB is done with it, as in a session; what is shared stays.
        rib.receive(sender, &update, 0);
    }
    let received = begin.elapsed();
    let begin = Instant::now();
    let changes = rib.take_changes(usize::MAX).len();
    let chosen = begin.elapsed();
    let begin = Instant::now();
    let sent: usize = drain(&mut rib, receiver);
    let advertised = begin.elapsed();
    let after = resident();
    assert_eq!((changes, sent), (prefixes as usize, prefixes as usize));

    let begin = Instant::now();
    for update in &withdrawals {
        rib.receive(sender, update, 0);
    }
    drain(&mut rib, receiver);
    rib.take_changes(usize::MAX);
    let withdrawn = begin.elapsed();
    assert_eq!(rib.prefixes(ferroute_bgp::message::AfiSafi::Ipv4Unicast), 0);

    println!("{prefixes} prefixes, {sets} attribute sets");
    println!("  in and chosen  {:8.2} ms", received.as_secs_f64() * 1e3);
    println!("  to the kernel  {:8.2} ms", chosen.as_secs_f64() * 1e3);
    println!("  out            {:8.2} ms", advertised.as_secs_f64() * 1e3);
    println!("  withdrawn      {:8.2} ms, in, chosen and out", withdrawn.as_secs_f64() * 1e3);
    let grown = after.saturating_sub(before);
    println!(
        "  memory         {:8.1} bytes a prefix, {:.1} MiB",
        f64::from(grown) * 1024.0 / f64::from(prefixes),
        f64::from(grown) / 1024.0
    );
}

/// Pulls as a session does: some prefixes at a time.
fn drain(rib: &mut Rib, peer: PeerId) -> usize {
    let mut sent = 0;
    loop {
        let update = rib.advertise(peer, 16_384);
        let announced: usize = update.announced.iter().map(|group| group.nlri.len()).sum();
        if announced + update.withdrawn.len() == 0 {
            return sent;
        }
        sent += announced;
    }
}

fn peer(rib: &mut Rib, last: u8, asn: u32) -> PeerId {
    let all = Some(Arc::new(Policy::accept_all()));
    let address = IpAddr::from([192, 0, 2, last]);
    let peer = rib.add_peer(PeerOptions { import: all.clone(), export: all, ..PeerOptions::new(address) });
    let session = Session {
        asn: Asn(asn),
        router_id: id(last),
        addresses: LocalAddresses { v4: Some([192, 0, 2, 1].into()), ..LocalAddresses::default() },
        families: Families::IPV4,
        add_path_receive: Families::NONE,
        add_path_send: Families::NONE,
        extended_next_hop: false,
    };
    rib.up(peer, session);
    peer
}

fn id(last: u8) -> RouterId {
    RouterId([10, 255, 0, last].into())
}

/// A set like those of a full table: a path of four, two communities.
fn attributes(index: u32) -> Attributes {
    Attributes {
        as_path: AsPath::sequence(
            [65010, 1000 + index % 7919, 2000 + index % 104_729, 3000 + index].map(Asn),
        ),
        next_hop: NextHop::V4([192, 0, 2, 10].into()),
        communities: vec![Community::new(65010, (index % 50) as u16), Community(index)],
        ..Attributes::default()
    }
}

/// /24s from 1.0.0.0 up.
fn prefix(index: u32) -> IpNet {
    let address = Ipv4Addr::from((index + 0x1_0000) << 8);
    Ipv4Net::new_assert(address, 24).into()
}

/// Resident memory in KiB, from the kernel.
fn resident() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse().ok()).unwrap_or(0)
}
