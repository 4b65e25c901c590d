//! May this write be posted now?

use std::ops::Range;

/// The memory of a write that was not ready.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) region: usize,
    pub(crate) stripes: Range<usize>,
    pub(crate) remote: (u32, u64),
}

/// The keys of a write whose memory is ready at both ends.
pub(crate) struct Keys {
    /// Of the local memory: they differ where it lies across two registrations.
    pub(super) first: u32,
    pub(super) last: u32,
    pub(super) remote: u32,
    /// Stripes of the local memory.
    pub(super) stripes: Range<usize>,
}

/// What became of a request.
pub(crate) enum Admission {
    Posted,
    NoCredit,
    NotReady,
}
