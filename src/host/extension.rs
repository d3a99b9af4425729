//! The matches and targets that rules need, looked for without writing a rule.
//!
//! `/proc/net/ip_tables_matches` and its siblings list what the legacy variant has at hand; the
//! `nft_compat` subsystem answers for the nft variant, and loads a module to do so; what neither tells,
//! the modules do.

use std::path::{Path, PathBuf};

use ferroute_netlink::{Batch, Error, Protocol, Socket};

use super::Family;
use super::kernel::{Finding, Presence};
use super::modules::{Found, Modules, modprobe};

/// A match or target of xtables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extension {
    /// As in `-m NAME` or `-j NAME`.
    pub name: &'static str,
    /// A target, not a match.
    pub target: bool,
    /// The only family it is for, if it is not for both.
    pub family: Option<Family>,
    /// The module that brings it.
    pub module: &'static str,
    /// The kernel option.
    pub option: &'static str,
    /// What does not work without it.
    pub needed_for: &'static str,
    /// The nft variant of iptables needs it too; for the others it has words of its own.
    pub in_nft: bool,
}

const fn both(
    name: &'static str,
    module: &'static str,
    option: &'static str,
    needed_for: &'static str,
    in_nft: bool,
) -> Extension {
    Extension { name, target: false, family: None, module, option, needed_for, in_nft }
}

const fn target(extension: Extension, family: Option<Family>) -> Extension {
    Extension { target: true, family, ..extension }
}

const SET: Extension =
    both("set", "xt_set", "CONFIG_NETFILTER_XT_SET", "every rule: all that changes is in sets", true);
const CONNTRACK: Extension = both(
    "conntrack",
    "xt_conntrack",
    "CONFIG_NETFILTER_XT_MATCH_CONNTRACK",
    "telling new clients from others",
    true,
);
const COMMENT: Extension = both(
    "comment",
    "xt_comment",
    "CONFIG_NETFILTER_XT_MATCH_COMMENT",
    "the comment that every rule has",
    false,
);
const ADDRTYPE: Extension = both(
    "addrtype",
    "xt_addrtype",
    "CONFIG_NETFILTER_XT_MATCH_ADDRTYPE",
    "knowing this node's own traffic",
    true,
);
const REJECT: Extension =
    both("REJECT", "ipt_REJECT", "CONFIG_IP_NF_TARGET_REJECT", "refusing instead of dropping (IPv4)", false);
const REJECT6: Extension = both(
    "REJECT",
    "ip6t_REJECT",
    "CONFIG_IP6_NF_TARGET_REJECT",
    "refusing instead of dropping (IPv6)",
    false,
);

/// What the rules of the Service room use.
pub const OF_PROXY: [Extension; 11] = [
    both(
        "ipvs",
        "xt_ipvs",
        "CONFIG_NETFILTER_XT_MATCH_IPVS",
        "clients from outside whose endpoint is on another node, and pods that reach themselves; other clients \
         are served",
        true,
    ),
    SET,
    target(Extension { name: "SET", needed_for: "marking local clients", ..SET }, None),
    CONNTRACK,
    ADDRTYPE,
    COMMENT,
    both("tcp", "xt_tcpudp", "CONFIG_NETFILTER_XTABLES", "resetting TCP connections", false),
    target(REJECT, Some(Family::V4)),
    target(REJECT6, Some(Family::V6)),
    target(both("SNAT", "xt_nat", "CONFIG_NETFILTER_XT_NAT", "the source of Service traffic", false), None),
    target(
        both(
            "MASQUERADE",
            "xt_MASQUERADE",
            "CONFIG_NETFILTER_XT_TARGET_MASQUERADE",
            "the source of Service traffic on hosts without the node's address",
            false,
        ),
        None,
    ),
];

/// What rules that enforce network policy use.
pub const OF_POLICY: [Extension; 13] = [
    SET,
    CONNTRACK,
    ADDRTYPE,
    COMMENT,
    both("mark", "xt_mark", "CONFIG_NETFILTER_XT_MARK", "remembering what a policy admitted", false),
    target(
        both("MARK", "xt_mark", "CONFIG_NETFILTER_XT_MARK", "remembering what a policy admitted", false),
        None,
    ),
    both("tcp", "xt_tcpudp", "CONFIG_NETFILTER_XTABLES", "TCP and UDP ports of policies", false),
    both("sctp", "xt_sctp", "CONFIG_NETFILTER_XT_MATCH_SCTP", "SCTP ports of policies", true),
    both("multiport", "xt_multiport", "CONFIG_NETFILTER_XT_MATCH_MULTIPORT", "lists of ports", true),
    both("limit", "xt_limit", "CONFIG_NETFILTER_XT_MATCH_LIMIT", "logging without a flood", false),
    target(
        both("NFLOG", "xt_NFLOG", "CONFIG_NETFILTER_XT_TARGET_NFLOG", "logging what is refused", false),
        None,
    ),
    target(REJECT, Some(Family::V4)),
    target(REJECT6, Some(Family::V6)),
];

/// Looks for these on this host. `nft` is whether the host uses that variant of iptables.
pub fn inspect(extensions: &[Extension], families: &[Family], nft: bool) -> Vec<Finding> {
    let host = Host { root: PathBuf::from("/"), modules: Modules::of_host(), ask, load: modprobe };
    host.inspect(extensions, families, nft)
}

/// Where to look and whom to ask.
struct Host {
    root: PathBuf,
    modules: Modules,
    ask: fn(&Extension, Family) -> Option<bool>,
    load: fn(&str) -> Result<(), String>,
}

impl Host {
    fn inspect(&self, extensions: &[Extension], families: &[Family], nft: bool) -> Vec<Finding> {
        extensions
            .iter()
            .filter(|extension| extension.in_nft || !nft)
            .filter_map(|extension| {
                let family = extension.family.or(families.first().copied())?;
                families.contains(&family).then(|| self.look_for(extension, family, nft))
            })
            .collect()
    }

    fn look_for(&self, extension: &Extension, family: Family, nft: bool) -> Finding {
        let told = if nft { (self.ask)(extension, family) } else { None };
        let (present, detail) = if told == Some(true) || self.is_listed(extension, family) {
            (Presence::Present, None)
        } else {
            match self.modules.find(extension.module) {
                Found::Loaded | Found::BuiltIn => (Presence::Present, None),
                found => match (self.load)(extension.module) {
                    Ok(()) => (Presence::Present, None),
                    Err(failure) if told == Some(false) || found != Found::CannotTell => {
                        (Presence::Missing, Some(failure))
                    }
                    Err(_) => (Presence::Unknown, None),
                },
            }
        };
        let Extension { name, target, module, option, needed_for, .. } = *extension;
        Finding {
            name: format!("iptables {} {name}", if target { "target" } else { "match" }),
            present,
            needed_for,
            cure: format!(
                "load module {module} on the host (modprobe {module}) or choose a kernel with {option}"
            ),
            detail,
        }
    }

    /// Whether the legacy variant has it at hand.
    fn is_listed(&self, extension: &Extension, family: Family) -> bool {
        let tables = if family == Family::V4 { "ip_tables" } else { "ip6_tables" };
        let kind = if extension.target { "targets" } else { "matches" };
        let list: &Path = &self.root.join(format!("proc/net/{tables}_{kind}"));
        std::fs::read_to_string(list).is_ok_and(|text| text.lines().any(|line| line == extension.name))
    }
}

/// Asks nft_compat (`NFNL_MSG_COMPAT_GET`, linux/netfilter/nf_tables_compat.h); `None` where it does not
/// answer.
fn ask(extension: &Extension, family: Family) -> Option<bool> {
    const NFNL_SUBSYS_NFT_COMPAT: u16 = 11;
    const NFTA_COMPAT_NAME: u16 = 1;
    const NFTA_COMPAT_REV: u16 = 2;
    const NFTA_COMPAT_TYPE: u16 = 3;
    let mut socket = Socket::open(Protocol::Netfilter).ok()?;
    let mut request = Batch::new();
    request.message(NFNL_SUBSYS_NFT_COMPAT << 8, 0, |body| {
        body.raw(&[family.number(), 0, 0, 0]);
        body.string(NFTA_COMPAT_NAME, extension.name);
        body.be32(NFTA_COMPAT_REV, 0);
        body.be32(NFTA_COMPAT_TYPE, u32::from(extension.target));
    });
    match socket.dump(&request, |_, _| Ok(None::<()>)) {
        Ok(_) => Some(true),
        Err(Error::Refused(failure)) => match failure.errno {
            // It has it, in another revision.
            nix::libc::EPROTONOSUPPORT => Some(true),
            nix::libc::ENOENT => Some(false),
            _ => None,
        },
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IPVS: Extension = OF_PROXY[0];

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("ferroute-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir_all(path.join("proc/net")).unwrap();
            Self(path)
        }

        fn write(&self, file: &str, text: &str) {
            let path = self.0.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn module(&self, list: &str, text: &str) {
            let release = nix::sys::utsname::uname().unwrap().release().to_str().unwrap().to_owned();
            self.write(&format!("lib/modules/{release}/{list}"), text);
        }

        fn host(
            &self,
            ask: fn(&Extension, Family) -> Option<bool>,
            load: fn(&str) -> Result<(), String>,
        ) -> Host {
            Host { root: self.0.clone(), modules: Modules::at(&self.0), ask, load }
        }

        fn look(&self, ask: fn(&Extension, Family) -> Option<bool>, loads: bool, nft: bool) -> Finding {
            let load =
                if loads { |_: &str| Ok(()) } else { |_: &str| Err("modprobe xt_ipvs failed".to_owned()) };
            self.host(ask, load).look_for(&IPVS, Family::V4, nft)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_match_is_found_wherever_it_is_told() {
        let silent = |_: &Extension, _| None;
        let folder = Folder::new("extension");
        // Nothing visible at all: it may still be there.
        assert_eq!(folder.look(silent, false, false).present, Presence::Unknown);
        assert_eq!(folder.look(silent, true, false).present, Presence::Present);
        assert_eq!(folder.look(|_, _| Some(true), false, true).present, Presence::Present);
        assert_eq!(folder.look(|_, _| Some(false), false, true).present, Presence::Missing);
        // The legacy variant is not asked through nft.
        assert_eq!(folder.look(|_, _| Some(true), false, false).present, Presence::Unknown);
        folder
            .module("modules.dep", "kernel/net/netfilter/xt_set.ko: kernel/net/netfilter/ipset/ip_set.ko\n");
        let missing = folder.look(silent, false, false);
        assert_eq!(missing.present, Presence::Missing);
        assert_eq!(
            missing.to_string(),
            "iptables match ipvs missing (needed for clients from outside whose endpoint is on another node, and \
             pods that reach themselves; other clients are served): load module xt_ipvs on the host (modprobe \
             xt_ipvs) or choose a kernel with CONFIG_NETFILTER_XT_MATCH_IPVS [modprobe xt_ipvs failed]"
        );
        folder.write("proc/net/ip_tables_matches", "set\nset\nipvs\n");
        assert_eq!(folder.look(silent, false, false).present, Presence::Present);
        folder.write("proc/net/ip_tables_matches", "ipvsx\n");
        assert_eq!(folder.look(silent, false, false).present, Presence::Missing);
        folder.module("modules.builtin", "kernel/net/netfilter/xt_ipvs.ko\n");
        assert_eq!(folder.look(silent, false, false).present, Presence::Present);
    }

    #[test]
    fn what_nft_says_in_its_own_words_is_not_asked_for() {
        let folder = Folder::new("extensions-nft");
        let host = folder.host(|_, _| Some(true), |_| Err("no".to_owned()));
        let names = |nft, families: &[Family]| -> Vec<String> {
            host.inspect(&OF_PROXY, families, nft).into_iter().map(|finding| finding.name).collect()
        };
        assert_eq!(
            names(true, &Family::BOTH),
            [
                "iptables match ipvs",
                "iptables match set",
                "iptables target SET",
                "iptables match conntrack",
                "iptables match addrtype",
            ]
        );
        assert_eq!(names(false, &Family::BOTH).len(), OF_PROXY.len());
        assert_eq!(names(false, &[Family::V4]).len(), OF_PROXY.len() - 1, "REJECT of IPv6 is left out");
        assert_eq!(host.inspect(&OF_POLICY, &Family::BOTH, false).len(), OF_POLICY.len());
    }
}
