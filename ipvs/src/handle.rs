//! The kernel's table: dump and apply, nothing clever.

use std::sync::Arc;

use ferroute_netlink::{Batch, DecodeError, Protocol, Socket, resolve_family};

use crate::error::{ChangeError, ChangeFailure, Error};
use crate::{
    Change, Destination, DestinationStats, Info, Statistics, Table, Timeouts, VirtualServer,
    VirtualServerKey, wire,
};

/// Bytes after which a batch is sent: one send holds 64 KiB, and no message of ours is as long as
/// the difference.
const BATCH: usize = 63 * 1024;

/// IPVS in the network namespace of the thread that opened it. Needs `CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct Handle {
    socket: Socket,
    family: u16,
    batch: Batch,
}

impl Handle {
    /// Opens a socket and finds IPVS; the kernel loads `ip_vs` when it can.
    ///
    /// # Errors
    ///
    /// [`Error::NoIpvs`], or a socket that cannot be opened.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::open(Protocol::Generic)?;
        let family = match resolve_family(&mut socket, wire::FAMILY) {
            Err(ferroute_netlink::Error::NoFamily { .. }) => return Err(Error::NoIpvs),
            family => family?,
        };
        Ok(Self { socket, family, batch: Batch::new() })
    }

    /// The whole table.
    ///
    /// One request for all servers and one per server for its destinations, because
    /// `/proc/net/ip_vs`, which has both, tells neither scheduler flags nor thresholds nor tunnels
    /// and is read in quadratic time.
    ///
    /// # Errors
    ///
    /// When the kernel's answers cannot be read.
    pub fn dump(&mut self) -> Result<Table, Error> {
        let servers = self.servers(|answer| Ok((answer.key, answer.options)))?;
        let mut table = Table::with_capacity_and_hasher(servers.len(), Default::default());
        for (key, options) in servers {
            let destinations = self.destinations(key, |answer| Ok(answer.destination))?;
            table.insert(key, Arc::new(VirtualServer::new(options, destinations)));
        }
        Ok(table)
    }

    /// The destinations of one server with their connections; none when there is no such server.
    ///
    /// # Errors
    ///
    /// When the kernel's answers cannot be read.
    pub fn dump_destinations(
        &mut self,
        key: VirtualServerKey,
    ) -> Result<Vec<(Destination, DestinationStats)>, Error> {
        self.destinations(key, |answer| Ok((answer.destination, answer.statistics()?)))
    }

    /// The counters of all servers, in one request.
    ///
    /// # Errors
    ///
    /// When the kernel's answers cannot be read.
    pub fn dump_stats(&mut self) -> Result<Vec<(VirtualServerKey, Statistics)>, Error> {
        self.servers(|answer| Ok((answer.key, answer.statistics()?)))
    }

    /// Carries out changes in their order, one message each, and returns those refused, in order.
    /// A refusal does not stop the rest.
    ///
    /// # Errors
    ///
    /// When the outcome is unknown from some change on: dump and compare.
    pub fn apply(&mut self, changes: &[Change]) -> Result<Vec<ChangeFailure>, Error> {
        let mut failures = Vec::new();
        let mut rest = changes.iter().enumerate().peekable();
        while let Some(&(first, _)) = rest.peek() {
            self.batch.clear();
            while let Some((_, change)) = rest.next_if(|_| self.batch.bytes().len() < BATCH) {
                wire::change(&mut self.batch, self.family, change);
            }
            for failure in self.socket.execute(&self.batch)? {
                let index = first + failure.index;
                if let Some(change) = changes.get(index) {
                    failures.push(ChangeFailure { index, error: ChangeError::of(change, failure) });
                }
            }
        }
        Ok(failures)
    }

    /// The idle timeouts of connections.
    ///
    /// # Errors
    ///
    /// When the kernel's answer cannot be read.
    pub fn timeouts(&mut self) -> Result<Timeouts, Error> {
        self.batch.clear();
        wire::get_timeouts(&mut self.batch, self.family);
        self.one("IPVS_CMD_GET_CONFIG", wire::decode_timeouts)
    }

    /// Sets the idle timeouts of connections; 0 leaves one as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with EINVAL for one above 2^31 ticks (248 days at 100 Hz, 24 at 1000 Hz).
    pub fn set_timeouts(&mut self, timeouts: &Timeouts) -> Result<(), Error> {
        self.batch.clear();
        wire::set_timeouts(&mut self.batch, self.family, timeouts);
        self.order("set the connection timeouts")
    }

    /// Deletes every virtual server, whoever made it. Destinations stay in a list of the kernel's
    /// for a minute or two, and each one added meanwhile walks that list: never flush to rebuild.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`].
    pub fn flush(&mut self) -> Result<(), Error> {
        self.batch.clear();
        wire::flush(&mut self.batch, self.family);
        self.order("flush IPVS")
    }

    /// The version of the kernel's IPVS and the size of its connection table.
    ///
    /// # Errors
    ///
    /// When the kernel's answer cannot be read.
    pub fn version(&mut self) -> Result<Info, Error> {
        self.batch.clear();
        wire::get_info(&mut self.batch, self.family);
        self.one("IPVS_CMD_GET_INFO", wire::decode_info)
    }

    /// How many messages were sent since the handle was opened.
    pub fn messages_sent(&self) -> u64 {
        self.socket.messages_sent()
    }

    /// How many of the messages sent only read.
    pub fn requests_sent(&self) -> u64 {
        self.socket.requests_sent()
    }

    /// How many system calls that took.
    pub fn sends(&self) -> u64 {
        self.socket.sends()
    }

    fn servers<T>(
        &mut self,
        mut keep: impl FnMut(wire::ServerAnswer<'_>) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, Error> {
        self.batch.clear();
        wire::get_servers(&mut self.batch, self.family);
        Ok(self.socket.dump(&self.batch, |_, payload| keep(wire::decode_server(payload)?).map(Some))?)
    }

    fn destinations<T>(
        &mut self,
        key: VirtualServerKey,
        mut keep: impl FnMut(wire::DestinationAnswer<'_>) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, Error> {
        self.batch.clear();
        wire::get_destinations(&mut self.batch, self.family, &key);
        Ok(self.socket.dump(&self.batch, |_, payload| {
            keep(wire::decode_destination(key.family(), payload)?).map(Some)
        })?)
    }

    fn one<T>(
        &mut self,
        what: &'static str,
        decode: impl Fn(&[u8]) -> Result<T, DecodeError>,
    ) -> Result<T, Error> {
        let answers = self.socket.dump(&self.batch, |_, payload| decode(payload).map(Some))?;
        let missing = || ferroute_netlink::Error::Decode(DecodeError::Missing { what });
        Ok(answers.into_iter().next().ok_or_else(missing)?)
    }

    fn order(&mut self, action: &'static str) -> Result<(), Error> {
        match self.socket.execute(&self.batch)?.into_iter().next() {
            Some(failure) => Err(Error::Refused { action, failure }),
            None => Ok(()),
        }
    }
}
