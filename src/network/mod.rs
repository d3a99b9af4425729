//! The pod network of this node: its addresses, learned routes, tunnels, MTU, masquerade.
//!
//! A room apart from the BGP speaker's: it takes routes from whoever learned them ([`learned`]), and each of
//! the two can be tested, and fail, without the other.
//!
//! - [`settings`]: what the user chose. Plain data.
//! - [`node_address`]: which of this machine's addresses stands for the node. Pure. [`OwnAddresses`] tells
//!   other rooms.
//! - [`learned`]: what a speaker told, and what of it is stale.
//! - [`fib`]: learned routes to routes of the kernel, and what is refused. Pure.
//! - [`overlay`]: tunnels to nodes in other subnets and the rules that lead to them. Pure.
//! - [`egress`]: masquerade, forwarding, segment sizes: chains and sets. Pure.
//! - [`cni_file`]: pod CIDRs and MTU in the network configuration.
//! - [`room`]: the thread that owns the kernel's part; [`removal`]: takes all of it away again.
//! - [`view`]: what other threads see of the room. [`plan`](plan()): what it would change.

pub mod cni_file;
pub mod egress;
mod error;
mod facts;
pub mod fib;
mod kernel;
pub mod learned;
pub mod node_address;
pub mod overlay;
mod own_addresses;
mod plan;
pub mod removal;
pub mod room;
pub mod settings;
pub mod view;

pub use error::Error;
pub use own_addresses::OwnAddresses;
pub use plan::plan;
pub use removal::cleanup;
pub use room::Room;
pub use settings::Settings;
pub use view::{Status, View};
