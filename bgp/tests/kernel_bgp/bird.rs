//! BIRD 2 as the peer.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use ferroute_bgp::fsm::Shutdown;
use ferroute_bgp::message::{Community, LargeCommunity};
use ferroute_bgp::transport::Password;
use ferroute_kit::serial;

use super::*;

/// A BIRD in the second of two hosts.
pub struct Bird {
    process: Child,
    directory: PathBuf,
    netns: Netns,
}

impl Bird {
    /// Starts one with both families over sessions named `v4` and `v6`; `extra` goes into both.
    pub fn start(host: &Host, peer: &Host, extra: &str) -> Self {
        Self::start_with(host, peer, extra, &[])
    }

    /// Starts one that takes over from a former one, whose routes its kernel still has. Without that it says
    /// itself that it has lost them.
    fn restart(host: &Host, peer: &Host) -> Self {
        Self::start_with(host, peer, "", &["-R"])
    }

    fn start_with(host: &Host, peer: &Host, extra: &str, options: &[&str]) -> Self {
        let directory = std::env::temp_dir().join(format!("ferroute-bird-{}", host.netns.name()));
        fs::create_dir_all(&directory).unwrap();
        let session = |name: &str, address: IpAddr| {
            format!(
                "protocol bgp {name} {{
                   local as {own}; neighbor {address} as {other};
                   connect delay time 1; connect retry time 1; error wait time 1, 2;
                   graceful restart on; {extra}
                   ipv4 {{ import all; export filter {{ if source = RTS_STATIC then accept; reject; }};
                          next hop self; extended next hop on; }};
                   ipv6 {{ import all; export filter {{ if source = RTS_STATIC then accept; reject; }};
                          next hop self; }};
                 }}\n",
                own = host.asn(),
                other = peer.asn(),
            )
        };
        let config = format!(
            "router id 10.9.0.{}; graceful restart wait 3;
             protocol device {{ }}
             protocol bfd {{ interface \"*\" {{ interval 100 ms; multiplier 3; }}; }}
             protocol static {{ ipv4; route 198.51.100.0/24 blackhole; route 203.0.113.7/32 blackhole; }}
             protocol static {{ ipv6; route 2001:db8:b::/48 blackhole; }}
             {}{}",
            host.number,
            session("v4", peer.v4()),
            session("v6", peer.v6()),
        );
        fs::write(directory.join("bird.conf"), config).unwrap();
        let mut command = Command::new("bird");
        command.current_dir(&directory).args(["-f", "-c", "bird.conf", "-s", "bird.ctl", "-P", "bird.pid"]);
        command.args(options);
        command.stdout(Stdio::null()).stderr(Stdio::inherit());
        let process = host.netns.run(|| command.spawn()).expect("these tests need BIRD 2 (Debian: bird2)");
        let bird = Self { process, directory, netns: host.netns.clone() };
        eventually("BIRD", PATIENCE, || bird.ask("show status").map(|_| ()));
        bird
    }

    fn ask(&self, question: &str) -> Result<String, String> {
        let socket = self.directory.join("bird.ctl");
        let mut words = vec!["-s", socket.to_str().unwrap()];
        words.extend(question.split(' '));
        self.netns.exec("birdc", &words).map_err(|error| error.to_string())
    }

    pub fn shows(&self, question: &str, wanted: &str) {
        eventually(question, PATIENCE, || {
            let answer = self.ask(question)?;
            if answer.contains(wanted) { Ok(()) } else { Err(format!("no {wanted:?} in {answer}")) }
        });
    }

    fn routes(&self, session: &str) -> Vec<String> {
        let answer = self.ask(&format!("show route protocol {session}")).unwrap_or_default();
        let prefixes = answer.lines().filter_map(|line| line.split_whitespace().next());
        prefixes.filter(|word| word.contains('/')).map(str::to_owned).collect()
    }

    pub fn learns(&self, session: &str, wanted: &[&str]) {
        let wanted: Vec<String> = wanted.iter().map(|prefix| (*prefix).to_owned()).collect();
        ferroute_kit::assert::eventually_equal("routes in BIRD", PATIENCE, &wanted, || {
            let mut routes = self.routes(session);
            routes.sort();
            routes
        });
    }
}

impl Drop for Bird {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

#[test]
fn routes_go_both_ways_over_both_families() {
    let _serial = serial();
    let (a, b) = wire("bi");
    let bird = Bird::start(&b, &a, "");
    let node = a.start(a.settings());
    node.peers(vec![b.as_peer(b.v4()), b.as_peer(b.v6())]);
    let attributes = Attributes {
        communities: vec![Community::new(64001, 7)],
        large_communities: vec![LargeCommunity { administrator: Asn(4_200_000_000), data1: 1, data2: 2 }],
        med: Some(50),
        ..Attributes::default()
    };
    let routes = ["10.96.0.10/32", "2001:db8:a::10/128"].map(|prefix| Advertisement {
        prefix: prefix.parse::<IpNet>().unwrap(),
        path: 0,
        attributes: Arc::new(attributes.clone()),
        tag: 0,
    });
    node.speaker.set_advertisements(routes.to_vec());
    for (session, key) in [("v4", b.v4()), ("v6", b.v6())] {
        let status = node.established(key);
        let negotiated = status.negotiated.unwrap();
        assert_eq!(negotiated.codec.families, Families::ALL);
        assert!(
            negotiated.route_refresh && negotiated.codec.enhanced_refresh && negotiated.codec.four_octet_as
        );
        bird.learns(session, &["10.96.0.10/32", "2001:db8:a::10/128"]);
    }
    let shown = bird.ask("show route for 10.96.0.10 all protocol v4").unwrap();
    for wanted in
        ["BGP.as_path: 64001", "BGP.next_hop: 10.9.0.1", "BGP.med: 50", "(64001,7)", "(4200000000, 1, 2)"]
    {
        assert!(shown.contains(wanted), "no {wanted} in {shown}");
    }
    let shown = bird.ask("show route for 2001:db8:a::10 all protocol v6").unwrap();
    assert!(shown.contains("BGP.next_hop: fd09::1"), "{shown}");
    // The other way, each over both sessions.
    let learned = |family| {
        let mut prefixes: Vec<String> = node.learned(family);
        prefixes.dedup();
        prefixes
    };
    eventually("BIRD's routes", PATIENCE, || {
        let (v4, v6) = (learned(AfiSafi::Ipv4Unicast), learned(AfiSafi::Ipv6Unicast));
        let has = |routes: &[String], prefix: &str| routes.iter().any(|route| route.starts_with(prefix));
        let all = has(&v4, "198.51.100.0/24 via 10.9.0.2")
            && has(&v4, "203.0.113.7/32 via 10.9.0.2")
            && has(&v6, "2001:db8:b::/48 via fd09::2");
        if all { Ok(()) } else { Err(format!("{v4:?} {v6:?}")) }
    });
    // A refresh from BIRD's side is answered, one from ours too.
    let before = node.peer(b.v4());
    bird.ask("reload in v4").unwrap();
    eventually("BIRD's refresh", PATIENCE, || {
        let now = node.peer(b.v4());
        let answered = now.received.refresh > before.received.refresh && now.sent.update > before.sent.update;
        if answered { Ok(()) } else { Err(format!("{now:#?}")) }
    });
    node.speaker.refresh(&b.v4().into(), Families::ALL);
    eventually("our refresh", PATIENCE, || {
        let now = node.peer(b.v4());
        if now.received.update > before.received.update { Ok(()) } else { Err(format!("{now:#?}")) }
    });
    bird.learns("v4", &["10.96.0.10/32", "2001:db8:a::10/128"]);
    // Withdrawn, and said goodbye to.
    node.advertises(&["10.96.0.10/32"]);
    bird.learns("v4", &["10.96.0.10/32"]);
    node.runtime.block_on(node.speaker.stop(Shutdown::Administrative("drain node-1".into())));
    bird.learns("v4", &[]);
    bird.shows("show protocols all v4", "drain node-1");
}

#[test]
fn signed_sessions() {
    let _serial = serial();
    let (a, b) = wire("bm");
    let bird = Bird::start(&b, &a, "password \"open sesame\";");
    let node = a.start(a.settings());
    node.advertises(&["10.96.0.10/32"]);
    let with = |text: &str| {
        [b.v4(), b.v6()].map(|key| PeerConfig {
            password: Some(Password::new(text.as_bytes()).unwrap()),
            ..b.as_peer(key)
        })
    };
    node.peers(with("wrong").to_vec());
    node.error(b.v4(), "another TCP MD5 password");
    node.error(b.v6(), "another TCP MD5 password");
    node.peers(with("open sesame").to_vec());
    node.established(b.v4());
    node.established(b.v6());
    bird.learns("v6", &["10.96.0.10/32"]);
}

/// A speaker that is killed and starts again: BIRD keeps its routes all the time.
#[test]
fn a_killed_speaker_keeps_its_routes_in_bird() {
    let _serial = serial();
    let (a, b) = wire("bg");
    let bird = Bird::start(&b, &a, "");
    let routes = ["10.96.0.10/32", "2001:db8:a::10/128"];
    let start = |restarted| {
        let node = a.start(a.restarting(restarted));
        node.peers(vec![b.as_peer(b.v4())]);
        node
    };
    let mut node = start(false);
    node.advertises(&routes);
    bird.learns("v4", &routes);
    for round in 0..3 {
        node.kill();
        bird.shows("show protocols all v4", "Neighbor graceful restart active");
        assert_eq!(bird.routes("v4").len(), 2, "round {round}");
        node = start(true);
        node.established(b.v4());
        // It does not know its routes yet, and says so by not saying End-of-RIB.
        assert_eq!(bird.routes("v4").len(), 2, "round {round}");
        node.learns(AfiSafi::Ipv4Unicast, &["198.51.100.0/24 via 10.9.0.2", "203.0.113.7/32 via 10.9.0.2"]);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(bird.routes("v4").len(), 2, "round {round}");
        node.advertises(&routes);
        eventually("the end of the restart", PATIENCE, || {
            let shown = bird.ask("show protocols all v4")?;
            if shown.contains("graceful restart active") { Err(shown) } else { Ok(()) }
        });
        bird.learns("v4", &routes);
    }
    // BIRD dies, and the node keeps what it had from it.
    let mut watch = node.speaker.watch();
    node.runtime.block_on(watch.next(usize::MAX));
    drop(bird);
    eventually("the end", PATIENCE, || {
        if node.peer(b.v4()).keeping_routes { Ok(()) } else { Err("routes are not kept".to_owned()) }
    });
    assert_eq!(node.learned(AfiSafi::Ipv4Unicast).len(), 2);
    let bird = Bird::restart(&b, &a);
    node.established(b.v4());
    eventually("fresh routes", PATIENCE, || {
        let counts = node.peer(b.v4()).prefixes;
        if counts.iter().all(|(_, counts)| counts.stale == 0) { Ok(()) } else { Err(format!("{counts:?}")) }
    });
    node.learns(AfiSafi::Ipv4Unicast, &["198.51.100.0/24 via 10.9.0.2", "203.0.113.7/32 via 10.9.0.2"]);
    let lost = watch.take(usize::MAX).routes.iter().filter(|route| route.paths.is_empty()).count();
    assert_eq!(lost, 0);
    bird.learns("v4", &routes);
}
