//! What routes cost: the speaker of `ferroute-bgp` beside BIRD, FRR and GoBGP, each between the same
//! senders and the same receiver. Needs no IPVS: it runs on the kernel it is started on, with all its CPUs.

mod ends;
mod make;

use std::fmt::Write;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use ferroute_kit::Netns;
use serde::{Deserialize, Serialize};

pub use ends::{establish, routes};
pub use make::{Make, speak};

use crate::report::{ms, spread};
use ends::{Receiver, Sender};
use make::Router;

/// AS of the router that is measured.
pub const ROUTER_ASN: u32 = 64_500;
/// Its address.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
/// Longest time for a run; keepalives are not sent meanwhile.
const PATIENCE: Duration = Duration::from_secs(200);
/// Seconds that sessions hold without keepalives.
pub const HOLD_TIME: u16 = 240;

/// Who is at the ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Args, Serialize, Deserialize)]
pub struct Load {
    /// Peers that send.
    #[arg(long)]
    pub senders: u32,
    /// IPv4 routes that each sends.
    #[arg(long)]
    pub routes: u32,
}

/// One run of one router.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Run {
    /// From exec until all sessions are up, in milliseconds.
    pub up_ms: f64,
    /// From the first octet sent until the receiver has every route.
    pub converged_ms: f64,
    /// CPU seconds of the router in that time, of all its threads.
    pub cpu: f64,
    /// Highest resident memory in MiB.
    pub peak: f64,
}

/// The `index`th end's address: the receiver is 0.
pub const fn end_address(index: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 9, 1, 0).to_bits() + index)
}

/// The `index`th end's AS.
pub const fn end_asn(index: u32) -> u32 {
    64_600 + index
}

/// Measures one router once.
///
/// # Errors
///
/// When it cannot be started, refuses a session, or has not passed on every route in time.
pub fn measure(make: Make, load: Load) -> Result<Run> {
    ensure!((1..=200).contains(&load.senders), "--senders: from 1 to 200");
    ensure!(load.routes > 0 && load.senders * load.routes <= 1_000_000, "--routes: at most a million in all");
    let (outside, inside) = (Netns::new("ends")?, Netns::named(format!("router{}", std::process::id()))?);
    outside.sh(&format!("ip link add eth0 type veth peer name eth0 netns {}", inside.name()))?;
    let mut script = String::from("link set eth0 up\n");
    for index in 0..=load.senders {
        // Writing to a String cannot fail.
        let _ = writeln!(script, "address add {}/16 dev eth0", end_address(index));
    }
    outside.exec_with_input("ip", &["-batch", "-"], &script)?;
    inside.sh("ip link set eth0 up")?;
    inside.sh(&format!("ip address add {ROUTER}/16 dev eth0"))?;

    let begin = Instant::now();
    let router = Router::start(make, &inside, load.senders)?;
    let deadline = begin + PATIENCE;
    let mut senders = (1..=load.senders)
        .map(|index| Sender::connect(&outside, index, load.routes, deadline))
        .collect::<Result<Vec<_>>>()?;
    let receiver = Receiver::connect(&outside, load, deadline)?;
    let up_ms = begin.elapsed().as_secs_f64() * 1e3;
    let before = router.cpu()?;
    let begin = Instant::now();
    let converged = std::thread::scope(|scope| {
        let receiver = scope.spawn(move || receiver.wait(begin + PATIENCE));
        for sender in &mut senders {
            sender.start()?;
        }
        receiver.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))?
    })
    .with_context(|| format!("{make} with {load:?}"))?;
    let run = Run {
        up_ms,
        converged_ms: converged.duration_since(begin).as_secs_f64() * 1e3,
        cpu: router.cpu()? - before,
        peak: router.peak()?,
    };
    drop(router);
    Ok(run)
}

/// All runs of one load.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// What was sent.
    pub load: Load,
    /// Runs of each router, taken in turns. Why one has no more, if it failed.
    pub runs: Vec<(Make, Vec<Run>, Option<String>)>,
}

impl Figures {
    /// No runs yet.
    pub fn new(load: Load) -> Self {
        Self { load, runs: Make::ALL.map(|make| (make, Vec::new(), None)).into() }
    }

    /// The rows of this load.
    pub fn table(&self) -> String {
        let of = |make: Make, field: fn(&Run) -> f64| {
            let runs = self.runs.iter().find(|(other, ..)| *other == make);
            spread(runs.into_iter().flat_map(|(_, runs, _)| runs.iter().map(field)))
        };
        let Load { senders, routes } = self.load;
        let mut out = format!(
            "\n{senders} x {routes} routes\n{:<10} {:>10} {:>12} {:>22} {:>8} {:>9} {:>9} {:>8}\n",
            "", "up ms", "converged ms", "(lowest..highest)", "x BIRD", "CPU s", "peak MiB", "x BIRD"
        );
        let (_, bird, _) = of(Make::Bird, |run| run.converged_ms);
        let (_, bird_peak, _) = of(Make::Bird, |run| run.peak);
        for (make, runs, failure) in &self.runs {
            // Writing to a String cannot fail.
            if let Some(failure) = failure {
                let _ = writeln!(out, "{make:<10} {failure}");
            }
            if runs.is_empty() {
                continue;
            }
            let (low, middle, high) = of(*make, |run| run.converged_ms);
            let peak = of(*make, |run| run.peak).1;
            let _ = writeln!(
                out,
                "{make:<10} {:>10} {:>12} {:>22} {:>8.2} {:>9.2} {peak:>9.1} {:>8.2}",
                ms(of(*make, |run| run.up_ms).1),
                ms(middle),
                format!("({}..{})", ms(low), ms(high)),
                middle / bird,
                of(*make, |run| run.cpu).1,
                peak / bird_peak,
            );
        }
        out
    }
}
