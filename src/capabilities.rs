//! Gives up the capabilities that the rooms do not need.
//!
//! The sets belong to threads: [`keep`] must run before any other thread is started. Programs
//! started later (`iptables-restore`) run as root and so get what the bounding set leaves.

use std::collections::HashSet;

use caps::{CapSet, Capability};

/// What the rooms need for good: IPVS, ipsets, routes, sysctls and conntrack (NET_ADMIN), the raw
/// socket of iptables' legacy variant (NET_RAW).
pub const ALWAYS: [Capability; 2] = [Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW];

/// What BGP needs besides: its port, which may become free late.
pub const BGP: Capability = Capability::CAP_NET_BIND_SERVICE;

/// What the start needs besides: `modprobe` (SYS_MODULE), and giving up the rest afterwards
/// (SETPCAP).
pub const AT_START: [Capability; 4] =
    [Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW, Capability::CAP_SYS_MODULE, Capability::CAP_SETPCAP];

/// A capability set that could not be changed.
#[derive(Debug, thiserror::Error)]
#[error("cannot give up capabilities ({set:?} set): {source}")]
pub struct Error {
    set: CapSet,
    source: caps::errors::CapsError,
}

/// Keeps at most these in every set of this thread. Where the bounding set may not be shrunk (no
/// SETPCAP, as in a container that was started with few), the others still are.
pub fn keep(wanted: &[Capability]) -> Result<(), Error> {
    let wanted: HashSet<Capability> = wanted.iter().copied().collect();
    let failed = |set| move |source| Error { set, source };
    let bounding = caps::read(None, CapSet::Bounding).map_err(failed(CapSet::Bounding))?;
    for capability in bounding.difference(&wanted) {
        if let Err(error) = caps::drop(None, CapSet::Bounding, *capability) {
            tracing::debug!(%capability, %error, "bounding set kept");
            break;
        }
    }
    caps::clear(None, CapSet::Ambient).map_err(failed(CapSet::Ambient))?;
    // Effective before permitted: it must stay a subset.
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        let kept: HashSet<Capability> =
            caps::read(None, set).map_err(failed(set))?.intersection(&wanted).copied().collect();
        caps::set(None, set, &kept).map_err(failed(set))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// In a thread of its own, since the sets cannot be won back.
    #[test]
    fn keeps_only_what_is_asked_for_and_children_get_no_more() {
        std::thread::spawn(|| {
            let before = caps::read(None, CapSet::Permitted).unwrap();
            keep(&AT_START).unwrap();
            keep(&ALWAYS).unwrap();
            let kept: HashSet<Capability> = before.iter().filter(|c| ALWAYS.contains(c)).copied().collect();
            for set in [CapSet::Effective, CapSet::Permitted] {
                assert_eq!(caps::read(None, set).unwrap(), kept, "{set:?}");
            }
            let inheritable = caps::read(None, CapSet::Inheritable).unwrap();
            assert!(inheritable.is_subset(&kept), "{inheritable:?}");
            if before.contains(&Capability::CAP_SETPCAP) {
                let bounding = caps::read(None, CapSet::Bounding).unwrap();
                assert!(bounding.iter().all(|c| ALWAYS.contains(c)), "{bounding:?}");
            }
            let child = Command::new("grep").args(["CapEff", "/proc/self/status"]).output().unwrap();
            let text = String::from_utf8(child.stdout).unwrap();
            let mask = u64::from_str_radix(text.split_whitespace().nth(1).unwrap(), 16).unwrap();
            let bounding: u64 =
                caps::read(None, CapSet::Bounding).unwrap().iter().map(Capability::bitmask).sum();
            let is_root = nix::unistd::geteuid().is_root();
            assert_eq!(mask, if is_root { bounding } else { 0 }, "a child has what the bounding set leaves");
        })
        .join()
        .unwrap();
    }
}
