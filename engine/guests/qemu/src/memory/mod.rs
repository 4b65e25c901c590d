//! Memory of a QEMU: which blocks it has, what they are mapped from, and whose they are.

mod file;
pub mod find;
pub mod image;
pub(crate) mod mtree;
pub mod ownership;
mod table;
