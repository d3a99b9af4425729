//! EndpointSlices as the rooms see them.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use super::service::Protocol;

/// One port of an EndpointSlice. Ports without a number are left out ("all ports" is not served).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SlicePort {
    /// Port name; empty when absent.
    pub name: Arc<str>,
    /// Transport protocol (default TCP).
    pub protocol: Protocol,
    /// Target port on the endpoint.
    pub port: NonZeroU16,
}

/// Where an endpoint's traffic should come from (`endpoints[].hints`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hints {
    /// `forZones[].name`.
    pub zones: Vec<Arc<str>>,
    /// `forNodes[].name`.
    pub nodes: Vec<Arc<str>>,
}

/// One endpoint address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The address; of the slice's family.
    pub address: IpAddr,
    /// `conditions.ready`; nil means true.
    pub ready: bool,
    /// `conditions.serving`; nil means the same as ready.
    pub serving: bool,
    /// `conditions.terminating`; nil means false.
    pub terminating: bool,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `hints`, shared between endpoints with equal ones.
    pub hints: Option<Arc<Hints>>,
}

/// An EndpointSlice of address type IPv4 or IPv6.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slice {
    /// The ports; shared between slices with equal ones.
    pub ports: Arc<[SlicePort]>,
    /// The endpoints that parse, in the order written.
    pub endpoints: Vec<Endpoint>,
}

/// The slices of one Service by name: nearly always one, so a list with no place to spare.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slices {
    /// Sorted by name.
    list: Vec<(Arc<str>, Arc<Slice>)>,
}

impl Slices {
    /// The slice of this name.
    pub fn get(&self, name: &str) -> Option<&Arc<Slice>> {
        self.place(name).ok().and_then(|place| self.list.get(place)).map(|(_, slice)| slice)
    }

    /// Stores a slice and returns the one that had its name before.
    pub fn insert(&mut self, name: Arc<str>, slice: Arc<Slice>) -> Option<Arc<Slice>> {
        match self.place(&name) {
            Ok(place) => self.list.get_mut(place).map(|(_, known)| std::mem::replace(known, slice)),
            Err(place) => {
                self.list.reserve_exact(1);
                self.list.insert(place, (name, slice));
                None
            }
        }
    }

    /// Takes a slice out.
    pub fn remove(&mut self, name: &str) -> Option<Arc<Slice>> {
        self.place(name).ok().map(|place| self.list.remove(place).1)
    }

    /// The slices, by name.
    pub fn iter(&self) -> std::slice::Iter<'_, (Arc<str>, Arc<Slice>)> {
        self.list.iter()
    }

    /// The slices, in the order of their names.
    pub fn values(&self) -> impl Iterator<Item = &Arc<Slice>> {
        self.list.iter().map(|(_, slice)| slice)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    fn place(&self, name: &str) -> Result<usize, usize> {
        self.list.binary_search_by(|(known, _)| (**known).cmp(name))
    }
}

impl<'a> IntoIterator for &'a Slices {
    type Item = &'a (Arc<str>, Arc<Slice>);
    type IntoIter = std::slice::Iter<'a, (Arc<str>, Arc<Slice>)>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl Extend<(Arc<str>, Arc<Slice>)> for Slices {
    fn extend<T: IntoIterator<Item = (Arc<str>, Arc<Slice>)>>(&mut self, slices: T) {
        for (name, slice) in slices {
            self.insert(name, slice);
        }
    }
}

impl FromIterator<(Arc<str>, Arc<Slice>)> for Slices {
    fn from_iter<T: IntoIterator<Item = (Arc<str>, Arc<Slice>)>>(slices: T) -> Self {
        let mut list = Self::default();
        list.extend(slices);
        list
    }
}

impl<const N: usize> From<[(Arc<str>, Arc<Slice>); N]> for Slices {
    fn from(slices: [(Arc<str>, Arc<Slice>); N]) -> Self {
        slices.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// As a map would.
        #[test]
        fn slices_are_kept_by_name(steps in prop::collection::vec((0u8..5, any::<bool>(), 1u16..9), 0..40)) {
            let (mut slices, mut model) = (Slices::default(), BTreeMap::new());
            for (name, keep, port) in steps {
                let name: Arc<str> = Arc::from(format!("s{name}"));
                let port = SlicePort {
                    name: "".into(),
                    protocol: Protocol::Tcp,
                    port: NonZeroU16::new(port).unwrap(),
                };
                let slice = Arc::new(Slice { ports: vec![port].into(), endpoints: Vec::new() });
                if keep {
                    prop_assert_eq!(slices.insert(name.clone(), slice.clone()), model.insert(name.clone(), slice));
                } else {
                    prop_assert_eq!(slices.remove(&name), model.remove(&name));
                }
                prop_assert_eq!(slices.get(&name), model.get(&name));
                let (found, wanted): (Vec<_>, Vec<_>) = (slices.values().collect(), model.values().collect());
                prop_assert_eq!(found, wanted);
                prop_assert_eq!((slices.len(), slices.is_empty()), (model.len(), model.is_empty()));
            }
        }
    }
}
