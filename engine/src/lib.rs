//! Live migration of virtual machines over one-sided writes.

pub mod bitmap;
pub mod dirty;
pub mod error;
pub mod guest;
pub mod memory;
pub mod page;

pub use error::{Error, Result};
