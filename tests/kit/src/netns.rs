//! One network namespace.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::link::Links;

/// The namespace of the calling thread (`/proc/self` would be the first thread's).
const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace. Clones share it; it is gone when the last clone, process and socket is.
#[derive(Clone, Debug)]
pub struct Netns(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    file: File,
    mounted: Option<PathBuf>,
}

/// Puts the thread back where it was, also when the closure panics.
struct Return(File);

impl Drop for Return {
    fn drop(&mut self) {
        if let Err(errno) = setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET) {
            // Going on in the wrong namespace would test something else than the test says.
            eprintln!("cannot return to the network namespace this thread came from: {errno}");
            std::process::abort();
        }
    }
}

impl Netns {
    /// A new, empty namespace with `lo` up. The name is for messages only.
    ///
    /// # Errors
    /// Without the right to make namespaces (root), or when `lo` does not come up.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        Self::create(name.into(), false)
    }

    /// Like [`Netns::new`], and seen by `ip netns` under its name until dropped.
    ///
    /// # Errors
    /// As [`Netns::new`], and when `/run/netns/NAME` exists or cannot be mounted.
    pub fn named(name: impl Into<String>) -> Result<Self> {
        Self::create(name.into(), true)
    }

    fn create(name: String, visible: bool) -> Result<Self> {
        let back = Return(File::open(OWN).with_context(|| format!("open {OWN}"))?);
        unshare(CloneFlags::CLONE_NEWNET).with_context(|| {
            format!("make network namespace {name}: needs root (run it through scripts/lab)")
        })?;
        let file = File::open(OWN).with_context(|| format!("open {OWN}"))?;
        let mut mounted = None;
        if visible {
            let path = Path::new("/run/netns").join(&name);
            fs::create_dir_all("/run/netns").context("create /run/netns")?;
            File::create_new(&path)
                .with_context(|| format!("create {}: another namespace has this name", path.display()))?;
            mount(Some(OWN), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .with_context(|| format!("mount {}", path.display()))?;
            mounted = Some(path);
        }
        drop(back);
        let netns = Self(Arc::new(Inner { name, file, mounted }));
        netns.links()?.up("lo")?;
        Ok(netns)
    }

    /// The namespace that the calling thread is in.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn current() -> Result<Self> {
        let file = File::open(OWN).with_context(|| format!("open {OWN}"))?;
        Ok(Self(Arc::new(Inner { name: "current".into(), file, mounted: None })))
    }

    /// The name given at creation.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The handle that netlink takes to name this namespace.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }

    /// Runs a closure inside, on the calling thread. Sockets it opens, threads and processes it
    /// starts stay inside; the thread itself comes back, also from a panic. Calls may nest.
    ///
    /// # Panics
    /// When the namespace cannot be entered (no root).
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        let here = File::open(OWN).unwrap_or_else(|error| panic!("open {OWN}: {error}"));
        let _back = Return(here);
        setns(self.fd(), CloneFlags::CLONE_NEWNET)
            .unwrap_or_else(|errno| panic!("enter network namespace {}: {errno}", self.name()));
        work()
    }

    /// Links, addresses and routes of this namespace.
    ///
    /// # Errors
    /// When no netlink socket can be had.
    pub fn links(&self) -> Result<Links> {
        self.run(Links::open).with_context(|| format!("open rtnetlink in {}", self.name()))
    }

    /// Writes a sysctl, named with slashes (`net/ipv4/ip_forward`).
    ///
    /// # Errors
    /// When the kernel has no such sysctl or refuses the value.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.run(|| fs::write(Path::new("/proc/sys").join(name), value))
            .with_context(|| format!("set sysctl {name}={value} in {}", self.name()))
    }

    /// Reads a sysctl, named with slashes; without the line end.
    ///
    /// # Errors
    /// When the kernel has no such sysctl.
    pub fn sysctl(&self, name: &str) -> Result<String> {
        self.run(|| fs::read_to_string(Path::new("/proc/sys").join(name)))
            .map(|text| text.trim_end().to_owned())
            .with_context(|| format!("read sysctl {name} in {}", self.name()))
    }

    /// Runs a program inside; its standard output.
    ///
    /// # Errors
    /// When it cannot start or fails; with what it said.
    pub fn exec(&self, program: &str, arguments: &[&str]) -> Result<String> {
        self.exec_with_input(program, arguments, "")
    }

    /// Like [`Netns::exec`] for a command written as one line, split at blanks.
    ///
    /// # Errors
    /// As [`Netns::exec`].
    pub fn sh(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let program = words.next().context("empty command")?;
        self.exec(program, &words.collect::<Vec<_>>())
    }

    /// Runs a program inside with this text as its standard input; its standard output.
    ///
    /// # Errors
    /// When it cannot start or fails; with what it said.
    pub fn exec_with_input(&self, program: &str, arguments: &[&str], input: &str) -> Result<String> {
        let line = || format!("{program} {} (in {})", arguments.join(" "), self.name());
        let mut command = Command::new(program);
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() });
        let mut child = self.run(|| command.spawn()).with_context(|| format!("start {}", line()))?;
        let output = std::thread::scope(|scope| {
            if let Some(mut stdin) = child.stdin.take() {
                // A program that ends without reading all of it says why by its status.
                scope.spawn(move || stdin.write_all(input.as_bytes()));
            }
            child.wait_with_output()
        })
        .with_context(|| format!("wait for {}", line()))?;
        if !output.status.success() {
            bail!("{}: {}: {}", line(), output.status, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(path) = &self.mounted {
            let gone = umount2(path, MntFlags::MNT_DETACH).map_err(std::io::Error::from);
            if let Err(error) = gone.and_then(|()| fs::remove_file(path)) {
                eprintln!("remove {}: {error}", path.display());
            }
        }
    }
}
