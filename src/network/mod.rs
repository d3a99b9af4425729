//! The pod network of this node: its addresses, learned routes, tunnels, MTU, masquerade.
//!
//! A room apart from the BGP speaker's: it takes routes from whoever learned them, and each of the two
//! can be tested, and fail, without the other.
//!
//! - [`node_address`]: which of this machine's addresses stands for the node. Pure.

pub mod node_address;
