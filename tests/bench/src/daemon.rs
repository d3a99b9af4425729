//! The whole daemon against an API server: start to ready, memory, CPU time.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferroute_apiserver::{ApiServer, NodeSpec};
use serde::{Deserialize, Serialize};

use crate::shape::{NODE, RANGE, Shape};
use crate::sides::enter_namespace;

/// How long an idle daemon is watched: its time is counted in ticks of 10 ms, a thirtieth of a percent of this.
pub const IDLE: Duration = Duration::from_secs(30);

/// What one run of the daemon took.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Daemon {
    /// From exec to ready, in milliseconds.
    pub ready_ms: f64,
    /// CPU seconds up to ready, in user and kernel mode.
    pub cpu_user: f64,
    /// The same in kernel mode.
    pub cpu_system: f64,
    /// Resident memory five seconds later, in MiB.
    pub resident: f64,
    /// Highest resident memory, in MiB.
    pub peak: f64,
    /// CPU seconds in [`IDLE`], some time after that.
    pub idle_cpu: f64,
}

struct Ferroute(Child);

impl Drop for Ferroute {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `program` against an API server with the shape's objects and waits until it is ready.
pub fn daemon(shape: &Shape, program: &Path) -> Result<Daemon> {
    enter_namespace()?;
    let server = ApiServer::builder()
        .service_cidrs([RANGE.parse()?])
        .node(NodeSpec::new(NODE, ["192.0.2.11".parse()?]).pod_cidrs(["10.128.0.0/24".parse()?]))
        .advertise(["192.0.2.1".parse()?])
        .controllers(false)
        .start()?;
    server.load("services", shape.service_objects())?;
    server.load("endpointslices.discovery.k8s.io", shape.slice_objects())?;
    let folder = std::env::temp_dir().join(format!("ferroute-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let log = std::fs::File::create(folder.join("log"))?;

    let started = Instant::now();
    let child = Command::new(program)
        .arg(format!("--master={}", server.url()))
        .arg(format!("--hostname-override={NODE}"))
        .args(["--run-router=false", "--run-firewall=false", "--health-port=20244", "--metrics-port=0"])
        .arg(format!("--admin-socket={}", folder.join("socket").display()))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let mut child = Ferroute(child);
    let process = child.0.id();
    while !is_ready() {
        if let Some(status) = child.0.try_wait()? {
            bail!("ferroute ended: {status}\n{}", std::fs::read_to_string(folder.join("log"))?);
        }
        ensure!(
            started.elapsed() < Duration::from_secs(180),
            "ferroute is not ready after three minutes\n{}",
            std::fs::read_to_string(folder.join("log"))?
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    let ready_ms = started.elapsed().as_secs_f64() * 1000.0;
    let (user, system) = cpu(process)?;
    std::thread::sleep(Duration::from_secs(5));
    let (idle_user, idle_system) = cpu(process)?;
    std::thread::sleep(IDLE);
    let (user_later, system_later) = cpu(process)?;
    Ok(Daemon {
        ready_ms,
        cpu_user: user,
        cpu_system: system,
        resident: memory(process, "VmRSS:")?,
        peak: memory(process, "VmHWM:")?,
        idle_cpu: user_later + system_later - idle_user - idle_system,
    })
}

fn is_ready() -> bool {
    use std::io::{Read, Write};
    let ask = || -> std::io::Result<String> {
        let mut stream = std::net::TcpStream::connect("127.0.0.1:20244")?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
}

/// User and system CPU seconds (proc_pid_stat(5), fields 14 and 15).
pub fn cpu(process: u32) -> Result<(f64, f64)> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let rest = stat.rsplit_once(") ").context("no command in stat")?.1;
    let mut fields = rest.split(' ').skip(11).map(str::parse::<f64>);
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock tick")? as f64;
    let mut next = || anyhow::Ok(fields.next().context("a short stat")?? / ticks);
    Ok((next()?, next()?))
}

/// A field of proc_pid_status(5) in MiB.
pub fn memory(process: u32, field: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}
