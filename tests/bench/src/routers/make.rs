//! The routers: how each is told to pass everything on between the ends, which dial it.

use std::fmt::{self, Write as _};
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use ferroute_bgp::fsm::Initiative;
use ferroute_bgp::message::{Asn, Families, RouterId};
use ferroute_bgp::peer::PeerConfig;
use ferroute_bgp::policy::{LocalAddresses, Policy};
use ferroute_bgp::session::PeerAsn;
use ferroute_bgp::speaker::{Speaker, SpeakerConfig};
use ferroute_kit::{Netns, router};
use serde::{Deserialize, Serialize};

use super::{HOLD_TIME, ROUTER, ROUTER_ASN, end_address, end_asn};
use crate::daemon::{cpu, memory};

/// Whose router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub enum Make {
    /// The speaker of this repository.
    Ferroute,
    /// BIRD 2.
    Bird,
    /// bgpd of FRR.
    Frr,
    /// gobgpd.
    Gobgp,
}

impl Make {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ferroute, Self::Bird, Self::Frr, Self::Gobgp];

    /// The word of the command line.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ferroute => "ferroute",
            Self::Bird => "bird",
            Self::Frr => "frr",
            Self::Gobgp => "gobgp",
        }
    }
}

impl fmt::Display for Make {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ferroute => "ferroute",
            Self::Bird => "BIRD",
            Self::Frr => "FRR",
            Self::Gobgp => "GoBGP",
        })
    }
}

/// A router that runs.
pub struct Router {
    process: Child,
    directory: PathBuf,
}

impl Router {
    /// Starts one that waits for the receiver and so many senders.
    pub fn start(make: Make, inside: &Netns, senders: u32) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("ferroute-bench-router-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        let (config, mut command) = match make {
            Make::Ferroute => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["speak", "--senders", &senders.to_string()]).stdout(Stdio::null());
                (String::new(), command)
            }
            Make::Bird => (bird(senders), router::Make::Bird.command(&directory)),
            Make::Frr => (frr(senders), router::Make::Frr.command(&directory)),
            Make::Gobgp => (gobgp(senders), router::Make::Gobgp.command(&directory)),
        };
        fs::write(directory.join(router::CONFIG), config)?;
        command.stderr(Stdio::null());
        let process = inside
            .run(|| command.spawn())
            .with_context(|| format!("cannot start {make} ({})", router::PACKAGES))?;
        Ok(Self { process, directory })
    }

    /// CPU seconds so far.
    pub fn cpu(&self) -> Result<f64> {
        let (user, system) = cpu(self.process.id())?;
        Ok(user + system)
    }

    /// Highest resident memory so far, in MiB.
    pub fn peak(&self) -> Result<f64> {
        memory(self.process.id(), "VmHWM:")
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

fn ends(senders: u32) -> impl Iterator<Item = (Ipv4Addr, u32)> {
    (0..=senders).map(|index| (end_address(index), end_asn(index)))
}

fn bird(senders: u32) -> String {
    let mut text = format!("router id {ROUTER};\nprotocol device {{ }}\n");
    for (index, (address, asn)) in ends(senders).enumerate() {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "protocol bgp end{index} {{
               local {ROUTER} as {ROUTER_ASN}; neighbor {address} as {asn}; passive on; hold time {HOLD_TIME};
               ipv4 {{ import all; export all; }};
             }}"
        );
    }
    text
}

fn frr(senders: u32) -> String {
    let mut text = format!(
        "frr defaults traditional
router bgp {ROUTER_ASN}
 bgp router-id {ROUTER}
 no bgp ebgp-requires-policy
 no bgp network import-check\n"
    );
    for (address, asn) in ends(senders) {
        let _ = writeln!(
            text,
            " neighbor {address} remote-as {asn}
 neighbor {address} passive
 neighbor {address} timers 80 {HOLD_TIME}"
        );
    }
    text
}

fn gobgp(senders: u32) -> String {
    let mut text = format!("[global.config]\n  as = {ROUTER_ASN}\n  router-id = \"{ROUTER}\"\n");
    for (address, asn) in ends(senders) {
        let _ = writeln!(
            text,
            "[[neighbors]]
  [neighbors.config]
    neighbor-address = \"{address}\"
    peer-as = {asn}
  [neighbors.timers.config]
    hold-time = {HOLD_TIME}
  [neighbors.transport.config]
    passive-mode = true"
        );
    }
    text
}

/// Is ferroute's router: a speaker between the ends, until it is killed.
///
/// # Errors
///
/// When it cannot listen.
pub fn speak(senders: u32) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let _inside = runtime.enter();
    let mut config = SpeakerConfig::new(Asn(ROUTER_ASN), RouterId(ROUTER));
    config.listen = vec![(ROUTER, 179).into()];
    config.addresses = LocalAddresses { v4: Some(ROUTER), ..LocalAddresses::default() };
    let speaker = Speaker::start(config)?;
    let all = Arc::new(Policy::accept_all());
    let peers = ends(senders).map(|(address, asn)| {
        let mut peer = PeerConfig::new(address.into(), PeerAsn::Exactly(Asn(asn)));
        peer.initiative = Initiative::Passive;
        peer.hold_time = HOLD_TIME;
        peer.families = Families::IPV4;
        peer.routes.import = Some(all.clone());
        peer.routes.export = Some(all.clone());
        peer
    });
    let refused = speaker.set_peers(peers.collect());
    ensure!(refused.is_empty(), "{refused:?}");
    loop {
        std::thread::park();
    }
}
