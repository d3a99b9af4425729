//! Changed messages: a short run of what `examples/message_hammer.rs` does for hours. One test, since memory is
//! counted for the whole process.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;

use ferroute_bgp::message::Message;
use peak_alloc::PeakAlloc;

#[path = "../fuzz/harness.rs"]
mod harness;
use harness::{Numbers, allowance, codecs, judge, judge_stream, mutate, seeds};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

#[test]
fn nothing_breaks_and_memory_is_bounded() {
    let (seeds, codecs) = (seeds(), codecs());
    let mut numbers = Numbers(2016);
    let mut outcomes = BTreeMap::<&str, u32>::new();
    for _ in 0..60_000 {
        let frame = mutate(&seeds, &mut numbers);
        let codec = &codecs[numbers.below(codecs.len())];
        let taken = taken(|| Message::decode(&frame, codec));
        assert!(taken <= allowance(frame.len()), "{taken} octets for {}: {frame:02x?}", frame.len());
        let outcome = judge(&frame, codec).unwrap_or_else(|finding| panic!("{finding}: {frame:02x?}"));
        *outcomes.entry(outcome).or_default() += 1;
    }
    // A mutation that leads nowhere proves nothing.
    for outcome in
        ["UPDATE", "OPEN", "NOTIFICATION", "ROUTE-REFRESH", "attribute discard", "treat as withdraw", "reset"]
    {
        assert!(outcomes.get(outcome).is_some_and(|count| *count > 100), "{outcome} of {outcomes:?}");
    }
    let mut messages = 0;
    for _ in 0..2000 {
        let codec = &codecs[numbers.below(codecs.len())];
        let stream: Vec<u8> = (0..4).flat_map(|_| mutate(&seeds, &mut numbers)).collect();
        messages += judge_stream(&stream, codec, || numbers.below(3000)).unwrap();
    }
    assert!(messages > 2000, "{messages}");

    // The dearest messages: default routes only, attributes of no length only.
    let codec = codecs.last().unwrap();
    for body in [&[0_u8, 0, 0, 0][..], &[0xff, 0xe5, 0, 0]] {
        let mut frame = vec![0xff; 16];
        frame.extend([0xff, 0xff, 2]);
        frame.extend(body);
        frame.resize(65535, 0);
        let taken = taken(|| Message::decode(&frame, codec));
        assert!(taken <= allowance(frame.len()), "{taken}");
    }
    let mut frame = vec![0xff; 16];
    frame.extend([0xff, 0xff, 2, 0, 0, 0xff, 0xe8]);
    frame.extend((0..21_837_u32).flat_map(|n| [0xc0, 33 + (n % 200) as u8, 0]));
    let length = (frame.len() as u16).to_be_bytes();
    frame[16..18].copy_from_slice(&length);
    let attributes = (frame.len() as u16 - 23).to_be_bytes();
    frame[21..23].copy_from_slice(&attributes);
    let taken = taken(|| Message::decode(&frame, codec).unwrap());
    assert!(taken <= allowance(frame.len()), "{taken}");
}

/// Most memory that is held at a time while this runs.
fn taken<T>(run: impl FnOnce() -> T) -> usize {
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    drop(run());
    MEMORY.peak_usage().saturating_sub(before)
}
