//! Poll to a deadline; a failure prints what was wanted, what there is, and the difference.

use std::fmt::Debug;
use std::path::Path;
use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// Compares with a golden file, line by line; with `FERROUTE_BLESS` in the environment writes it instead.
///
/// # Panics
/// At the first line that differs.
pub fn golden(file: &Path, actual: &str) {
    if std::env::var_os("FERROUTE_BLESS").is_some() {
        std::fs::write(file, actual).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        return;
    }
    let expected = std::fs::read_to_string(file).unwrap_or_default();
    for (number, (have, want)) in actual.lines().zip(expected.lines()).enumerate() {
        assert_eq!(have, want, "{} line {}", file.display(), number + 1);
    }
    assert_eq!(actual.lines().count(), expected.lines().count(), "{} has another length", file.display());
}

/// Looks until it gets `Ok`; that value.
///
/// # Panics
/// At the deadline, with the last `Err`.
pub fn eventually<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let begin = Instant::now();
    loop {
        match look() {
            Ok(value) => return value,
            Err(last) if begin.elapsed() >= deadline => {
                panic!("{what}: not within {} ms; last: {last}", deadline.as_millis())
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Looks until what it sees equals what is desired.
///
/// # Panics
/// At the deadline, with desired, actual and their difference line by line.
pub fn eventually_equal<T: Debug + PartialEq>(
    what: &str,
    deadline: Duration,
    desired: &T,
    mut actual: impl FnMut() -> T,
) {
    eventually(what, deadline, || {
        let actual = actual();
        if actual == *desired { Ok(()) } else { Err(explain(desired, &actual)) }
    });
}

/// Keeps looking for this long; every look must give `Ok`.
///
/// # Panics
/// At the first `Err`.
pub fn throughout(what: &str, time: Duration, mut look: impl FnMut() -> Result<(), String>) {
    let begin = Instant::now();
    while begin.elapsed() < time {
        if let Err(text) = look() {
            panic!("{what}: after {} ms: {text}", begin.elapsed().as_millis());
        }
        std::thread::sleep(PAUSE);
    }
}

fn explain<T: Debug>(desired: &T, actual: &T) -> String {
    let (desired, actual) = (format!("{desired:#?}"), format!("{actual:#?}"));
    let split = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let difference = difference(&split(&desired), &split(&actual));
    format!("\ndesired: {desired}\nactual: {actual}\ndifference:\n{}", difference.join("\n"))
}

/// Lines only in `before` (with `-`) and only in `after` (with `+`), in order: a longest common
/// subsequence, so a moved line shows too.
pub fn difference(before: &[String], after: &[String]) -> Vec<String> {
    let prefix = before.iter().zip(after).take_while(|(a, b)| a == b).count();
    let (before, after) = (&before[prefix..], &after[prefix..]);
    let suffix = before.iter().rev().zip(after.iter().rev()).take_while(|(a, b)| a == b).count();
    let (before, after) = (&before[..before.len() - suffix], &after[..after.len() - suffix]);
    let width = after.len() + 1;
    let mut common = vec![0_u32; (before.len() + 1) * width];
    for i in (0..before.len()).rev() {
        for j in (0..after.len()).rev() {
            common[i * width + j] = if before[i] == after[j] {
                common[(i + 1) * width + j + 1] + 1
            } else {
                common[(i + 1) * width + j].max(common[i * width + j + 1])
            };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < before.len() || j < after.len() {
        if i < before.len() && j < after.len() && before[i] == after[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == after.len()
            || (i < before.len() && common[(i + 1) * width + j] >= common[i * width + j + 1])
        {
            lines.push(format!("- {}", before[i]));
            i += 1;
        } else {
            lines.push(format!("+ {}", after[j]));
            j += 1;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn difference_shows_removed_added_and_moved_lines() {
        assert!(difference(&lines("a b c"), &lines("a b c")).is_empty());
        assert_eq!(difference(&lines("a b c"), &lines("a c d")), ["- b", "+ d"]);
        assert_eq!(difference(&lines("a b"), &lines("b a")), ["- a", "+ a"]);
    }

    #[test]
    #[should_panic(expected = "difference:\n- 2\n+ 3")]
    fn a_missed_deadline_prints_the_difference() {
        eventually_equal("number", Duration::ZERO, &2, || 3);
    }
}
