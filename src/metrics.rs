//! Metrics in Prometheus' text format 0.0.4, under kube-router's names where they mean the same.
//!
//! Each room writes its own families; here are those of the process. Everything is read when it is
//! asked for, so gauges cannot drift. Counters keep their exact names: nothing is appended.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus::HistogramOpts;

use crate::health::RoomHealth;

/// A page under construction.
#[derive(Default)]
pub struct Page {
    text: String,
}

impl Page {
    /// Starts a family: `kind` is `counter` or `gauge`.
    pub fn family(&mut self, name: &str, kind: &str, help: &str) {
        head(&mut self.text, name, kind, help);
    }

    /// One sample of the family started last.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl fmt::Display) {
        self.text.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            self.text.push(if index == 0 { '{' } else { ',' });
            self.text.push_str(label);
            self.text.push_str("=\"");
            escape(text, &mut self.text);
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }

    /// Whole families written by a room.
    pub fn text(&mut self) -> &mut String {
        &mut self.text
    }

    /// The page.
    pub fn finish(self) -> String {
        self.text
    }
}

/// A label value: backslash, quote and line feed are escaped.
fn escape(text: &str, out: &mut String) {
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
}

/// Upper bounds in seconds: fine where one change is, coarse where a cold start is.
const BOUNDS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// A histogram of durations.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    buckets: [u64; BOUNDS.len()],
    count: u64,
    sum: f64,
}

impl Histogram {
    /// Counts one duration.
    pub fn observe(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        self.count += 1;
        self.sum += seconds;
        if let Some(index) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            self.buckets[index] += 1;
        }
    }

    /// Writes the family in text format.
    pub fn write(&self, out: &mut String, name: &str, help: &str) {
        head(out, name, "histogram", help);
        let mut total = 0;
        for (bound, count) in BOUNDS.iter().zip(self.buckets) {
            total += count;
            line(out, &format!("{name}_bucket"), &format!("{{le=\"{bound}\"}}"), total);
        }
        line(out, &format!("{name}_bucket"), "{le=\"+Inf\"}", self.count);
        line(out, &format!("{name}_sum"), "", self.sum);
        line(out, &format!("{name}_count"), "", self.count);
    }
}

/// What is behind a lock that many read. It is changed by whole values, so it stays usable after a panic
/// elsewhere; the supervisor ends the process anyway.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The head of a family of which a room writes the samples itself.
pub fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// One sample; `labels` with their braces, values [`escaped`], or nothing.
pub fn line(out: &mut String, name: &str, labels: &str, value: impl fmt::Display) {
    let _ = writeln!(out, "{name}{labels} {value}");
}

/// A label value as the text format wants it.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    escape(text, &mut out);
    out
}

/// Who runs: version and features of the build.
pub fn build_info(page: &mut Page) {
    const NAME: &str = "kube_router_build_info";
    page.family(NAME, "gauge", "Version of the program.");
    // goversion is part of the name's contract; there is no Go here.
    page.sample(NAME, &[("goversion", ""), ("version", env!("CARGO_PKG_VERSION"))], 1);
}

/// How fresh the rooms are.
pub fn rooms(page: &mut Page, rooms: &[RoomHealth], now: Instant) {
    let label = |room: &RoomHealth| [("room", room.name)];
    const AGE: &str = "ferroute_last_clean_pass_age_seconds";
    page.family(
        AGE,
        "gauge",
        "Time since the last pass of a room without any failure; +Inf before the first.",
    );
    for room in rooms {
        match room.passes.last_clean_pass {
            Some(at) => {
                page.sample(AGE, &label(room), now.saturating_duration_since(at).as_secs_f64());
            }
            None => page.sample(AGE, &label(room), "+Inf"),
        }
    }
}

/// Objects that cannot be honoured as written.
pub fn problems(
    page: &mut Page,
    counters: &BTreeMap<(&'static str, &'static str), u64>,
    current: &BTreeMap<(&'static str, &'static str), u64>,
    dropped_events: u64,
) {
    for (name, kind, help, values) in [
        ("ferroute_object_problems_total", "counter", "Problems of objects that were reported.", counters),
        ("ferroute_object_problems", "gauge", "Problems of objects that stand now.", current),
    ] {
        page.family(name, kind, help);
        for ((kind, reason), value) in values {
            page.sample(name, &[("kind", kind), ("reason", reason)], value);
        }
    }
    const DROPPED: &str = "ferroute_events_dropped_total";
    page.family(DROPPED, "counter", "Events that were never posted because too many waited.");
    page.sample(DROPPED, &[], dropped_events);
}

/// The process, under the names every Prometheus client uses; what cannot be read is left out.
pub fn process(page: &mut Page, started: Duration) {
    let mut gauge = |name: &str, kind: &str, help: &str, value: Option<f64>| {
        if let Some(value) = value {
            page.family(name, kind, help);
            page.sample(name, &[], value);
        }
    };
    gauge(
        "process_start_time_seconds",
        "gauge",
        "Start time of the process since the Unix epoch in seconds.",
        Some(started.as_secs_f64()),
    );
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    let usage = ticks.filter(|ticks| *ticks > 0).and_then(|ticks| Usage::parse(&stat, ticks as f64));
    gauge(
        "process_cpu_seconds_total",
        "counter",
        "Total user and system CPU time spent in seconds.",
        usage.as_ref().map(|usage| usage.cpu_seconds),
    );
    gauge(
        "process_virtual_memory_bytes",
        "gauge",
        "Virtual memory size in bytes.",
        usage.as_ref().map(|usage| usage.virtual_bytes),
    );
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    gauge("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", resident(&status));
    let files = std::fs::read_dir("/proc/self/fd").ok().map(|files| files.count() as f64);
    gauge("process_open_fds", "gauge", "Number of open file descriptors.", files);
}

/// CPU time and memory from `/proc/self/stat` (proc_pid_stat(5): fields 14, 15 and 23).
struct Usage {
    cpu_seconds: f64,
    virtual_bytes: f64,
}

impl Usage {
    fn parse(stat: &str, ticks_per_second: f64) -> Option<Self> {
        // The name in parentheses may hold spaces; field 3 follows the last parenthesis.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        Some(Self { cpu_seconds: (field(14)? + field(15)?) / ticks_per_second, virtual_bytes: field(23)? })
    }
}

/// `VmRSS` of `/proc/self/status`, which counts in KiB.
fn resident(status: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib * 1024.0)
}

/// How long the pages take to write; kube-router's name and buckets.
pub struct ExportTime(prometheus::Histogram);

impl ExportTime {
    /// A histogram without observations.
    pub fn new() -> prometheus::Result<Self> {
        prometheus::Histogram::with_opts(HistogramOpts::new(
            "kube_router_controller_ipvs_metrics_export_time",
            "Time it took to export metrics.",
        ))
        .map(Self)
    }

    /// Adds one page's time.
    pub fn observe(&self, time: Duration) {
        self.0.observe(time.as_secs_f64());
    }

    /// Writes the family.
    pub fn write(&self, page: &mut Page) {
        use prometheus::TextEncoder;
        use prometheus::core::Collector;
        // Fails only for families without samples, which a histogram never is.
        let _ = TextEncoder::new().encode_utf8(&self.0.collect(), &mut page.text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::Passes;

    #[test]
    fn label_values_are_escaped() {
        let mut page = Page::default();
        page.family("a", "gauge", "Help.");
        page.sample("a", &[("x", "q\"b\\n\n"), ("y", "")], 1.5);
        page.sample("a", &[], 2);
        assert_eq!(
            page.finish(),
            "# HELP a Help.\n# TYPE a gauge\na{x=\"q\\\"b\\\\n\\n\",y=\"\"} 1.5\na 2\n"
        );
    }

    #[test]
    fn buckets_are_cumulative() {
        let mut histogram = Histogram::default();
        for ms in [0, 3, 3, 200_000] {
            histogram.observe(Duration::from_millis(ms));
        }
        let mut out = String::new();
        histogram.write(&mut out, "x", "help");
        assert!(
            out.contains("x_bucket{le=\"0.0005\"} 1\n") && out.contains("x_bucket{le=\"0.005\"} 3\n"),
            "{out}"
        );
        assert!(out.contains("x_bucket{le=\"+Inf\"} 4\n") && out.contains("x_count 4\n"), "{out}");
    }

    #[test]
    fn the_process_is_read_from_proc() {
        let stat = "42 (a b) c) S 1 1 1 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 100 12345678 500";
        let usage = Usage::parse(stat, 100.0).unwrap();
        assert_eq!((usage.cpu_seconds, usage.virtual_bytes), (3.0, 12345678.0));
        assert!(Usage::parse("", 100.0).is_none());
        assert_eq!(resident("VmPeak:\t 9 kB\nVmRSS:\t     4096 kB\n"), Some(4194304.0));
        assert_eq!(resident("VmRSS: x kB"), None);
        let mut page = Page::default();
        process(&mut page, Duration::from_secs(1));
        let text = page.finish();
        for name in ["cpu_seconds_total", "resident_memory_bytes", "virtual_memory_bytes", "open_fds"] {
            assert!(text.contains(&format!("\nprocess_{name} ")), "{text}");
        }
    }

    #[test]
    fn families_keep_their_names() {
        let now = Instant::now();
        let room = RoomHealth {
            name: "proxy",
            turn_limit: Duration::ZERO,
            clean_limit: Duration::ZERO,
            passes: Passes { passes: 4, failures: 1, ..Passes::new(now) },
        };
        let mut page = Page::default();
        build_info(&mut page);
        rooms(&mut page, &[room], now);
        problems(&mut page, &BTreeMap::from([(("Service", "BadAddress"), 2)]), &BTreeMap::new(), 3);
        let export = ExportTime::new().unwrap();
        export.observe(Duration::from_millis(7));
        export.write(&mut page);
        let text = page.finish();
        for line in [
            "kube_router_build_info{goversion=\"\",version=\"0.1.0\"} 1",
            "ferroute_last_clean_pass_age_seconds{room=\"proxy\"} +Inf",
            "ferroute_object_problems_total{kind=\"Service\",reason=\"BadAddress\"} 2",
            "ferroute_events_dropped_total 3",
            "kube_router_controller_ipvs_metrics_export_time_bucket{le=\"0.005\"} 0",
            "kube_router_controller_ipvs_metrics_export_time_bucket{le=\"0.01\"} 1",
            "kube_router_controller_ipvs_metrics_export_time_count 1",
        ] {
            assert!(text.lines().any(|known| known == line), "{line} is missing in:\n{text}");
        }
    }
}
