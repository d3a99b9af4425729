//! From exec of a speaker until its session stands and its first route is out, with a router that waits for
//! it. Each dials as soon as its configuration lets it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferroute_kit::{Netns, router};
use serde::{Deserialize, Serialize};

use super::node::{Daemon, PODS, api};
use super::tap::Tap;
use super::{PATIENCE, RECEIVER, RECEIVER_ASN, SPEAKER_ASN, namespaces};
use crate::routers::{Make, ROUTER};

/// One start.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Start {
    /// From exec until both sides have the other's OPEN and KEEPALIVE, in milliseconds.
    pub established_ms: f64,
    /// From exec until the first UPDATE with a route, in milliseconds.
    pub announced_ms: f64,
}

/// Starts `starter` once beside `receiver`.
///
/// # Errors
///
/// When one of them does not start, or no route comes.
pub fn measure(starter: Make, receiver: Make, program: &Path) -> Result<Start> {
    ensure!(receiver != Make::Ferroute, "the receiver is another make's router");
    let (outside, inside) = namespaces()?;
    let waiting = Router::start(receiver, &outside, false)?;
    waiting.wait(&outside)?;
    let tap = Tap::open(&outside)?;
    let deadline = Instant::now() + PATIENCE;
    let (begun, seen);
    if starter == Make::Ferroute {
        let server = api(&inside)?;
        let daemon = Daemon::start(program, &inside, &server, &[])?;
        begun = daemon.begun;
        seen = tap.wait(deadline).with_context(|| daemon.log())?;
    } else {
        let router = Router::start(starter, &inside, true)?;
        begun = router.begun;
        if starter == Make::Gobgp {
            // Its configuration has no place for a route.
            let words = ["-u", "127.0.0.1", "global", "rib", "add", "-a", "ipv4", PODS];
            while inside.exec("gobgp", &words).is_err() {
                ensure!(Instant::now() < deadline, "gobgpd takes no route");
            }
        }
        seen = tap.wait(deadline)?;
    }
    let since = |at: Instant| at.duration_since(begun).as_secs_f64() * 1e3;
    Ok(Start { established_ms: since(seen.established), announced_ms: since(seen.announced) })
}

/// Another make's router.
struct Router {
    process: Child,
    directory: PathBuf,
    begun: Instant,
}

impl Router {
    /// Starts it, either to dial and announce, or to wait.
    fn start(make: Make, netns: &Netns, announces: bool) -> Result<Self> {
        let role = if announces { "starter" } else { "receiver" };
        let name = format!("ferroute-bench-{role}-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir_all(&directory)?;
        let (config, its) = match make {
            Make::Ferroute => bail!("ferroute is started as a daemon"),
            Make::Bird => (bird(announces), router::Make::Bird),
            Make::Frr => (frr(announces), router::Make::Frr),
            Make::Gobgp => (gobgp(announces), router::Make::Gobgp),
        };
        fs::write(directory.join(router::CONFIG), config)?;
        let mut command = its.command(&directory);
        command.stderr(Stdio::null());
        let begun = Instant::now();
        let process = netns
            .run(|| command.spawn())
            .with_context(|| format!("cannot start {make} ({})", router::PACKAGES))?;
        Ok(Self { process, directory, begun })
    }

    /// Waits until it listens.
    fn wait(&self, netns: &Netns) -> Result<()> {
        while !netns.exec("ss", &["-Hltn", "sport = :179"])?.contains(":179") {
            ensure!(self.begun.elapsed() < PATIENCE, "the receiver does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        // It listens before it knows its neighbours.
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn bird(announces: bool) -> String {
    if announces {
        format!(
            "router id {ROUTER}; protocol device {{ }}
             protocol static {{ ipv4; route {PODS} blackhole; }}
             protocol bgp receiver {{
               local {ROUTER} as {SPEAKER_ASN}; neighbor {RECEIVER} as {RECEIVER_ASN};
               connect delay time 1; connect retry time 1;
               ipv4 {{ import all; export all; next hop self; }};
             }}\n"
        )
    } else {
        format!(
            "router id {RECEIVER}; protocol device {{ }}
             protocol bgp speaker {{
               local {RECEIVER} as {RECEIVER_ASN}; neighbor {ROUTER} as {SPEAKER_ASN}; passive on;
               ipv4 {{ import all; export none; }};
             }}\n"
        )
    }
}

fn frr(announces: bool) -> String {
    let (own, own_asn, peer, peer_asn, more) = if announces {
        (
            ROUTER,
            SPEAKER_ASN,
            RECEIVER,
            RECEIVER_ASN,
            format!(" neighbor {RECEIVER} timers connect 1\n network {PODS}\n"),
        )
    } else {
        (RECEIVER, RECEIVER_ASN, ROUTER, SPEAKER_ASN, format!(" neighbor {ROUTER} passive\n"))
    };
    format!(
        "frr defaults traditional
router bgp {own_asn}
 bgp router-id {own}
 no bgp ebgp-requires-policy
 no bgp network import-check
 neighbor {peer} remote-as {peer_asn}
{more}"
    )
}

fn gobgp(announces: bool) -> String {
    let (own, own_asn, peer, peer_asn) = if announces {
        (ROUTER, SPEAKER_ASN, RECEIVER, RECEIVER_ASN)
    } else {
        (RECEIVER, RECEIVER_ASN, ROUTER, SPEAKER_ASN)
    };
    format!(
        "[global.config]
  as = {own_asn}
  router-id = \"{own}\"
[[neighbors]]
  [neighbors.config]
    neighbor-address = \"{peer}\"
    peer-as = {peer_asn}
  [neighbors.timers.config]
    connect-retry = 1
  [neighbors.transport.config]
    passive-mode = {passive}\n",
        passive = !announces
    )
}
