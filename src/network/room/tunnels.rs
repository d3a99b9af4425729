//! Tunnels to other nodes: made right, one by one.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::{Room, Whole};
use crate::host::fou::Listener;
use crate::host::tunnel::Encapsulation;
use crate::host::{self, Family};
use crate::network::error::Error;
use crate::network::fib::Surroundings;
use crate::network::node_address::Purpose;
use crate::network::overlay::{self, TunnelChange};
use crate::network::settings::Reach;

impl Room {
    /// Makes tunnels right, one by one: one that cannot be made does not stop the others. Those that
    /// nobody needs go only when all routes of their family have been heard.
    pub(super) fn settle_tunnels(&mut self, around: &Surroundings, whole: Whole) -> Result<(), Error> {
        let ends = around.tunnel_ends(self.learned.all_next_hops());
        let names = overlay::assign(&ends, &self.machine.tunnels);
        let (wanted, without) = self.machine.tunnels_to(names, &self.settings, &self.addresses);
        let mut failure = None;
        for remote in without {
            let problem = format!(
                "no tunnel to {remote}: this node has no tunnel end of that family; see --overlay-address"
            );
            failure = Some(Error::Kernel(problem));
        }
        if let Encapsulation::Gue(port) = self.settings.encapsulation
            && self.settings.overlay != Reach::Off
            && let Err(error) = self.settle_listeners(port)
        {
            failure = Some(error);
        }
        let learned = &self.learned;
        let is_blind = self.cluster.blind;
        let changes =
            overlay::diff(&self.machine.tunnels, &wanted, |family| learned.is_complete(family) && !is_blind);
        self.tunnels = wanted;
        if changes.is_empty() {
            return failure.map_or(Ok(()), Err);
        }
        if whole.audit {
            self.drift(changes.len(), "tunnels differed from what was programmed, repairing");
        }
        for change in &changes {
            tracing::debug!(?change, "tunnel");
            if let Err(error) = self.apply_tunnel(change) {
                failure = Some(error);
            }
        }
        self.machine.tunnels = self.kernel.network().tunnels()?;
        failure.map_or(Ok(()), Err)
    }

    fn apply_tunnel(&mut self, change: &TunnelChange) -> Result<(), Error> {
        let network = self.kernel.network();
        let outcome = match change {
            TunnelChange::Create(wanted) => network.create_tunnel(&wanted.name, &wanted.tunnel, wanted.mtu),
            TunnelChange::Change(index, wanted) => network
                .change_tunnel(*index, &wanted.tunnel, wanted.mtu)
                // Some changes are not possible in place.
                .or_else(|_| {
                    network.delete_link(*index)?;
                    network.create_tunnel(&wanted.name, &wanted.tunnel, wanted.mtu)
                }),
            TunnelChange::Recreate(index, wanted) => network
                .delete_link(*index)
                .and_then(|()| network.create_tunnel(&wanted.name, &wanted.tunnel, wanted.mtu)),
            TunnelChange::Delete(index, _) => network.delete_link(*index),
        };
        outcome.map_err(|error| lacking(error, self.settings.encapsulation))
    }

    /// Packets that come in GUE are unwrapped by a listener for each family this node has an end in.
    fn settle_listeners(&mut self, port: u16) -> Result<(), Error> {
        let Some(present) = self.kernel.read_listeners()? else {
            return Err(Error::Kernel(format!(
                "--overlay-encap=fou: this kernel cannot unwrap GUE on port {port}; load fou on the host (modprobe fou \
                 fou6), choose a kernel with CONFIG_NET_FOU and CONFIG_NET_FOU_IP_TUNNELS, or use --overlay-encap=ipip"
            )));
        };
        let mut failure = None;
        for family in Family::BOTH {
            let listener = Listener { port, family, gue: true };
            if self.addresses.get(Purpose::Overlay, family).is_some()
                && !present.contains(&listener)
                && let Err(error) = self.kernel.add_listener(listener)
            {
                failure = Some(error);
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Tunnels that are as they must be, by their far end.
    pub(super) fn working_tunnels(&self) -> BTreeMap<IpAddr, u32> {
        let working = self.tunnels.iter().filter_map(|wanted| {
            let found = self.machine.tunnels.iter().find(|found| found.link.name == wanted.name)?;
            (found.tunnel == wanted.tunnel && found.link.is_up())
                .then_some((wanted.tunnel.remote, found.link.index))
        });
        working.collect()
    }
}

/// Says what the kernel lacks for tunnels, where that is what a refusal means.
fn lacking(error: host::Error, encapsulation: Encapsulation) -> Error {
    match (error.errno(), encapsulation) {
        (Some(nix::libc::EINVAL | nix::libc::EOPNOTSUPP), Encapsulation::Gue(_)) => Error::Kernel(format!(
            "{error}; tunnels in UDP need CONFIG_NET_FOU_IP_TUNNELS (IPv6: CONFIG_IPV6_FOU_TUNNEL), modules fou and \
             fou6; or use --overlay-encap=ipip"
        )),
        (Some(nix::libc::EOPNOTSUPP), _) => Error::Kernel(format!(
            "{error}; tunnels need the modules ipip and ip6_tunnel (CONFIG_NET_IPIP, CONFIG_IPV6_TUNNEL)"
        )),
        _ => Error::Host(error),
    }
}
