//! Whatever a peer sends, cut anyhow: the same messages come out.
#![no_main]

#[path = "../harness.rs"]
#[allow(dead_code, reason = "the stable driver uses more of it")]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((choice, stream)) = bytes.split_first() else { return };
    let codecs = harness::codecs();
    let codec = &codecs[usize::from(*choice) % codecs.len()];
    let mut numbers = harness::Numbers(u64::from(*choice));
    if let Err(finding) = harness::judge_stream(stream, codec, || numbers.below(3000)) {
        panic!("{finding}");
    }
});
