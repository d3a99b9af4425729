//! Sends changed messages to the decoder and checks what must hold, for as long as asked.
//! Usage: `hammer [SECONDS [SEED]]`. Prints executions, CPU time, outcomes and every finding with the octets
//! that show it; exit status 1 if there are any. The same seed sends the same messages.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement stops at the first surprise")]

use std::collections::BTreeMap;
use std::panic::catch_unwind;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ferroute_bgp::message::Message;
use peak_alloc::PeakAlloc;

#[path = "../fuzz/harness.rs"]
mod harness;
use harness::{Numbers, allowance, codecs, judge, judge_stream, mutate, seeds};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u64>().expect("a number"));
    let time = Duration::from_secs(arguments.next().unwrap_or(10));
    let seed = arguments.next().unwrap_or(1);
    let (seeds, codecs) = (seeds(), codecs());
    println!("{} seeds, {} kinds of session, seed {seed}", seeds.len(), codecs.len());
    let mut numbers = Numbers(seed);
    let mut corpus = seeds;
    let mut outcomes = BTreeMap::<&str, u64>::new();
    let (start, mut executions, mut findings, mut most) = (Instant::now(), 0_u64, 0_u64, 0.0_f64);
    let mut next_report = Duration::from_secs(60);
    while start.elapsed() < time {
        for _ in 0..256 {
            let frame = mutate(&corpus, &mut numbers);
            let codec = &codecs[numbers.below(codecs.len())];
            executions += 1;
            // The panic's own message goes to standard error.
            let result = catch_unwind(|| {
                MEMORY.reset_peak_usage();
                let before = MEMORY.current_usage();
                let decoded = Message::decode(&frame, codec);
                let taken = MEMORY.peak_usage().saturating_sub(before);
                drop(decoded);
                if taken > allowance(frame.len()) {
                    return Err(format!("{taken} octets of memory for {} of message", frame.len()));
                }
                judge(&frame, codec).map(|outcome| (outcome, taken))
            });
            match result {
                Ok(Ok((outcome, taken))) => {
                    *outcomes.entry(outcome).or_default() += 1;
                    most = most.max(taken as f64 / frame.len() as f64);
                    // What is still read whole is worth changing further.
                    let whole = matches!(outcome, "UPDATE" | "OPEN" | "attribute discard");
                    if whole && corpus.len() < 5000 && numbers.below(200) == 0 {
                        corpus.push(frame);
                    }
                }
                Ok(Err(finding)) => {
                    findings += 1;
                    println!("FINDING {finding}\n  session {codec:?}\n  message {}", hex(&frame));
                }
                Err(_) => {
                    findings += 1;
                    println!("PANIC\n  session {codec:?}\n  message {}", hex(&frame));
                }
            }
        }
        let codec = &codecs[numbers.below(codecs.len())];
        let stream: Vec<u8> = (0..4).flat_map(|_| mutate(&corpus, &mut numbers)).collect();
        if let Err(finding) = judge_stream(&stream, codec, || numbers.below(3000)) {
            findings += 1;
            println!("FINDING in a stream: {finding}\n  session {codec:?}\n  stream {}", hex(&stream));
        }
        if start.elapsed() >= next_report {
            next_report += Duration::from_secs(60);
            println!("{} s: {executions} executions, {findings} findings", start.elapsed().as_secs());
        }
    }
    // First number: nanoseconds that this thread, the only one, was on a processor.
    let usage = std::fs::read_to_string("/proc/self/schedstat").expect("own usage");
    let cpu =
        usage.split(' ').next().and_then(|time| time.parse::<u64>().ok()).expect("a time") / 1_000_000_000;
    println!("{executions} executions in {} s, {cpu} s of CPU", start.elapsed().as_secs());
    println!("most memory for a message: {most:.1} times its length; outcomes {outcomes:?}");
    println!("{findings} findings");
    if findings == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|octet| format!("{octet:02x}")).collect()
}
