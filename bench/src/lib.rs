//! The downtime harness: the same guest moved in several ways, and the same bytes, in turns within
//! one run.

pub mod bulk;
pub mod collect;
pub mod compare;
pub mod cost;
pub mod dirty;
pub mod downtime;
pub mod gaps;
pub mod memory;
pub mod peers;
pub mod progress;
pub mod rdma;
pub mod record;
pub mod report;
pub mod shaped;
pub mod simulate;
pub mod stats;
pub mod summary;
pub mod sweep;
pub mod sweeper;
pub mod testbed;
pub mod told;
pub mod watch;
pub mod ways;
