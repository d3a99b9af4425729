//! A real process in a node.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Netns, Node};

/// Lines of log kept in memory.
const KEPT: usize = 5000;
/// Lines of log shown when something fails.
const SHOWN: usize = 60;

/// A program running in a namespace. It dies with the test process, and when this is dropped (with
/// SIGKILL: to see an orderly stop, call [`Daemon::terminate`]). Dropped by a failing test, it prints
/// its last log lines.
#[derive(Debug)]
pub struct Daemon {
    /// For messages and the log file: the node's name.
    pub name: String,
    /// Where `/readyz` is asked.
    pub health: SocketAddr,
    netns: Netns,
    program: PathBuf,
    arguments: Vec<String>,
    child: Option<Child>,
    log: Arc<Log>,
}

#[derive(Debug)]
struct Log {
    lines: Mutex<VecDeque<String>>,
    file: Option<Mutex<File>>,
}

impl Log {
    /// Also written to `$OUT/NAME.log`, where there is an output folder.
    fn new(name: &str) -> Result<Self> {
        let mut file = None;
        if let Some(folder) = std::env::var_os("OUT").filter(|folder| !folder.is_empty()) {
            let path = Path::new(&folder).join(format!("{name}.log"));
            let opened = File::options().create(true).append(true).open(&path);
            file = Some(Mutex::new(opened.with_context(|| format!("open {}", path.display()))?));
        }
        Ok(Self { lines: Mutex::default(), file })
    }

    fn add(&self, line: String) {
        if let Some(file) = &self.file {
            // The lines in memory are what tests read; a full output folder loses only the copy.
            let _ = writeln!(file.lock().unwrap_or_else(PoisonError::into_inner), "{line}");
        }
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == KEPT {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    fn follow(self: &Arc<Self>, stream: impl Read + Send + 'static) -> Result<()> {
        let log = self.clone();
        let copy = move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                log.add(String::from_utf8_lossy(&line).into_owned());
            }
        };
        std::thread::Builder::new()
            .name("log".into())
            .stack_size(64 * 1024)
            .spawn(copy)
            .context("start log reader")?;
        Ok(())
    }
}

/// The kernel sends the parent-death signal when the *thread* that started a process ends, so one
/// thread that lives as long as this process starts them all.
fn spawn(netns: &Netns, mut command: Command) -> Result<Child> {
    type Job = (Netns, Command, mpsc::Sender<std::io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let work = move || {
            for (netns, mut command, done) in inbox {
                let _ = done.send(netns.run(|| command.spawn()));
            }
        };
        // Without the thread the channel is closed, which is reported below.
        let _ = std::thread::Builder::new().name("spawner".into()).spawn(work);
        jobs
    });
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let (done, answer) = mpsc::channel();
    spawner
        .send((netns.clone(), command, done))
        .ok()
        .context("the thread that starts processes has ended")?;
    Ok(answer.recv().context("the thread that starts processes has ended")??)
}

impl Daemon {
    /// Starts ferroute on a node. Added to the arguments unless they are among them:
    /// `--hostname-override` (the node's name), `--admin-socket` and `--cni-socket` beside it (nodes
    /// share one file system), `--run-firewall=false`: policy closes pods that no Pod object tells of, and
    /// many tests have none; and `--run-router=false`: the cluster has routes of its own.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn ferroute(node: &Node, program: impl Into<PathBuf>, arguments: &[&str]) -> Result<Self> {
        let given = |flag: &str| {
            let value = |argument: &&str| argument.strip_prefix(flag)?.strip_prefix('=').map(str::to_owned);
            arguments.iter().find_map(value)
        };
        let mut all: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let admin_socket = given("--admin-socket").unwrap_or_else(|| Self::admin_socket(node));
        let cni_socket = Path::new(&admin_socket).with_file_name("cni.sock").display().to_string();
        for (flag, value) in [
            ("--hostname-override", node.name.clone()),
            ("--admin-socket", admin_socket),
            ("--cni-socket", cni_socket),
        ] {
            if given(flag).is_none() {
                all.push(format!("{flag}={value}"));
            }
        }
        for flag in ["--run-firewall", "--run-router"] {
            if given(flag).is_none() && !arguments.contains(&flag) {
                all.push(format!("{flag}=false"));
            }
        }
        let address =
            given("--health-addr").and_then(|a| a.parse().ok()).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let port = given("--health-port").and_then(|port| port.parse().ok()).unwrap_or(20244);
        let mut daemon = Self::new(&node.netns, &node.name, program.into(), all)?;
        daemon.health = SocketAddr::new(address, port);
        daemon.start()?;
        Ok(daemon)
    }

    /// The admin socket of a node's ferroute.
    pub fn admin_socket(node: &Node) -> String {
        format!("/run/ferroute-{}/ferroute.sock", node.name)
    }

    /// Starts any program in a namespace.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn program(
        netns: &Netns,
        name: &str,
        program: impl Into<PathBuf>,
        arguments: &[&str],
    ) -> Result<Self> {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let mut daemon = Self::new(netns, name, program.into(), arguments)?;
        daemon.start()?;
        Ok(daemon)
    }

    fn new(netns: &Netns, name: &str, program: PathBuf, arguments: Vec<String>) -> Result<Self> {
        if !program.is_file() && program.components().count() > 1 {
            bail!("{name}: no program {}", program.display());
        }
        let health = SocketAddr::from((Ipv4Addr::LOCALHOST, 20244));
        let (name, log) = (name.to_owned(), Arc::new(Log::new(name)?));
        Ok(Self { name, health, netns: netns.clone(), program, arguments, child: None, log })
    }

    /// Starts it (again) with the same command line; its log goes on.
    ///
    /// # Errors
    /// When it runs, or cannot be started.
    pub fn start(&mut self) -> Result<()> {
        if self.is_running()? {
            bail!("{} runs already", self.name);
        }
        // A parent-death signal set by the child itself would need unsafe code; setpriv has it.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(&self.program).args(&self.arguments);
        let mut child = spawn(&self.netns, command)
            .with_context(|| format!("{}: start {} by setpriv", self.name, self.program.display()))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        self.child = Some(child);
        stdout.map_or(Ok(()), |stream| self.log.follow(stream))?;
        stderr.map_or(Ok(()), |stream| self.log.follow(stream))
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether it has been started and not ended.
    ///
    /// # Errors
    /// When the kernel will not say.
    pub fn is_running(&mut self) -> Result<bool> {
        let Some(child) = &mut self.child else { return Ok(false) };
        if child.try_wait()?.is_none() {
            return Ok(true);
        }
        self.child = None;
        Ok(false)
    }

    /// Waits until `/readyz` says 200.
    ///
    /// # Errors
    /// At the deadline, or when it ends before; with the last log lines.
    pub fn wait_ready(&mut self, deadline: Duration) -> Result<()> {
        let begin = Instant::now();
        loop {
            let last = match self.netns.http_get(self.health, "/readyz") {
                Ok(response) if response.status == 200 => return Ok(()),
                Ok(response) => format!("{} {}", response.status, response.body.trim()),
                Err(error) => error.to_string(),
            };
            if !self.is_running()? {
                bail!("{} ended before it was ready{}", self.name, self.tail());
            }
            if begin.elapsed() > deadline {
                bail!("{} not ready within {} ms: {last}{}", self.name, deadline.as_millis(), self.tail());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// At the deadline, with the last log lines; or when it does not run.
    pub fn wait_exit(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let begin = Instant::now();
        loop {
            let child = self.child.as_mut().with_context(|| format!("{} does not run", self.name))?;
            if let Some(status) = child.try_wait()? {
                self.child = None;
                return Ok(status);
            }
            if begin.elapsed() > deadline {
                bail!("{} still runs after {} ms{}", self.name, deadline.as_millis(), self.tail());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.pid().with_context(|| format!("{} does not run", self.name))?;
        kill(Pid::from_raw(pid.try_into()?), signal)
            .with_context(|| format!("send {signal} to {}", self.name))
    }

    /// SIGTERM, and its exit status.
    ///
    /// # Errors
    /// When it has not ended at the deadline, with the last log lines.
    pub fn terminate(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait_exit(deadline)
    }

    /// SIGKILL; returns when it is gone.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait_exit(Duration::from_secs(5)).map(drop)
    }

    /// An orderly stop, a start, and ready again.
    ///
    /// # Errors
    /// When stopping or becoming ready takes longer than the deadline, each.
    pub fn restart(&mut self, deadline: Duration) -> Result<()> {
        let status = self.terminate(deadline)?;
        if !status.success() {
            return Err(anyhow!("{} stopped with {status}{}", self.name, self.tail()));
        }
        self.start()?;
        self.wait_ready(deadline)
    }

    /// Its log lines so far, the last 5,000.
    pub fn log(&self) -> Vec<String> {
        self.log.lines.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// The last log lines, as a message's end.
    fn tail(&self) -> String {
        let lines = self.log();
        let from = lines.len().saturating_sub(SHOWN);
        format!("; {} said:\n{}", self.name, lines[from..].join("\n"))
    }

    /// Resident memory in KiB and CPU time used (user and system).
    ///
    /// # Errors
    /// When it does not run.
    pub fn usage(&self) -> Result<(u64, Duration)> {
        let pid = self.pid().with_context(|| format!("{} does not run", self.name))?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident =
            resident.and_then(|text| text.split_whitespace().next()?.parse().ok()).context("VmRSS")?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // Fields 14 and 15, counted after the name, which may hold blanks; USER_HZ is 100 everywhere.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        Ok((resident, Duration::from_millis((ticks(11) + ticks(12)) * 10)))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Either it runs and is killed, or it has ended and is only reaped.
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("daemon {}{}", self.name, self.tail());
        }
    }
}
