//! Routes: this node's BGP speaker, and the pod network that it carries.
//!
//! - [`settings`]: what the user chose for BGP. Plain data.
//! - [`identity`]: who this node is: AS, router id, part in route reflection. Pure.
//! - [`peers`], [`external`]: Nodes and settings to peers. Pure.
//! - [`policies`]: what peers are given and may send. Pure.
//! - [`advertise`]: Nodes and Services to the routes of this node. Pure.
//! - `room`: the thread that gives all this to the speaker. [`status`], `metrics`: what it says.
//!
//! The control half owns the [`Speaker`]; whoever programs routes follows [`CurrentSpeaker`] and
//! takes [`Speaker::watch`] of each speaker that appears there.

pub mod advertise;
pub mod external;
#[cfg(test)]
mod fixture;
pub mod identity;
mod metrics;
pub mod peers;
pub mod policies;
mod room;
pub mod settings;
pub mod status;
mod view;

use ferroute_bgp::speaker::Speaker;
use tokio::sync::watch;

pub use room::{NoRuntime, Room};
pub use settings::Settings;
pub use status::{Listing, Status};
pub use view::View;

/// The speaker that runs now. There is none before this node's AS and router id are known, and
/// another one when these change: BGP has no way to change them within a session. The watch of the one
/// before ends; routes in the kernel stay until the new one says that it has heard all
/// ([`Changes::complete`](ferroute_bgp::speaker::Changes::complete)).
pub type CurrentSpeaker = watch::Receiver<Option<Speaker>>;
