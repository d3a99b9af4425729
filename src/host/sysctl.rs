//! Kernel parameters under /proc/sys: read, compare, write only what differs.
//!
//! Parameters under `net` belong to the network namespace of the calling thread.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::release::Release;

/// What a parameter should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Exactly this number.
    Exactly(u32),
    /// The second number where the first is found; any other value is right as it is.
    Instead {
        /// The value that is wrong.
        of: u32,
        /// What replaces it.
        is: u32,
    },
}

impl Want {
    /// The number to write over `current`, or `None` when it may stay.
    pub fn correction(self, current: &str) -> Option<u32> {
        let current: Option<u32> = current.trim().parse().ok();
        match self {
            Want::Exactly(wanted) => (current != Some(wanted)).then_some(wanted),
            Want::Instead { of, is } => (current == Some(of)).then_some(is),
        }
    }
}

/// A parameter, what it should hold, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Path below /proc/sys, with slashes: a link name may contain dots.
    pub key: String,
    /// The right value.
    pub want: Want,
    /// What goes wrong without it.
    pub reason: &'static str,
}

/// What became of one setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing was written.
    AlreadyRight,
    /// Written and read back.
    Written {
        /// The value before.
        from: String,
    },
    /// It is wrong and the kernel refused the write (or took it and kept its value, `errno` 0).
    Refused {
        /// Positive errno: EROFS and EACCES where /proc/sys is mounted read-only.
        errno: i32,
        /// The value that stays; `None` when not even reading worked.
        value: Option<String>,
    },
    /// This kernel has no such parameter, or its module is not loaded.
    Missing,
}

/// A setting and its outcome. Its text names the parameter, the value and the cure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// What was wanted.
    pub setting: Setting,
    /// What happened.
    pub outcome: Outcome,
}

impl Applied {
    /// Whether the parameter is now as wanted.
    pub fn is_right(&self) -> bool {
        matches!(self.outcome, Outcome::AlreadyRight | Outcome::Written { .. })
    }
}

impl fmt::Display for Applied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Setting { key, want, reason } = &self.setting;
        let wanted = match want {
            Want::Exactly(value) | Want::Instead { is: value, .. } => value,
        };
        match &self.outcome {
            Outcome::AlreadyRight => write!(f, "sysctl {key} is right"),
            Outcome::Written { from } => write!(f, "sysctl {key} changed from {from} to {wanted}"),
            Outcome::Refused { errno, value } => {
                write!(f, "cannot set sysctl {key} to {wanted}")?;
                if let Some(value) = value {
                    write!(f, " (it stays {value})")?;
                }
                let text = match errno {
                    0 => "the kernel kept its value",
                    errno => nix::errno::Errno::from_raw(*errno).desc(),
                };
                write!(
                    f,
                    ": {text}; {reason}; set it on the host (/etc/sysctl.d) or let the container write /proc/sys"
                )
            }
            Outcome::Missing => write!(
                f,
                "this kernel has no sysctl {key}; {reason}; load the module that brings it or choose a kernel that has it"
            ),
        }
    }
}

/// The tree of kernel parameters.
#[derive(Clone, Debug)]
pub struct Sysctls {
    root: PathBuf,
}

impl Sysctls {
    /// Those of this host, as seen by the calling thread: /proc/sys.
    pub fn of_host() -> Self {
        Self::at("/proc/sys")
    }

    /// A tree mounted elsewhere.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Reads a parameter, without the trailing newline; `None` when the kernel has none of that
    /// name.
    pub fn read(&self, key: &str) -> io::Result<Option<String>> {
        match std::fs::read_to_string(self.path(key)) {
            Ok(text) => Ok(Some(text.trim_end().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes one parameter right, writing only when it is wrong, and reads it back.
    pub fn apply(&self, setting: &Setting) -> Applied {
        let outcome = self.outcome(setting);
        Applied { setting: setting.clone(), outcome }
    }

    /// Makes all right, each on its own: one refusal stops nothing.
    pub fn apply_all(&self, settings: &[Setting]) -> Vec<Applied> {
        settings.iter().map(|setting| self.apply(setting)).collect()
    }

    fn outcome(&self, setting: &Setting) -> Outcome {
        let from = match self.read(&setting.key) {
            Ok(Some(value)) => value,
            Ok(None) => return Outcome::Missing,
            Err(error) => return Outcome::Refused { errno: errno(&error), value: None },
        };
        let Some(wanted) = setting.want.correction(&from) else { return Outcome::AlreadyRight };
        if let Err(error) = std::fs::write(self.path(&setting.key), wanted.to_string()) {
            return Outcome::Refused { errno: errno(&error), value: Some(from) };
        }
        // Some parameters take a write and clamp it; what counts is what reads back.
        match self.read(&setting.key) {
            Ok(Some(value)) if setting.want.correction(&value).is_none() => Outcome::Written { from },
            Ok(value) => Outcome::Refused { errno: 0, value },
            Err(error) => Outcome::Refused { errno: errno(&error), value: None },
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        // An absolute key would replace the root in `join`.
        self.root.join(Path::new(key.trim_start_matches('/')))
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(nix::libc::EIO)
}

/// What the Service proxy needs on this kernel, for IPVS on `interfaces` (the pod bridge, the VIP
/// dummy and the link of the node's address; `all` is added here).
///
/// `net/ipv4/conf/*/route_localnet` is not among them: no NodePort is served on loopback addresses.
pub fn proxy_settings(release: Release, interfaces: &[&str]) -> Vec<Setting> {
    let exactly =
        |key: &str, value, reason| Setting { key: key.to_owned(), want: Want::Exactly(value), reason };
    let mut settings = vec![
        exactly(
            "net/ipv4/vs/conntrack",
            1,
            "without it the masquerade of Service traffic and network policies do not see IPVS connections",
        ),
        exactly(
            "net/ipv4/vs/expire_nodest_conn",
            1,
            "without it connections to a removed endpoint hang until they time out",
        ),
        exactly(
            "net/ipv4/vs/expire_quiescent_template",
            1,
            "without it session affinity keeps sending clients to a draining endpoint",
        ),
    ];
    if let Some(value) = connection_reuse_mode(release) {
        settings.push(exactly(
            "net/ipv4/vs/conn_reuse_mode",
            value,
            "a client port that is used again would wait a second or stay with a removed endpoint",
        ));
    }
    settings.extend([
        exactly(
            "net/ipv4/conf/all/arp_ignore",
            1,
            "without it every node answers ARP requests for every VIP",
        ),
        exactly(
            "net/ipv4/conf/all/arp_announce",
            2,
            "without it ARP requests may carry a VIP as sender and poison neighbours",
        ),
        exactly(
            "net/bridge/bridge-nf-call-iptables",
            1,
            "without it replies between pods of one bridge pass by IPVS and arrive untranslated",
        ),
        exactly(
            "net/bridge/bridge-nf-call-ip6tables",
            1,
            "without it replies between pods of one bridge pass by IPVS and arrive untranslated",
        ),
    ]);
    let mut seen = Vec::new();
    for interface in ["all"].iter().chain(interfaces) {
        if seen.contains(interface) {
            continue;
        }
        seen.push(interface);
        settings.push(Setting {
            key: format!("net/ipv4/conf/{interface}/rp_filter"),
            // The kernel applies the larger of `all` and the link's own: strict (1) must give way
            // on both, off (0) and loose (2) may stay.
            want: Want::Instead { of: 1, is: 2 },
            reason: "strict reverse path filtering drops Service traffic whose reply leaves by another link",
        });
    }
    settings
}

/// What network policy needs: traffic between pods of one bridge must meet iptables.
pub fn policy_settings() -> Vec<Setting> {
    ["iptables", "ip6tables"]
        .into_iter()
        .map(|program| Setting {
            key: format!("net/bridge/bridge-nf-call-{program}"),
            want: Want::Exactly(1),
            reason: "without it network policies do not see traffic between pods of one bridge; if it is missing, \
                     load br_netfilter on the host (modprobe br_netfilter)",
        })
        .collect()
}

/// The right `net/ipv4/vs/conn_reuse_mode`, or `None` where the kernel has no such parameter.
///
/// - From 5.9 a reused client port is rescheduled at once, so 1, the kernel's default, is right:
///   0 would keep a new connection on an endpoint that drains at weight 0.
/// - From 4.1 to 5.8 mode 1 drops the first SYN of a reused port when connection tracking is on,
///   and the client waits a second for its retry: 0, and weight 0 is the smaller evil.
/// - Before 4.1 there was no such parameter.
pub fn connection_reuse_mode(release: Release) -> Option<u32> {
    if release >= Release::new(5, 9) {
        Some(1)
    } else if release >= Release::new(4, 1) {
        Some(0)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn tree() -> (PathBuf, Sysctls) {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let root = std::env::temp_dir().join(format!(
            "ferroute-sysctl-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        std::fs::create_dir_all(root.join("net/ipv4/conf/eth0.100")).unwrap();
        let sysctls = Sysctls::at(&root);
        (root, sysctls)
    }

    fn setting(want: Want) -> Setting {
        Setting { key: "net/ipv4/conf/eth0.100/rp_filter".to_owned(), want, reason: "r" }
    }

    #[test]
    fn a_right_value_is_not_written() {
        let (root, sysctls) = tree();
        let file = root.join("net/ipv4/conf/eth0.100/rp_filter");
        std::fs::write(&file, "2\n").unwrap();
        let before = std::fs::metadata(&file).unwrap().modified().unwrap();
        assert_eq!(sysctls.apply(&setting(Want::Exactly(2))).outcome, Outcome::AlreadyRight);
        assert_eq!(sysctls.apply(&setting(Want::Instead { of: 1, is: 2 })).outcome, Outcome::AlreadyRight);
        assert_eq!(std::fs::metadata(&file).unwrap().modified().unwrap(), before);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "2\n");
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_wrong_value_is_written_and_said() {
        let (root, sysctls) = tree();
        let file = root.join("net/ipv4/conf/eth0.100/rp_filter");
        std::fs::write(&file, "1\n").unwrap();
        let applied = sysctls.apply(&setting(Want::Instead { of: 1, is: 2 }));
        assert_eq!(applied.outcome, Outcome::Written { from: "1".to_owned() });
        assert!(applied.is_right());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "2");
        assert_eq!(applied.to_string(), "sysctl net/ipv4/conf/eth0.100/rp_filter changed from 1 to 2");
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn off_and_loose_filters_stay() {
        let want = Want::Instead { of: 1, is: 2 };
        assert_eq!(want.correction("0"), None);
        assert_eq!(want.correction("2\n"), None);
        assert_eq!(want.correction("1\n"), Some(2));
        assert_eq!(Want::Exactly(1).correction("garbage"), Some(1));
    }

    #[test]
    fn missing_and_refused_name_the_cure() {
        let (root, sysctls) = tree();
        let missing = sysctls.apply(&setting(Want::Exactly(1)));
        assert_eq!(missing.outcome, Outcome::Missing);
        assert!(missing.to_string().contains("load the module"), "{missing}");

        // A directory in the parameter's place cannot be read, whoever asks.
        std::fs::create_dir(root.join("net/ipv4/conf/eth0.100/rp_filter")).unwrap();
        let refused = sysctls.apply(&setting(Want::Exactly(1)));
        assert_eq!(refused.outcome, Outcome::Refused { errno: nix::libc::EISDIR, value: None });
        assert!(refused.to_string().contains("/etc/sysctl.d"), "{refused}");
        assert!(!refused.is_right());
        std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn connection_reuse_follows_the_kernel() {
        for (release, wanted) in [
            ("3.10.0-1160.el7.x86_64", None),
            ("4.1.0", Some(0)),
            ("5.4.0-190-generic", Some(0)),
            ("5.8.18", Some(0)),
            ("5.9.0", Some(1)),
            ("6.1.0-18-amd64", Some(1)),
            ("10.0", Some(1)),
        ] {
            assert_eq!(connection_reuse_mode(Release::parse(release).unwrap()), wanted, "{release}");
        }
    }

    #[test]
    fn each_interface_is_asked_once() {
        let settings = proxy_settings(Release::new(6, 1), &["kube-bridge", "kube-dummy-if", "eth0", "eth0"]);
        let filters: Vec<&str> =
            settings.iter().map(|s| s.key.as_str()).filter(|key| key.ends_with("rp_filter")).collect();
        assert_eq!(
            filters,
            [
                "net/ipv4/conf/all/rp_filter",
                "net/ipv4/conf/kube-bridge/rp_filter",
                "net/ipv4/conf/kube-dummy-if/rp_filter",
                "net/ipv4/conf/eth0/rp_filter",
            ]
        );
        assert!(!settings.iter().any(|s| s.key.contains("route_localnet") || s.key.contains("ip_forward")));
    }
}
