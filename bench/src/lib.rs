//! The downtime laboratory: the same guest moved in several ways, in turns, within one run.

pub mod cpu;
pub mod floor;
pub mod machine;
pub mod peers;
pub mod stats;
pub mod ways;
