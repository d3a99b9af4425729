//! Runs the iptables programs: which variant, with what input, for how long, and what they said.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::Family;
use crate::detect::plain_variant;
use crate::plan::{Plan, PlanError, plan};
use crate::table::{CutOff, Found, Ours, Ruleset, TableName, parse};

/// How long restore waits for another program's lock, in seconds, unless told otherwise.
const LOCK_WAIT: u32 = 10;
/// A program that takes longer is killed: more than the wait for the lock.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// Which kernel interface the programs use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Variant {
    /// nf_tables.
    Nft,
    /// ip_tables, ip6_tables.
    Legacy,
}

impl Variant {
    /// As in the programs' names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }
}

impl std::fmt::Display for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// What went wrong with a program or with what it said.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not installed.
    #[error("no {program} found in {path}: install the package iptables")]
    Missing {
        /// As in "iptables-save".
        program: String,
        /// Where it was looked for.
        path: String,
    },
    /// Neither variant works with this kernel.
    #[error("no variant of {program} works here: {}", .reasons.join("; "))]
    NoVariant {
        /// `iptables` or `ip6tables`.
        program: &'static str,
        /// Each variant's reason.
        reasons: Vec<String>,
    },
    /// Could not be started or talked to.
    #[error("cannot run {program}: {source}")]
    Run {
        /// The program.
        program: String,
        /// Why.
        source: std::io::Error,
    },
    /// Killed at the time limit.
    #[error("{program} did not end within {} s and was killed", .limit.as_secs())]
    TimeLimit {
        /// The program.
        program: String,
        /// The limit.
        limit: Duration,
    },
    /// Another program kept the lock of the legacy variant.
    #[error(
        "{program} waited {seconds} s for the xtables lock (/run/xtables.lock), which another program holds; \
         find it with `fuser /run/xtables.lock`"
    )]
    Locked {
        /// The program.
        program: String,
        /// How long it waited.
        seconds: u32,
    },
    /// Ended with an error.
    #[error("{program} failed ({status}): {stderr}{}", .line.as_ref().map(|l| format!(" [at: {l}]")).unwrap_or_default())]
    Failed {
        /// The program.
        program: String,
        /// Exit code or signal.
        status: String,
        /// All it said.
        stderr: String,
        /// The line of our document that it refused, if it said which.
        line: Option<String>,
    },
    /// A listing that stops in the middle.
    #[error(transparent)]
    CutOff(#[from] CutOff),
    /// A ruleset that is not ours to write.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// The programs of one family and variant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    family: Family,
    variant: Variant,
    save: PathBuf,
    restore: PathBuf,
    lock_wait: u32,
}

impl Command {
    /// The programs of a given variant.
    ///
    /// # Errors
    /// They are not installed.
    pub fn new(family: Family, variant: Variant) -> Result<Self, Error> {
        let program = program(family);
        let named = |verb: &str| find(&format!("{program}-{}-{verb}", variant.name()));
        if let (Ok(save), Ok(restore)) = (named("save"), named("restore")) {
            return Ok(Self { family, variant, save, restore, lock_wait: LOCK_WAIT });
        }
        // Hosts with one variant only may give it the plain name.
        let (save, restore) = (find(&format!("{program}-save"))?, find(&format!("{program}-restore"))?);
        match plain_variant(family)? {
            plain if plain == variant => Ok(Self { family, variant, save, restore, lock_wait: LOCK_WAIT }),
            _ => Err(Error::Missing {
                program: format!("{program}-{}-save", variant.name()),
                path: search_path(),
            }),
        }
    }

    /// The same programs, waiting at most so long for another program's lock. Only the legacy variant locks.
    #[must_use]
    pub fn with_lock_wait(self, seconds: u32) -> Self {
        Self { lock_wait: seconds, ..self }
    }

    /// IPv4 or IPv6.
    #[must_use]
    pub fn family(&self) -> Family {
        self.family
    }

    /// nft or legacy.
    #[must_use]
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// Our chains and jumps in a table.
    ///
    /// # Errors
    /// The program failed.
    pub fn read(&self, table: TableName, ours: &Ours) -> Result<Found, Error> {
        let save = run(&self.save, &["-t", table.name()], "")?;
        Ok(parse(&save, table, ours)?)
    }

    /// Writes a plan in one atomic step; an empty plan runs nothing.
    ///
    /// # Errors
    /// The program failed: nothing of the document was taken.
    pub fn write(&self, table: TableName, plan: &Plan) -> Result<(), Error> {
        if plan.is_empty() {
            return Ok(());
        }
        self.restore(&plan.document(table))
    }

    /// One pass over a table: read, compare, write what differs. Returns what was done.
    ///
    /// # Errors
    /// A program failed, or the ruleset is not ours.
    pub fn sync(&self, table: TableName, ours: &Ours, wanted: &Ruleset) -> Result<Plan, Error> {
        let plan = plan(&self.read(table, ours)?, wanted, ours, self.family)?;
        self.write(table, &plan)?;
        Ok(plan)
    }

    /// [`Self::sync`] of several tables with one program to read and, where anything differs, one to
    /// write. Each table is still one atomic step; one that is refused does not keep the others from being
    /// written. One result per table, in the order given.
    #[must_use]
    pub fn sync_tables(&self, ours: &Ours, wanted: &[(TableName, Ruleset)]) -> Vec<Result<Plan, Error>> {
        let outcome = self.list().and_then(|listing| self.sync_at_once(&listing, ours, wanted));
        // Who is to blame, and what was written before it, shows one by one.
        settled(outcome, wanted, || {
            wanted.iter().map(|(table, ruleset)| self.sync(*table, ours, ruleset)).collect()
        })
    }

    /// [`Self::sync_tables`] without the program to read: `listing` is [`crate::Detected::listing`], and nobody
    /// wrote rules since. What is refused is read and tried again.
    #[must_use]
    pub fn sync_tables_from(
        &self,
        listing: &str,
        ours: &Ours,
        wanted: &[(TableName, Ruleset)],
    ) -> Vec<Result<Plan, Error>> {
        let outcome = self.sync_at_once(listing, ours, wanted);
        settled(outcome, wanted, || self.sync_tables(ours, wanted))
    }

    fn sync_at_once(
        &self,
        listing: &str,
        ours: &Ours,
        wanted: &[(TableName, Ruleset)],
    ) -> Result<Vec<Result<Plan, Error>>, Error> {
        let plans = wanted
            .iter()
            .map(|(table, ruleset)| Ok(plan(&parse(listing, *table, ours)?, ruleset, ours, self.family)?))
            .collect::<Result<Vec<Plan>, Error>>()?;
        let documents: String =
            wanted.iter().zip(&plans).map(|((table, _), plan)| plan.document(*table)).collect();
        if !documents.is_empty() {
            self.restore(&documents)?;
        }
        Ok(plans.into_iter().map(Ok).collect())
    }

    /// What [`Self::sync`] would do, without doing it.
    ///
    /// # Errors
    /// A program failed, or the ruleset is not ours.
    pub fn compare(&self, table: TableName, ours: &Ours, wanted: &Ruleset) -> Result<Plan, Error> {
        Ok(plan(&self.read(table, ours)?, wanted, ours, self.family)?)
    }

    /// Whether this variant can be read here; writes nothing.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), Error> {
        self.list().map(drop)
    }

    /// Tables that exist now; asking for another one would make it.
    pub(crate) fn tables(&self) -> Result<Vec<TableName>, Error> {
        let save = self.list()?;
        let present =
            |table: &TableName| save.lines().any(|line| line.strip_prefix('*') == Some(table.name()));
        Ok(TableName::ALL.into_iter().filter(present).collect())
    }

    fn restore(&self, document: &str) -> Result<(), Error> {
        let seconds = self.lock_wait;
        let arguments = ["--noflush", "-w", &seconds.to_string()];
        run(&self.restore, &arguments, document).map(drop).map_err(|error| match error {
            Error::Failed { program, stderr, .. } if stderr.contains("holding the xtables lock") => {
                Error::Locked { program, seconds }
            }
            Error::Failed { program, status, stderr, .. } => {
                let line = failed_line(&stderr).and_then(|line| document.lines().nth(line.checked_sub(1)?));
                let line = line.map(str::to_owned);
                Error::Failed { program, status, stderr, line }
            }
            other => other,
        })
    }

    /// The host's rules, or why this variant does not work here.
    pub(crate) fn list(&self) -> Result<String, Error> {
        // Without -t: naming a table would load it, and legacy tables on an nft host are worth avoiding.
        run(&self.save, &[], "")
    }

    /// Whether the kernel takes what this variant writes. Some kernels have nf_tables without its IPv4 or IPv6
    /// part: they list nothing and fail on writing (User-Mode Linux 6.1 of Debian). What is left behind is
    /// an empty filter table, which the first real write would make too.
    pub(crate) fn probe(&self) -> Result<(), Error> {
        self.restore(&format!("*filter\n:{PROBE} - [0:0]\n-X {PROBE}\nCOMMIT\n"))
    }
}

/// One result per table, of what was done at once or, where that was refused, of another attempt.
fn settled(
    outcome: Result<Vec<Result<Plan, Error>>, Error>,
    wanted: &[(TableName, Ruleset)],
    again: impl FnOnce() -> Vec<Result<Plan, Error>>,
) -> Vec<Result<Plan, Error>> {
    match outcome {
        Ok(results) => results,
        // Nobody is to blame here, and waiting once more, or once for each table, would only take longer.
        Err(Error::Locked { program, seconds }) => {
            let locked = || Error::Locked { program: program.clone(), seconds };
            wanted.iter().map(|_| Err(locked())).collect()
        }
        Err(_) => again(),
    }
}

const PROBE: &str = "IPTABLES-WRITE-PROBE";

pub(crate) fn program(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

/// The search path, always with the places where these programs live.
fn search_path() -> String {
    let mut path = std::env::var("PATH").unwrap_or_default();
    for place in ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"] {
        if !path.split(':').any(|part| part == place) {
            if !path.is_empty() {
                path.push(':');
            }
            path.push_str(place);
        }
    }
    path
}

pub(crate) fn find(program: &str) -> Result<PathBuf, Error> {
    let path = search_path();
    let found = path.split(':').map(|place| PathBuf::from(place).join(program)).find(|file| file.is_file());
    found.ok_or_else(|| Error::Missing { program: program.to_owned(), path })
}

/// The number of the refused line in what restore said. Three ways are known (1.8.9):
/// `Error occurred at line: 3`, `iptables-restore: line 3 failed`, `line 3: RULE_APPEND failed (...)`.
fn failed_line(stderr: &str) -> Option<usize> {
    stderr.lines().find_map(|line| {
        let rest = line.split_once("line: ").or_else(|| line.split_once("line ")).map(|(_, rest)| rest)?;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    })
}

/// Runs a program without a shell, feeds it, and returns its output; killed at the time limit.
pub(crate) fn run(program: &std::path::Path, arguments: &[&str], input: &str) -> Result<String, Error> {
    let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    let failed = |source| Error::Run { program: name.clone(), source };
    let mut child = Process::new(program)
        .args(arguments)
        .env("PATH", search_path())
        // Messages are parsed.
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let deadline = Instant::now() + TIME_LIMIT;
    let outcome = match converse(&mut child, input.as_bytes(), deadline) {
        Ok(Some(said)) => wait(&mut child, deadline).map(|status| status.map(|status| (status, said))),
        Ok(None) => Ok(None),
        Err(source) => Err(source),
    };
    let (status, [stdout, stderr]) = match outcome {
        Ok(Some(ended)) => ended,
        unfinished => {
            // It may have ended in between.
            let _ = child.kill();
            child.wait().map_err(failed)?;
            return Err(match unfinished {
                Err(source) => failed(source),
                Ok(_) => Error::TimeLimit { program: name, limit: TIME_LIMIT },
            });
        }
    };
    if status.success() {
        Ok(String::from_utf8_lossy(&stdout).into_owned())
    } else {
        let stderr = String::from_utf8_lossy(&stderr).trim().to_owned();
        Err(Error::Failed { program: name, status: status.to_string(), stderr, line: None })
    }
}

/// Feeds a program and hears it out, until it closes its outputs; `None` at the deadline. All in this
/// thread: starting one per pipe takes a good part of such a program's own time.
fn converse(child: &mut Child, input: &[u8], deadline: Instant) -> std::io::Result<Option<[Vec<u8>; 2]>> {
    let (mut stdin, mut rest) = (child.stdin.take(), input);
    if let Some(pipe) = &stdin {
        // Our end only: the program's own is another open file.
        fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    }
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let mut said = [Vec::new(), Vec::new()];
    loop {
        if let Some(pipe) = &mut stdin {
            match pipe.write(rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                // A program that ends early: its exit code and words say why.
                Err(_) => rest = &[],
            }
        }
        if rest.is_empty() {
            // Closed, which is how it knows the end.
            stdin = None;
        }
        let ready = {
            let watched = [
                stdin.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)),
                stdout.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)),
                stderr.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)),
            ];
            let places: Vec<usize> = (0..watched.len()).filter(|place| watched[*place].is_some()).collect();
            let mut watched: Vec<PollFd<'_>> = watched.into_iter().flatten().collect();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            // Rounded up: a fraction of a millisecond must not spin.
            let millis = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
            match poll(&mut watched, PollTimeout::from(millis)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let mut ready = [false; 3];
            for (place, polled) in places.into_iter().zip(&watched) {
                ready[place] = polled.any().unwrap_or(true);
            }
            ready
        };
        let [out, err] = &mut said;
        if ready[1] {
            hear(&mut stdout, out);
        }
        if ready[2] {
            hear(&mut stderr, err);
        }
        if stdout.is_none() && stderr.is_none() {
            return Ok(Some(said));
        }
    }
}

/// Takes what has come through a pipe, and closes it at its end.
fn hear(pipe: &mut Option<impl Read>, said: &mut Vec<u8>) {
    let mut part = [0; 16 * 1024];
    match pipe.as_mut().map(|pipe| pipe.read(&mut part)) {
        Some(Ok(length)) if length > 0 => said.extend_from_slice(part.get(..length).unwrap_or_default()),
        Some(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
        // What came before an error is still worth showing.
        _ => *pipe = None,
    }
}

/// Both pipes are closed: the end is near, but a program may linger.
fn wait(child: &mut Child, deadline: Instant) -> std::io::Result<Option<std::process::ExitStatus>> {
    let mut pause = Duration::from_micros(100);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refused_line_is_found_in_all_known_messages() {
        for (text, line) in [
            (
                "iptables-restore v1.8.9 (legacy): Couldn't load match `x'\n\nError occurred at line: 3\nTry",
                3,
            ),
            ("iptables-restore: line 67 failed", 67),
            ("iptables-nft-restore v1.8.9 (nf_tables): \nline 56: RULE_APPEND failed (No such file)", 56),
        ] {
            assert_eq!(failed_line(text), Some(line));
        }
        assert_eq!(failed_line("something else"), None);
    }

    #[test]
    fn programs_are_found_run_and_their_failures_told() {
        assert_eq!(run(&find("cat").unwrap(), &[], "x\n").unwrap(), "x\n");
        assert!(matches!(run(&find("false").unwrap(), &[], ""), Err(Error::Failed { .. })));
        // More than any pipe holds, both ways, and one that does not listen.
        let long = "a line of a document\n".repeat(100_000);
        assert_eq!(run(&find("cat").unwrap(), &[], &long).unwrap(), long);
        assert_eq!(run(&find("true").unwrap(), &[], &long).unwrap(), "");
        let both = run(&find("sh").unwrap(), &["-c", "cat; echo said >&2; exit 3"], &long);
        assert!(matches!(both, Err(Error::Failed { stderr, .. }) if stderr == "said"));
        let missing = find("no-such-program").unwrap_err();
        assert!(missing.to_string().contains("package iptables"), "{missing}");
    }
}
