//! Whatever a peer sends: what must hold of a message does, on the session that the first octet chooses.
#![no_main]

#[path = "../harness.rs"]
#[allow(dead_code, reason = "the stable driver uses more of it")]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((choice, body)) = bytes.split_first() else { return };
    let codecs = harness::codecs();
    let codec = &codecs[usize::from(*choice >> 3) % codecs.len()];
    let mut frame = vec![0xff; 16];
    let Ok(length) = u16::try_from(body.len() + 19) else { return };
    frame.extend(length.to_be_bytes());
    frame.push(1 + (choice & 7) % 5);
    frame.extend(body);
    if let Err(finding) = harness::judge(&frame, codec) {
        panic!("{finding}");
    }
});
