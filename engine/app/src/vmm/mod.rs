//! The VMMs whose guests a supervisor can hold.

pub(crate) mod console;
pub mod launch;
pub mod microvm;
pub mod qemu;
