//! Samples to a table: medians and spread over the runs.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;

use crate::daemon::{Daemon, IDLE};
use crate::shape::Shape;
use crate::sides::{Sample, Samples};

/// All samples of one shape.
#[derive(Debug, Default, Serialize)]
pub struct Figures {
    /// The run that wrote the floor's script; only its "API Service ..." count.
    pub captured: Samples,
    /// Runs of ferroute.
    pub ferroute: Vec<Samples>,
    /// Runs of the floor, each right after ferroute's of the same place.
    pub floor: Vec<Samples>,
    /// The usual commands.
    pub commands: Samples,
    /// Runs of the daemon.
    pub daemon: Vec<Daemon>,
}

/// All that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    kernel: String,
    runs: usize,
    shapes: Vec<(String, Figures)>,
    policies: Vec<crate::policies::Figures>,
    /// What packets pay, run by run.
    pub packets: Vec<Vec<crate::policies::Packets>>,
    /// Routers, load by load.
    pub routers: Vec<crate::routers::Figures>,
    /// Starts and changes.
    pub sessions: Option<crate::sessions::Figures>,
}

/// Rows in their order.
const ROWS: [&str; 14] = [
    "cold start",
    "cold start: tables",
    "cold start: chains",
    "API Service served",
    "API Service usable",
    "one endpoint added",
    "one endpoint added, woken",
    "one endpoint removed",
    "one Service added",
    "one Service removed",
    "opening the handles",
    "warm restart",
    "warm restart: tables",
    "full audit",
];

impl Report {
    /// An empty report about this kernel.
    pub fn begin(runs: usize) -> Result<Self> {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
        let place = std::env::var("FERROUTE_LAB").unwrap_or_else(|_| "host".into());
        let kernel = format!("Linux {kernel} ({place})");
        println!("{kernel}, {runs} interleaved runs; median (lowest..highest)");
        Ok(Self {
            kernel,
            runs,
            shapes: Vec::new(),
            policies: Vec::new(),
            packets: Vec::new(),
            routers: Vec::new(),
            sessions: None,
        })
    }

    /// Adds the figures of a number of policies.
    pub fn add_policies(&mut self, figures: crate::policies::Figures) {
        self.policies.push(figures);
    }

    /// Adds a shape and returns its table.
    pub fn add(&mut self, shape: &Shape, figures: Figures) -> String {
        let text = table(shape, &figures);
        self.shapes.push((shape.to_string(), figures));
        text
    }
}

fn table(shape: &Shape, figures: &Figures) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "\n{shape}\n{:<26} {:>11} {:>11}  {:<22} {:>12} {:>12} {:>10}",
        "", "ferroute ms", "floor ms", "ratio", "written", "floor", "asked"
    );
    for row in ROWS {
        let of = |runs: &[Samples]| -> Vec<Sample> {
            runs.iter().filter_map(|samples| samples.get(row)).copied().collect()
        };
        let (mut ours, floor) = (of(&figures.ferroute), of(&figures.floor));
        if ours.is_empty() {
            ours.extend(figures.captured.get(row));
        }
        let Some(last) = ours.last().copied() else { continue };
        let time = ms(spread(ours.iter().map(|sample| sample.ms)).1);
        let (mut floor_time, mut ratio, mut floor_written) = (String::new(), String::new(), String::new());
        if let Some(least) = floor.last() {
            floor_time = ms(spread(floor.iter().map(|sample| sample.ms)).1);
            let ratios = ours.iter().zip(&floor).map(|(ours, floor)| ours.ms / floor.ms);
            let (low, middle, high) = spread(ratios);
            ratio = format!("{middle:.2} ({low:.2}..{high:.2})");
            floor_written = count(least.written);
        }
        let _ = writeln!(
            out,
            "{row:<26} {time:>11} {floor_time:>11}  {ratio:<22} {:>12} {floor_written:>12} {:>10}",
            count(last.written),
            count(last.asked),
        );
    }
    for (command, sample) in &figures.commands {
        let _ = writeln!(out, "{command:<26} {:>11} {:>11}", "", ms(sample.ms));
    }
    if !figures.daemon.is_empty() {
        let of = |field: fn(&Daemon) -> f64| spread(figures.daemon.iter().map(field)).1;
        let _ = writeln!(
            out,
            "daemon with API server: ready {} ms after exec, CPU {:.2} s user + {:.2} s system by then, \
             resident {:.1} MiB, peak {:.1} MiB, idle {:.2} s CPU in {} s",
            ms(of(|d| d.ready_ms)),
            of(|d| d.cpu_user),
            of(|d| d.cpu_system),
            of(|d| d.resident),
            of(|d| d.peak),
            of(|d| d.idle_cpu),
            IDLE.as_secs(),
        );
    }
    out
}

/// Lowest, median, highest.
pub fn spread(values: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    let last = values.len().saturating_sub(1);
    let middle = (at(last / 2) + at(last.div_ceil(2))) / 2.0;
    (at(0), middle, at(last))
}

/// Milliseconds with the digits that matter.
pub fn ms(value: f64) -> String {
    if value < 10.0 { format!("{value:.3}") } else { format!("{value:.1}") }
}

/// A count per event.
pub fn count(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_even_and_odd_counts() {
        assert_eq!(spread([3.0, 1.0, 2.0].into_iter()), (1.0, 2.0, 3.0));
        assert_eq!(spread([4.0, 1.0, 2.0, 3.0].into_iter()), (1.0, 2.5, 4.0));
    }
}
