//! Address blocks with exceptions, as entries of a `hash:net` set.
//!
//! The set decides by the longest prefix that holds an address, and one set holds the blocks of a whole
//! rule. So an exception can be an exception of the set only where no other block of the rule allows it;
//! else the blocks are cut into pieces without exceptions.

use std::net::IpAddr;

use ferroute_iptables::Family;
use ipnet::IpNet;

/// A block: addresses inside `cidr` and outside every `except`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block<'a> {
    pub cidr: IpNet,
    pub except: &'a [IpNet],
}

impl Block<'_> {
    /// Whether an address is in the block.
    pub(crate) fn holds(&self, ip: IpAddr) -> bool {
        self.cidr.contains(&ip) && !self.except.iter().any(|except| except.contains(&ip))
    }
}

/// The blocks of one family as set entries: networks, and whether each is an exception. No network has
/// prefix length 0, which the kernel's sets cannot hold.
pub(crate) fn entries(blocks: &[Block<'_>], family: Family) -> Vec<(IpNet, bool)> {
    let blocks: Vec<Block<'_>> =
        blocks.iter().copied().filter(|block| Family::of(block.cidr.addr()) == family).collect();
    if blocks.iter().enumerate().any(|(at, block)| clashes(block, at, &blocks)) {
        let mut entries = Vec::new();
        for block in &blocks {
            cut(block.cidr, block.except, &mut entries);
        }
        return distinct(entries.into_iter().flat_map(halves).map(|net| (net, false)).collect());
    }
    let mut entries = Vec::new();
    for block in &blocks {
        entries.extend(halves(block.cidr).into_iter().map(|net| (net, false)));
        entries.extend(block.except.iter().copied().flat_map(halves).map(|net| (net, true)));
    }
    distinct(entries)
}

fn distinct(mut entries: Vec<(IpNet, bool)>) -> Vec<(IpNet, bool)> {
    entries.sort_unstable();
    entries.dedup();
    entries
}

/// Whether an exception of the block, as an exception of the set, would take away what another block
/// allows, or what the block itself is.
fn clashes(block: &Block<'_>, at: usize, all: &[Block<'_>]) -> bool {
    block.except.iter().any(|except| {
        halves(*except).iter().any(|half| halves(block.cidr).contains(half))
            || all.iter().enumerate().any(|(other, another)| {
                other != at
                    // A block inside the exception is a longer prefix and wins by itself.
                    && another.cidr.contains(except)
                    && !another.except.iter().any(|theirs| theirs.contains(except))
            })
    })
}

/// What is left of `net` without `except`, as networks.
fn cut(net: IpNet, except: &[IpNet], out: &mut Vec<IpNet>) {
    let inside: Vec<IpNet> = except.iter().copied().filter(|e| net.contains(e) || e.contains(&net)).collect();
    if inside.is_empty() {
        out.push(net);
        return;
    }
    if inside.iter().any(|e| e.contains(&net)) {
        return;
    }
    // An exception inside the network is longer, so the network can be halved.
    if let Ok(parts) = net.subnets(net.prefix_len() + 1) {
        for part in parts {
            cut(part, &inside, out);
        }
    }
}

/// The network, or its two halves when it is the whole family.
fn halves(net: IpNet) -> Vec<IpNet> {
    let net = net.trunc();
    if net.prefix_len() > 0 {
        return vec![net];
    }
    net.subnets(1).map(Iterator::collect).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    /// What the kernel's set says: the entry with the longest prefix decides.
    fn set_holds(entries: &[(IpNet, bool)], ip: IpAddr) -> bool {
        let hit = entries.iter().filter(|(net, _)| net.contains(&ip)).max_by_key(|(net, _)| net.prefix_len());
        hit.is_some_and(|(_, nomatch)| !nomatch)
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn plain_exceptions_stay_exceptions() {
        let except = [net("10.1.0.0/16")];
        let blocks = [Block { cidr: net("10.0.0.0/8"), except: &except }];
        assert_eq!(entries(&blocks, Family::V4), [(net("10.0.0.0/8"), false), (net("10.1.0.0/16"), true)]);
        assert!(entries(&blocks, Family::V6).is_empty());
    }

    #[test]
    fn everything_is_two_halves_in_both_families() {
        for (all, family) in [("0.0.0.0/0", Family::V4), ("::/0", Family::V6)] {
            let list = entries(&[Block { cidr: net(all), except: &[] }], family);
            assert_eq!(list.len(), 2);
            assert!(list.iter().all(|(net, nomatch)| net.prefix_len() == 1 && !nomatch));
        }
    }

    #[test]
    fn an_exception_of_one_block_does_not_touch_another() {
        let except = [net("10.1.0.0/16")];
        let blocks = [
            Block { cidr: net("10.0.0.0/8"), except: &except },
            Block { cidr: net("10.1.0.0/16"), except: &[] },
        ];
        let list = entries(&blocks, Family::V4);
        assert!(set_holds(&list, "10.1.2.3".parse().unwrap()));
        assert!(set_holds(&list, "10.2.2.3".parse().unwrap()));
    }

    #[test]
    fn a_block_that_excludes_itself_is_empty() {
        for all in ["10.0.0.0/8", "0.0.0.0/0"] {
            let except = [net(all)];
            let list = entries(&[Block { cidr: net(all), except: &except }], Family::V4);
            assert!(!set_holds(&list, "10.1.2.3".parse().unwrap()), "{list:?}");
        }
        let except = [net("0.0.0.0/1")];
        let list = entries(&[Block { cidr: net("0.0.0.0/0"), except: &except }], Family::V4);
        assert!(!set_holds(&list, "10.1.2.3".parse().unwrap()), "{list:?}");
        assert!(set_holds(&list, "200.1.2.3".parse().unwrap()), "{list:?}");
    }

    fn any_net() -> impl Strategy<Value = IpNet> {
        // Small space, so that blocks meet each other.
        (0u8..16, 0u8..=4).prop_map(|(bits, length)| {
            let ip = Ipv4Addr::new(bits << 4, 0, 0, 0);
            IpNet::new(ip.into(), length).unwrap().trunc()
        })
    }

    proptest! {
        #[test]
        fn the_set_holds_what_some_block_holds(
            blocks in prop::collection::vec((any_net(), prop::collection::vec(any_net(), 0..4)), 0..5),
        ) {
            let blocks: Vec<(IpNet, Vec<IpNet>)> = blocks
                .into_iter()
                .map(|(cidr, except)| (cidr, except.into_iter().filter(|e| cidr.contains(e)).collect()))
                .collect();
            let blocks: Vec<Block<'_>> =
                blocks.iter().map(|(cidr, except)| Block { cidr: *cidr, except }).collect();
            let list = entries(&blocks, Family::V4);
            let mut nets: Vec<IpNet> = list.iter().map(|(net, _)| *net).collect();
            nets.dedup();
            prop_assert_eq!(nets.len(), list.len(), "one entry, one meaning");
            for bits in 0..=255u8 {
                let ip = IpAddr::V4(Ipv4Addr::new(bits, 1, 2, 3));
                let wanted = blocks.iter().any(|block| block.holds(ip));
                prop_assert_eq!(set_holds(&list, ip), wanted, "{} in {:?}", ip, list);
            }
        }
    }
}
