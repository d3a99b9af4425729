//! The RIBs as people ask for them: what a peer sent and what became of it, what a peer was told and
//! what not, each before and after policy.

use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;

use super::adj_out::Export;
use super::loc::Path;
use super::peer::PeerId;
use super::table::{Entry, Prefix, Table};
use super::{Rib, number};
use crate::decision::Reason;
use crate::message::{AfiSafi, Attributes};
use crate::policy::{Policy, Refusal, Withheld};

/// On which side of policy to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// As it came from the peer, or from Loc-RIB.
    Before,
    /// As it went into Loc-RIB, or to the peer.
    After,
}

/// A path in Adj-RIB-In or Loc-RIB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathView {
    /// Where it leads.
    pub prefix: IpNet,
    /// Who sent it; none for our own.
    pub peer: Option<PeerId>,
    /// The peer's identifier of the path; 0 without add-path.
    pub path_id: u32,
    /// Our identifier of the path towards peers with add-path.
    pub local_id: u32,
    /// At the stage asked for.
    pub attributes: Arc<Attributes>,
    /// What became of it.
    pub reason: Reason,
    /// The statement of the import policy that refused it.
    pub statement: Option<Arc<str>>,
    /// Seconds, on the clock of [`Rib::receive`].
    pub since: u32,
    /// The originator's tag.
    pub tag: u16,
    /// From before the peer's restart.
    pub stale: bool,
}

impl fmt::Display for PathView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} via {}: {}", self.prefix, self.attributes.next_hop, self.reason)?;
        if let Some(statement) = &self.statement {
            write!(f, " {statement:?}")?;
        }
        f.write_str(if self.stale { ", stale" } else { "" })
    }
}

/// A path offered to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdvertisedView {
    /// Where it leads.
    pub prefix: IpNet,
    /// Our identifier of the path; 0 without add-path.
    pub path_id: u32,
    /// At the stage asked for.
    pub attributes: Arc<Attributes>,
    /// Why the peer is not told; such paths are seen before policy only.
    pub withheld: Option<Withheld>,
    /// The statement of the export policy that withholds it.
    pub statement: Option<Arc<str>>,
    /// Whether the peer knows it in this form. Otherwise it is due to be told, or untold.
    pub is_current: bool,
}

impl fmt::Display for AdvertisedView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} via {}: ", self.prefix, self.attributes.next_hop)?;
        match &self.withheld {
            None => f.write_str("advertised")?,
            Some(withheld) => write!(f, "not advertised: {withheld}")?,
        }
        if let Some(statement) = &self.statement {
            write!(f, " {statement:?}")?;
        }
        f.write_str(if self.is_current { "" } else { ", pending" })
    }
}

impl Rib {
    /// What a peer sent. After policy: what import took.
    pub fn received(&self, peer: PeerId, family: AfiSafi, stage: Stage) -> Vec<PathView> {
        let Some((known, number)) = self.peers.get(peer).zip(number(family)) else { return Vec::new() };
        let received = &known.families[number].received;
        let paths = |entry: &[Path], prefix: IpNet| -> Vec<PathView> {
            entry
                .iter()
                .filter(|path| path.peer == peer)
                .filter_map(|path| self.view(prefix, path, stage))
                .collect()
        };
        match number {
            0 => received.iter().flat_map(|id| with(&self.v4, id, paths)).collect(),
            _ => received.iter().flat_map(|id| with(&self.v6, id, paths)).collect(),
        }
    }

    /// All paths of a family that take part in route selection or would like to, prefix by prefix, the best
    /// of each first.
    pub fn paths(&self, family: AfiSafi) -> Vec<PathView> {
        let paths = |entry: &[Path], prefix: IpNet| self.views(entry, prefix);
        match number(family) {
            Some(0) => self.v4.ids().flat_map(|id| with(&self.v4, id, paths)).collect(),
            Some(_) => self.v6.ids().flat_map(|id| with(&self.v6, id, paths)).collect(),
            None => Vec::new(),
        }
    }

    /// All paths to exactly this prefix, the best first.
    pub fn paths_to(&self, prefix: IpNet) -> Vec<PathView> {
        let paths = |entry: &[Path], prefix: IpNet| self.views(entry, prefix);
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.find(prefix).map(|id| with(&self.v4, id, paths)),
            IpNet::V6(prefix) => self.v6.find(prefix).map(|id| with(&self.v6, id, paths)),
        }
        .unwrap_or_default()
    }

    /// What a peer is offered: before policy with the reason why it is not told, after policy what it is
    /// told. Nothing without a session.
    pub fn advertised(&self, peer: PeerId, family: AfiSafi, stage: Stage) -> Vec<AdvertisedView> {
        match number(family) {
            Some(0) => self.offers(&self.v4, peer, family, stage),
            Some(_) => self.offers(&self.v6, peer, family, stage),
            None => Vec::new(),
        }
    }

    fn offers<P: Prefix>(
        &self,
        table: &Table<P>,
        peer: PeerId,
        family: AfiSafi,
        stage: Stage,
    ) -> Vec<AdvertisedView> {
        let mut views = Vec::new();
        let exports = Export::new(&self.speaker, &self.peers, &self.next_hops, peer, family);
        let Some(mut exports) = exports else { return views };
        let policy = self.peers.get(peer).and_then(|peer| peer.options.export.as_deref());
        for id in table.ids() {
            let entry = table.get(id);
            let prefix: IpNet = entry.prefix.into();
            for (path_id, path) in exports.offered(entry) {
                let exported = exports.export(prefix, path);
                let Some(before) = path.effective.as_ref() else { continue };
                let told = told(entry, peer, path_id);
                let (attributes, withheld, is_current) = match (exported, stage) {
                    (Ok((after, fingerprint)), Stage::After) => (after, None, told == Some(fingerprint)),
                    (Ok((_, fingerprint)), Stage::Before) => {
                        (Arc::clone(before), None, told == Some(fingerprint))
                    }
                    (Err(_), Stage::After) => continue,
                    (Err(withheld), Stage::Before) => (Arc::clone(before), Some(withheld), told.is_none()),
                };
                let statement = match withheld {
                    Some(Withheld::Policy(Some(index))) => statement(policy, index),
                    _ => None,
                };
                views.push(AdvertisedView { prefix, path_id, attributes, withheld, statement, is_current });
            }
        }
        views
    }

    fn views(&self, paths: &[Path], prefix: IpNet) -> Vec<PathView> {
        paths.iter().filter_map(|path| self.view(prefix, path, Stage::Before)).collect()
    }

    fn view(&self, prefix: IpNet, path: &Path, stage: Stage) -> Option<PathView> {
        let attributes = match stage {
            Stage::Before => &path.received,
            Stage::After => path.effective.as_ref()?,
        };
        let statement = match path.reason {
            Reason::Refused(Refusal::Policy(Some(index))) => {
                let peer = self.peers.get(path.peer)?;
                statement(peer.options.import.as_deref(), index)
            }
            _ => None,
        };
        Some(PathView {
            prefix,
            peer: Some(path.peer).filter(|&peer| peer != PeerId::LOCAL),
            path_id: path.path_id,
            local_id: path.local_id,
            attributes: Arc::clone(attributes),
            reason: path.reason,
            statement,
            since: path.since,
            tag: path.tag,
            stale: path.stale,
        })
    }
}

fn with<P: Prefix, T>(table: &Table<P>, id: u32, see: impl Fn(&[Path], IpNet) -> T) -> T {
    let entry = table.get(id);
    see(entry.paths.as_slice(), entry.prefix.into())
}

/// The fingerprint of what a peer was told.
fn told<P>(entry: &Entry<P>, peer: PeerId, path_id: u32) -> Option<u64> {
    let advertised = entry.advertised.as_slice();
    let place = advertised.binary_search_by_key(&(peer, path_id), |told| (told.peer, told.path_id)).ok()?;
    Some(advertised[place].fingerprint)
}

fn statement(policy: Option<&Policy>, index: u16) -> Option<Arc<str>> {
    policy?.statements.get(usize::from(index)).map(|statement| Arc::clone(&statement.name))
}
