//! How soon BGP says something: a session and the first route after a start, and one Service's change to its
//! UPDATE. The whole daemon against an API server, beside BIRD, FRR and GoBGP. Needs no IPVS: it runs on the
//! kernel it is started on, without the service proxy.

mod change;
mod node;
mod start;
mod tap;

use std::fmt::Write;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Result;
use ferroute_kit::Netns;
use serde::Serialize;

pub use change::{Change, measure as change};
pub use start::{Start, measure as start};

use crate::report::{ms, spread};
use crate::routers::{Make, ROUTER, end_address, end_asn};

/// The AS of who starts and announces, at [`ROUTER`].
const SPEAKER_ASN: u32 = 64_512;
/// Who listens.
const RECEIVER: Ipv4Addr = end_address(0);
/// Its AS.
const RECEIVER_ASN: u32 = end_asn(0);
/// Longest time for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// The receiver's namespace and the speaker's, with a cable between them.
fn namespaces() -> Result<(Netns, Netns)> {
    let (outside, inside) =
        (Netns::new("receiver")?, Netns::named(format!("speaker{}", std::process::id()))?);
    outside.sh(&format!("ip link add eth0 type veth peer name eth0 netns {}", inside.name()))?;
    for (netns, address) in [(&outside, RECEIVER), (&inside, ROUTER)] {
        netns.sh("ip link set lo up")?;
        netns.sh("ip link set eth0 up")?;
        netns.sh(&format!("ip address add {address}/16 dev eth0"))?;
    }
    Ok((outside, inside))
}

/// All runs.
#[derive(Debug, Default, Serialize)]
pub struct Figures {
    /// Who started, who received, what each run took, and why there are no more runs.
    pub starts: Vec<(Make, Make, Vec<Start>, Option<String>)>,
    /// Changes of one Service.
    pub changes: Vec<Change>,
}

impl Figures {
    /// Every make that starts, with every router that receives; no runs yet.
    pub fn new() -> Self {
        let pairs = Make::ALL
            .into_iter()
            .flat_map(|starter| Make::ALL[1..].iter().map(move |receiver| (starter, *receiver)));
        let starts = pairs.map(|(starter, receiver)| (starter, receiver, Vec::new(), None)).collect();
        Self { starts, changes: Vec::new() }
    }

    /// The rows.
    pub fn table(&self) -> String {
        // Writing to a String cannot fail.
        let mut out = String::from("\nfrom exec\n");
        let _ = writeln!(
            out,
            "{:<10} {:<10} {:>15} {:>22} {:>15} {:>22}",
            "starts",
            "receives",
            "established ms",
            "(lowest..highest)",
            "first route ms",
            "(lowest..highest)"
        );
        for (starter, receiver, runs, failure) in &self.starts {
            if let Some(failure) = failure {
                let _ = writeln!(out, "{starter:<10} {receiver:<10} {failure}");
            }
            if !runs.is_empty() {
                let _ = writeln!(
                    out,
                    "{starter:<10} {receiver:<10} {} {}",
                    cells(15, runs.iter().map(|run| run.established_ms)),
                    cells(15, runs.iter().map(|run| run.announced_ms))
                );
            }
        }
        let _ = writeln!(
            out,
            "\none Service of {}: written to the API until its UPDATE is read",
            change::SERVICES
        );
        for (name, field) in [
            ("announced", (|run| run.announced_ms) as fn(&Change) -> f64),
            ("withdrawn", |run| run.withdrawn_ms),
            ("floor", |run| run.floor_ms),
        ] {
            let _ = writeln!(out, "{name:<10} {}", cells(15, self.changes.iter().map(field)));
        }
        let ratios = self.changes.iter().map(|run| run.announced_ms / run.floor_ms);
        let (low, middle, high) = spread(ratios);
        let _ = writeln!(out, "announced / floor {middle:.1} ({low:.1}..{high:.1})");
        out
    }
}

fn cells(width: usize, values: impl Iterator<Item = f64>) -> String {
    let (low, middle, high) = spread(values);
    format!("{:>width$} {:>22}", ms(middle), format!("({}..{})", ms(low), ms(high)))
}
