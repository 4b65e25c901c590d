//! The downtime harness: the same guest moved in several ways, and the same bytes, in turns within
//! one run.

pub mod bulk;
pub mod collect;
pub mod compare;
pub mod console;
pub mod cost;
pub mod cpu;
pub mod dirty;
pub mod downtime;
pub mod floor;
pub mod gaps;
pub mod machine;
pub mod memory;
pub mod microvm;
pub mod peers;
pub mod process;
pub mod progress;
pub mod rdma;
pub mod record;
pub mod report;
mod said;
pub mod shaped;
pub mod simulate;
pub mod stats;
pub mod summary;
pub mod sweep;
pub mod sweeper;
pub mod told;
pub mod watch;
pub mod ways;
