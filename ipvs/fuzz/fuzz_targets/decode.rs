//! Whatever the kernel answers: a value or an error, never a panic, and what was read can be written.
#![no_main]

#[path = "../harness.rs"]
#[allow(dead_code, reason = "the stable driver uses more of it")]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(finding) = harness::judge(bytes) {
        panic!("{finding}");
    }
});
