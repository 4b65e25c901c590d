//! Live migration of virtual machines over one-sided writes.

pub mod bitmap;
pub mod cli;
pub mod destination;
pub mod dirty;
pub mod error;
pub mod guest;
pub mod hold;
pub mod memory;
pub mod page;
pub mod policy;
pub mod precopy;
pub mod prefault;
pub mod progress;
pub mod protocol;
pub mod report;
pub mod session;
pub mod source;
pub mod supervisor;
pub mod switchover;
pub mod verify;

pub use error::{Error, Result};

/// This release, as it introduces itself to a peer.
pub const VERSION: &str = concat!("pageferry ", env!("CARGO_PKG_VERSION"));
