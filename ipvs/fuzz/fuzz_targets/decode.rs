//! Whatever the kernel answers: a value or an error, never a panic.
#![no_main]

use ferroute_ipvs::{Family, wire};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(answer) = wire::decode_server(bytes) {
        let _ = answer.statistics();
    }
    for family in [Family::V4, Family::V6] {
        if let Ok(answer) = wire::decode_destination(family, bytes) {
            let _ = answer.statistics();
        }
    }
    let _ = (wire::decode_timeouts(bytes), wire::decode_info(bytes));
});
