//! The pass for Services: Services and endpoints to what the kernel must hold.

pub mod settings;
