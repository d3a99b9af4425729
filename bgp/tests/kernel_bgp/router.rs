//! The routers of others: BIRD 2, FRR and GoBGP as Debian has them, each with the same neighbours and the
//! same routes of its own.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::Child;

pub use ferroute_kit::router::Make;
use ferroute_kit::router::{CONFIG, CONTROL, PACKAGES};

use super::*;

/// Routes that every router here originates.
pub const OWN: [&str; 2] = ["198.51.100.0/24", "2001:db8:b::/48"];

/// A neighbour of a router.
#[derive(Debug, Clone, Default)]
pub struct Neighbor {
    pub address: Option<IpAddr>,
    pub asn: u32,
    pub password: Option<&'static str>,
    /// TTL security (RFC 5082).
    pub security: bool,
    /// Several paths, both ways.
    pub add_paths: bool,
    /// Its routes are reflected.
    pub client: bool,
    /// IPv6 next hops for IPv4 routes (RFC 8950).
    pub v6_next_hops: bool,
}

/// A router that runs.
pub struct Router {
    make: Make,
    process: Child,
    directory: PathBuf,
    netns: Netns,
    /// In the order of their names in BIRD: `peer0` and so on.
    neighbors: Vec<IpAddr>,
}

impl Router {
    pub fn start(make: Make, host: &Host, asn: u32, neighbors: &[Neighbor]) -> Self {
        Self::originating(make, host, asn, neighbors, &OWN)
    }

    pub fn originating(make: Make, host: &Host, asn: u32, neighbors: &[Neighbor], own: &[&str]) -> Self {
        Self::start_with(make, host, asn, neighbors, own, false)
    }

    /// Kills it: the kernel closes its sockets, and nobody says a word.
    pub fn kill(self) {
        drop(self);
    }

    /// Starts it after a former one was killed, whose routes its kernel still has: it says so to its
    /// neighbours (RFC 4724). `own` is what it still originates.
    pub fn restart(make: Make, host: &Host, asn: u32, neighbors: &[Neighbor], own: &[&str]) -> Self {
        // GoBGP learns its own routes by its API, and without them it would say that it has none.
        host.silence("-A");
        let router = Self::start_with(make, host, asn, neighbors, own, true);
        host.silence("-D");
        router
    }

    fn start_with(
        make: Make,
        host: &Host,
        asn: u32,
        neighbors: &[Neighbor],
        own: &[&str],
        restarted: bool,
    ) -> Self {
        let directory = std::env::temp_dir().join(format!("ferroute-router-{}", host.netns.name()));
        fs::create_dir_all(&directory).unwrap();
        let id = format!("10.9.0.{}", host.number);
        let config = match make {
            Make::Bird => bird(&id, asn, neighbors, own),
            Make::Frr => frr(&id, asn, neighbors, own),
            Make::Gobgp => gobgp(&id, asn, neighbors),
        };
        fs::write(directory.join(CONFIG), config).unwrap();
        host.netns.sh("ip link set lo up").unwrap();
        let mut command = make.command(&directory);
        match make {
            Make::Bird if restarted => {
                command.arg("-R");
            }
            Make::Gobgp if restarted => {
                command.arg("-r");
            }
            // FRR preserves what it is configured to preserve.
            _ => {}
        }
        let process = host
            .netns
            .run(|| command.spawn())
            .unwrap_or_else(|error| panic!("{make:?}: {error} ({PACKAGES})"));
        let neighbors = neighbors.iter().filter_map(|neighbor| neighbor.address).collect();
        let router = Self { make, process, directory, netns: host.netns.clone(), neighbors };
        eventually("the router", PATIENCE, || router.table(AfiSafi::Ipv4Unicast).map(|_| ()));
        if make == Make::Gobgp {
            for prefix in own {
                let family = if prefix.contains(':') { "ipv6" } else { "ipv4" };
                router.ask(&format!("global rib add -a {family} {prefix}")).unwrap();
            }
        }
        router
    }

    fn ask(&self, question: &str) -> Result<String, String> {
        let answer = match self.make {
            Make::Bird => {
                let socket = self.directory.join(CONTROL);
                let mut words = vec!["-s", socket.to_str().unwrap()];
                words.extend(question.split(' '));
                self.netns.exec("birdc", &words)
            }
            Make::Frr => {
                let directory = self.directory.to_str().unwrap();
                self.netns.exec("vtysh", &["--vty_socket", directory, "-d", "bgpd", "-c", question])
            }
            Make::Gobgp => {
                let mut words = vec!["-u", "127.0.0.1", "-p", "50051"];
                words.extend(question.split(' '));
                self.netns.exec("gobgp", &words)
            }
        };
        answer.map_err(|error| error.to_string())
    }

    /// All routes of a family, as the router shows them.
    pub fn table(&self, family: AfiSafi) -> Result<String, String> {
        let v4 = family == AfiSafi::Ipv4Unicast;
        self.ask(match (self.make, v4) {
            (Make::Bird, true) => "show route table master4",
            (Make::Bird, false) => "show route table master6",
            (Make::Frr, true) => "show bgp ipv4 unicast",
            (Make::Frr, false) => "show bgp ipv6 unicast",
            (Make::Gobgp, true) => "global rib -a ipv4",
            (Make::Gobgp, false) => "global rib -a ipv6",
        })
    }

    /// Everything about one prefix.
    pub fn route(&self, prefix: &str) -> Result<String, String> {
        let family = if prefix.contains(':') { "ipv6" } else { "ipv4" };
        self.ask(&match self.make {
            Make::Bird => format!("show route {prefix} all"),
            Make::Frr => format!("show bgp {family} unicast {prefix}"),
            Make::Gobgp => format!("global rib -a {family} {prefix}"),
        })
    }

    /// Waits until a prefix is shown with all of these words.
    pub fn shows(&self, prefix: &str, wanted: &[&str]) {
        eventually(&format!("{prefix} in {:?}", self.make), PATIENCE, || {
            let shown = self.route(prefix)?;
            match wanted.iter().find(|word| !shown.contains(**word)) {
                Some(word) => Err(format!("no {word:?} in {shown}")),
                None => Ok(()),
            }
        });
    }

    /// Whether it has a route to a prefix now.
    pub fn has(&self, prefix: &str) -> bool {
        let address = prefix.split('/').next().unwrap_or_default();
        let family = if prefix.contains(':') { AfiSafi::Ipv6Unicast } else { AfiSafi::Ipv4Unicast };
        self.table(family).is_ok_and(|shown| shown.contains(address))
    }

    /// Waits until a prefix is gone.
    pub fn loses(&self, prefix: &str) {
        eventually(&format!("no {prefix} in {:?}", self.make), PATIENCE, || {
            if self.has(prefix) { Err("it is there".to_owned()) } else { Ok(()) }
        });
    }

    /// Asks a neighbour for its IPv4 routes again (RFC 2918), BIRD for those of both families; `false` of GoBGP,
    /// which keeps what it heard and never asks.
    pub fn asks_again(&self, neighbor: IpAddr) -> bool {
        let question = match self.make {
            Make::Bird => {
                let index = self.neighbors.iter().position(|known| *known == neighbor).unwrap();
                format!("reload in peer{index}")
            }
            Make::Frr => format!("clear bgp ipv4 unicast {neighbor} soft in"),
            Make::Gobgp => return false,
        };
        self.ask(&question).unwrap();
        true
    }

    /// How this make writes a community.
    pub fn community(&self, high: u16, low: u16) -> String {
        match self.make {
            Make::Bird => format!("({high},{low})"),
            Make::Frr | Make::Gobgp => format!("{high}:{low}"),
        }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn bird(id: &str, asn: u32, neighbors: &[Neighbor], own: &[&str]) -> String {
    let mut text = format!("router id {id}; protocol device {{ }}\n");
    for prefix in own {
        let family = if prefix.contains(':') { "ipv6" } else { "ipv4" };
        let _ = writeln!(text, "protocol static {{ {family}; route {prefix} blackhole; }}");
    }
    for (index, neighbor) in neighbors.iter().enumerate() {
        let mut extra = String::new();
        if let Some(password) = neighbor.password {
            let _ = write!(extra, "password \"{password}\"; ");
        }
        if neighbor.security {
            extra.push_str("ttl security on; ");
        } else if neighbor.asn != asn {
            extra.push_str("direct; ");
        }
        if neighbor.client {
            extra.push_str("rr client; ");
        }
        let v6_next_hops = if neighbor.v6_next_hops { "extended next hop on;" } else { "" };
        let add_paths = if neighbor.add_paths { "add paths on;" } else { "" };
        let address = neighbor.address.unwrap();
        let _ = writeln!(
            text,
            "protocol bgp peer{index} {{
               local as {asn}; neighbor {address} as {};
               connect delay time 1; connect retry time 1; error wait time 1, 2; graceful restart on; {extra}
               ipv4 {{ import all; export all; {add_paths} {v6_next_hops} }};
               ipv6 {{ import all; export all; {add_paths} }};
             }}",
            neighbor.asn
        );
    }
    text
}

fn frr(id: &str, asn: u32, neighbors: &[Neighbor], own: &[&str]) -> String {
    let mut text = format!(
        "frr defaults traditional
router bgp {asn}
 bgp router-id {id}
 no bgp ebgp-requires-policy
 no bgp default ipv4-unicast
 no bgp network import-check
 bgp graceful-restart
 bgp graceful-restart restart-time 60
 bgp graceful-restart preserve-fw-state
"
    );
    for neighbor in neighbors {
        let address = neighbor.address.unwrap();
        let _ = writeln!(text, " neighbor {address} remote-as {}", neighbor.asn);
        let _ = writeln!(text, " neighbor {address} timers connect 1");
        if let Some(password) = neighbor.password {
            let _ = writeln!(text, " neighbor {address} password {password}");
        }
        if neighbor.security {
            let _ = writeln!(text, " neighbor {address} ttl-security hops 1");
        }
        if neighbor.v6_next_hops {
            let _ = writeln!(text, " neighbor {address} capability extended-nexthop");
        }
    }
    for family in ["ipv4", "ipv6"] {
        let _ = writeln!(text, " address-family {family} unicast");
        for prefix in own.iter().filter(|prefix| prefix.contains(':') == (family == "ipv6")) {
            let _ = writeln!(text, "  network {prefix}");
        }
        for neighbor in neighbors {
            let address = neighbor.address.unwrap();
            let _ = writeln!(text, "  neighbor {address} activate");
            if neighbor.add_paths {
                let _ = writeln!(text, "  neighbor {address} addpath-tx-all-paths");
            }
            if neighbor.client {
                let _ = writeln!(text, "  neighbor {address} route-reflector-client");
            }
        }
        text.push_str(" exit-address-family\n");
    }
    text
}

fn gobgp(id: &str, asn: u32, neighbors: &[Neighbor]) -> String {
    let mut text = format!("[global.config]\n  as = {asn}\n  router-id = \"{id}\"\n");
    for neighbor in neighbors {
        let _ = writeln!(
            text,
            "[[neighbors]]
  [neighbors.config]
    neighbor-address = \"{}\"
    peer-as = {}
    auth-password = \"{}\"
  [neighbors.timers.config]
    connect-retry = 1
    idle-hold-time-after-reset = 1
  [neighbors.graceful-restart.config]
    enabled = true
    restart-time = 60",
            neighbor.address.unwrap(),
            neighbor.asn,
            neighbor.password.unwrap_or_default()
        );
        if neighbor.security {
            text.push_str("  [neighbors.ttl-security.config]\n    enabled = true\n    ttl-min = 255\n");
        }
        if neighbor.client {
            let _ = writeln!(
                text,
                "  [neighbors.route-reflector.config]
    route-reflector-client = true
    route-reflector-cluster-id = \"{id}\""
            );
        }
        for family in ["ipv4-unicast", "ipv6-unicast"] {
            let _ = writeln!(
                text,
                "  [[neighbors.afi-safis]]
    [neighbors.afi-safis.config]
      afi-safi-name = \"{family}\"
    [neighbors.afi-safis.mp-graceful-restart.config]
      enabled = true"
            );
            if neighbor.add_paths {
                text.push_str(
                    "    [neighbors.afi-safis.add-paths.config]\n      receive = true\n      send-max = 8\n",
                );
            }
        }
    }
    text
}
