//! Named tasks and threads: the first one that ends is known by name, whatever way it ended.
//!
//! A room runs for the life of the process. One that returns, fails or panics without being asked
//! ends the process, which the kubelet or systemd starts again: the kernel keeps what was
//! programmed meanwhile. Nothing here knows what the rooms do.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{AbortHandle, JoinError};

/// A room that ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its name.
    pub name: &'static str,
    /// In which way.
    pub how: How,
}

/// The way a room ended.
#[derive(Debug, PartialEq, Eq)]
pub enum How {
    /// It returned without error.
    Returned,
    /// It returned an error; the whole chain as text.
    Failed(String),
    /// It panicked with this message.
    Panicked(String),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.how {
            How::Returned => write!(f, "{} ended although nothing asked it to", self.name),
            How::Failed(error) => write!(f, "{}: {error}", self.name),
            How::Panicked(message) => write!(f, "{} panicked: {message}", self.name),
        }
    }
}

/// All rooms of the process.
pub struct Supervisor {
    ended: UnboundedReceiver<Ended>,
    sender: UnboundedSender<Ended>,
    /// Tasks have a handle; threads end only on their own.
    running: BTreeMap<&'static str, Option<AbortHandle>>,
}

impl Default for Supervisor {
    fn default() -> Self {
        let (sender, ended) = unbounded_channel();
        Self { ended, sender, running: BTreeMap::new() }
    }
}

impl Supervisor {
    /// Starts a task. Must be called within the runtime.
    pub fn task<F>(&mut self, name: &'static str, body: F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let task = tokio::spawn(body);
        self.running.insert(name, Some(task.abort_handle()));
        let sender = self.sender.clone();
        tokio::spawn(async move {
            let how = match task.await {
                Ok(outcome) => How::of(outcome),
                Err(error) => match panic_of(error) {
                    Some(message) => How::Panicked(message),
                    None => How::Returned, // Cancelled by `stop`.
                },
            };
            // Nobody listens any more once the process is stopping.
            let _ = sender.send(Ended { name, how });
        });
    }

    /// Starts a thread for a room that blocks; `body` must end by itself when the room is told to.
    pub fn thread(
        &mut self,
        name: &'static str,
        body: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
    ) -> std::io::Result<()> {
        let sender = self.sender.clone();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // The closure is gone after a panic, so nobody sees what it left half done.
            let how = match catch_unwind(AssertUnwindSafe(body)) {
                Ok(outcome) => How::of(outcome),
                Err(payload) => How::Panicked(panic_message(&*payload)),
            };
            let _ = sender.send(Ended { name, how });
        })?;
        self.running.insert(name, None);
        Ok(())
    }

    /// Waits for the first room that ends.
    pub async fn first_end(&mut self) -> Ended {
        match self.ended.recv().await {
            Some(ended) => {
                self.running.remove(ended.name);
                ended
            }
            // The supervisor holds a sender itself, so the channel never closes.
            None => std::future::pending().await,
        }
    }

    /// Cancels the tasks and waits for the threads, which were told to end; the names of those
    /// still running at the deadline, and what failed on the way out.
    pub async fn stop(mut self, deadline: Duration) -> Stopped {
        for handle in self.running.values().flatten() {
            handle.abort();
        }
        let mut failed = Vec::new();
        let wait = async {
            while !self.running.is_empty() {
                let Some(ended) = self.ended.recv().await else { break };
                self.running.remove(ended.name);
                if ended.how != How::Returned {
                    failed.push(ended);
                }
            }
        };
        // Whether it timed out shows in what is still running.
        let _ = tokio::time::timeout(deadline, wait).await;
        Stopped { running: self.running.into_keys().collect(), failed }
    }
}

/// How the stop went.
#[derive(Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Rooms that did not end in time.
    pub running: Vec<&'static str>,
    /// Rooms that ended with an error.
    pub failed: Vec<Ended>,
}

impl How {
    fn of(outcome: anyhow::Result<()>) -> Self {
        match outcome {
            Ok(()) => How::Returned,
            Err(error) => How::Failed(chain(&error)),
        }
    }
}

/// An error with its causes, each said once: many errors already repeat their cause.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// The panic's message, or `None` if the task was cancelled.
pub fn panic_of(error: JoinError) -> Option<String> {
    error.try_into_panic().ok().map(|payload| panic_message(&*payload))
}

fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

/// Sends panics to the log, in its format, instead of bare lines on standard error.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        tracing::error!(
            thread = thread.name().unwrap_or("unnamed"),
            location = info.location().map(tracing::field::display),
            message = panic_message(info.payload()),
            "panic"
        );
    }));
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn the_first_end_carries_the_name() {
        let mut rooms = Supervisor::default();
        rooms.task("waits", std::future::pending());
        rooms.task("fails", async { Err(anyhow::anyhow!("disk").context("cannot write")) });
        assert_eq!(rooms.first_end().await.to_string(), "fails: cannot write: disk");
        rooms.task("returns", async { Ok(()) });
        assert_eq!(rooms.first_end().await.to_string(), "returns ended although nothing asked it to");
        rooms.task("panics", async { panic!("number {}", 7) });
        assert_eq!(rooms.first_end().await.to_string(), "panics panicked: number 7");
        rooms.thread("thread", || panic!("plain")).unwrap();
        assert_eq!(rooms.first_end().await.to_string(), "thread panicked: plain");
        rooms.thread("thread", || Err(anyhow::anyhow!("kernel"))).unwrap();
        assert_eq!(rooms.first_end().await.to_string(), "thread: kernel");
        assert_eq!(
            rooms.stop(Duration::from_secs(5)).await,
            Stopped { running: vec![], failed: vec![] },
            "a cancelled task is no failure"
        );
    }

    #[test]
    fn causes_are_said_once() {
        let error = anyhow::anyhow!("no such file").context("cannot read /x: no such file").context("start");
        assert_eq!(chain(&error), "start: cannot read /x: no such file");
    }

    #[tokio::test]
    async fn a_stop_has_a_deadline() {
        let mut rooms = Supervisor::default();
        let (release, wait) = mpsc::channel::<()>();
        rooms
            .thread("stuck", move || {
                let _ = wait.recv();
                Ok(())
            })
            .unwrap();
        rooms.thread("complains", || Err(anyhow::anyhow!("late"))).unwrap();
        let stopped = rooms.stop(Duration::from_millis(300)).await;
        assert_eq!(stopped.running, ["stuck"]);
        assert_eq!(stopped.failed.len(), 1);
        drop(release);
    }
}
