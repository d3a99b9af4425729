//! A BGP-4 speaker for one node.
//!
//! What is here, by RFC:
//!
//! - [`message`]: the messages of RFC 4271 section 4, read with the error handling of section 6 as revised
//!   by RFC 7606, 7607 and 9774. Multiprotocol routes (4760, next hops 2545 and 8950), four-octet AS numbers
//!   and their translation for older speakers (6793), several paths (7911 section 3), extended messages
//!   (8654), ROUTE-REFRESH (2918, 7313), End-of-RIB (4724 section 2). Capabilities (5492, long form 9072) of
//!   all these, and of graceful restart (4724, 8538). Communities (1997, 4360, 8092), route reflection (4456),
//!   confederation segments (5065 section 3). NOTIFICATION with subcodes of 4486, 6608, 8538, 9003 and 9384.
//! - [`bfd`]: fast detection of broken paths, asynchronous mode (5880), over one hop (5881) and several
//!   (5883).
//! - [`session`], [`fsm`]: the OPEN and what follows from both (4271 section 6.2, 4724, 5492, 6286, 7607, 7911,
//!   8538, 8654, 8950), the state machine with collision resolution (4271 sections 6.8 and 8, 6608, 9687,
//!   9003).
//! - [`rib`], [`decision`], [`policy`]: Adj-RIB-In, Loc-RIB and Adj-RIB-Out (4271 sections 3.2 and 9), route
//!   reflection (4456), communities (1997, 4360, 8092), graceful shutdown (8326), nothing from and to
//!   external peers without a policy (8212), several paths to a prefix (7911), stale routes (4724, 7313).
//! - [`speaker`], [`peer`]: the tasks: one for each peer, one for the RIB. Sessions end with their path
//!   (BFD, 5882, 9384). Graceful restart of either side
//!   (4724, 8538), route refresh (2918, 7313), limits (4486), send hold timer (9687).
//! - [`transport`]: TCP with MD5 signatures (2385), TTL security (5082), link-local addresses.
//!
//! The codec is our own: the one published crate that does all of this needs a newer compiler than ours
//! and breaks its interface monthly, the others panic, exhaust memory or lack RFC 7606 or 8950; and
//! decoding straight into attribute sets that are shared is what makes large tables cheap.

pub mod bfd;
pub mod decision;
pub mod fsm;
pub mod message;
pub mod peer;
pub mod policy;
pub mod rib;
pub mod session;
pub mod speaker;
pub mod transport;
