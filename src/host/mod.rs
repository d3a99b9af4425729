//! This machine's kernel: dump and apply, nothing clever.
