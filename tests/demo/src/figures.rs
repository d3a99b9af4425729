//! Requests counted, and the spread over endpoints as a table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail, ensure};
use ferroute_kit::{Netns, Tally};

use crate::application::{Application, Front};

/// Everything that was asked.
#[derive(Debug, Default)]
pub struct Figures {
    /// Requests sent.
    pub requests: u64,
    /// Requests without the right answer.
    pub failed: u64,
    rows: BTreeMap<String, Row>,
}

#[derive(Debug, Default)]
struct Row {
    sources: BTreeMap<&'static str, u64>,
    pods: BTreeMap<String, u64>,
}

impl Figures {
    /// Asks so many times; every answer must come from an expected pod. Returns whom the pods saw.
    ///
    /// # Errors
    /// A wrong answer or none.
    pub fn ask(
        &mut self,
        front: &Front,
        from: &Netns,
        who: &'static str,
        to: SocketAddr,
        times: usize,
        expected: &[String],
    ) -> Result<BTreeSet<IpAddr>> {
        let tally = from.spread(front.protocol, to, times);
        self.count(&tally);
        ensure!(tally.failed == 0, "{} at {} {to} from {who}: {tally}", front.name, front.protocol);
        let row = self.rows.entry(front.port_name()).or_default();
        // An endpoint that never answers must show as 0.
        for pod in front.pods.keys() {
            row.pods.entry(pod.clone()).or_default();
        }
        *row.sources.entry(who).or_default() += tally.ok;
        for (pod, count) in &tally.pods {
            ensure!(expected.contains(pod), "{} at {to} from {who} was answered by {pod}", front.name);
            *row.pods.entry(pod.clone()).or_default() += count;
        }
        Ok(tally.peers)
    }

    /// Every endpoint has answered, where the default scheduler takes turns.
    ///
    /// # Errors
    /// The first that has not.
    pub fn all_reached(&self, application: &Application) -> Result<()> {
        for front in application.fronts.iter().filter(|front| front.takes_turns) {
            let row = self.rows.get(&front.port_name());
            let silent = row.map(|row| row.pods.iter().find(|(_, count)| **count == 0));
            match silent {
                None => bail!("{} was never asked", front.port_name()),
                Some(Some((pod, _))) => bail!("{}: endpoint {pod} never answered", front.port_name()),
                Some(None) => {}
            }
        }
        Ok(())
    }

    /// Adds requests made elsewhere.
    pub fn count(&mut self, tally: &Tally) {
        self.requests += tally.ok + tally.failed;
        self.failed += tally.failed;
    }

    /// One row per Service port: who asked how often, and which pods answered.
    pub fn print_table(&self) {
        println!(
            "   {:<44} {:>5} {:>5} {:>7}  answers per endpoint",
            "SERVICE PORT", "PODS", "NODES", "OUTSIDE"
        );
        for (name, row) in &self.rows {
            let from = |who| row.sources.get(who).copied().unwrap_or_default();
            let spread: Vec<String> = row.pods.values().map(u64::to_string).collect();
            println!(
                "   {name:<44} {:>5} {:>5} {:>7}  {}",
                from("pod"),
                from("node"),
                from("outside"),
                spread.join(" ")
            );
        }
    }
}
