//! How two ends come to have queue pairs.

pub(super) mod connect;
pub(super) mod limits;
pub(super) mod listen;
pub(super) mod path;
