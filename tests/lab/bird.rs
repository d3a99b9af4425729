//! BIRD 2 with the configuration that a test gives it.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;

use ferroute_kit::Netns;
use ferroute_kit::assert::{eventually, eventually_equal};
use ferroute_kit::router::{CONFIG, CONTROL, Make, PACKAGES};

use super::{SESSION, SOON};

/// A BIRD that runs.
pub struct Bird {
    process: Child,
    directory: PathBuf,
    netns: Netns,
}

impl Bird {
    /// Starts it in a namespace.
    pub fn start(netns: &Netns, config: &str) -> Self {
        let directory =
            std::env::temp_dir().join(format!("ferroute-bird-{}-{}", netns.name(), std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(CONFIG), config).unwrap();
        let process = Self::spawn(&directory, netns, &[]);
        let bird = Self { process, directory, netns: netns.clone() };
        bird.wait();
        bird
    }

    fn spawn(directory: &Path, netns: &Netns, more: &[&str]) -> Child {
        let mut command = Make::Bird.command(directory);
        command.args(more);
        netns.run(|| command.spawn()).unwrap_or_else(|error| panic!("BIRD: {error} ({PACKAGES})"))
    }

    fn wait(&self) {
        eventually("BIRD", SOON, || self.ask("show status").map(|_| ()));
    }

    /// Ends it without a word to its neighbours.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Starts it again, as one that has restarted.
    pub fn recover(&mut self) {
        self.process = Self::spawn(&self.directory, &self.netns, &["-R"]);
        self.wait();
    }

    /// What birdc answers.
    pub fn ask(&self, question: &str) -> Result<String, String> {
        let socket = self.directory.join(CONTROL);
        let mut words = vec!["-s", socket.to_str().unwrap()];
        words.extend(question.split(' '));
        self.netns.exec("birdc", &words).map_err(|error| error.to_string())
    }

    /// The prefixes that came by a protocol.
    pub fn routes(&self, protocol: &str) -> BTreeSet<String> {
        let answer = self.ask(&format!("show route protocol {protocol}")).unwrap_or_default();
        let words = answer.lines().filter_map(|line| line.split_whitespace().next());
        words.filter(|word| word.contains('/')).map(str::to_owned).collect()
    }

    /// Waits until exactly these have come by a protocol.
    pub fn learns(&self, protocol: &str, wanted: &[&str]) {
        let wanted: BTreeSet<String> = wanted.iter().map(|prefix| (*prefix).to_owned()).collect();
        eventually_equal(&format!("routes of {protocol} in BIRD"), SESSION, &wanted, || {
            self.routes(protocol)
        });
    }
}

impl Drop for Bird {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}
