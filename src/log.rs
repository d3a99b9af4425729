//! Log lines on standard error: kube-router's `-v` levels, text or JSON, changed while running.

use std::io::IsTerminal;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{Layer, Registry};

use crate::config::Log;

/// Changes the level of the running process.
#[derive(Clone)]
pub struct Level {
    handle: reload::Handle<Targets, Registry>,
}

impl Level {
    /// Takes effect at once.
    pub fn set(&self, level: i32) -> Result<(), reload::Error> {
        self.handle.reload(targets(level))
    }
}

/// Starts logging; once per process.
pub fn start(log: Log) -> Result<Level, TryInitError> {
    let (filter, handle) = reload::Layer::new(targets(log.level));
    let format = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(log.level > 0);
    let format = if log.json { format.json().flatten_event(true).boxed() } else { format.boxed() };
    tracing_subscriber::registry().with(format.with_filter(filter)).try_init()?;
    Ok(Level { handle })
}

/// 0: changes of state; 1: passes; 2 and 3: every object; 4: the libraries' own lines as well.
fn targets(level: i32) -> Targets {
    let (ours, others) = match level {
        ..=0 => (LevelFilter::INFO, LevelFilter::WARN),
        1 => (LevelFilter::DEBUG, LevelFilter::WARN),
        2 | 3 => (LevelFilter::TRACE, LevelFilter::INFO),
        _ => (LevelFilter::TRACE, LevelFilter::DEBUG),
    };
    // An answer that is no JSON is logged whole by the client, and may be a Secret. What is wrong with it our watches say.
    Targets::new()
        .with_default(others)
        .with_target("ferroute", ours)
        .with_target("kube_client", LevelFilter::ERROR)
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn levels_by_table() {
        for (level, ours, others) in [
            (-1, Level::INFO, Level::WARN),
            (0, Level::INFO, Level::WARN),
            (1, Level::DEBUG, Level::WARN),
            (2, Level::TRACE, Level::INFO),
            (9, Level::TRACE, Level::DEBUG),
        ] {
            let targets = targets(level);
            let kube = ("kube_client::client", Level::ERROR);
            for (target, most) in
                [("ferroute::proxy", ours), ("ferroute_ipvs", ours), ("hyper", others), kube]
            {
                for asked in [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE] {
                    let shown = targets.would_enable(target, &asked);
                    assert_eq!(shown, asked <= most, "-v={level} {target} {asked}");
                }
            }
        }
    }
}
