//! Next hops in use, and what is known of the way to them.

use std::collections::HashMap;
use std::net::IpAddr;

use foldhash::fast::RandomState;

/// The way to a next hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// There is one, of this cost.
    Reachable {
        /// Lower is better; 0 on the link.
        metric: u32,
    },
    /// There is none: paths over it take no part.
    Unreachable,
    /// It is an address of this node: paths over it would lead back.
    Own,
}

impl Default for Resolution {
    /// Until somebody says otherwise a next hop is taken for a neighbour on the link.
    fn default() -> Self {
        Self::Reachable { metric: 0 }
    }
}

/// What was said of next hops, and how many paths lead over each.
#[derive(Debug, Default)]
pub(super) struct NextHops {
    resolutions: HashMap<IpAddr, Resolution, RandomState>,
    uses: HashMap<IpAddr, u32, RandomState>,
    generation: u64,
}

impl NextHops {
    pub(super) fn resolution(&self, address: IpAddr) -> Resolution {
        if self.resolutions.is_empty() {
            return Resolution::default();
        }
        self.resolutions.get(&address).copied().unwrap_or_default()
    }

    /// Takes what is known; `false` if nothing changed.
    pub(super) fn resolve(&mut self, address: IpAddr, resolution: Resolution) -> bool {
        let before = if resolution == Resolution::default() {
            self.resolutions.remove(&address)
        } else {
            self.resolutions.insert(address, resolution)
        };
        before.unwrap_or_default() != resolution
    }

    pub(super) fn acquire(&mut self, address: IpAddr) {
        let uses = self.uses.entry(address).or_default();
        if *uses == 0 {
            self.generation += 1;
        }
        *uses += 1;
    }

    pub(super) fn release(&mut self, address: IpAddr) {
        if let Some(uses) = self.uses.get_mut(&address) {
            *uses -= 1;
            if *uses == 0 {
                self.uses.remove(&address);
                self.generation += 1;
            }
        }
    }

    pub(super) fn is_used(&self, address: IpAddr) -> bool {
        self.uses.contains_key(&address)
    }

    pub(super) fn used(&self) -> impl Iterator<Item = (IpAddr, Resolution)> {
        self.uses.keys().map(|&address| (address, self.resolution(address)))
    }

    pub(super) const fn generation(&self) -> u64 {
        self.generation
    }
}
