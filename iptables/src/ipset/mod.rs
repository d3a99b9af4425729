//! ipsets over netlink: model, difference, and a handle that reads and writes them.

mod diff;
mod error;
mod handle;
mod set;
mod wire;

pub use diff::{Change, Difference, Retype, apply_to, diff, diff_entries, diff_leftovers};
pub use error::{Error, Failed, Refusal};
pub use handle::Handle;
pub use set::{Entry, Extra, Kind, Mark, Misfit, Options, Set, SetType, Sets};
pub use wire::{Header, Part, decode_part};
