//! The difference of two tables, as an ordered list of changes.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::{Destination, DestinationKey, Options, Scheduler, Table, VirtualServer, VirtualServerKey};

/// One step from one table to another; each is one netlink message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Change {
    /// A server without destinations comes into being.
    CreateServer {
        /// Which.
        key: VirtualServerKey,
        /// What it is like.
        options: Options,
    },
    /// A server gets other options and keeps its destinations.
    UpdateServer {
        /// Which.
        key: VirtualServerKey,
        /// What it is like from now on.
        options: Options,
    },
    /// A server goes, with its destinations.
    DeleteServer {
        /// Which.
        key: VirtualServerKey,
    },
    /// A server gets one more destination.
    CreateDestination {
        /// Of which server.
        server: VirtualServerKey,
        /// The new one.
        destination: Destination,
    },
    /// A destination gets another weight, forwarding or thresholds.
    UpdateDestination {
        /// Of which server.
        server: VirtualServerKey,
        /// What it is like from now on.
        destination: Destination,
    },
    /// A server loses a destination.
    DeleteDestination {
        /// Of which server.
        server: VirtualServerKey,
        /// Which.
        destination: DestinationKey,
    },
}

impl Change {
    /// The server that the change is about.
    pub const fn server(&self) -> VirtualServerKey {
        match self {
            Self::CreateServer { key, .. } | Self::UpdateServer { key, .. } | Self::DeleteServer { key } => {
                *key
            }
            Self::CreateDestination { server, .. }
            | Self::UpdateDestination { server, .. }
            | Self::DeleteDestination { server, .. } => *server,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateServer { key, .. } => write!(f, "create virtual server {key}"),
            Self::UpdateServer { key, .. } => write!(f, "update virtual server {key}"),
            Self::DeleteServer { key } => write!(f, "delete virtual server {key}"),
            Self::CreateDestination { server, destination } => {
                write!(f, "add destination {} to virtual server {server}", destination.key())
            }
            Self::UpdateDestination { server, destination } => {
                write!(f, "update destination {} of virtual server {server}", destination.key())
            }
            Self::DeleteDestination { server, destination } => {
                write!(f, "delete destination {destination} of virtual server {server}")
            }
        }
    }
}

/// The changes that make `actual` like `desired`, for these keys only; others are not looked at, so
/// what belongs to somebody else stays. Keys given twice give their changes twice.
///
/// A server comes before its destinations; inside a server additions come before updates and those
/// before removals, so that it is never emptier than both tables say. A new `mh` server with several
/// destinations is created as `rr`, filled, and then made `mh`: the kernel builds that
/// scheduler's lookup table anew for each destination (82 us), so this way it is built once.
pub fn diff(
    actual: &Table,
    desired: &Table,
    keys: impl IntoIterator<Item = VirtualServerKey>,
) -> Vec<Change> {
    let mut changes = Vec::new();
    for key in keys {
        match (actual.get(&key), desired.get(&key)) {
            (None, None) => {}
            (None, Some(new)) => create(key, new, &mut changes),
            (Some(_), None) => changes.push(Change::DeleteServer { key }),
            (Some(old), Some(new)) => {
                if !Arc::ptr_eq(old, new) {
                    update(key, old, new, &mut changes);
                }
            }
        }
    }
    changes
}

/// [`diff`] over every key of both tables, in the order of the keys: what is not in `desired` is
/// deleted, whoever made it.
pub fn diff_all(actual: &Table, desired: &Table) -> Vec<Change> {
    let mut keys: Vec<_> =
        desired.keys().chain(actual.keys().filter(|key| !desired.contains_key(key))).copied().collect();
    keys.sort_unstable();
    diff(actual, desired, keys)
}

fn create(key: VirtualServerKey, new: &VirtualServer, changes: &mut Vec<Change>) {
    let options = new.options();
    let filled_first = options.scheduler == Scheduler::MH && new.destinations.len() > 1;
    let scheduler = if filled_first { Scheduler::RR } else { options.scheduler };
    changes.push(Change::CreateServer { key, options: Options { scheduler, ..options } });
    let additions = new.destinations.iter();
    changes.extend(additions.map(|&destination| Change::CreateDestination { server: key, destination }));
    if filled_first {
        changes.push(Change::UpdateServer { key, options });
    }
}

fn update(key: VirtualServerKey, old: &VirtualServer, new: &VirtualServer, changes: &mut Vec<Change>) {
    if old.options() != new.options() {
        changes.push(Change::UpdateServer { key, options: new.options() });
    }
    if old.destinations == new.destinations {
        return;
    }
    let (mut updates, mut removals) = (Vec::new(), Vec::new());
    let (mut olds, mut news) = (old.destinations.iter().peekable(), new.destinations.iter().peekable());
    loop {
        let order = match (olds.peek(), news.peek()) {
            (None, None) => break,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(old), Some(new)) => old.key().cmp(&new.key()),
        };
        let old = if order.is_le() { olds.next() } else { None };
        let new = if order.is_ge() { news.next() } else { None };
        match (old, new) {
            (Some(old), None) => {
                removals.push(Change::DeleteDestination { server: key, destination: old.key() });
            }
            (None, Some(&destination)) => {
                changes.push(Change::CreateDestination { server: key, destination })
            }
            (Some(old), Some(new)) if old != new => {
                updates.push(Change::UpdateDestination { server: key, destination: *new });
            }
            _ => {}
        }
    }
    changes.append(&mut updates);
    changes.append(&mut removals);
}

/// A change that does not fit the table it was applied to. The kernel answers EEXIST and ENOENT
/// (ESRCH for a server).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// What should be created is there.
    #[error("it exists already")]
    Exists,
    /// What should be changed or deleted, or the server of a destination, is not there.
    #[error("it does not exist")]
    Missing,
}

/// Carries out a change on a table in memory, as the kernel does on its own.
///
/// # Errors
///
/// [`Mismatch`] when it does not fit; the table is unchanged then.
pub fn apply_to(table: &mut Table, change: &Change) -> Result<(), Mismatch> {
    let find = |table: &mut Table, key: &VirtualServerKey, destination: DestinationKey| {
        let server = table.get(key).ok_or(Mismatch::Missing)?;
        Ok(server.destinations.binary_search_by_key(&destination, Destination::key))
    };
    // Only after the check: the first change to a shared server copies it.
    let open = |table: &mut Table, key: &VirtualServerKey, edit: &mut dyn FnMut(&mut VirtualServer)| {
        table.get_mut(key).map(Arc::make_mut).map(edit).ok_or(Mismatch::Missing)
    };
    match change {
        Change::CreateServer { key, options } => {
            if table.contains_key(key) {
                return Err(Mismatch::Exists);
            }
            table.insert(*key, Arc::new(VirtualServer::new(*options, Vec::new())));
            Ok(())
        }
        Change::UpdateServer { key, options } => open(table, key, &mut |server| {
            let Options { scheduler, flags, timeout, netmask } = *options;
            (server.scheduler, server.flags) = (scheduler, flags);
            (server.timeout, server.netmask) = (timeout, netmask);
        }),
        Change::DeleteServer { key } => table.remove(key).map(drop).ok_or(Mismatch::Missing),
        Change::CreateDestination { server, destination } => match find(table, server, destination.key())? {
            Ok(_) => Err(Mismatch::Exists),
            Err(at) => open(table, server, &mut |server| server.destinations.insert(at, *destination)),
        },
        Change::UpdateDestination { server, destination } => match find(table, server, destination.key())? {
            Ok(at) => open(table, server, &mut |server| server.destinations[at] = *destination),
            Err(_) => Err(Mismatch::Missing),
        },
        Change::DeleteDestination { server, destination } => match find(table, server, *destination)? {
            Ok(at) => open(table, server, &mut |server| {
                server.destinations.remove(at);
            }),
            Err(_) => Err(Mismatch::Missing),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::{Family, Flags, Forwarding, Netmask, Protocol, Tunnel, TunnelKind};

    /// Few values each, so that tables overlap.
    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (0..4u8).prop_map(|last| Ipv4Addr::new(10, 0, 0, last).into()),
            (0..4u16).prop_map(|last| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last).into()),
        ]
    }

    fn key() -> impl Strategy<Value = VirtualServerKey> {
        let protocol = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp]);
        let family = prop::sample::select(vec![Family::V4, Family::V6]);
        prop_oneof![
            (protocol, address(), 80..82u16)
                .prop_map(|(protocol, address, port)| VirtualServerKey::Address { protocol, address, port }),
            (family, 1..3u32).prop_map(|(family, mark)| VirtualServerKey::Mark { family, mark }),
        ]
    }

    fn destination() -> impl Strategy<Value = Destination> {
        let forwarding = prop::sample::select(vec![
            Forwarding::Masquerade,
            Forwarding::DirectRoute,
            Forwarding::Tunnel(Tunnel::IPIP),
            Forwarding::Tunnel(Tunnel { kind: TunnelKind::Gue, port: 6080, flags: 1 }),
        ]);
        (address(), 80..82u16, forwarding, 0..2u32, 0..2u32).prop_map(
            |(address, port, forwarding, weight, upper)| Destination {
                forwarding,
                upper_threshold: upper,
                ..Destination::masquerade(address, port, weight)
            },
        )
    }

    fn server() -> impl Strategy<Value = VirtualServer> {
        let scheduler = prop::sample::select(vec![Scheduler::RR, Scheduler::MH, Scheduler::SH]);
        let destinations = prop::collection::vec(destination(), 0..6);
        (scheduler, 0..8u32, 0..2u32, destinations).prop_map(|(scheduler, flags, timeout, destinations)| {
            let netmask = Netmask::host(Family::V4);
            let flags = Flags::from_bits(flags);
            VirtualServer::new(Options { scheduler, flags, timeout, netmask }, destinations)
        })
    }

    fn table() -> impl Strategy<Value = Table> {
        prop::collection::vec((key(), server()), 0..8)
            .prop_map(|servers| servers.into_iter().map(|(key, server)| (key, Arc::new(server))).collect())
    }

    fn applied(table: &Table, changes: &[Change]) -> Table {
        let mut table = table.clone();
        for change in changes {
            apply_to(&mut table, change).unwrap_or_else(|error| panic!("{change}: {error}"));
        }
        table
    }

    proptest! {
        #[test]
        fn applying_the_difference_gives_the_desired_table(actual in table(), desired in table()) {
            let changes = diff_all(&actual, &desired);
            prop_assert_eq!(&applied(&actual, &changes), &desired);
            prop_assert_eq!(diff_all(&applied(&actual, &changes), &desired), []);
        }

        #[test]
        fn nothing_to_do_is_nothing(table in table()) {
            // Copies, so that equality is not only that of pointers.
            let copy = table.iter().map(|(key, server)| (*key, Arc::new((**server).clone()))).collect();
            prop_assert_eq!(diff_all(&table, &copy), []);
        }

        #[test]
        fn other_keys_stay_untouched(actual in table(), desired in table(), keys in prop::collection::hash_set(key(), 0..4)) {
            let changes = diff(&actual, &desired, keys.iter().copied());
            prop_assert!(changes.iter().all(|change| keys.contains(&change.server())));
            let after = applied(&actual, &changes);
            for key in actual.keys().chain(desired.keys()) {
                let expected = if keys.contains(key) { desired.get(key) } else { actual.get(key) };
                prop_assert_eq!(after.get(key), expected);
            }
        }

        #[test]
        fn a_server_never_has_fewer_destinations_than_in_both_tables(actual in table(), desired in table()) {
            let mut table = actual.clone();
            for change in diff_all(&actual, &desired) {
                apply_to(&mut table, &change).unwrap();
                let key = change.server();
                if let (Some(old), Some(new), Some(now)) = (actual.get(&key), desired.get(&key), table.get(&key)) {
                    prop_assert!(now.destinations.len() >= old.destinations.len().min(new.destinations.len()));
                }
            }
        }

        #[test]
        fn a_change_that_does_not_fit_changes_nothing(table in table(), key in key(), destination in destination()) {
            for change in [
                Change::CreateDestination { server: key, destination },
                Change::UpdateDestination { server: key, destination },
                Change::DeleteDestination { server: key, destination: destination.key() },
                Change::DeleteServer { key },
            ] {
                let mut after = table.clone();
                if apply_to(&mut after, &change).is_err() {
                    prop_assert_eq!(&after, &table);
                } else {
                    prop_assert_ne!(&after.get(&key), &table.get(&key).filter(|_| change != Change::UpdateDestination { server: key, destination }));
                }
            }
        }
    }

    fn one(scheduler: Scheduler, destinations: u8) -> (VirtualServerKey, Table) {
        let key = VirtualServerKey::Mark { family: Family::V4, mark: 1 };
        let netmask = Netmask::host(Family::V4);
        let options = Options { scheduler, flags: Flags::MH_PORT, timeout: 0, netmask };
        let destinations =
            (0..destinations).map(|last| Destination::masquerade([10, 0, 0, last].into(), 80, 1)).collect();
        (key, Table::from_iter([(key, Arc::new(VirtualServer::new(options, destinations)))]))
    }

    #[test]
    fn a_new_mh_server_is_filled_before_it_becomes_mh() {
        let (key, desired) = one(Scheduler::MH, 3);
        let changes = diff(&Table::default(), &desired, [key]);
        let schedulers: Vec<_> = changes
            .iter()
            .filter_map(|change| match change {
                Change::CreateServer { options, .. } | Change::UpdateServer { options, .. } => {
                    Some((options.scheduler, options.flags))
                }
                _ => None,
            })
            .collect();
        assert_eq!(schedulers, [(Scheduler::RR, Flags::MH_PORT), (Scheduler::MH, Flags::MH_PORT)]);
        assert_eq!(changes.len(), 5);
        assert!(matches!(changes[4], Change::UpdateServer { .. }));

        // One destination costs one rebuild either way; an existing server must not lose its hashing.
        let (key, single) = one(Scheduler::MH, 1);
        assert_eq!(diff(&Table::default(), &single, [key]).len(), 2);
        assert!(
            diff(&single, &desired, [key]).iter().all(|change| {
                !matches!(change, Change::CreateServer { .. } | Change::UpdateServer { .. })
            })
        );
    }

    #[test]
    fn additions_then_updates_then_removals() {
        let at = |last, weight| Destination::masquerade([10, 0, 0, last].into(), 80, weight);
        let (key, base) = one(Scheduler::RR, 0);
        let with = |destinations| {
            Table::from_iter([(key, Arc::new(VirtualServer::new(base[&key].options(), destinations)))])
        };
        let changes =
            diff(&with(vec![at(1, 1), at(2, 1), at(3, 1)]), &with(vec![at(2, 0), at(3, 1), at(4, 1)]), [key]);
        assert_eq!(
            changes,
            [
                Change::CreateDestination { server: key, destination: at(4, 1) },
                Change::UpdateDestination { server: key, destination: at(2, 0) },
                Change::DeleteDestination { server: key, destination: at(1, 1).key() },
            ]
        );
    }

    #[test]
    fn changes_read_well() {
        let (key, desired) = one(Scheduler::RR, 1);
        let lines: Vec<_> = diff(&Table::default(), &desired, [key]).iter().map(Change::to_string).collect();
        assert_eq!(
            lines,
            [
                "create virtual server FWM 0x1 IPv4",
                "add destination 10.0.0.0:80 to virtual server FWM 0x1 IPv4",
            ]
        );
    }
}
