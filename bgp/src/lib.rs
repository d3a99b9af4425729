//! A BGP-4 speaker for one node.
//!
//! What is here, by RFC:
//!
//! - [`message`]: every message of RFC 4271 section 4, ROUTE-REFRESH (2918, 7313), capabilities (5492,
//!   long form 9072) and the attributes a node meets. Errors in an UPDATE are handled as RFC 7606 says.
//! - [`bfd`]: fast detection of broken paths, asynchronous mode (5880), over one hop (5881) and several
//!   (5883).
//!
//! The codec is our own: the one published crate that does all of this needs a newer compiler than ours
//! and breaks its interface monthly, the others panic, exhaust memory or lack RFC 7606 or 8950; and
//! decoding straight into shared attribute sets is what makes large tables cheap.

pub mod bfd;
pub mod message;
