//! What the receiver threads of a target share: where bytes may go, and what has come.

use crate::exposed::Exposed;
use crate::failure::LaneFailure;
use crate::fences::Arrivals;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Condvar, Mutex};

/// What the threads of the lanes and the target have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) exposed: Mutex<Exposed>,
    pub(crate) progress: Mutex<Progress>,
    pub(crate) changed: Condvar,
    pub(super) placed_bytes: AtomicU64,
    pub(super) stopping: AtomicBool,
}

#[derive(Debug)]
pub(crate) struct Progress {
    pub(crate) arrivals: Arrivals,
    pub(crate) failure: Option<LaneFailure>,
}
