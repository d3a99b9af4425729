//! What NetworkPolicy costs: changes of pods and policies against the least that makes the same kernel
//! state, and what packets pay for being judged.

mod cluster;
mod floor;
mod packets;
mod room;

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub use floor::floor;
pub use packets::packets;
pub use room::room;

use crate::report::{count, ms, spread};

/// Events of each kind in one run; the run's figure is their median.
pub const EVENTS: u32 = 20;

/// Kinds of events in the order they are made.
pub const ROWS: [&str; 6] =
    ["policy added", "pod added", "label changed", "pod removed", "policy removed", "cold start"];

/// One kind of event in one run.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Milliseconds, event decoded to last acknowledgement.
    pub ms: f64,
    /// Netlink messages that write sets, per event.
    pub messages: f64,
    /// Runs of iptables-restore, per event.
    pub restores: f64,
    /// Bytes of restore input, per event; only the floor knows them.
    pub bytes: f64,
    /// Rules in it, per event.
    pub rules: f64,
}

/// Rows of one run by name.
pub type Samples = BTreeMap<String, Sample>;

/// One run of the room.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Run {
    /// Rows.
    pub samples: Samples,
    /// Resident memory after all in MiB, the bench's own cluster included.
    pub resident: f64,
}

/// What packets pay with a number of isolated pods.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Packets {
    /// Local isolated pods, each with a policy of its own.
    pub isolated: u32,
    /// TCP connections made and closed per second.
    pub connections: f64,
    /// Bytes of one established connection per second, in MB.
    pub throughput: f64,
}

/// All samples of one number of policies.
#[derive(Debug, Default, Serialize)]
pub struct Figures {
    /// Policies in the cluster.
    pub policies: u32,
    /// Runs of ferroute.
    pub room: Vec<Run>,
    /// Runs of the floor, each right after ferroute's of the same place.
    pub floor: Vec<Samples>,
}

impl Figures {
    /// As a table.
    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "\n{} NetworkPolicies in the cluster, {} local pods\n{:<16} {:>11} {:>9}  {:<22} {:>9} {:>7} {:>9} {:>11} {:>7}",
            self.policies,
            cluster::LOCAL_PODS,
            "",
            "ferroute ms",
            "floor ms",
            "ratio",
            "messages",
            "floor",
            "restores",
            "bytes",
            "rules"
        );
        for row in ROWS {
            let ours: Vec<Sample> =
                self.room.iter().filter_map(|run| run.samples.get(row)).copied().collect();
            let floor: Vec<Sample> = self.floor.iter().filter_map(|run| run.get(row)).copied().collect();
            let Some(last) = ours.last() else { continue };
            let time = ms(spread(ours.iter().map(|sample| sample.ms)).1);
            let (mut floor_time, mut ratio) = (String::new(), String::new());
            let mut least = Sample::default();
            if let Some(sample) = floor.last() {
                least = *sample;
                floor_time = ms(spread(floor.iter().map(|sample| sample.ms)).1);
                let (low, middle, high) = spread(ours.iter().zip(&floor).map(|(a, b)| a.ms / b.ms));
                ratio = format!("{middle:.2} ({low:.2}..{high:.2})");
            }
            let _ = writeln!(
                out,
                "{row:<16} {time:>11} {floor_time:>9}  {ratio:<22} {:>9} {:>7} {:>9} {:>11} {:>7}",
                count(last.messages),
                count(least.messages),
                count(last.restores),
                count(least.bytes),
                count(least.rules),
            );
        }
        let (_, resident, _) = spread(self.room.iter().map(|run| run.resident));
        let _ = writeln!(out, "resident {resident:.1} MiB");
        out
    }
}

/// Packet figures as a table; ratios to no isolated pod, run by run.
pub fn packet_table(runs: &[Vec<Packets>]) -> Result<String> {
    let mut out = String::new();
    writeln!(out, "\n{:<14} {:>14} {:<20} {:>12} {:<20}", "isolated pods", "connections/s", "", "MB/s", "")?;
    let shapes = runs.first().context("no run")?.len();
    for at in 0..shapes {
        let column = |value: fn(&Packets) -> f64| {
            let own = spread(runs.iter().filter_map(|run| run.get(at)).map(value)).1;
            let ratio = spread(runs.iter().filter_map(|run| Some(value(run.get(at)?) / value(run.first()?))));
            (own, format!("{:.2} ({:.2}..{:.2})", ratio.1, ratio.0, ratio.2))
        };
        let isolated = runs.first().and_then(|run| run.get(at)).map_or(0, |sample| sample.isolated);
        let ((rate, rate_ratio), (bytes, bytes_ratio)) =
            (column(|sample| sample.connections), column(|sample| sample.throughput));
        writeln!(out, "{isolated:<14} {rate:>14.0} {rate_ratio:<20} {bytes:>12.0} {bytes_ratio:<20}")?;
    }
    Ok(out)
}
