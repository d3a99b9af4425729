//! The kernel's sets: read, apply changes. No policy.

use std::collections::BTreeMap;
use std::ops::Range;

use ferroute_netlink::{Batch, Failure, Protocol, Socket};

use super::diff::hashsize;
use super::error::{EINVAL, ENOENT, Error, FIND_TYPE, Failed, Refusal};
use super::wire::{self, Header};
use super::{Change, Entry, Extra, Kind, Options, Set, SetType, Sets};
use crate::{SetName, hashed};

/// The only writer of this program's sets. Blocking.
pub struct Handle {
    socket: Socket,
    batch: Batch,
    /// Lowest and highest revision of each type asked for.
    revisions: BTreeMap<Kind, (u8, u8)>,
}

/// A message of a batch: which change it serves, and which of its entries.
struct Origin {
    change: usize,
    entries: Range<usize>,
}

impl Handle {
    /// Opens a socket and checks that the kernel has ipsets.
    ///
    /// # Errors
    /// No socket, no ipsets in this kernel, or a protocol too old.
    pub fn open() -> Result<Self, Error> {
        let socket = Socket::open(Protocol::Netfilter)
            .map_err(|source| Error::Netlink { action: "open a socket for ipsets".into(), source })?;
        let mut handle = Self { socket, batch: Batch::new(), revisions: BTreeMap::new() };
        wire::protocol(&mut handle.batch);
        let found = match handle.socket.dump(&handle.batch, |_, payload| wire::decode_protocol(payload)) {
            Ok(found) => found.into_iter().next().unwrap_or(0),
            // nfnetlink's answer for a subsystem that nobody registered.
            Err(source) if source.errno() == Some(EINVAL) => return Err(Error::NoKernelSupport),
            Err(source) => return Err(Error::Netlink { action: "ask for ipset support".into(), source }),
        };
        if found < wire::PROTOCOL {
            return Err(Error::OldProtocol { found, needed: wire::PROTOCOL });
        }
        Ok(handle)
    }

    /// Headers of all sets on the host, ours or not.
    ///
    /// # Errors
    /// Netlink failed.
    pub fn headers(&mut self) -> Result<Vec<Header>, Error> {
        self.batch.clear();
        wire::headers(&mut self.batch);
        let parts = self
            .socket
            .dump(&self.batch, |_, payload| wire::decode_part(payload, None).map(Some))
            .map_err(|source| Error::Netlink { action: "list the ipsets".into(), source })?;
        Ok(parts.into_iter().filter_map(|part| part.header).collect())
    }

    /// One set with its entries; `None` when there is none of that name.
    ///
    /// # Errors
    /// Netlink failed.
    pub fn list(&mut self, name: SetName) -> Result<Option<Set>, Error> {
        self.batch.clear();
        wire::list(&mut self.batch, name);
        let mut kind = None;
        let parts = self.socket.dump(&self.batch, |_, payload| {
            let part = wire::decode_part(payload, kind)?;
            kind = part.header.as_ref().map(|header| header.kind).or(kind);
            Ok(Some(part))
        });
        let parts = match parts {
            Ok(parts) => parts,
            Err(source) if source.errno() == Some(ENOENT) => return Ok(None),
            Err(source) => return Err(Error::Netlink { action: format!("list ipset {name}"), source }),
        };
        let mut set: Option<Set> = None;
        for part in parts {
            if let Some(header) = part.header {
                set = Some(Set::new(header.kind.set_type, header.kind.family, header.options));
            }
            if let Some(set) = &mut set {
                for (entry, extra) in part.entries {
                    // The kernel holds nothing that does not fit its own set.
                    let _ = set.insert(entry, extra);
                }
            }
        }
        Ok(set)
    }

    /// All sets whose name starts with one of `prefixes`, with their entries. Costs one request for all
    /// headers and one for each set found; strangers' entries are not read.
    ///
    /// # Errors
    /// Netlink failed.
    pub fn read(&mut self, prefixes: &[&str]) -> Result<Sets, Error> {
        let mut sets = Sets::new();
        for header in self.headers()? {
            let ours = prefixes.iter().any(|prefix| header.name.starts_with(prefix));
            if ours
                && let Ok(name) = SetName::new(&header.name)
                && let Some(set) = self.list(name)?
            {
                sets.insert(name, set);
            }
        }
        Ok(sets)
    }

    /// [`Self::apply`], and notes in `sets` what the kernel took: a copy of its tables stays one.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn apply_noting(&mut self, changes: &[Change], sets: &mut Sets) -> Result<Vec<Failed>, Error> {
        let failures = self.apply(changes)?;
        for (index, change) in changes.iter().enumerate() {
            if !failures.iter().any(|failure| failure.change == index) {
                super::apply_to(sets, std::slice::from_ref(change));
            }
        }
        Ok(failures)
    }

    /// Carries out changes in order, batched; those that the kernel refuses are returned and the rest goes
    /// on. Applying a change again is harmless. One list must not both add and delete an entry ([`super::diff`]
    /// never does): entries of a refused message are tried once more at the end.
    ///
    /// # Errors
    /// Netlink failed: how far it came is unknown, read again.
    pub fn apply(&mut self, changes: &[Change]) -> Result<Vec<Failed>, Error> {
        let mut failed = Vec::new();
        let mut origins: Vec<Origin> = Vec::new();
        self.batch.clear();
        for (index, change) in changes.iter().enumerate() {
            let whole = || Origin { change: index, entries: 0..0 };
            match change {
                Change::Create { set, kind, options, hashsize } => match self.revision(*kind, options)? {
                    Ok(revision) => {
                        wire::create(&mut self.batch, *set, *kind, options, *hashsize, revision);
                        origins.push(whole());
                    }
                    Err(refusal) => failed.push(Failed {
                        change: index,
                        set: *set,
                        action: "create",
                        entry: None,
                        refusal,
                    }),
                },
                Change::Add { set, entries } => {
                    let mut left = entries.iter().copied().peekable();
                    let mut at = 0;
                    while left.peek().is_some() {
                        let taken = wire::add(&mut self.batch, *set, &mut left);
                        origins.push(Origin { change: index, entries: at..at + taken });
                        at += taken;
                    }
                }
                Change::Delete { set, entries } => {
                    let mut left = entries.iter().map(|entry| (*entry, Extra::default())).peekable();
                    let mut at = 0;
                    while left.peek().is_some() {
                        let taken = wire::delete(&mut self.batch, *set, &mut left);
                        origins.push(Origin { change: index, entries: at..at + taken });
                        at += taken;
                    }
                }
                Change::Replace { set, with } => {
                    self.send(changes, &mut origins, &mut failed)?;
                    if let Err((entry, refusal)) = self.replace(*set, with)? {
                        failed.push(Failed { change: index, set: *set, action: "replace", entry, refusal });
                    }
                    self.batch.clear();
                }
                Change::Destroy { set } => {
                    wire::destroy(&mut self.batch, *set);
                    origins.push(whole());
                }
            }
        }
        self.send(changes, &mut origins, &mut failed)?;
        // What could not be created cannot be filled: one failure tells it.
        let absent: Vec<SetName> = failed.iter().filter(|f| f.action == "create").map(|f| f.set).collect();
        failed.retain(|f| f.action != "add to" || f.refusal != Refusal::NoSet || !absent.contains(&f.set));
        if failed.iter().any(|f| matches!(f.refusal, Refusal::Full { maxelem: 0 })) {
            let limits: BTreeMap<String, u32> =
                self.headers()?.into_iter().map(|header| (header.name, header.options.maxelem)).collect();
            for failed in &mut failed {
                if let Refusal::Full { maxelem } = &mut failed.refusal {
                    *maxelem = limits.get(failed.set.as_str()).copied().unwrap_or(*maxelem);
                }
            }
        }
        failed.sort_by_key(|failed| failed.change);
        Ok(failed)
    }

    /// Exchanges the names of two sets of the same type and family.
    ///
    /// # Errors
    /// Netlink failed; the inner error is the kernel's refusal.
    pub fn swap(&mut self, first: SetName, second: SetName) -> Result<Result<(), Refusal>, Error> {
        self.single(|batch| wire::swap(batch, first, second))
    }

    /// Renames a set that nothing refers to.
    ///
    /// # Errors
    /// Netlink failed; the inner error is the kernel's refusal.
    pub fn rename(&mut self, from: SetName, to: SetName) -> Result<Result<(), Refusal>, Error> {
        self.single(|batch| wire::rename(batch, from, to))
    }

    /// Empties a set.
    ///
    /// # Errors
    /// Netlink failed; the inner error is the kernel's refusal.
    pub fn flush(&mut self, set: SetName) -> Result<Result<(), Refusal>, Error> {
        self.single(|batch| wire::flush(batch, set))
    }

    /// Netlink messages sent so far, for metrics and tests.
    #[must_use]
    pub fn messages_sent(&self) -> u64 {
        self.socket.messages_sent()
    }

    /// How many of them only read.
    #[must_use]
    pub fn requests_sent(&self) -> u64 {
        self.socket.requests_sent()
    }

    /// System calls that took.
    #[must_use]
    pub fn sends(&self) -> u64 {
        self.socket.sends()
    }

    /// Sends the batch and notes what failed; a message of many entries that failed is tried again entry by
    /// entry, to take the good ones and name the bad.
    fn send(
        &mut self,
        changes: &[Change],
        origins: &mut Vec<Origin>,
        failed: &mut Vec<Failed>,
    ) -> Result<(), Error> {
        let mut again = Vec::new();
        for failure in self.execute("change ipsets")? {
            let Some(origin) = origins.get(failure.index) else { continue };
            if origin.entries.len() > 1 && failure.errno != ENOENT {
                again.extend(
                    origin.entries.clone().map(|at| Origin { change: origin.change, entries: at..at + 1 }),
                );
            } else {
                failed.extend(Self::failed(changes, origin, &failure));
            }
        }
        if !again.is_empty() {
            self.batch.clear();
            for origin in &again {
                match changes.get(origin.change) {
                    Some(Change::Add { set, entries }) => {
                        let entries = entries.get(origin.entries.clone()).unwrap_or_default();
                        wire::add(&mut self.batch, *set, &mut entries.iter().copied().peekable());
                    }
                    Some(Change::Delete { set, entries }) => {
                        let entries = entries.get(origin.entries.clone()).unwrap_or_default();
                        let mut entries = entries.iter().map(|entry| (*entry, Extra::default())).peekable();
                        wire::delete(&mut self.batch, *set, &mut entries);
                    }
                    _ => {}
                }
            }
            for failure in self.execute("change ipsets")? {
                let Some(origin) = again.get(failure.index) else { continue };
                failed.extend(Self::failed(changes, origin, &failure));
            }
        }
        self.batch.clear();
        origins.clear();
        Ok(())
    }

    fn execute(&mut self, action: &str) -> Result<Vec<Failure>, Error> {
        self.socket.execute(&self.batch).map_err(|source| Error::Netlink { action: action.into(), source })
    }

    fn failed(changes: &[Change], origin: &Origin, failure: &Failure) -> Option<Failed> {
        let change = changes.get(origin.change)?;
        let set = change.set();
        let (action, entry) = match change {
            Change::Create { .. } => ("create", None),
            Change::Add { entries, .. } => ("add to", entries.get(origin.entries.start).map(|entry| entry.0)),
            Change::Delete { entries, .. } => ("delete from", entries.get(origin.entries.start).copied()),
            Change::Replace { .. } => ("replace", None),
            // Gone already is what was wanted.
            Change::Destroy { .. } if failure.errno == ENOENT => return None,
            Change::Destroy { .. } => ("destroy", None),
        };
        let refusal = Refusal::new(failure.errno, failure.text.as_deref());
        // An entry is not to blame for a set that is not there.
        let entry = entry.filter(|_| refusal != Refusal::NoSet);
        Some(Failed { change: origin.change, set, action, entry, refusal })
    }

    /// Fills a temporary set and swaps it in, only if every entry was taken.
    fn replace(&mut self, set: SetName, with: &Set) -> Result<Result<(), (Option<Entry>, Refusal)>, Error> {
        let revision = match self.revision(with.kind(), with.options())? {
            Ok(revision) => revision,
            Err(refusal) => return Ok(Err((None, refusal))),
        };
        let temporary = temporary(set);
        // One may be left from a process that was killed: its destruction may fail for want of it.
        self.batch.clear();
        wire::destroy(&mut self.batch, temporary);
        self.execute("remove a temporary ipset")?;
        let size = hashsize(with.entries().len());
        self.batch.clear();
        wire::create(&mut self.batch, temporary, with.kind(), with.options(), size, revision);
        if let Some(failure) = self.execute("create a temporary ipset")?.first() {
            return Ok(Err((None, Refusal::new(failure.errno, failure.text.as_deref()))));
        }
        if !with.entries().is_empty() {
            let entries = with.entries().iter().map(|(entry, extra)| (*entry, *extra)).collect();
            let failed = self.apply(&[Change::Add { set: temporary, entries }])?;
            if let Some(failed) = failed.into_iter().next() {
                self.batch.clear();
                wire::destroy(&mut self.batch, temporary);
                self.execute("remove a temporary ipset")?;
                return Ok(Err((failed.entry, failed.refusal)));
            }
        }
        self.batch.clear();
        wire::swap(&mut self.batch, temporary, set);
        wire::destroy(&mut self.batch, temporary);
        Ok(match self.execute("swap ipsets")?.first() {
            Some(failure) => Err((None, Refusal::new(failure.errno, failure.text.as_deref()))),
            None => Ok(()),
        })
    }

    fn single(&mut self, message: impl FnOnce(&mut Batch)) -> Result<Result<(), Refusal>, Error> {
        self.batch.clear();
        message(&mut self.batch);
        let failures = self.execute("change an ipset")?;
        Ok(match failures.into_iter().next() {
            Some(failure) => Err(Refusal::new(failure.errno, failure.text.as_deref())),
            None => Ok(()),
        })
    }

    /// The revision to create a set with: the newest that both sides know.
    fn revision(&mut self, kind: Kind, options: &Options) -> Result<Result<u8, Refusal>, Error> {
        let Some((known, skbinfo)) = known_revisions(kind.set_type) else {
            return Ok(Err(Refusal::NoType { kind }));
        };
        let (lowest, highest) = match self.revisions.get(&kind) {
            Some(range) => *range,
            None => {
                let mut ask = Batch::new();
                wire::revisions(&mut ask, kind);
                match self.socket.dump(&ask, |_, payload| wire::decode_revisions(payload)) {
                    Ok(answers) => match answers.into_iter().next() {
                        Some(range) => {
                            self.revisions.insert(kind, range);
                            range
                        }
                        None => return Ok(Err(Refusal::NoType { kind })),
                    },
                    Err(source) if matches!(source.errno(), Some(FIND_TYPE | ENOENT)) => {
                        return Ok(Err(Refusal::NoType { kind }));
                    }
                    Err(source) => {
                        return Err(Error::Netlink { action: format!("ask for set type {kind}"), source });
                    }
                }
            }
        };
        if lowest > known {
            return Ok(Err(Refusal::TooNew { kind, lowest }));
        }
        if options.skbinfo && highest < skbinfo {
            return Ok(Err(Refusal::NoExtension {
                kind,
                extension: "skbinfo",
                found: highest,
                needed: skbinfo,
            }));
        }
        Ok(Ok(highest.min(known)))
    }
}

/// Newest revision this crate knows, and the one that brought skbinfo (net/netfilter/ipset/ip_set_hash_*.c).
fn known_revisions(set_type: SetType) -> Option<(u8, u8)> {
    match set_type {
        SetType::HashIp => Some((6, 4)),
        SetType::HashNet => Some((7, 6)),
        SetType::HashIpPort => Some((7, 5)),
        SetType::HashIpPortIp => Some((6, 5)),
        SetType::HashIpPortNet => Some((8, 7)),
        SetType::HashNetNet => Some((4, 2)),
        SetType::Other => None,
    }
}

/// Name of the set that stands in while `set` is replaced. It starts like the set's own, so that one left
/// behind is found by the same prefix.
fn temporary(set: SetName) -> SetName {
    let text = set.as_str();
    let start = text.get(..text.len().min(22)).unwrap_or(text);
    let hash = hashed("", &[text]);
    // At most 22 + 1 + 8 = 31 bytes of the characters that names allow.
    SetName::new(&format!("{start}~{}", hash.get(..8).unwrap_or(&hash))).unwrap_or(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_names_fit_and_differ() {
        let long = |end: char| SetName::new(&format!("{}{end}", "x".repeat(30))).unwrap();
        assert_ne!(temporary(long('a')), temporary(long('b')));
        assert_ne!(temporary(long('a')), long('a'));
        assert!(
            temporary(SetName::new("inet6:kube-router-svip").unwrap())
                .as_str()
                .starts_with("inet6:kube-router-")
        );
    }
}
