//! ipsets over netlink: model, difference, and a handle that reads and writes them.

mod diff;
mod set;

pub use diff::{Change, Difference, Retype, apply_to, diff, diff_entries};
pub use set::{Entry, Extra, Kind, Mark, Misfit, Options, Set, SetType, Sets};
