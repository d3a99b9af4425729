//! Durations as Go writes them (`300ms`, `1m30s`, `2h`), so that flags of existing manifests parse.
//!
//! Grammar: Go's `time.ParseDuration`: an optional sign, then one or more decimal numbers with an
//! optional fraction, each with a unit of `ns`, `us` (`µs`, `μs`), `ms`, `s`, `m`, `h`; or a bare
//! `0`. Whole days do not exist there and do not here.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A signed span of nanoseconds, the range of Go's `time.Duration` (about 292 years).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct GoDuration(i64);

/// Text that is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// No number and unit at all.
    #[error("not a duration; write for example 30s, 1m30s or 500ms")]
    Malformed,
    /// A number without its unit.
    #[error("a number without unit; write for example {0}s or {0}m")]
    UnitMissing(String),
    /// A unit that Go does not know.
    #[error("unknown unit {0:?}; units are ns, us, ms, s, m, h")]
    UnitUnknown(String),
    /// More than Go's range of about 292 years.
    #[error("out of range; the longest duration is 2562047h47m16.854775807s")]
    OutOfRange,
}

impl GoDuration {
    /// A span of whole seconds.
    pub const fn from_secs(seconds: u32) -> Self {
        Self(seconds as i64 * 1_000_000_000)
    }

    /// The span in nanoseconds; may be negative.
    pub const fn nanoseconds(self) -> i64 {
        self.0
    }

    /// As an unsigned duration; `None` when negative.
    pub fn unsigned(self) -> Option<Duration> {
        u64::try_from(self.0).ok().map(Duration::from_nanos)
    }
}

/// 2^63, the magnitude of the most negative duration.
const LIMIT: u64 = 1 << 63;

impl FromStr for GoDuration {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let (negative, mut rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        if rest == "0" {
            return Ok(Self(0));
        }
        if rest.is_empty() {
            return Err(ParseError::Malformed);
        }
        let mut total: u64 = 0;
        while !rest.is_empty() {
            let term = Term::take(&mut rest)?;
            total = total.checked_add(term).filter(|sum| *sum <= LIMIT).ok_or(ParseError::OutOfRange)?;
        }
        if negative {
            return Ok(Self(0i64.wrapping_sub_unsigned(total)));
        }
        i64::try_from(total).map(Self).map_err(|_| ParseError::OutOfRange)
    }
}

/// One number and unit of a duration.
struct Term;

impl Term {
    /// Takes one term off the front of `rest`; its value in nanoseconds.
    fn take(rest: &mut &str) -> Result<u64, ParseError> {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at(number_end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(ParseError::Malformed);
        }
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let unit: u64 = match unit {
            "" => return Err(ParseError::UnitMissing(number.to_owned())),
            "ns" => 1,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            other => return Err(ParseError::UnitUnknown(other.to_owned())),
        };
        *rest = tail;
        let mut value: u64 = 0;
        for digit in whole.bytes() {
            value = value
                .checked_mul(10)
                .and_then(|value| value.checked_add(u64::from(digit - b'0')))
                .ok_or(ParseError::OutOfRange)?;
        }
        let value = value.checked_mul(unit).ok_or(ParseError::OutOfRange)?;
        let value = value.checked_add(Self::fraction(fraction, unit)).ok_or(ParseError::OutOfRange)?;
        if value > LIMIT { Err(ParseError::OutOfRange) } else { Ok(value) }
    }

    /// Nanoseconds of the digits behind the point. In floating point, as Go does it, so that a
    /// third of an hour written with many digits is twenty minutes in both.
    fn fraction(digits: &str, unit: u64) -> u64 {
        let (mut value, mut scale) = (0u64, 1f64);
        for digit in digits.bytes() {
            // Digits beyond 63 bits add less than a nanosecond.
            let Some(next) = value.checked_mul(10).and_then(|v| v.checked_add(u64::from(digit - b'0')))
            else {
                break;
            };
            if next > i64::MAX as u64 {
                break;
            }
            value = next;
            scale *= 10.0;
        }
        (value as f64 * (unit as f64 / scale)) as u64
    }
}

impl fmt::Display for GoDuration {
    /// Go's form: `5m0s`, `1h0m0s`, `1.5s`, `300ms`, `0s`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 0 {
            f.write_str("-")?;
        }
        let total = self.0.unsigned_abs();
        match total {
            0 => f.write_str("0s"),
            1..1_000 => write!(f, "{total}ns"),
            1_000..1_000_000 => decimal(f, total, 1_000, "\u{b5}s"),
            1_000_000..1_000_000_000 => decimal(f, total, 1_000_000, "ms"),
            _ => {
                let (minutes, rest) = (total / 60_000_000_000, total % 60_000_000_000);
                if minutes >= 60 {
                    write!(f, "{}h", minutes / 60)?;
                }
                if minutes > 0 {
                    write!(f, "{}m", minutes % 60)?;
                }
                decimal(f, rest, 1_000_000_000, "s")
            }
        }
    }
}

/// Writes `value / unit` with as many decimals as needed.
fn decimal(f: &mut fmt::Formatter<'_>, value: u64, unit: u64, name: &str) -> fmt::Result {
    let (whole, rest) = (value / unit, value % unit);
    if rest == 0 {
        return write!(f, "{whole}{name}");
    }
    let width = unit.ilog10() as usize;
    let digits = format!("{rest:0width$}");
    write!(f, "{whole}.{}{name}", digits.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: i64 = 1_000_000;
    const S: i64 = 1_000 * MS;
    const M: i64 = 60 * S;
    const H: i64 = 60 * M;

    #[test]
    fn accepts_what_go_accepts() {
        for (text, nanoseconds) in [
            ("0", 0),
            ("-0", 0),
            ("5s", 5 * S),
            ("+5s", 5 * S),
            ("-5s", -5 * S),
            ("1m30s", M + 30 * S),
            ("1h0m0s", H),
            ("5.0s", 5 * S),
            ("5.s", 5 * S),
            (".5s", 500 * MS),
            ("1.004s", 1004 * MS),
            ("100.00100s", 100 * S + MS),
            ("10ns", 10),
            ("11us", 11_000),
            ("12\u{b5}s", 12_000),
            ("12\u{3bc}s", 12_000),
            ("13ms", 13 * MS),
            ("3h30m", 3 * H + 30 * M),
            ("10.5s4m", 4 * M + 10 * S + 500 * MS),
            ("0.3333333333333333333h", 20 * M),
            ("9223372036854775807ns", i64::MAX),
            ("-9223372036854775808ns", i64::MIN),
            ("0.100000000000000000000h", 6 * M),
        ] {
            assert_eq!(text.parse::<GoDuration>().map(GoDuration::nanoseconds), Ok(nanoseconds), "{text}");
        }
    }

    #[test]
    fn refuses_what_go_refuses() {
        for text in [
            "",
            "3",
            "-",
            "s",
            ".",
            "-.",
            ".s",
            "+.s",
            "1d",
            "1w",
            "1m 30s",
            " 1s",
            "1s ",
            "1..5s",
            "1m30",
            "9223372036854775808ns",
            "3000000h",
            "-9223372036854775809ns",
            "1S",
            "\u{fffd}",
            "--1s",
            "1e3s",
        ] {
            assert!(text.parse::<GoDuration>().is_err(), "{text:?} must not parse");
        }
    }

    #[test]
    fn prints_as_go_does() {
        for (nanoseconds, text) in [
            (0, "0s"),
            (1, "1ns"),
            (1_100, "1.1\u{b5}s"),
            (2_200_000, "2.2ms"),
            (3_300_000_000, "3.3s"),
            (5 * M, "5m0s"),
            (M + 30 * S, "1m30s"),
            (5 * H + 6 * M + 7 * S + MS, "5h6m7.001s"),
            (-30 * S, "-30s"),
            (i64::MIN, "-2562047h47m16.854775808s"),
        ] {
            assert_eq!(GoDuration(nanoseconds).to_string(), text);
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,40}") {
            let _ = text.parse::<GoDuration>();
        }

        #[test]
        fn never_panics_on_near_misses(text in "[-+]?([0-9.]{0,25}(ns|us|ms|s|m|h|d)?){0,4}") {
            let _ = text.parse::<GoDuration>();
        }

        #[test]
        fn what_is_printed_parses_back(nanoseconds in any::<i64>()) {
            let duration = GoDuration(nanoseconds);
            prop_assert_eq!(duration.to_string().parse(), Ok(duration));
        }

        #[test]
        fn terms_add_up(terms in prop::collection::vec((0u32..100_000, 0usize..6), 1..5)) {
            const UNITS: [(&str, u64); 6] = [
                ("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000),
                ("m", 60_000_000_000), ("h", 3_600_000_000_000),
            ];
            let text: String = terms.iter().map(|(n, unit)| format!("{n}{}", UNITS[*unit].0)).collect();
            let sum: u64 = terms.iter().map(|(n, unit)| u64::from(*n) * UNITS[*unit].1).sum();
            prop_assert_eq!(text.parse::<GoDuration>().map(GoDuration::nanoseconds), Ok(sum as i64));
        }
    }
}
