//! What can go wrong, with the kernel's own words.

use std::fmt;
use std::time::Duration;

use nix::errno::Errno;

use crate::{DecodeError, Protocol};

/// Why a request could not be carried out, or its answer not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket could not be opened or set up.
    #[error("cannot {action} a {protocol} netlink socket: {}", errno_text(*source as i32))]
    Open {
        /// Which protocol.
        protocol: Protocol,
        /// What was tried: "open", "bind", ...
        action: &'static str,
        /// The system's answer.
        source: Errno,
    },
    /// A multicast group could not be joined.
    #[error("cannot join multicast group {group}: {}", errno_text(*source as i32))]
    Join {
        /// Group number.
        group: u32,
        /// The system's answer.
        source: Errno,
    },
    /// A send failed as a whole. The messages of earlier sends of the batch were carried out.
    #[error("cannot send {messages} netlink messages: {}", errno_text(*source as i32))]
    Send {
        /// How many messages were in the send.
        messages: usize,
        /// The system's answer.
        source: Errno,
    },
    /// Reading failed.
    #[error("cannot read from the netlink socket: {}", errno_text(*source as i32))]
    Receive {
        /// The system's answer.
        source: Errno,
    },
    /// The kernel refused a dump or get request.
    #[error("the kernel refused the request: {0}")]
    Refused(Failure),
    /// The receive buffer overflowed: answers or events are lost. After [`crate::Socket::execute`] it
    /// is unknown which messages of the batch were carried out; after
    /// [`crate::Socket::receive_events`] some events are missing. Dump the table and compare.
    #[error("the receive buffer overflowed and answers were lost; the table has to be read again")]
    Overrun,
    /// No answer came in time.
    #[error("the kernel did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// An answer was longer than the receive buffer. The buffer has been enlarged: try again.
    #[error("an answer of {0} bytes did not fit the receive buffer")]
    Truncated(usize),
    /// The table changed during every attempt to dump it. Try again later.
    #[error("the table changed during each of {0} attempts to read it")]
    Interrupted(u32),
    /// An answer has an unexpected shape.
    #[error("cannot understand the kernel's answer: {0}")]
    Decode(#[from] DecodeError),
    /// A message holds an attribute longer than 65,535 bytes. Nothing of the batch was sent.
    #[error("message {index} of the batch has an attribute longer than 65,535 bytes")]
    TooLong {
        /// Index of the message in the batch.
        index: usize,
    },
    /// A dump takes exactly one request. Nothing was sent.
    #[error("a dump takes one request, not {0}")]
    NotOneRequest(usize),
    /// The kernel does not know a generic netlink family, and could not load it.
    #[error("the kernel has no generic netlink family {name}: its module is missing or not loaded")]
    NoFamily {
        /// Name of the family.
        name: String,
    },
}

impl Error {
    /// The errno behind the error, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Open { source, .. }
            | Self::Join { source, .. }
            | Self::Send { source, .. }
            | Self::Receive { source } => Some(*source as i32),
            Self::Refused(failure) => Some(failure.errno),
            _ => None,
        }
    }
}

/// One message that the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Index of the message in its batch.
    pub index: usize,
    /// Positive errno.
    pub errno: i32,
    /// The kernel's extended acknowledgement, where it gave one.
    pub text: Option<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&errno_text(self.errno))?;
        match &self.text {
            Some(text) => write!(f, ": {text}"),
            None => Ok(()),
        }
    }
}

/// Name and meaning of a positive errno, as in "ENOENT (No such file or directory)".
pub fn errno_text(errno: i32) -> String {
    match Errno::from_raw(errno) {
        Errno::UnknownErrno => format!("errno {errno}"),
        known => format!("{known:?} ({})", known.desc()),
    }
}
