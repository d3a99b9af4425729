//! An independent judge of NetworkPolicy.
//!
//! It says of one packet whether the objects of a cluster let it through, and why. It is written from
//! the prose of the API (the field comments of networking/v1, and the Kubernetes documentation's page
//! on network policies), shares no code with the implementation it judges, and reads the API's own
//! types. It is slow and plain on purpose: nothing is compiled, merged or cached beyond parsed
//! addresses, so that a mistake in one of those cannot be made on both sides.
//!
//! - [`judge`]: the verdict on one packet.
//! - [`selector`] and [`address`]: label selectors; blocks of addresses.
//! - [`generate`]: random clusters with overlapping selectors, blocks and ports, from a seed; [`topology`]:
//!   the addresses they are made on.
//! - [`probes`]: packets worth asking about.
//! - [`mod@shrink`]: the smallest cluster that still shows a mismatch; [`mod@manifests`] prints it.
//! - [`cases`]: the cases of the upstream end-to-end suite, with their expected reachability.
//!
//! ICMP is outside: it is always allowed. So are replies: the verdict is on the first packet of a
//! connection.

pub mod address;
pub mod cases;
pub mod generate;
pub mod judge;
pub mod manifests;
pub mod probes;
pub mod random;
pub mod selector;
pub mod shrink;
pub mod topology;

pub use generate::Shape;
pub use judge::{Cluster, Judge, Packet, Protocol, Side, Verdict, Why, allows};
pub use manifests::manifests;
pub use probes::Probes;
pub use random::Random;
pub use shrink::shrink;
pub use topology::{Place, Topology};
