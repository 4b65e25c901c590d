//! The program `pageferry`: commands, supervisors and their output.

pub mod cli;
pub mod output;
pub mod supervisor;
pub mod vmm;
