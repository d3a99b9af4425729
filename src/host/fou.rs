//! Listeners that unwrap GUE: the receiving half of tunnels in UDP.
//!
//! Wire format: generic netlink family `fou`, FOU_CMD_* and FOU_ATTR_* of linux/fou.h.

use ferroute_netlink::{Batch, DecodeError, Protocol, Socket, attributes, resolve_family};

use super::modules::modprobe;
use super::{Error, Family};

const ADD: u8 = 1;
const DELETE: u8 = 2;
const GET: u8 = 3;

const ATTR_PORT: u16 = 1;
const ATTR_FAMILY: u16 = 2;
const ATTR_TYPE: u16 = 4;
/// FOU_ENCAP_GUE.
const TYPE_GUE: u8 = 2;

/// Length of `struct genlmsghdr`.
const HEADER: usize = 4;

/// One UDP port that is unwrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Listener {
    /// UDP port.
    pub port: u16,
    /// Of which family.
    pub family: Family,
    /// GUE, not a bare protocol in UDP.
    pub gue: bool,
}

impl Listener {
    /// Reads an answer of FOU_CMD_GET; `None` for a family that is not IP.
    ///
    /// # Errors
    /// When it is cut off or an attribute has a wrong length.
    pub fn decode(payload: &[u8]) -> Result<Option<Self>, DecodeError> {
        let (_, rest) = super::split_header::<HEADER>(payload)?;
        let (mut port, mut family, mut gue) = (0, None, false);
        for attribute in attributes(rest) {
            let attribute = attribute?;
            match attribute.kind {
                ATTR_PORT => port = attribute.be16()?,
                ATTR_FAMILY => family = Family::from_number(attribute.u8()?),
                ATTR_TYPE => gue = attribute.u8()? == TYPE_GUE,
                _ => {}
            }
        }
        Ok(family.map(|family| Listener { port, family, gue }))
    }
}

/// The kernel's listeners, in the network namespace of the thread that opened it.
pub struct Listeners {
    socket: Socket,
    number: u16,
    batch: Batch,
}

impl Listeners {
    /// Opens the family. `None` when this kernel does not have it; its modules are loaded first where
    /// that is allowed.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn open() -> Result<Option<Self>, Error> {
        let transport = |source| Error::Transport { action: "open the fou family", source };
        let mut socket = Socket::open(Protocol::Generic).map_err(transport)?;
        for attempt in 0..2 {
            match resolve_family(&mut socket, "fou") {
                Ok(number) => return Ok(Some(Self { socket, number, batch: Batch::new() })),
                Err(ferroute_netlink::Error::NoFamily { .. }) if attempt == 0 => {
                    for module in ["fou", "fou6"] {
                        if let Err(reason) = modprobe(module) {
                            tracing::debug!(module, reason, "not loaded");
                        }
                    }
                }
                Err(ferroute_netlink::Error::NoFamily { .. }) => {}
                Err(source) => return Err(transport(source)),
            }
        }
        Ok(None)
    }

    /// All listeners, ours or not.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub fn list(&mut self) -> Result<Vec<Listener>, Error> {
        let number = self.number;
        self.batch.clear();
        self.batch.message(number, ferroute_netlink::flags::DUMP, |body| body.raw(&[GET, 1, 0, 0]));
        self.socket
            .dump(
                &self.batch,
                |kind, payload| if kind == number { Listener::decode(payload) } else { Ok(None) },
            )
            .map_err(|source| Error::Transport { action: "list fou listeners", source })
    }

    /// Begins to unwrap GUE on a port.
    ///
    /// # Errors
    /// What the kernel refused; EADDRINUSE where a program has the port.
    pub fn add(&mut self, listener: Listener) -> Result<(), Error> {
        self.execute(ADD, "add fou listener", listener)
    }

    /// Ends it.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn delete(&mut self, listener: Listener) -> Result<(), Error> {
        self.execute(DELETE, "delete fou listener", listener)
    }

    fn execute(&mut self, command: u8, action: &'static str, listener: Listener) -> Result<(), Error> {
        encode(&mut self.batch, self.number, command, listener);
        let failures =
            self.socket.execute(&self.batch).map_err(|source| Error::Transport { action, source })?;
        match failures.into_iter().next() {
            None => Ok(()),
            Some(failure) => {
                let Listener { port, family, .. } = listener;
                Err(Error::refused(action, format!("UDP port {port} ({family:?})"), failure))
            }
        }
    }
}

fn encode(batch: &mut Batch, number: u16, command: u8, listener: Listener) {
    batch.clear();
    batch.message(number, 0, |body| {
        body.raw(&[command, 1, 0, 0]);
        body.be16(ATTR_PORT, listener.port);
        body.u8(ATTR_FAMILY, listener.family.number());
        if listener.gue {
            body.u8(ATTR_TYPE, TYPE_GUE);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read_back() {
        for family in Family::BOTH {
            let listener = Listener { port: 5555, family, gue: true };
            let mut batch = Batch::new();
            encode(&mut batch, 33, ADD, listener);
            assert_eq!(batch.bytes()[16..20], [ADD, 1, 0, 0]);
            assert_eq!(Listener::decode(&batch.bytes()[16..]), Ok(Some(listener)));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Listener::decode(&bytes);
        }
    }
}
