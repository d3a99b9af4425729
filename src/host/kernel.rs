//! What this kernel can do, read once at start: each thing we need, whether it is there, what for,
//! and the cure when it is not.

use std::fmt;

use ferroute_netlink::{Batch, Protocol, Socket, resolve_family};

use super::Family;
use super::modules::{Found, Modules, modprobe};
use super::sysctl::Sysctls;

/// Schedulers of IPVS in the kernel, by name; the module is `ip_vs_NAME`.
pub const SCHEDULERS: [&str; 14] =
    ["rr", "wrr", "lc", "wlc", "sh", "mh", "dh", "sed", "nq", "fo", "ovf", "lblc", "lblcr", "twos"];

/// Whether the kernel has something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It answers, or its module is loaded, built in, or can be loaded when first used.
    Present,
    /// It does not answer, and loading it failed.
    Missing,
    /// Cannot be told from here: in a container without the host's /lib/modules the kernel may
    /// still load it when it is first used.
    Unknown,
}

/// One thing this kernel has or lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The thing, as in "IPVS" or "IPVS scheduler mh".
    pub name: String,
    /// Whether it is there.
    pub present: Presence,
    /// What does not work without it.
    pub needed_for: &'static str,
    /// What to do when it is missing.
    pub cure: String,
    /// What was tried and said, when it is not present.
    pub detail: Option<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { name, present, needed_for, cure, detail } = self;
        match present {
            Presence::Present => return write!(f, "{name} present"),
            Presence::Missing => write!(f, "{name} missing (needed for {needed_for}): {cure}")?,
            Presence::Unknown => {
                write!(f, "{name} may be missing (needed for {needed_for}); if it is: {cure}")?;
            }
        }
        match detail {
            Some(detail) => write!(f, " [{detail}]"),
            None => Ok(()),
        }
    }
}

/// Something the kernel brings in a module.
struct Need {
    name: &'static str,
    module: &'static str,
    option: &'static str,
    needed_for: &'static str,
    probe: Probe,
}

/// How to ask whether it is there.
enum Probe {
    /// A generic netlink family of that name resolves.
    GenericFamily(&'static str),
    /// A nfnetlink subsystem answers a harmless question: message type, its attribute (u8).
    Netfilter { kind: u16, attribute: Option<(u16, u8)> },
    /// A parameter exists.
    Sysctl(&'static str),
    /// Only its module can be looked for.
    Module,
}

const NEEDS: [Need; 5] = [
    Need {
        name: "IPVS",
        module: "ip_vs",
        option: "CONFIG_IP_VS",
        needed_for: "every Service",
        probe: Probe::GenericFamily("IPVS"),
    },
    Need {
        name: "ipset",
        module: "ip_set",
        option: "CONFIG_IP_SET",
        needed_for: "network policy and the firewall of VIPs",
        // NFNL_SUBSYS_IPSET, IPSET_CMD_PROTOCOL with IPSET_ATTR_PROTOCOL 6.
        probe: Probe::Netfilter { kind: 6 << 8 | 1, attribute: Some((1, 6)) },
    },
    Need {
        name: "dummy links",
        module: "dummy",
        option: "CONFIG_DUMMY",
        needed_for: "binding VIPs to kube-dummy-if",
        probe: Probe::Module,
    },
    Need {
        name: "conntrack netlink",
        module: "nf_conntrack_netlink",
        option: "CONFIG_NF_CT_NETLINK",
        needed_for: "expiring flows of endpoints and pods that are gone",
        // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET_STATS.
        probe: Probe::Netfilter { kind: 1 << 8 | 5, attribute: None },
    },
    Need {
        name: "bridge netfilter",
        module: "br_netfilter",
        option: "CONFIG_BRIDGE_NETFILTER",
        needed_for: "policies and Services between pods of one bridge",
        probe: Probe::Sysctl("net/bridge/bridge-nf-call-iptables"),
    },
];

/// Looks for everything the Service proxy needs, trying to load what does not answer. Schedulers
/// are looked for but not loaded: the kernel loads one when a virtual server first names it.
pub fn inspect() -> Vec<Finding> {
    let modules = Modules::of_host();
    let mut findings: Vec<Finding> = NEEDS.iter().map(|need| look_for(need, &modules)).collect();
    findings.extend(SCHEDULERS.iter().map(|name| scheduler(name, &modules)));
    findings
}

/// Looks for what network policy needs, trying to load what does not answer.
pub fn inspect_for_policy() -> Vec<Finding> {
    let modules = Modules::of_host();
    NEEDS
        .iter()
        .filter(|need| ["ipset", "conntrack netlink", "bridge netfilter"].contains(&need.name))
        .map(|need| look_for(need, &modules))
        .collect()
}

/// Whether this host forwards packets, per family. The daemon never switches forwarding on: it
/// makes a router of the host, which is for its administrator to decide.
pub fn forwarding(sysctls: &Sysctls, families: &[Family]) -> Vec<Finding> {
    families
        .iter()
        .map(|family| {
            let (name, key, parameter) = match family {
                Family::V4 => ("IPv4 forwarding", "net/ipv4/ip_forward", "net.ipv4.ip_forward"),
                Family::V6 => {
                    ("IPv6 forwarding", "net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding")
                }
            };
            let (present, detail) = match sysctls.read(key) {
                Ok(Some(value)) if value == "0" => (Presence::Missing, None),
                Ok(Some(_)) => (Presence::Present, None),
                Ok(None) => (Presence::Missing, Some("this kernel does not have the family".to_owned())),
                Err(error) => (Presence::Unknown, Some(error.to_string())),
            };
            Finding {
                name: name.to_owned(),
                present,
                needed_for: "traffic from other hosts and from pods",
                cure: format!("sysctl -w {parameter}=1, and in /etc/sysctl.d to keep it"),
                detail,
            }
        })
        .collect()
}

fn look_for(need: &Need, modules: &Modules) -> Finding {
    let mut result = probe(need, modules);
    if result != Ok(Presence::Present) && modules.find(need.module) != Found::BuiltIn {
        let loaded = modprobe(need.module);
        result = probe(need, modules);
        match (&result, loaded) {
            (Ok(Presence::Present), _) | (Err(_), Ok(())) => {}
            (Err(reason), Err(failure)) => result = Err(format!("{reason}; {failure}")),
            (Ok(_), loaded) => {
                // Only the probe by module cannot tell; modprobe's word decides then.
                result = match loaded {
                    Ok(()) => Ok(Presence::Present),
                    Err(failure) if modules.readable() => Err(failure),
                    Err(_) => Ok(Presence::Unknown),
                }
            }
        }
    }
    let (present, detail) = match result {
        Ok(present) => (present, None),
        Err(reason) => (Presence::Missing, Some(reason)),
    };
    Finding {
        name: need.name.to_owned(),
        present,
        needed_for: need.needed_for,
        cure: format!(
            "load module {} on the host (modprobe {0}) or choose a kernel with {}",
            need.module, need.option
        ),
        detail,
    }
}

/// `Ok(Present)`, `Ok(Unknown)` when only the module could be looked for and was not seen, or why
/// it does not answer.
fn probe(need: &Need, modules: &Modules) -> Result<Presence, String> {
    match need.probe {
        Probe::GenericFamily(name) => {
            let mut socket = Socket::open(Protocol::Generic).map_err(|error| error.to_string())?;
            resolve_family(&mut socket, name).map_err(|error| error.to_string())?;
            Ok(Presence::Present)
        }
        Probe::Netfilter { kind, attribute } => {
            let mut socket = Socket::open(Protocol::Netfilter).map_err(|error| error.to_string())?;
            let mut request = Batch::new();
            request.message(kind, 0, |body| {
                body.raw(&[Family::V4.number(), 0, 0, 0]);
                if let Some((attribute, value)) = attribute {
                    body.u8(attribute, value);
                }
            });
            socket.dump(&request, |_, _| Ok(None::<()>)).map_err(|error| error.to_string())?;
            Ok(Presence::Present)
        }
        Probe::Sysctl(key) => match Sysctls::of_host().read(key) {
            Ok(Some(_)) => Ok(Presence::Present),
            Ok(None) => Err(format!("no /proc/sys/{key}")),
            Err(error) => Err(error.to_string()),
        },
        Probe::Module => Ok(match modules.find(need.module) {
            Found::Loaded | Found::BuiltIn => Presence::Present,
            Found::Loadable | Found::Absent | Found::CannotTell => Presence::Unknown,
        }),
    }
}

fn scheduler(name: &str, modules: &Modules) -> Finding {
    let module = format!("ip_vs_{name}");
    let present = match modules.find(&module) {
        Found::Loaded | Found::BuiltIn | Found::Loadable => Presence::Present,
        Found::Absent => Presence::Missing,
        Found::CannotTell => Presence::Unknown,
    };
    Finding {
        name: format!("IPVS scheduler {name}"),
        present,
        needed_for: "Services that name this scheduler",
        cure: format!(
            "install module {module} for the running kernel, load it (modprobe {module}), or name another scheduler"
        ),
        detail: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::modules;

    #[test]
    fn a_missing_scheduler_names_its_cure() {
        let modules = modules::tests::sample();
        assert_eq!(scheduler("mh", &modules).present, Presence::Present);
        let finding = scheduler("twos", &modules);
        assert_eq!(finding.present, Presence::Missing);
        assert_eq!(
            finding.to_string(),
            "IPVS scheduler twos missing (needed for Services that name this scheduler): install module \
             ip_vs_twos for the running kernel, load it (modprobe ip_vs_twos), or name another scheduler"
        );
    }

    #[test]
    fn forwarding_off_is_said_and_not_changed() {
        let root = std::env::temp_dir().join(format!("ferroute-forwarding-{}", std::process::id()));
        std::fs::create_dir_all(root.join("net/ipv4")).unwrap();
        std::fs::write(root.join("net/ipv4/ip_forward"), "0\n").unwrap();
        let findings = forwarding(&Sysctls::at(&root), &Family::BOTH);
        assert_eq!(findings[0].present, Presence::Missing);
        assert!(findings[0].to_string().contains("sysctl -w net.ipv4.ip_forward=1"), "{}", findings[0]);
        assert_eq!(findings[1].present, Presence::Missing);
        assert_eq!(std::fs::read_to_string(root.join("net/ipv4/ip_forward")).unwrap(), "0\n");
        std::fs::write(root.join("net/ipv4/ip_forward"), "1\n").unwrap();
        assert_eq!(forwarding(&Sysctls::at(&root), &[Family::V4])[0].present, Presence::Present);
        std::fs::remove_dir_all(root).unwrap();
    }
}
