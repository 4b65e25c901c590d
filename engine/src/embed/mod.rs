//! Adapters for what embedders already have.

#[cfg(feature = "vm-memory")]
pub mod vm_memory;
