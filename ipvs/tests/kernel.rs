//! Against a kernel with IPVS, each test in a network namespace of its own. Needs root; where the
//! running kernel has no IPVS, run them through `scripts/lab`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeSet;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Once};
use std::thread;
use std::time::{Duration, Instant};

use ferroute_ipvs::*;
use ferroute_netlink::{Batch, Protocol as Netlink, Socket, resolve_family};
use nix::sched::{CloneFlags, unshare};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Runs on a thread of its own in a fresh network namespace with its loopback link up: without it
/// the kernel takes every address for a broadcast one.
fn with_ipvs<T: Send + 'static>(test: impl FnOnce(Handle) -> T + Send + 'static) -> T {
    static MODULES: Once = Once::new();
    // Kernels with everything built in have no modules to load; Handle::open tells.
    MODULES.call_once(|| {
        let _ = Command::new("modprobe").args(["-a", "ipv6", "ip_vs"]).output();
    });
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root to make network namespaces");
        run("ip", &["link", "set", "lo", "up"]);
        test(Handle::open().expect("this kernel has no IPVS: run these tests through scripts/lab"))
    });
    match thread.join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Output of a command, run in the namespace of the calling thread.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn ipvsadm_lines() -> BTreeSet<String> {
    run("ipvsadm", &["-Sn"]).lines().map(|line| line.trim_end().to_owned()).collect()
}

fn key(text: &str) -> VirtualServerKey {
    let address: SocketAddr = text.parse().unwrap();
    VirtualServerKey::Address { protocol: Protocol::Tcp, address: address.ip(), port: address.port() }
}

fn options(family: Family) -> Options {
    Options { scheduler: Scheduler::RR, flags: Flags::NONE, timeout: 0, netmask: Netmask::host(family) }
}

fn at(text: &str) -> Destination {
    let address: SocketAddr = text.parse().unwrap();
    Destination::masquerade(address.ip(), address.port(), 1)
}

fn table(servers: impl IntoIterator<Item = (VirtualServerKey, Options, Vec<Destination>)>) -> Table {
    servers
        .into_iter()
        .map(|(key, options, destinations)| (key, Arc::new(VirtualServer::new(options, destinations))))
        .collect()
}

/// Makes the kernel's table equal to this one and checks that it says so.
fn program(ipvs: &mut Handle, desired: &Table) {
    let actual = ipvs.dump().unwrap();
    let changes = diff_all(&actual, desired);
    let sent = ipvs.messages_sent();
    assert_eq!(ipvs.apply(&changes).unwrap(), []);
    assert_eq!(ipvs.messages_sent() - sent, changes.len() as u64, "one message per change");
    assert_eq!(&ipvs.dump().unwrap(), desired);
    let listed = Listing::default().fingerprint(|key| desired.contains_key(key));
    assert_eq!(listed, Some(fingerprint(desired)), "the listing tells the same");
}

#[test]
fn every_scheduler() {
    with_ipvs(|mut ipvs| {
        for scheduler in Scheduler::ALL {
            let module = format!("ip_vs_{scheduler}");
            let loads =
                Command::new("modprobe").arg(&module).output().is_ok_and(|output| output.status.success());
            let wanted = table([(
                key("10.0.0.1:80"),
                Options { scheduler, ..options(Family::V4) },
                vec![at("10.1.0.1:80"), at("10.1.0.2:80"), at("10.1.0.3:80")],
            )]);
            if loads {
                program(&mut ipvs, &wanted);
                continue;
            }
            ipvs.flush().unwrap();
            // Youngest of them, and absent from 6.1: the refusal has to say what is missing.
            let failures = ipvs.apply(&diff_all(&Table::default(), &wanted)).unwrap();
            assert_eq!(scheduler, Scheduler::TWOS, "{module} cannot be loaded");
            let missing = ChangeError::NoScheduler { server: key("10.0.0.1:80"), scheduler };
            assert!(failures.iter().any(|failure| failure.error == missing), "{failures:?}");
        }
    });
}

#[test]
fn flags_and_persistence_read_back_as_asked() {
    with_ipvs(|mut ipvs| {
        let (v4, v6) = (key("10.0.0.1:80"), key("[fd00::1]:80"));
        let cases = [
            (Scheduler::SH, Flags::SH_FALLBACK | Flags::SH_PORT, 0, Netmask::host(Family::V4)),
            (Scheduler::SH, Flags::SH_PORT, 0, Netmask::host(Family::V4)),
            (Scheduler::MH, Flags::MH_FALLBACK | Flags::MH_PORT, 0, Netmask::host(Family::V4)),
            (Scheduler::MH, Flags::MH_FALLBACK, 0, Netmask::host(Family::V4)),
            (Scheduler::RR, Flags::PERSISTENT, 10_800, Netmask::host(Family::V4)),
            (Scheduler::RR, Flags::PERSISTENT, 86_400, Netmask::V4(Ipv4Addr::new(255, 255, 240, 0))),
            (Scheduler::RR, Flags::PERSISTENT | Flags::ONE_PACKET, 1, Netmask::host(Family::V4)),
            (Scheduler::RR, Flags::SCHED_3, 7, Netmask::host(Family::V4)),
        ];
        // Each as a new server, and each as an update of the one before.
        for (scheduler, flags, timeout, netmask) in cases {
            let v4_options = Options { scheduler, flags, timeout, netmask };
            let v6_options = Options { netmask: Netmask::host(Family::V6), ..v4_options };
            program(&mut ipvs, &table([(v4, v4_options, vec![]), (v6, v6_options, vec![])]));
        }
        for prefix in [1, 64, 128] {
            let flags = Flags::PERSISTENT;
            let v6_options =
                Options { flags, timeout: 60, netmask: Netmask::V6(prefix), ..options(Family::V6) };
            program(&mut ipvs, &table([(v6, v6_options, vec![])]));
        }
        ipvs.flush().unwrap();
        let flags = Flags::PERSISTENT;
        let v4_options = Options { flags, timeout: 300, ..options(Family::V4) };
        program(&mut ipvs, &table([(v4, v4_options, vec![])]));
        let listing = run("ipvsadm", &["-Sn"]);
        // ipvsadm leaves a mask of all ones out.
        assert_eq!(listing.trim_end(), "-A -t 10.0.0.1:80 -s rr -p 300");
    });
}

#[test]
fn ipvsadm_agrees() {
    with_ipvs(|mut ipvs| {
        let protocol = |protocol, address: &str, port| VirtualServerKey::Address {
            protocol,
            address: address.parse().unwrap(),
            port,
        };
        let tunnel = |kind, port, flags| Forwarding::Tunnel(Tunnel { kind, port, flags });
        let with = |forwarding, destination| Destination { forwarding, ..destination };
        let persistent = Options {
            scheduler: Scheduler::SH,
            flags: Flags::PERSISTENT | Flags::SH_PORT,
            timeout: 600,
            netmask: Netmask::V4(Ipv4Addr::new(255, 255, 255, 0)),
        };
        program(
            &mut ipvs,
            &table([
                (
                    protocol(Protocol::Tcp, "10.0.0.1", 80),
                    persistent,
                    vec![Destination {
                        weight: 7,
                        upper_threshold: 100,
                        lower_threshold: 50,
                        ..at("10.1.0.1:8080")
                    }],
                ),
                (
                    protocol(Protocol::Udp, "fd00::1", 53),
                    options(Family::V6),
                    vec![Destination { weight: 0, ..at("[fd00::2]:53") }],
                ),
                (
                    protocol(Protocol::Sctp, "10.0.0.2", 7),
                    options(Family::V4),
                    vec![with(Forwarding::DirectRoute, at("10.1.0.3:7"))],
                ),
                (
                    VirtualServerKey::Mark { family: Family::V4, mark: 0x4000_0001 },
                    Options { flags: Flags::ONE_PACKET, ..options(Family::V4) },
                    vec![
                        with(Forwarding::Tunnel(Tunnel::IPIP), at("10.1.0.4:0")),
                        with(tunnel(TunnelKind::Gue, 6080, 1), at("10.1.0.5:0")),
                        with(tunnel(TunnelKind::Gre, 0, 1), at("10.1.0.6:0")),
                        with(Forwarding::Tunnel(Tunnel::IPIP), at("[fd00::9]:0")),
                    ],
                ),
                (
                    VirtualServerKey::Mark { family: Family::V6, mark: 1 },
                    options(Family::V6),
                    vec![at("[fd00::3]:0")],
                ),
            ]),
        );
        let expected = [
            "-A -t 10.0.0.1:80 -s sh -p 600 -M 255.255.255.0 -b sh-port",
            "-a -t 10.0.0.1:80 -r 10.1.0.1:8080 -m -w 7",
            "-A -u [fd00::1]:53 -s rr",
            "-a -u [fd00::1]:53 -r [fd00::2]:53 -m -w 0",
            "-A --sctp-service 10.0.0.2:7 -s rr",
            "-a --sctp-service 10.0.0.2:7 -r 10.1.0.3:7 -g -w 1",
            "-A -f 1073741825 -s rr -o",
            "-a -f 1073741825 -r 10.1.0.4:0 -i -w 1 --tun-type ipip",
            "-a -f 1073741825 -r 10.1.0.5:0 -i -w 1 --tun-type gue --tun-port 6080 --tun-csum",
            "-a -f 1073741825 -r 10.1.0.6:0 -i -w 1 --tun-type gre --tun-csum",
            "-a -f 1073741825 -r [fd00::9]:0 -i -w 1 --tun-type ipip",
            "-A -f 1 -6 -s rr",
            "-a -f 1 -6 -r [fd00::3]:0 -m -w 1",
        ];
        assert_eq!(ipvsadm_lines(), expected.into_iter().map(str::to_owned).collect());
        // -S leaves thresholds out.
        let thresholds = run("ipvsadm", &["-Ln", "--thresholds"]);
        let line = thresholds.lines().find(|line| line.contains("10.1.0.1:8080")).unwrap();
        assert_eq!(line.split_whitespace().collect::<Vec<_>>()[2..4], ["100", "50"], "{thresholds}");
    });
}

/// The bytes of `golden.txt` themselves, only with the family's number of this kernel.
#[test]
fn the_golden_bytes_do_what_they_say() {
    with_ipvs(|_| {
        let mut socket = Socket::open(Netlink::Generic).unwrap();
        let family = resolve_family(&mut socket, wire::FAMILY).unwrap();
        let mut send = |names: &[&str]| {
            let mut batch = Batch::new();
            for name in names {
                let line =
                    include_str!("golden.txt").lines().find_map(|line| line.strip_prefix(name)).unwrap();
                let hex = line.trim().as_bytes().chunks(2);
                let bytes: Vec<_> = hex
                    .map(|digits| u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap())
                    .collect();
                batch.message(family, 0, |body| body.raw(&bytes[16..]));
            }
            assert_eq!(socket.execute(&batch).unwrap(), []);
            ipvsadm_lines()
        };
        let lines = |lines: &[&str]| lines.iter().map(|&line| line.to_owned()).collect::<BTreeSet<_>>();
        let created = send(&["create-server-v4 ", "create-server-v6-sctp ", "create-server-mark "]);
        let (v6, mark) = ("-A --sctp-service [fd00::1]:80 -s rr", "-A -f 1073741825 -6 -s rr");
        assert_eq!(created, lines(&["-A -t 10.96.0.1:443 -s rr", v6, mark]));
        let filled = send(&["update-server-persistent ", "create-destination ", "create-destination-gue "]);
        let mh = "-A -t 10.96.0.1:443 -s mh -p 10800 -M 255.255.255.0 -b mh-port";
        let gue = "-a -f 1073741825 -6 -r [fd00::9]:0 -i -w 7 --tun-type gue --tun-port 6080 --tun-csum";
        assert_eq!(filled, lines(&[mh, "-a -t 10.96.0.1:443 -r 10.1.2.3:8080 -m -w 1", v6, mark, gue]));
        let drained = send(&["update-destination "]);
        assert_eq!(drained, lines(&[mh, "-a -t 10.96.0.1:443 -r 10.1.2.3:8080 -m -w 0", v6, mark, gue]));
        assert_eq!(send(&["delete-destination ", "delete-server "]), lines(&[mh, mark, gue]));
    });
}

#[test]
fn what_ipvsadm_makes_is_read() {
    with_ipvs(|mut ipvs| {
        run("ipvsadm", &["-A", "-t", "10.0.0.1:80", "-s", "mh", "-b", "mh-port,mh-fallback", "-p", "42"]);
        run(
            "ipvsadm",
            &["-a", "-t", "10.0.0.1:80", "-r", "10.1.0.1:81", "-m", "-w", "3", "-x", "9", "-y", "4"],
        );
        run("ipvsadm", &["-A", "-f", "77", "-6", "-s", "wlc"]);
        let gue = ["--tun-type", "gue", "--tun-port", "6080", "--tun-nocsum"];
        run("ipvsadm", &[["-a", "-f", "77", "-6", "-r", "[fd00::5]:0", "-i"].as_slice(), &gue].concat());
        let mh = Options {
            scheduler: Scheduler::MH,
            flags: Flags::MH_PORT | Flags::MH_FALLBACK | Flags::PERSISTENT,
            timeout: 42,
            netmask: Netmask::host(Family::V4),
        };
        let limited = Destination { weight: 3, upper_threshold: 9, lower_threshold: 4, ..at("10.1.0.1:81") };
        let wlc = Options { scheduler: Scheduler::WLC, ..options(Family::V6) };
        let tunnel = Tunnel { kind: TunnelKind::Gue, port: 6080, flags: 0 };
        assert_eq!(
            ipvs.dump().unwrap(),
            table([
                (key("10.0.0.1:80"), mh, vec![limited]),
                (
                    VirtualServerKey::Mark { family: Family::V6, mark: 77 },
                    wlc,
                    vec![Destination { forwarding: Forwarding::Tunnel(tunnel), ..at("[fd00::5]:0") }]
                ),
            ])
        );
    });
}

#[test]
fn refusals_name_what_is_wrong_and_stop_nothing() {
    with_ipvs(|mut ipvs| {
        let (server, other) = (key("10.0.0.1:80"), key("10.0.0.2:80"));
        let (good, gone) = (at("10.1.0.1:80"), at("10.1.0.9:80"));
        let unknown = Scheduler::new("nosuch").unwrap();
        let broadcast = at("255.255.255.255:80");
        let heavy = Destination { weight: u32::MAX, ..at("10.1.0.2:80") };
        let inverted = Destination { upper_threshold: 1, lower_threshold: 2, ..at("10.1.0.3:80") };
        let portless = Tunnel { kind: TunnelKind::Gue, port: 0, flags: 0 };
        let portless = Destination { forwarding: Forwarding::Tunnel(portless), ..at("10.1.0.4:80") };
        let plain = options(Family::V4);
        let create = |destination| Change::CreateDestination { server, destination };
        let changes = [
            Change::CreateServer { key: server, options: plain },
            create(good),
            Change::CreateServer { key: server, options: plain },
            Change::CreateServer { key: other, options: Options { scheduler: unknown, ..plain } },
            Change::CreateDestination { server: other, destination: good },
            create(good),
            Change::UpdateDestination { server, destination: gone },
            Change::DeleteDestination { server, destination: gone.key() },
            create(broadcast),
            create(heavy),
            create(inverted),
            create(portless),
            Change::DeleteServer { key: other },
            create(at("10.1.0.7:80")),
        ];
        let failures = ipvs.apply(&changes).unwrap();
        let (missing, existing) = (gone.key(), good.key());
        let expected = [
            (2, ChangeError::ServerExists(server)),
            (3, ChangeError::NoScheduler { server: other, scheduler: unknown }),
            (4, ChangeError::NoServer(other)),
            (5, ChangeError::DestinationExists { server, destination: existing }),
            (6, ChangeError::NoDestination { server, destination: missing }),
            (7, ChangeError::NoDestination { server, destination: missing }),
            (8, ChangeError::UnusableDestination { server, destination: broadcast.key() }),
            (9, ChangeError::OutOfRange { server, destination: heavy }),
            (10, ChangeError::OutOfRange { server, destination: inverted }),
            (11, ChangeError::UnusableDestination { server, destination: portless.key() }),
            (12, ChangeError::NoServer(other)),
        ];
        assert_eq!(failures, expected.map(|(index, error)| ChangeFailure { index, error }));
        assert_eq!(ipvs.dump().unwrap(), table([(server, plain, vec![good, at("10.1.0.7:80")])]));
    });
}

#[test]
fn a_stranger_stays_untouched() {
    with_ipvs(|mut ipvs| {
        run("ipvsadm", &["-A", "-t", "192.0.2.1:443", "-s", "wrr", "-p", "99", "-M", "255.255.0.0"]);
        run("ipvsadm", &["-a", "-t", "192.0.2.1:443", "-r", "10.9.0.1:443", "-g", "-w", "5"]);
        let strangers = ipvsadm_lines();
        let ours = [key("10.0.0.1:80"), key("10.0.0.2:80")];
        let first =
            table(ours.map(|key| (key, options(Family::V4), vec![at("10.1.0.1:80"), at("10.1.0.2:80")])));
        let second = table([(ours[0], options(Family::V4), vec![at("10.1.0.3:80")])]);
        for desired in [&first, &second, &Table::default()] {
            let changes = diff(&ipvs.dump().unwrap(), desired, ours);
            assert_eq!(ipvs.apply(&changes).unwrap(), []);
            let actual = ipvs.dump().unwrap();
            assert_eq!(actual.len(), desired.len() + 1);
            assert_eq!(diff(&actual, desired, ours), []);
            assert!(ipvsadm_lines().is_superset(&strangers));
        }
        assert_eq!(ipvsadm_lines(), strangers);
    });
}

#[test]
fn any_table_becomes_any_other() {
    let address = || {
        proptest::prop_oneof![
            (1..9u8).prop_map(|last| IpAddr::from([10, 1, 0, last])),
            (1..9u16).prop_map(|last| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last])),
        ]
    };
    let any_key = proptest::prop_oneof![
        (0..3u8, address(), 80..83u16).prop_map(|(protocol, address, port)| {
            let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp][usize::from(protocol)];
            VirtualServerKey::Address { protocol, address, port }
        }),
        (proptest::bool::ANY, 1..9u32).prop_map(|(v6, mark)| {
            VirtualServerKey::Mark { family: if v6 { Family::V6 } else { Family::V4 }, mark }
        }),
    ];
    let any_destination = (address(), 80..82u16, 0..6u8, 0..3u32, 0..3u32, 0..3u32).prop_map(
        |(address, port, forwarding, weight, lower, more)| Destination {
            forwarding: match forwarding {
                0 => Forwarding::DirectRoute,
                1 => Forwarding::Tunnel(Tunnel::IPIP),
                2 => Forwarding::Tunnel(Tunnel { kind: TunnelKind::Gue, port: 6080, flags: 2 }),
                3 => Forwarding::Tunnel(Tunnel { kind: TunnelKind::Gre, port: 0, flags: 1 }),
                _ => Forwarding::Masquerade,
            },
            lower_threshold: lower,
            upper_threshold: lower + more,
            ..Destination::masquerade(address, port, weight)
        },
    );
    let any_server = (
        any_key,
        0..13usize,
        proptest::sample::select(vec![0u32, 1, 4, 8, 0x10, 0x18, 0x20, 0x3d]),
        0..1000u32,
        1..33u8,
        proptest::collection::vec(any_destination, 0..8),
    );
    let servers = proptest::collection::vec(any_server, 0..12).prop_map(|servers| {
        table(servers.into_iter().map(|(key, scheduler, flags, timeout, mask, mut destinations)| {
            // The kernel mixes families only through tunnels.
            destinations.retain(|destination| {
                Family::of(&destination.address) == key.family()
                    || matches!(destination.forwarding, Forwarding::Tunnel(_))
            });
            let netmask = match key.family() {
                Family::V4 => Netmask::V4(Ipv4Addr::from_bits(u32::MAX << (32 - mask))),
                Family::V6 => Netmask::V6(mask),
            };
            let options = Options {
                scheduler: Scheduler::ALL[scheduler],
                flags: Flags::from_bits(flags),
                timeout,
                netmask,
            };
            (key, options, destinations)
        }))
    });
    with_ipvs(move |mut ipvs| {
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        for _ in 0..150 {
            program(&mut ipvs, &servers.new_tree(&mut runner).unwrap().current());
        }
        let full = servers.new_tree(&mut runner).unwrap().current();
        program(&mut ipvs, &full);
        let sent = ipvs.messages_sent();
        let changes = diff_all(&ipvs.dump().unwrap(), &full);
        assert_eq!(changes, []);
        assert_eq!(ipvs.apply(&changes).unwrap(), []);
        assert_eq!(ipvs.messages_sent() - sent, 1 + full.len() as u64, "only the dump's own requests");
    });
}

#[test]
fn thousands_of_changes_in_few_sends() {
    with_ipvs(|mut ipvs| {
        let desired = table((0..1000u32).map(|number| {
            let key = VirtualServerKey::Address {
                protocol: Protocol::Tcp,
                address: Ipv4Addr::from_bits(0x0a00_0000 + number).into(),
                port: 80,
            };
            let pods = (0..10).map(|pod| Ipv4Addr::from_bits(0x0b00_0000 + number * 16 + pod + 1));
            let destinations = pods.map(|pod| Destination::masquerade(pod.into(), 8080, 1)).collect();
            (key, options(Family::V4), destinations)
        }));
        let changes = diff_all(&Table::default(), &desired);
        assert_eq!(changes.len(), 11_000);
        let sends = ipvs.sends();
        assert_eq!(ipvs.apply(&changes).unwrap(), []);
        let sends = ipvs.sends() - sends;
        assert!(sends < 40, "{sends} sends");
        assert_eq!(ipvs.dump().unwrap(), desired);
        // Everything again: everything is refused, and nothing of it gets lost.
        let failures = ipvs.apply(&changes).unwrap();
        assert_eq!(failures.len(), changes.len());
        assert!(
            failures.iter().enumerate().all(|(at, failure)| failure.index == at && failure.error.is_drift())
        );
        assert_eq!(ipvs.dump().unwrap(), desired);
    });
}

#[test]
fn timeouts_flush_and_version() {
    with_ipvs(|mut ipvs| {
        let before = ipvs.timeouts().unwrap();
        assert_eq!(before, Timeouts { tcp: 900, tcp_fin: 120, udp: 300 });
        ipvs.set_timeouts(&Timeouts { tcp: 600, tcp_fin: 0, udp: 10 }).unwrap();
        assert_eq!(ipvs.timeouts().unwrap(), Timeouts { tcp: 600, tcp_fin: 120, udp: 10 });
        let refused = ipvs.set_timeouts(&Timeouts { tcp: u32::MAX, ..before }).unwrap_err();
        assert_eq!(refused.to_string(), "cannot set the connection timeouts: EINVAL (Invalid argument)");

        program(&mut ipvs, &table([(key("10.0.0.1:80"), options(Family::V4), vec![at("10.1.0.1:80")])]));
        ipvs.flush().unwrap();
        assert_eq!(ipvs.dump().unwrap(), Table::default());
        let info = ipvs.version().unwrap();
        assert_eq!(info.version, (1, 2, 1));
        assert!(info.connection_table_size.is_power_of_two());
    });
}

#[test]
fn connections_are_counted() {
    with_ipvs(|mut ipvs| {
        for address in ["10.9.9.9/32", "10.9.9.10/32"] {
            run("ip", &["address", "add", address, "dev", "lo"]);
        }
        let listener = TcpListener::bind("10.9.9.10:8080").unwrap();
        let (server, real) = (key("10.9.9.9:80"), at("10.9.9.10:8080"));
        let persistent = Options { flags: Flags::PERSISTENT, timeout: 100, ..options(Family::V4) };
        program(&mut ipvs, &table([(server, persistent, vec![real])]));
        assert_eq!(ipvs.dump_destinations(server).unwrap(), [(real, DestinationStats::default())]);
        assert_eq!(ipvs.dump_stats().unwrap(), [(server, Statistics::default())]);

        let mut client = TcpStream::connect("10.9.9.9:80").unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let open = ipvs.dump_destinations(server).unwrap()[0].1;
        assert_eq!(
            (open.active_connections, open.inactive_connections, open.persistent_connections),
            (1, 0, 1)
        );
        drop(accepted);
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
        drop(client);
        let closed = ipvs.dump_destinations(server).unwrap()[0].1;
        assert_eq!((closed.active_connections, closed.inactive_connections), (0, 1));
        // The estimator brings the counters over within 2 s.
        let end = Instant::now() + Duration::from_secs(20);
        let (service, destination) = loop {
            let service = ipvs.dump_stats().unwrap()[0].1;
            let destination = ipvs.dump_destinations(server).unwrap()[0].1.statistics;
            if destination.connections > 0 && service.connections > 0 {
                break (service, destination);
            }
            assert!(Instant::now() < end, "no counters after 20 s");
            thread::sleep(Duration::from_millis(100));
        };
        assert_eq!((service.connections, destination.connections), (1, 1));
        assert!(service.incoming_packets >= 3 && service.incoming_bytes >= 120, "{service:?}");
        assert_eq!(ipvs.dump_destinations(key("10.0.0.7:7")).unwrap(), []);
    });
}
