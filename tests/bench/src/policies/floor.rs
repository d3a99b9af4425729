//! The least that makes the same change: set messages encoded beforehand, and one restore document with
//! only the chains that differ.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ferroute_iptables::Family;
use ferroute_iptables::ipset::{self, Sets};
use ferroute_netlink::{Batch, Protocol, Socket};
use serde::{Deserialize, Serialize};

use super::{EVENTS, ROWS, Sample, Samples};
use crate::sides::{enter_namespace, median};
use crate::tables::{batch_of, create_set, destroy_set, write_entries};

/// Sets and chains of the filter tables.
pub struct State {
    sets: Sets,
    chains: BTreeMap<&'static str, BTreeMap<String, Vec<String>>>,
}

const PROGRAMS: [(&str, Family); 2] = [("iptables", Family::V4), ("ip6tables", Family::V6)];

fn variant(family: Family) -> Result<String> {
    Ok(ferroute_iptables::Command::detect(family, None)?.command.variant().name().to_owned())
}

fn save(program: &str, family: Family) -> Result<String> {
    let save = format!("{program}-{}-save", variant(family)?);
    let output =
        Command::new(&save).args(["-t", "filter"]).output().with_context(|| format!("cannot run {save}"))?;
    ensure!(output.status.success(), "{save}: {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

impl State {
    fn read() -> Result<Self> {
        let mut chains = BTreeMap::new();
        for (program, family) in PROGRAMS {
            let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for line in save(program, family)?.lines() {
                if let Some(chain) = line.strip_prefix(':') {
                    let chain = chain.split(' ').next().unwrap_or_default();
                    found.entry(chain.to_owned()).or_default();
                } else if let Some((chain, _)) =
                    line.strip_prefix("-A ").and_then(|rest| rest.split_once(' '))
                {
                    found.entry(chain.to_owned()).or_default().push(line.to_owned());
                }
            }
            chains.insert(program, found);
        }
        Ok(Self { sets: ipset::Handle::open()?.read(&[""])?, chains })
    }

    /// Input of the usual commands, to make this state again.
    pub fn save_commands(folder: &Path) -> Result<()> {
        let output = Command::new("ipset").arg("save").output().context("cannot run ipset")?;
        ensure!(output.status.success(), "ipset save: {}", output.status);
        std::fs::write(folder.join("ipset"), output.stdout)?;
        for (program, family) in PROGRAMS {
            std::fs::write(folder.join(program), save(program, family)?)?;
        }
        Ok(())
    }
}

/// One event's least work.
#[derive(Default, Serialize, Deserialize)]
struct Step {
    first: Vec<u8>,
    documents: Vec<(String, String)>,
    last: Vec<u8>,
    messages: usize,
}

/// Watches the kernel from event to event.
pub struct Recorder {
    state: State,
    steps: Vec<Step>,
}

impl Recorder {
    /// From the state the kernel is in.
    pub fn start() -> Result<Self> {
        Ok(Self { state: State::read()?, steps: Vec::new() })
    }

    /// Notes what the last event changed.
    pub fn record(&mut self) -> Result<()> {
        let now = State::read()?;
        self.steps.push(step(&self.state, &now)?);
        self.state = now;
        Ok(())
    }

    /// Writes the script.
    pub fn save(self, folder: &Path) -> Result<()> {
        ensure!(self.steps.len() == (ROWS.len() - 1) * usize::try_from(EVENTS)?, "an event is missing");
        Ok(std::fs::write(folder.join("steps"), serde_json::to_vec(&self.steps)?)?)
    }
}

fn step(before: &State, after: &State) -> Result<Step> {
    let (mut first, mut last) = (Batch::new(), Batch::new());
    let mut documents = Vec::new();
    for (program, now) in &after.chains {
        let empty = BTreeMap::new();
        let then = before.chains.get(program).unwrap_or(&empty);
        let mut declared = String::new();
        let mut rules = String::new();
        for (chain, lines) in now {
            if then.get(chain) != Some(lines) {
                declared += &format!(":{chain} - [0:0]\n");
                lines.iter().for_each(|line| rules += &format!("{line}\n"));
            }
        }
        for chain in then.keys().filter(|chain| !now.contains_key(*chain)) {
            declared += &format!(":{chain} - [0:0]\n");
            rules += &format!("-X {chain}\n");
        }
        if !declared.is_empty() {
            documents.push(((*program).to_owned(), format!("*filter\n{declared}{rules}COMMIT\n")));
        }
    }
    for (name, set) in &after.sets {
        match before.sets.get(name) {
            None => {
                create_set(&mut first, name.as_str(), set)?;
                let entries = set.entries().iter().map(|(entry, extra)| (*entry, *extra));
                write_entries(&mut first, true, name.as_str(), set, entries);
            }
            Some(then) => {
                let added = set.entries().iter().filter(|(entry, _)| !then.entries().contains_key(entry));
                let added = added.map(|(entry, extra)| (*entry, *extra));
                write_entries(&mut first, true, name.as_str(), set, added);
                let gone = then.entries().iter().filter(|(entry, _)| !set.entries().contains_key(entry));
                let gone = gone.map(|(entry, extra)| (*entry, *extra));
                // Without a chain to write, one batch is enough.
                let batch = if documents.is_empty() { &mut first } else { &mut last };
                write_entries(batch, false, name.as_str(), set, gone);
            }
        }
    }
    for name in before.sets.keys().filter(|name| !after.sets.contains_key(name)) {
        destroy_set(&mut last, name.as_str());
    }
    Ok(Step {
        messages: first.len() + last.len(),
        first: first.bytes().to_vec(),
        last: last.bytes().to_vec(),
        documents,
    })
}

fn send(socket: &mut Socket, batch: &Batch) -> Result<()> {
    if !batch.is_empty() {
        let failures = socket.execute(batch)?;
        ensure!(failures.is_empty(), "the floor was refused: {:?}", failures.first());
    }
    Ok(())
}

fn restore(program: &str, flags: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(flags)
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    child.stdin.take().context("no input")?.write_all(input.as_bytes())?;
    let status = child.wait()?;
    ensure!(status.success(), "{program}: {status}");
    Ok(())
}

/// One run of the floor: the state before the events made anew, then each event replayed.
pub fn floor(folder: &Path) -> Result<Samples> {
    enter_namespace()?;
    let steps: Vec<Step> = serde_json::from_slice(&std::fs::read(folder.join("steps"))?)?;
    restore("ipset", &["restore"], &std::fs::read_to_string(folder.join("ipset"))?)?;
    let mut programs = BTreeMap::new();
    for (program, family) in PROGRAMS {
        let restorer = format!("{program}-{}-restore", variant(family)?);
        restore(&restorer, &[], &std::fs::read_to_string(folder.join(program))?)?;
        programs.insert(program, restorer);
    }
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let mut samples = Samples::new();
    for (row, steps) in ROWS.iter().zip(steps.chunks(usize::try_from(EVENTS)?)) {
        let mut times = Vec::new();
        let mut sample = Sample::default();
        for step in steps {
            let (first, last) = (batch_of(&step.first)?, batch_of(&step.last)?);
            let begun = Instant::now();
            send(&mut socket, &first)?;
            for (program, document) in &step.documents {
                let restorer = programs.get(program.as_str()).context("unknown program")?;
                restore(restorer, &["--noflush"], document)?;
            }
            send(&mut socket, &last)?;
            times.push(begun.elapsed().as_secs_f64() * 1000.0);
            let each = |value: usize| value as f64 / f64::from(EVENTS);
            sample.messages += each(step.messages);
            sample.restores += each(step.documents.len());
            sample.bytes += each(step.documents.iter().map(|(_, text)| text.len()).sum());
            sample.rules += each(
                step.documents
                    .iter()
                    .flat_map(|(_, text)| text.lines())
                    .filter(|line| line.starts_with("-A"))
                    .count(),
            );
        }
        sample.ms = median(times);
        samples.insert((*row).to_owned(), sample);
    }
    let kinds: BTreeSet<&str> = samples.keys().map(String::as_str).collect();
    ensure!(kinds.len() == ROWS.len() - 1, "a kind of event is missing: {kinds:?}");
    Ok(samples)
}
