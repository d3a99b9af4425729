//! What this kernel offers, and what is missing.

use std::sync::OnceLock;

use anyhow::{Result, bail};

use crate::Netns;

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
