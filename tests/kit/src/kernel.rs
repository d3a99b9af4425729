//! What this kernel offers, and what is missing.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

use crate::Netns;

/// Modules of a modular lab kernel, in one call: one modprobe each costs 60 ms in User-Mode Linux.
/// Names that a kernel lacks (built in, renamed) do no harm; what is needed is checked afterwards.
const MODULES: &[&str] = &[
    "ipv6",
    "sctp",
    "dummy",
    "veth",
    "bridge",
    "br_netfilter",
    "ip_vs",
    "ip_vs_rr",
    "ip_vs_wrr",
    "ip_vs_lc",
    "ip_vs_wlc",
    "ip_vs_lblc",
    "ip_vs_lblcr",
    "ip_vs_dh",
    "ip_vs_sh",
    "ip_vs_mh",
    "ip_vs_sed",
    "ip_vs_nq",
    "ip_vs_fo",
    "ip_vs_ovf",
    "ipip",
    "xt_ipvs",
    "xt_set",
    "iptable_filter",
    "iptable_nat",
    "iptable_mangle",
    "iptable_raw",
    "ip6table_filter",
    "ip6table_nat",
    "ip6table_mangle",
    "ip6table_raw",
    "xt_comment",
    "xt_conntrack",
    "xt_mark",
    "xt_connmark",
    "xt_addrtype",
    "xt_multiport",
    "xt_tcpudp",
    "xt_physdev",
    "xt_MASQUERADE",
    "xt_nat",
    "xt_TCPMSS",
    "xt_CT",
    "ipt_REJECT",
    "ip6t_REJECT",
    "nf_conntrack_netlink",
    "ip_set_hash_ip",
    "ip_set_hash_net",
    "ip_set_hash_ipport",
    "ip_set_hash_netport",
    "ip_set_hash_ipportnet",
    "ip_set_hash_ipportip",
];

/// What tests may choose by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The iptables command that works here: `iptables` (the host's choice) or `iptables-legacy`.
    pub iptables: &'static str,
    /// Whether nftables tables exist, so that `nft list ruleset` belongs to a snapshot.
    pub nft: bool,
}

impl Kernel {
    /// The `ip6tables` twin of [`Kernel::iptables`].
    pub fn ip6tables(&self) -> &'static str {
        if self.iptables == "iptables" { "ip6tables" } else { "ip6tables-legacy" }
    }
}

/// Checks once per process that this kernel can carry a cluster with IPVS.
///
/// # Errors
/// Names everything that is missing; outside a lab that is usually IPVS itself.
pub fn require() -> Result<&'static Kernel> {
    static KERNEL: OnceLock<Result<Kernel, String>> = OnceLock::new();
    match KERNEL.get_or_init(|| probe().map_err(|error| format!("{error:#}"))) {
        Ok(kernel) => Ok(kernel),
        Err(text) => bail!("{text}"),
    }
}

fn probe() -> Result<Kernel> {
    // Only in a lab kernel of our own are modules and the module loader ours to touch.
    if std::env::var_os("UML").is_some() && !Path::new("/proc/net/ip_vs").exists() {
        for module in MODULES.chunks(MODULES.len()) {
            let _ = Command::new("modprobe").arg("-qa").args(module).status();
        }
        // With everything loaded, legacy iptables need not start modprobe 60 ms at a time.
        fs::write("/proc/sys/kernel/modprobe", "\n").context("switch the kernel's module loader off")?;
    }
    let netns = Netns::new("probe")?;
    let mut missing = Vec::new();
    if netns.sysctl("net/ipv4/vs/conntrack").is_err() {
        missing.push("IPVS with connection tracking (module ip_vs)".to_owned());
    }
    if netns.sysctl("net/ipv6/conf/all/forwarding").is_err() {
        missing.push("IPv6 (module ipv6)".to_owned());
    }
    let links = netns.links()?;
    for kind in ["dummy", "bridge"] {
        if let Err(error) = links.add(&format!("probe-{kind}"), kind) {
            missing.push(format!("{kind} links ({error:#})"));
        }
    }
    if let Err(error) = links.add_veth("probe-veth", "probe-peer", netns.fd()) {
        missing.push(format!("veth links ({error:#})"));
    }
    for (program, arguments) in [
        ("ipvsadm", &["-Ln"][..]),
        ("ipset", &["create", "probe", "hash:ip,port"][..]),
        ("conntrack", &["-L"][..]),
    ] {
        if let Err(error) = netns.exec(program, arguments) {
            missing.push(format!("{error:#}"));
        }
    }
    let works = |command| netns.exec(command, &["-t", "nat", "-S"]).is_ok();
    let iptables = if works("iptables") { "iptables" } else { "iptables-legacy" };
    if iptables == "iptables-legacy" && !works(iptables) {
        missing.push("iptables (neither the default variant nor the legacy one works)".to_owned());
    }
    if !missing.is_empty() {
        bail!(
            "this kernel cannot carry the lab (run the test through scripts/lab); missing: {}",
            missing.join("; ")
        );
    }
    let nft = netns.exec("nft", &["list", "ruleset"]).is_ok();
    Ok(Kernel { iptables, nft })
}
