//! Against the running kernel, in network namespaces of their own. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use ferroute_netlink::{Batch, Body, Error, Protocol, Socket, attributes, flags, resolve_family};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const IFA_LOCAL: u16 = 2;
const IFLA_IFNAME: u16 = 3;
const RTNLGRP_IPV4_ROUTE: u32 = 7;

/// Runs on a thread of its own in a fresh network namespace, whose loopback link has index 1.
fn in_namespace<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root to make network namespaces");
        test()
    });
    match thread.join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn link_up(socket: &mut Socket) {
    let mut batch = Batch::new();
    batch.message(RTM_NEWLINK, 0, |body| body.raw(&ifinfo(1, 1)));
    assert_eq!(socket.execute(&batch).unwrap(), []);
}

/// `struct ifinfomsg` with flags and the mask of what changes.
fn ifinfo(index: u32, up: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&up.to_ne_bytes());
    header[12..16].copy_from_slice(&up.to_ne_bytes());
    header
}

/// `struct ifaddrmsg` and the address.
fn address(body: &mut Body<'_>, index: u32, address: Ipv4Addr) {
    let mut header = [2, 32, 0, 0, 0, 0, 0, 0];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    body.raw(&header);
    body.bytes(IFA_LOCAL, &address.octets());
}

/// `struct rtmsg` of a blackhole route in the main table.
fn blackhole(body: &mut Body<'_>, number: u32) {
    body.raw(&[2, 32, 0, 0, 254, 70, 0, 6, 0, 0, 0, 0]);
    body.be32(RTA_DST, 0x0a00_0000 + number);
}

fn routes(kind: u16, flags: u16, numbers: std::ops::Range<u32>) -> Batch {
    let mut batch = Batch::new();
    for number in numbers {
        batch.message(kind, flags, |body| blackhole(body, number));
    }
    batch
}

fn count_routes(socket: &mut Socket) -> usize {
    let mut request = Batch::new();
    request.message(RTM_GETROUTE, flags::DUMP, |body| body.raw(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
    let ours = |_, payload: &[u8]| Ok((payload.get(5) == Some(&70)).then_some(()));
    socket.dump(&request, ours).unwrap().len()
}

#[test]
fn dumps_the_links_of_its_namespace() {
    let names = in_namespace(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let mut request = Batch::new();
        request.message(RTM_GETLINK, flags::DUMP, |body| body.raw(&[0; 16]));
        socket.dump(&request, |kind, payload| {
            assert_eq!(kind, RTM_NEWLINK);
            for attribute in attributes(payload.get(16..).unwrap_or_default()) {
                let attribute = attribute?;
                if attribute.kind == IFLA_IFNAME {
                    return Ok(Some(attribute.string()?.to_owned()));
                }
            }
            Ok(None)
        })
    });
    assert!(names.unwrap().contains(&"lo".to_owned()));
}

#[test]
fn gets_one_object_and_says_why_not() {
    in_namespace(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let mut request = Batch::new();
        request.message(RTM_GETLINK, 0, |body| body.raw(&ifinfo(1, 0)));
        assert_eq!(socket.dump(&request, |_, payload| Ok(Some(payload.len() > 16))).unwrap(), [true]);
        request.clear();
        request.message(RTM_GETLINK, 0, |body| body.raw(&ifinfo(4711, 0)));
        let error = socket.dump(&request, |_, _| Ok(Some(()))).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::ENODEV as i32), "{error}");
        assert!(error.to_string().contains("ENODEV"), "{error}");
    });
}

#[test]
fn a_failure_in_the_middle_comes_back_with_its_index_and_stops_nothing() {
    in_namespace(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        link_up(&mut socket);
        let mut batch = Batch::new();
        for (index, last) in [(1, 1), (4711, 2), (1, 3), (4712, 4), (1, 5)] {
            batch.message(RTM_NEWADDR, flags::CREATE | flags::EXCL, |body| {
                address(body, index, Ipv4Addr::new(10, 0, 0, last));
            });
        }
        let (messages, sends) = (socket.messages_sent(), socket.sends());
        let failures = socket.execute(&batch).unwrap();
        assert_eq!(socket.messages_sent() - messages, 5);
        assert_eq!(socket.sends() - sends, 1);
        let seen: Vec<_> = failures.iter().map(|failure| (failure.index, failure.errno)).collect();
        assert_eq!(seen, [(1, Errno::ENODEV as i32), (3, Errno::ENODEV as i32)]);
        // The second time the others exist, and the last message, which is acknowledged, fails too.
        let indices: Vec<_> = socket.execute(&batch).unwrap().iter().map(|failure| failure.index).collect();
        assert_eq!(indices, [0, 1, 2, 3, 4]);
        let mut request = Batch::new();
        request.message(RTM_GETADDR, flags::DUMP, |body| body.raw(&[2, 0, 0, 0, 0, 0, 0, 0]));
        assert_eq!(socket.dump(&request, |_, _| Ok(Some(()))).unwrap().len(), 4, "three and 127.0.0.1");
    });
}

#[test]
fn the_kernels_text_is_kept() {
    in_namespace(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        link_up(&mut socket);
        let mut batch = Batch::new();
        batch.message(RTM_NEWROUTE, flags::CREATE, |body| {
            body.raw(&[2, 32, 0, 0, 254, 70, 0, 1, 0, 0, 0, 0]);
            body.be32(RTA_DST, 0x0a00_0001);
            body.be32(RTA_GATEWAY, 0x0b00_0001);
            body.u32(RTA_OIF, 1);
        });
        let failures = socket.execute(&batch).unwrap();
        assert_eq!(failures.len(), 1);
        assert_eq!(failures[0].text.as_deref(), Some("Nexthop has invalid gateway"));
        assert_eq!(
            failures[0].to_string(),
            "ENETUNREACH (Network is unreachable): Nexthop has invalid gateway"
        );
    });
}

#[test]
fn many_messages_take_few_sends_and_every_refusal_of_many_is_seen() {
    const MANY: u32 = 20_000;
    in_namespace(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let add = routes(RTM_NEWROUTE, flags::CREATE | flags::EXCL, 1..MANY + 1);
        assert_eq!(socket.execute(&add).unwrap(), []);
        assert_eq!(socket.messages_sent(), u64::from(MANY));
        let full = add.bytes().len().div_ceil(64 * 1024) as u64;
        assert!((full..=full + 1).contains(&socket.sends()), "{} sends", socket.sends());
        assert_eq!(count_routes(&mut socket), MANY as usize);

        let failures = socket.execute(&add).unwrap();
        assert_eq!(failures.len(), MANY as usize);
        assert!(failures.iter().enumerate().all(|(at, failure)| failure.index == at));
        assert!(failures.iter().all(|failure| failure.errno == Errno::EEXIST as i32));

        // Half of them twice: the first deletes, the second is refused.
        let mut delete = Batch::new();
        for number in 1..=MANY / 2 {
            for _ in 0..2 {
                delete.message(RTM_DELROUTE, 0, |body| blackhole(body, number));
            }
        }
        let failures = socket.execute(&delete).unwrap();
        assert_eq!(failures.len(), MANY as usize / 2);
        assert!(failures.iter().enumerate().all(|(at, failure)| failure.index == 2 * at + 1));
        assert_eq!(count_routes(&mut socket), MANY as usize / 2);
    });
}

#[test]
fn a_batch_with_an_impossible_attribute_is_refused_unsent() {
    let mut socket = Socket::open(Protocol::Route).unwrap();
    let mut batch = Batch::new();
    batch.message(RTM_GETLINK, 0, |body| body.raw(&ifinfo(1, 0)));
    batch.message(RTM_GETLINK, 0, |body| body.bytes(IFLA_IFNAME, &[0; 70_000]));
    assert!(matches!(socket.execute(&batch), Err(Error::TooLong { index: 1 })));
    assert!(matches!(socket.dump(&Batch::new(), |_, _| Ok(Some(()))), Err(Error::NotOneRequest(0))));
    assert_eq!(socket.messages_sent(), 0);
}

#[test]
fn a_dump_is_whole_while_the_table_changes() {
    const STEADY: u8 = 200;
    in_namespace(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        link_up(&mut socket);
        let mut batch = Batch::new();
        for last in 0..STEADY {
            batch.message(RTM_NEWADDR, flags::CREATE, |body| address(body, 1, Ipv4Addr::new(10, 1, 1, last)));
        }
        assert_eq!(socket.execute(&batch).unwrap(), []);
        // The thread starts in the namespace of this one.
        let churn = thread::spawn(|| {
            let mut socket = Socket::open(Protocol::Route).unwrap();
            let mut batch = Batch::new();
            for kind in [RTM_NEWADDR, RTM_DELADDR] {
                batch.message(kind, flags::CREATE, |body| address(body, 1, Ipv4Addr::new(10, 2, 2, 2)));
            }
            let end = Instant::now() + Duration::from_millis(300);
            while Instant::now() < end {
                socket.execute(&batch).unwrap();
                thread::sleep(Duration::from_micros(200));
            }
        });
        let mut request = Batch::new();
        request.message(RTM_GETADDR, flags::DUMP, |body| body.raw(&[2, 0, 0, 0, 0, 0, 0, 0]));
        while !churn.is_finished() {
            let dumped = socket.dump(&request, |_, payload| {
                let local = attributes(payload.get(8..).unwrap_or_default())
                    .map_while(Result::ok)
                    .find(|attribute| attribute.kind == IFA_LOCAL);
                Ok(local.and_then(|local| local.be32().ok()).filter(|local| local >> 8 == 0x0a_01_01))
            });
            let mut steady = match dumped {
                Ok(steady) => steady,
                Err(Error::Interrupted(_)) => continue,
                Err(error) => panic!("{error}"),
            };
            steady.sort_unstable();
            steady.dedup();
            assert_eq!(steady.len(), usize::from(STEADY));
        }
        churn.join().unwrap();
    });
}

#[test]
fn an_answer_that_cannot_be_understood_leaves_the_socket_usable() {
    in_namespace(|| {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        assert_eq!(socket.execute(&routes(RTM_NEWROUTE, flags::CREATE, 1..3000)).unwrap(), []);
        let mut request = Batch::new();
        request.message(RTM_GETROUTE, flags::DUMP, |body| body.raw(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
        let error = socket
            .dump::<()>(&request, |_, _| Err(ferroute_netlink::DecodeError::Missing { what: "RTA_DST" }))
            .unwrap_err();
        assert_eq!(error.to_string(), "cannot understand the kernel's answer: RTA_DST is missing");
        assert_eq!(count_routes(&mut socket), 2999);
    });
}

#[test]
fn events_come_time_out_and_overrun() {
    in_namespace(|| {
        let mut events = Socket::open(Protocol::Route).unwrap();
        events.join(RTNLGRP_IPV4_ROUTE).unwrap();
        let start = Instant::now();
        let none = events.receive_events(Some(Duration::from_millis(30)), |_, _| panic!("no event")).unwrap();
        assert_eq!(none, 0);
        assert!(start.elapsed() >= Duration::from_millis(30));

        let mut socket = Socket::open(Protocol::Route).unwrap();
        socket.execute(&routes(RTM_NEWROUTE, flags::CREATE, 1..11)).unwrap();
        let mut kinds = Vec::new();
        let count = events.receive_events(None, |kind, _| kinds.push(kind)).unwrap();
        assert_eq!((count, kinds), (10, vec![RTM_NEWROUTE; 10]));

        // More than the receive buffer holds.
        socket.execute(&routes(RTM_NEWROUTE, flags::CREATE, 11..40_000)).unwrap();
        let mut got = 0;
        let overrun = loop {
            match events.receive_events(Some(Duration::from_millis(50)), |_, _| got += 1) {
                Ok(0) => break false,
                Ok(_) => {}
                Err(Error::Overrun) => break true,
                Err(error) => panic!("{error}"),
            }
        };
        assert!(overrun, "{got} events and no overrun");
        // What was still queued comes, then new events do.
        while events.receive_events(Some(Duration::ZERO), |_, _| {}).unwrap() > 0 {}
        socket.execute(&routes(RTM_DELROUTE, 0, 1..2)).unwrap();
        assert_eq!(events.receive_events(None, |kind, _| assert_eq!(kind, RTM_DELROUTE)).unwrap(), 1);
    });
}

#[test]
fn families_are_found_by_name() {
    let mut socket = Socket::open(Protocol::Generic).unwrap();
    assert_eq!(resolve_family(&mut socket, "nlctrl").unwrap(), 0x10);
    let error = resolve_family(&mut socket, "no-such-family").unwrap_err();
    assert!(matches!(&error, Error::NoFamily { name } if name == "no-such-family"), "{error}");
    // Longer than GENL_NAMSIZ: refused by the kernel, not by us.
    assert!(matches!(resolve_family(&mut socket, &"x".repeat(300)), Err(Error::Refused(_))));
}
