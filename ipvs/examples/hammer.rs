//! Reads changed answers of the kernel and checks what must hold, for as long as asked, on stable Rust.
//! Usage: `hammer [SECONDS [SEED]]`. Prints executions, CPU time and every finding with the bytes that
//! show it; exit status 1 if there are any. The same seed makes the same answers.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement stops at the first surprise")]

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::time::{Duration, Instant};

#[path = "../fuzz/harness.rs"]
mod harness;
use harness::{Numbers, judge, mutate, seeds};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u64>().expect("a number"));
    let time = Duration::from_secs(arguments.next().unwrap_or(10));
    let mut numbers = Numbers(arguments.next().unwrap_or(1).max(1));
    let mut corpus = seeds();
    let (start, mut executions, mut sense, mut findings) = (Instant::now(), 0_u64, 0_u64, 0_u64);
    while start.elapsed() < time {
        for _ in 0..1024 {
            let bytes = mutate(&corpus, &mut numbers);
            executions += 1;
            // The panic's own message goes to standard error.
            match catch_unwind(|| judge(&bytes)) {
                Ok(Ok(0)) => {}
                Ok(Ok(_)) => {
                    sense += 1;
                    // What still says something is worth changing further.
                    if corpus.len() < 5000 && numbers.below(2000) == 0 {
                        corpus.push(bytes);
                    }
                }
                Ok(Err(finding)) => {
                    findings += 1;
                    println!("FINDING {finding}\n  answer {}", hex(&bytes));
                }
                Err(_) => {
                    findings += 1;
                    println!("PANIC\n  answer {}", hex(&bytes));
                }
            }
        }
    }
    // First number: nanoseconds that this thread, the only one, was on a processor.
    let usage = std::fs::read_to_string("/proc/self/schedstat").expect("own usage");
    let cpu =
        usage.split(' ').next().and_then(|time| time.parse::<u64>().ok()).expect("a time") / 1_000_000_000;
    println!(
        "{executions} executions in {} s, {cpu} s of CPU; {sense} made sense",
        start.elapsed().as_secs()
    );
    println!("{findings} findings");
    if findings == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|octet| format!("{octet:02x}")).collect()
}
