//! A BGP-4 speaker for one node.
//!
//! What is here, by RFC:
//!
//! - [`message`]: every message of RFC 4271 section 4, ROUTE-REFRESH (2918, 7313), capabilities (5492,
//!   long form 9072) and the attributes a node meets. Errors in an UPDATE are handled as RFC 7606 says.
//! - [`bfd`]: fast detection of broken paths, asynchronous mode (5880), over one hop (5881) and several
//!   (5883).
//! - [`session`], [`fsm`]: the OPEN and what follows from both (4271 section 6.2, 4724, 5492, 6286, 7607, 7911,
//!   8538, 8654, 8950), the state machine with collision resolution (4271 sections 6.8 and 8, 6608, 9687,
//!   9003).
//! - [`transport`]: TCP with MD5 signatures (2385), TTL security (5082), link-local addresses.
//!
//! The codec is our own: the one published crate that does all of this needs a newer compiler than ours
//! and breaks its interface monthly, the others panic, exhaust memory or lack RFC 7606 or 8950; and
//! decoding straight into shared attribute sets is what makes large tables cheap.

pub mod bfd;
pub mod fsm;
pub mod message;
pub mod session;
pub mod transport;
