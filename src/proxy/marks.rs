//! Firewall marks that tell local clients from remote ones.
//!
//! The kernel looks a virtual server up by the whole 32-bit mark, so a mark is one number, not a
//! bit field. Ours all have bit 30 set and leave bits 14 to 17 clear: 0x4000 and 0x8000 belong to
//! the kubelet, 0x10000 and 0x20000 to network policy.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use crate::cluster::ServiceKey;
use crate::cluster::service::Protocol;

/// Set in every mark of ours.
pub const MARK_BASE: u32 = 0x4000_0000;
/// Bits that number the marks: 0-13 and 18-29.
pub const MARK_BITS: u32 = 0x3ffc_3fff;

/// What a mark stands for: one port of a Service in one family.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MarkOwner {
    /// The Service.
    pub service: ServiceKey,
    /// Protocol of the port.
    pub protocol: Protocol,
    /// Index of the port in the Service.
    pub port_index: u16,
    /// Address family.
    pub ipv6: bool,
}

/// Marks in use. A mark is derived from its owner, so a restart finds the same one in the kernel.
#[derive(Debug, Default)]
pub struct Marks {
    by_owner: HashMap<MarkOwner, (u32, u32), FixedState>,
    by_mark: HashMap<u32, MarkOwner, FixedState>,
}

impl Marks {
    /// The mark of an owner; counts one more use of it.
    pub fn acquire(&mut self, owner: &MarkOwner) -> u32 {
        if let Some((mark, uses)) = self.by_owner.get_mut(owner) {
            *uses += 1;
            return *mark;
        }
        let mut number = fnv1a(owner);
        // 26 bits hold far more marks than a cluster has Services, so a free one is near.
        let mark = loop {
            let mark = MARK_BASE | spread(number);
            if !self.by_mark.contains_key(&mark) {
                break mark;
            }
            number = number.wrapping_add(1);
        };
        self.by_owner.insert(owner.clone(), (mark, 1));
        self.by_mark.insert(mark, owner.clone());
        mark
    }

    /// Gives one use back; also says whether it was the last. An unknown owner has the mark 0.
    pub fn release(&mut self, owner: &MarkOwner) -> (u32, bool) {
        let Some((mark, uses)) = self.by_owner.get_mut(owner) else { return (0, false) };
        let mark = *mark;
        *uses -= 1;
        let last = *uses == 0;
        if last {
            self.by_owner.remove(owner);
            self.by_mark.remove(&mark);
        }
        (mark, last)
    }

    /// The mark of an owner that has one.
    pub fn get(&self, owner: &MarkOwner) -> Option<u32> {
        self.by_owner.get(owner).map(|(mark, _)| *mark)
    }

    /// Who owns a mark.
    pub fn owner(&self, mark: u32) -> Option<&MarkOwner> {
        self.by_mark.get(&mark)
    }
}

/// Whether a mark is one of ours.
pub fn is_ours(mark: u32) -> bool {
    mark & !MARK_BITS == MARK_BASE
}

/// Lays the low 26 bits of a number over the bits that are ours.
fn spread(number: u32) -> u32 {
    (number & 0x3fff) | ((number & 0x03ff_c000) << 4)
}

/// FNV-1a: stable between runs and releases, unlike the standard library's hashers.
fn fnv1a(owner: &MarkOwner) -> u32 {
    let mut hash: u32 = 0x811c_9dc5;
    let mut eat = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        }
    };
    eat(owner.service.namespace.as_bytes());
    eat(b"/");
    eat(owner.service.name.as_bytes());
    eat(b"/");
    eat(&[owner.protocol.number(), u8::from(owner.ipv6)]);
    eat(&owner.port_index.to_be_bytes());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(name: &str, port_index: u16) -> MarkOwner {
        MarkOwner { service: ServiceKey::new("ns", name), protocol: Protocol::Tcp, port_index, ipv6: false }
    }

    #[test]
    fn marks_stay_inside_their_bits_and_are_unique() {
        let mut marks = Marks::default();
        let mut seen = std::collections::HashSet::new();
        for index in 0..20_000 {
            let mark = marks.acquire(&owner(&format!("s{index}"), 0));
            assert!(is_ours(mark) && mark & 0x0003_c000 == 0, "{mark:#x}");
            assert!(seen.insert(mark));
        }
    }

    #[test]
    fn a_mark_is_shared_released_and_derived_again() {
        let mut marks = Marks::default();
        let mark = marks.acquire(&owner("a", 1));
        assert_eq!(marks.acquire(&owner("a", 1)), mark);
        assert_eq!(marks.release(&owner("a", 1)), (mark, false));
        assert_eq!(marks.release(&owner("a", 1)), (mark, true));
        assert_eq!(marks.release(&owner("a", 1)), (0, false));
        assert_eq!(marks.owner(mark), None);
        assert_eq!(Marks::default().acquire(&owner("a", 1)), mark);
    }
}
