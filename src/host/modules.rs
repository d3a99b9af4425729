//! The modules of this kernel: where one is, and how to load it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long one run of modprobe may take. It reads a few files and calls the kernel; a module that
/// takes longer is stuck, and the start must not be.
const MODPROBE_PATIENCE: Duration = Duration::from_secs(5);

/// Where a module is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// In the kernel now.
    Loaded,
    /// Part of the kernel.
    BuiltIn,
    /// A file under /lib/modules.
    Loadable,
    /// Not for this kernel.
    Absent,
    /// /lib/modules of the running kernel is not visible.
    CannotTell,
}

/// What the host says about modules.
pub struct Modules {
    /// /proc/modules.
    loaded: String,
    /// modules.builtin, `None` when not visible.
    built_in: Option<String>,
    /// modules.dep, `None` when not visible.
    loadable: Option<String>,
}

impl Modules {
    /// Those of the running kernel.
    pub fn of_host() -> Self {
        Self::at(Path::new("/"))
    }

    /// Those that `/proc` and `/lib/modules` below a folder tell.
    pub fn at(root: &Path) -> Self {
        let modules = root.join("lib/modules");
        let directory =
            nix::sys::utsname::uname().map_or(modules.clone(), |names| modules.join(names.release()));
        Self {
            // A kernel without modules has no such file: nothing is loaded then.
            loaded: std::fs::read_to_string(root.join("proc/modules")).unwrap_or_default(),
            built_in: std::fs::read_to_string(directory.join("modules.builtin")).ok(),
            loadable: std::fs::read_to_string(directory.join("modules.dep")).ok(),
        }
    }

    /// Whether modules that are not loaded can be told.
    pub fn readable(&self) -> bool {
        self.built_in.is_some() || self.loadable.is_some()
    }

    /// Where the module of this name is.
    pub fn find(&self, name: &str) -> Found {
        if self
            .loaded
            .lines()
            .any(|line| line.split(' ').next().is_some_and(|found| same_module(found, name)))
        {
            return Found::Loaded;
        }
        let names = |text: &Option<String>| {
            text.as_deref().is_some_and(|text| {
                text.lines().any(|line| module_of_path(line.split(':').next().unwrap_or(line)) == Some(name))
            })
        };
        // File names have `-` and `_` as the author liked; those looked for here have `_`.
        if names(&self.built_in) {
            Found::BuiltIn
        } else if names(&self.loadable) {
            Found::Loadable
        } else if self.readable() {
            Found::Absent
        } else {
            Found::CannotTell
        }
    }
}

fn same_module(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).all(|(a, b)| a == b || (is_dash(a) && is_dash(b)))
}

fn is_dash(byte: u8) -> bool {
    byte == b'-' || byte == b'_'
}

/// `ip_vs` of `kernel/net/netfilter/ipvs/ip_vs.ko.xz`.
fn module_of_path(path: &str) -> Option<&str> {
    let file = path.rsplit('/').next()?;
    file.split_once(".ko").map(|(name, _)| name)
}

/// Loads a module with the host's modprobe, waiting a bounded time; the error says what happened.
pub fn modprobe(module: &str) -> Result<(), String> {
    let mut child = Command::new("modprobe")
        .arg("--")
        .arg(module)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("modprobe did not run: {error}"))?;
    let deadline = Instant::now() + MODPROBE_PATIENCE;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("modprobe {module} failed ({status})")),
            Ok(None) if Instant::now() >= deadline => {
                // Both only fail when the child has just ended.
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("modprobe {module} took longer than {MODPROBE_PATIENCE:?}"));
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(format!("modprobe {module} was lost: {error}")),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn sample() -> Modules {
        Modules {
            loaded: "ip_vs_rr 16384 0 - Live 0x0\nnf_conntrack 180224 1 ip_vs, Live 0x0\n".to_owned(),
            built_in: Some(
                "kernel/net/ipv4/tcp_cubic.ko\nkernel/net/netfilter/ipvs/ip_vs_wrr.ko\n".to_owned(),
            ),
            loadable: Some(
                "kernel/net/netfilter/ipvs/ip_vs_mh.ko.xz: kernel/net/netfilter/ipvs/ip_vs.ko.xz\n"
                    .to_owned(),
            ),
        }
    }

    #[test]
    fn a_module_is_found_where_it_is() {
        let modules = sample();
        assert_eq!(modules.find("ip_vs_rr"), Found::Loaded);
        assert_eq!(modules.find("ip_vs_wrr"), Found::BuiltIn);
        assert_eq!(modules.find("ip_vs_mh"), Found::Loadable);
        // Named only as a dependency of another: the line of its own is what counts.
        assert_eq!(modules.find("ip_vs"), Found::Absent);
        assert_eq!(modules.find("ip_vs_r"), Found::Absent);
        let blind = Modules { loaded: String::new(), built_in: None, loadable: None };
        assert_eq!(blind.find("ip_vs_rr"), Found::CannotTell);
    }
}
