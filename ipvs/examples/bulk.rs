//! How long a table takes: encoding, applying, replaying the same bytes raw, reading back.
//! Usage: `bulk [SERVERS [DESTINATIONS [ROUNDS]]]`, as root on a kernel with IPVS; every measurement
//! runs in a network namespace of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement stops at the first surprise")]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ferroute_ipvs::*;
use ferroute_netlink::{Batch, Protocol as Netlink, Socket, resolve_family};
use nix::sched::{CloneFlags, unshare};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u32>().expect("a number"));
    let servers = arguments.next().unwrap_or(1000);
    let destinations = arguments.next().unwrap_or(10);
    let rounds = arguments.next().unwrap_or(5);
    let _ = std::process::Command::new("modprobe").args(["-a", "ip_vs", "ip_vs_rr"]).output();

    let desired = table(servers, destinations);
    let start = Instant::now();
    let changes = diff_all(&Table::default(), &desired);
    report("difference from nothing", vec![start.elapsed()], changes.len());

    let mut times: [Vec<Duration>; 6] = Default::default();
    for _ in 0..rounds {
        let mut batch = Batch::new();
        times[0].push(timed(|| changes.iter().for_each(|change| wire::change(&mut batch, 0x1c, change))));
        times[1].push(in_namespace(|| replay(&changes)));
        let (apply, dump, proc, same) = in_namespace(|| apply(&changes, &desired));
        times[2].push(apply);
        times[3].push(dump);
        times[4].push(proc);
        times[5].push(same);
    }
    let [encode, raw, apply, dump, proc, same] = times;
    report("encode", encode, changes.len());
    report("raw replay, 64 KiB per send", raw, changes.len());
    report("apply (encode, send, errors)", apply, changes.len());
    report("dump", dump, changes.len());
    report("read /proc/thread-self/net/ip_vs", proc, changes.len());
    report("difference of equal tables", same, changes.len());
}

fn table(servers: u32, destinations: u32) -> Table {
    let netmask = Netmask::host(Family::V4);
    let options = Options { scheduler: Scheduler::RR, flags: Flags::NONE, timeout: 0, netmask };
    (0..servers)
        .map(|server| {
            let address = Ipv4Addr::from_bits(0x0a60_0000 + server).into();
            let key = VirtualServerKey::Address { protocol: Protocol::Tcp, address, port: 80 };
            let pods = (0..destinations)
                .map(|pod| Ipv4Addr::from_bits(0x0b00_0000 + server * destinations + pod))
                .map(|pod| Destination::masquerade(pod.into(), 8080, 1));
            (key, Arc::new(VirtualServer::new(options, pods.collect())))
        })
        .collect()
}

/// The same messages encoded beforehand: what the kernel alone takes.
fn replay(changes: &[Change]) -> Duration {
    let mut socket = Socket::open(Netlink::Generic).unwrap();
    let family = resolve_family(&mut socket, wire::FAMILY).expect("a kernel with IPVS");
    let mut batch = Batch::new();
    changes.iter().for_each(|change| wire::change(&mut batch, family, change));
    timed(|| assert_eq!(socket.execute(&batch).unwrap(), []))
}

fn apply(changes: &[Change], desired: &Table) -> (Duration, Duration, Duration, Duration) {
    let mut ipvs = Handle::open().unwrap();
    let apply = timed(|| assert_eq!(ipvs.apply(changes).unwrap(), []));
    let mut actual = Table::default();
    let dump = timed(|| actual = ipvs.dump().unwrap());
    let mut text = Vec::new();
    let proc = timed(|| text = std::fs::read("/proc/thread-self/net/ip_vs").unwrap());
    assert!(text.len() > 40 * changes.len());
    let same = timed(|| assert_eq!(diff_all(&actual, desired), []));
    (apply, dump, proc, same)
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn in_namespace<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("root");
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
            assert!(up.is_ok_and(|status| status.success()), "lo has to be up");
            work()
        });
        thread.join().unwrap()
    })
}

fn report(what: &str, mut times: Vec<Duration>, items: usize) {
    times.sort_unstable();
    let median = times[times.len() / 2];
    let per_item = median.as_secs_f64() * 1e6 / items as f64;
    println!("{what:34} {:8.1} ms  {per_item:6.3} us each of {items}", median.as_secs_f64() * 1e3);
}
