//! Any bytes as a message of an ipset listing: a value or a refusal, never a panic.
#![no_main]

use ferroute_iptables::Family;
use ferroute_iptables::ipset::{Kind, SetType, decode_part};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|payload: &[u8]| {
    let _ = decode_part(payload, None);
    for set_type in SetType::WRITTEN {
        for family in Family::BOTH {
            let _ = decode_part(payload, Some(Kind { set_type, family }));
        }
    }
});
