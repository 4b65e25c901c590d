//! What a synthetic guest is to do.

use serde::{Deserialize, Serialize};

/// What kind of guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyntheticOptions {
    /// Size of its memory in pages.
    pub pages: u64,
    /// Pages that are written at all; the rest stays a hole.
    pub touched_pages: u64,
    /// Threads that write; each has its own share of the pages.
    pub threads: u32,
    /// Pages a second that each thread writes; `None` is as fast as it can.
    pub pages_per_second: Option<u32>,
    /// Seed of what is written where.
    pub seed: u64,
    /// Whether pages are given back to the host now and then, as a balloon does. They read as zeros
    /// until they are written again.
    pub discards: bool,
}
