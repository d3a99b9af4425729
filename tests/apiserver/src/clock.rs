//! Timestamps, unique ids and name suffixes.

use std::sync::atomic::{AtomicU64, Ordering};

use jiff::{Timestamp, Unit};
use serde_json::Value;

/// The current second, RFC 3339, as `metadata.creationTimestamp` has it.
pub fn now() -> String {
    let now = Timestamp::now();
    now.round(Unit::Second).unwrap_or(now).to_string()
}

/// Seconds since a timestamp in an object; none when it is not one.
pub fn seconds_since(value: &Value) -> Option<i64> {
    let then: Timestamp = value.as_str()?.parse().ok()?;
    Some(Timestamp::now().as_second() - then.as_second())
}

/// The timestamp so many seconds from now.
pub fn in_seconds(seconds: i64) -> String {
    let now = Timestamp::now().as_second();
    Timestamp::from_second(now.saturating_add(seconds)).map_or_else(|_| self::now(), |t| t.to_string())
}

/// An age as kubectl prints it: `5s`, `3m20s`, `2h`, `5d`.
pub fn age(seconds: i64) -> String {
    match seconds.max(0) {
        s @ 0..120 => format!("{s}s"),
        s @ 120..600 if s % 60 != 0 => format!("{}m{}s", s / 60, s % 60),
        s @ 120..10_800 => format!("{}m", s / 60),
        s @ 10_800..172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A fresh uid: unique in this process, and unlike those of others.
pub fn uid() -> String {
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let seed = u64::try_from(Timestamp::now().as_nanosecond()).unwrap_or_default();
    let a = mix(seed ^ (u64::from(std::process::id()) << 40));
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        a >> 32,
        a & 0xffff,
        (a >> 16) & 0xfff,
        (a >> 52) & 0xfff,
        count
    )
}

/// Five letters for `generateName` and pod names.
pub fn suffix() -> String {
    let seed = u64::try_from(Timestamp::now().as_nanosecond()).unwrap_or_default();
    letters(mix(seed ^ COUNTER.fetch_add(1, Ordering::Relaxed).rotate_left(17)), 5)
}

/// A stable name part for a value, as `pod-template-hash`. Null and empty fields do not count: clients
/// that pass a template through typed structs add some.
pub fn digest(value: &Value) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in without_empty(value).to_string().bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    letters(mix(hash), 10)
}

fn without_empty(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let kept = map.iter().map(|(k, v)| (k.clone(), without_empty(v)));
            let empty = |v: &Value| v.is_null() || v.as_object().is_some_and(serde_json::Map::is_empty);
            Value::Object(kept.filter(|(_, v)| !empty(v)).collect())
        }
        Value::Array(list) => Value::Array(list.iter().map(without_empty).collect()),
        plain => plain.clone(),
    }
}

fn letters(mut number: u64, count: usize) -> String {
    // The safe letters of k8s.io/apimachinery rand: no vowels, so no words.
    const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut text = String::with_capacity(count);
    for _ in 0..count {
        text.push(char::from(LETTERS[(number % 27) as usize]));
        number /= 27;
    }
    text
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
