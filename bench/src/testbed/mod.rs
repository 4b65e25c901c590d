//! What guests are moved on: a QEMU or a microvm with the test guest, its console, and what its
//! processes say and cost.

pub mod console;
pub mod cpu;
pub mod images;
pub mod machine;
pub mod microvm;
pub mod process;
mod said;
