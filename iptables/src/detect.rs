//! Which variant of iptables a host uses.
//!
//! Programs are dear (a start takes milliseconds, far more in some virtual machines), and on most hosts
//! one variant holds no table at all. Where the kernel says so, no program is asked.

use std::path::{Path, PathBuf};

use ferroute_netlink::{Batch, Protocol, Socket, attributes, flags};

use crate::Family;
use crate::command::{Command, Error, Variant, find, program, run};
use crate::table::{Census, TableName, census};

/// What [`Command::detect`] chose, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detected {
    /// The choice.
    pub command: Command,
    /// Why.
    pub reason: Reason,
    /// Rules seen in the variant that was not chosen: both filter packets, and programs that use it do not
    /// see our rules.
    pub mixed: Option<Mixed>,
    /// Variants passed over, each with the reason.
    pub passed_over: Vec<String>,
    /// All tables of the chosen variant as they were listed for the choice, for
    /// [`Command::sync_tables_from`].
    pub listing: String,
    /// Something was written since, to see whether that works: there was no table at all.
    pub probed: bool,
}

/// Why a variant was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The kubelet's hint or canary chain is there.
    Kubelet,
    /// It holds more rules.
    MoreRules,
    /// The caller preferred it, or the plain `iptables` is it, or it is the only one that works.
    Default,
}

/// Rules in two variants at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mixed {
    /// The variant not chosen.
    pub other: Variant,
    /// How many rules it holds.
    pub rules: usize,
}

impl Command {
    /// The programs of the variant that the host uses: the one with the kubelet's hint, else the one with
    /// more rules, else `prefer`, else what plain `iptables` is. A variant that this kernel does not support
    /// is passed over. For IPv6 pass what was chosen for IPv4 as `prefer`.
    ///
    /// # Errors
    /// No programs, or none that works.
    pub fn detect(family: Family, prefer: Option<Variant>) -> Result<Detected, Error> {
        let mut seen: Vec<(Self, Census)> = Vec::new();
        let mut listings = Vec::new();
        let mut passed_over = Vec::new();
        let mut missing = None;
        for variant in [Variant::Nft, Variant::Legacy] {
            let command = match Self::new(family, variant) {
                Ok(command) => command,
                Err(error) => {
                    passed_over.push(format!("{variant}: {error}"));
                    missing = missing.or(Some(error));
                    continue;
                }
            };
            match command.known_listing().map_or_else(|| command.list(), Ok) {
                Ok(listing) => {
                    seen.push((command, census(&listing)));
                    listings.push((variant, listing));
                }
                Err(error) => passed_over.push(format!("{variant}: {error}")),
            }
        }
        let mut probed = None;
        // Only a variant about to be chosen is written to, and only where nothing shows that it works.
        while let Some((command, _)) = choose(&seen, family, prefer)
            && seen.iter().any(|(other, census)| *other == command && !census.tables)
        {
            if command.is_at_hand() {
                break;
            }
            probed = Some(command.variant());
            let Err(error) = command.probe() else { break };
            passed_over.push(format!("{}: {error}", command.variant()));
            seen.retain(|(other, _)| *other != command);
        }
        let Some((command, reason)) = choose(&seen, family, prefer) else {
            return Err(match missing {
                Some(missing) if all_missing(family) => missing,
                _ => Error::NoVariant { program: program(family), reasons: passed_over },
            });
        };
        let mixed = seen
            .iter()
            .find(|(other, census)| other.variant() != command.variant() && census.rules > 0)
            .map(|(other, census)| Mixed { other: other.variant(), rules: census.rules });
        let listing = listings.into_iter().find(|(variant, _)| *variant == command.variant());
        let listing = listing.map(|(_, listing)| listing).unwrap_or_default();
        let probed = probed == Some(command.variant());
        Ok(Detected { command, reason, mixed, passed_over, listing, probed })
    }

    /// The listing, where the kernel tells without a program that there is no table to list.
    fn known_listing(&self) -> Option<String> {
        let empty = match self.variant() {
            Variant::Legacy => legacy_tables(Path::new("/"), self.family()).unwrap_or_default().is_empty(),
            Variant::Nft => nft_tables(self.family()).is_some_and(|names| {
                !names.iter().any(|name| TableName::ALL.iter().any(|table| table.name() == name))
            }),
        };
        empty.then(String::new)
    }

    /// Whether the kernel shows without a write that it takes what this variant writes.
    fn is_at_hand(&self) -> bool {
        self.variant() == Variant::Legacy && legacy_tables(Path::new("/"), self.family()).is_some()
    }
}

/// The variant that the host uses, of those that may work.
fn choose(seen: &[(Command, Census)], family: Family, prefer: Option<Variant>) -> Option<(Command, Reason)> {
    Some(match seen {
        [] => return None,
        [(only, census)] => (only.clone(), if census.hint { Reason::Kubelet } else { Reason::Default }),
        [(nft, n), (legacy, l), ..] => match (n.hint, l.hint) {
            (true, false) => (nft.clone(), Reason::Kubelet),
            (false, true) => (legacy.clone(), Reason::Kubelet),
            _ if n.rules > l.rules => (nft.clone(), Reason::MoreRules),
            _ if l.rules > n.rules => (legacy.clone(), Reason::MoreRules),
            _ => {
                let default = prefer.or_else(|| plain_variant(family).ok()).unwrap_or(Variant::Nft);
                let chosen = if default == Variant::Nft { nft } else { legacy };
                (chosen.clone(), Reason::Default)
            }
        },
    })
}

/// What `iptables --version` says it is.
pub(crate) fn plain_variant(family: Family) -> Result<Variant, Error> {
    let found = find(program(family))?;
    // Debian's and Fedora's names lead to one program per variant.
    if let Some(variant) = found.canonicalize().ok().and_then(variant_of_program) {
        return Ok(variant);
    }
    let version = run(&found, &["--version"], "")?;
    // Versions before 1.8 say nothing and are legacy.
    Ok(if version.contains("nf_tables") { Variant::Nft } else { Variant::Legacy })
}

fn all_missing(family: Family) -> bool {
    let program = program(family);
    ["-nft-save", "-legacy-save", "-save"].iter().all(|end| find(&format!("{program}{end}")).is_err())
}

/// The variant that a program's own name tells, links followed.
fn variant_of_program(path: PathBuf) -> Option<Variant> {
    match path.file_name()?.to_str()? {
        "xtables-nft-multi" => Some(Variant::Nft),
        "xtables-legacy-multi" => Some(Variant::Legacy),
        _ => None,
    }
}

/// The tables of the legacy variant in the calling thread's network namespace, as `iptables-legacy-save`
/// finds them; `None` where the kernel does not have that variant, or not yet.
fn legacy_tables(root: &Path, family: Family) -> Option<String> {
    let names = match family {
        Family::V4 => "ip_tables_names",
        Family::V6 => "ip6_tables_names",
    };
    std::fs::read_to_string(root.join("proc/thread-self/net").join(names)).ok()
}

/// The tables of one family in nf_tables (`NFT_MSG_GETTABLE`, linux/netfilter/nf_tables.h), whoever made
/// them; `None` where the kernel does not answer.
fn nft_tables(family: Family) -> Option<Vec<String>> {
    const GET_TABLE: u16 = 10 << 8 | 1;
    const NFTA_TABLE_NAME: u16 = 1;
    // NFPROTO_IPV4, NFPROTO_IPV6.
    let number = match family {
        Family::V4 => 2,
        Family::V6 => 10,
    };
    let mut request = Batch::new();
    request.message(GET_TABLE, flags::DUMP, |body| body.raw(&[number, 0, 0, 0]));
    let mut socket = Socket::open(Protocol::Netfilter).ok()?;
    let names = socket.dump(&request, |_, payload| {
        for attribute in attributes(payload.get(4..).unwrap_or_default()) {
            let attribute = attribute?;
            if attribute.kind == NFTA_TABLE_NAME {
                return Ok(Some(attribute.string()?.to_owned()));
            }
        }
        Ok(None)
    });
    names.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_is_shows_in_its_name_or_is_asked() {
        let of = |path: &str| variant_of_program(path.into());
        assert_eq!(of("/usr/sbin/xtables-nft-multi"), Some(Variant::Nft));
        assert_eq!(of("/usr/sbin/xtables-legacy-multi"), Some(Variant::Legacy));
        // A wrapper that decides itself.
        assert_eq!(of("/sbin/iptables-wrapper"), None);
    }

    #[test]
    fn an_absent_list_of_tables_is_not_an_empty_one() {
        let root = std::env::temp_dir().join(format!("ferroute-tables-{}", std::process::id()));
        let folder = root.join("proc/thread-self/net");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("ip6_tables_names"), "").unwrap();
        assert_eq!(legacy_tables(&root, Family::V4), None);
        assert_eq!(legacy_tables(&root, Family::V6).as_deref(), Some(""));
        std::fs::remove_dir_all(root).unwrap();
    }
}
