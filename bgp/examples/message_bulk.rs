//! How long many routes take: written into messages, cut out of a stream and read.
//! Usage: `bulk [ROUTES [ROUNDS]]`. Every figure is the median with the least and the most, in time that this
//! thread was on a processor.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement stops at the first surprise")]

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ferroute_bgp::message::*;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::time::{ClockId, clock_gettime};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u32>().expect("a number"));
    let routes = arguments.next().unwrap_or(100_000);
    let rounds = arguments.next().unwrap_or(11);
    let codec = Codec { families: Families::ALL, four_octet_as: true, ..Codec::initial() };
    for ipv6 in [false, true] {
        for shared in [100, 1] {
            let sets: Vec<(Attributes, Vec<Nlri>)> = (0..routes)
                .step_by(shared)
                .map(|first| {
                    let last = (first + shared as u32).min(routes);
                    (attributes(first, ipv6), (first..last).map(|number| route(number, ipv6)).collect())
                })
                .collect();
            let (mut bytes, mut written, mut read, mut messages) = (Vec::new(), Vec::new(), Vec::new(), 0);
            for _ in 0..rounds {
                bytes.clear();
                let start = now();
                messages = sets
                    .iter()
                    .map(|(attributes, nlri)| {
                        codec.announce(attributes, nlri.iter().copied(), &mut bytes).unwrap()
                    })
                    .sum();
                written.push(now() - start);
                let start = now();
                assert_eq!(count(&bytes, &codec), routes as usize);
                read.push(now() - start);
            }
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            println!("{routes} {family} routes, {shared} to a set of attributes, {messages} messages:");
            report("write", written);
            report("read", read);
        }
    }
}

fn route(number: u32, ipv6: bool) -> Nlri {
    Nlri::new(if ipv6 {
        let address = 0x2001_0db8 << 96 | u128::from(number) << 64;
        IpNet::from(Ipv6Net::new(Ipv6Addr::from(address), 64).unwrap())
    } else {
        IpNet::from(Ipv4Net::new(Ipv4Addr::from(0x0a00_0000 + (number << 8)), 24).unwrap())
    })
}

fn attributes(number: u32, ipv6: bool) -> Attributes {
    Attributes {
        as_path: AsPath::sequence([Asn(65001), Asn(4_200_000_000 + number), Asn(65003)]),
        next_hop: if ipv6 {
            NextHop::V6 { global: Ipv6Addr::LOCALHOST, link_local: None }
        } else {
            NextHop::V4([192, 0, 2, 1].into())
        },
        med: Some(number),
        communities: vec![Community::new(65001, 1), Community::new(65001, 2)],
        ..Attributes::default()
    }
}

/// Reads a stream as it comes from a socket, and counts the routes.
fn count(mut stream: &[u8], codec: &Codec) -> usize {
    let (mut reader, mut routes) = (FrameReader::new(), 0);
    while !stream.is_empty() {
        let space = reader.space();
        let length = space.len().min(stream.len());
        space[..length].copy_from_slice(&stream[..length]);
        reader.filled(length);
        stream = &stream[length..];
        while let Some(frame) = reader.next_frame(codec).unwrap() {
            let Message::Update(update) = Message::decode(frame, codec).unwrap().message else { continue };
            routes += update.announced.iter().map(|announcement| announcement.nlri.len()).sum::<usize>();
        }
    }
    routes
}

fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("own time").into()
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let [least, median, most] = [times[0], times[times.len() / 2], times[times.len() - 1]];
    println!("  {what:5} {median:>9.2?} ({least:.2?} to {most:.2?})");
}
