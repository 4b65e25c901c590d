//! The two ends of a link, and the rule that says which lane carries which address.

use crate::error::Result;
use crate::region::{MemoryRegion, RemoteRegion};
use crate::work::{Completion, FenceTag, WorkRequest};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// What carries the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransportKind {
    /// Queue pairs of an RDMA device.
    Rdma,
    /// TCP connections driven by io_uring.
    Tcp,
    /// Memory copies inside one process.
    Loopback,
}

impl TransportKind {
    /// The name used in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
            Self::Loopback => "loopback",
        }
    }
}

/// The end that pushes: it runs on the source host.
pub trait Initiator: Send {
    /// What carries the bytes.
    fn kind(&self) -> TransportKind;

    /// Number of lanes, at least one.
    fn lanes(&self) -> usize;

    /// Makes `region` known to the link so that slices of it can be posted. Costs nothing a byte.
    fn register(&mut self, region: &Arc<MemoryRegion>) -> Result<()>;

    /// Says which parts of a registered region will be posted, in about this order, so that a link
    /// that must pin memory does so ahead of the data and beside it. What is posted without having
    /// been expected is made ready when it is posted, which takes longer.
    fn expect(&mut self, region: &Arc<MemoryRegion>, parts: &[Range<usize>]) -> Result<()> {
        let _ = (region, parts);
        Ok(())
    }

    /// Has the memory of these writes made ready at both ends without posting them. True if all of
    /// it is; if not, it is being done, and the caller asks again after a [`Self::poll`].
    fn make_ready(&mut self, writes: &[WorkRequest]) -> Result<bool> {
        let _ = writes;
        Ok(true)
    }

    /// Whether a write could be posted now as far as its memory is concerned. Asks nobody for
    /// anything.
    fn is_ready(&mut self, write: &WorkRequest) -> Result<bool> {
        let _ = write;
        Ok(true)
    }

    /// Registrations that were made so far, at this end and, as far as it has said so, at the
    /// other.
    fn registrations(&self) -> u64 {
        0
    }

    /// Posts a prefix of `batch` and returns its length; zero means no credit, or memory that one
    /// of the ends is still making ready. Whatever was accepted is on its way when this returns: no
    /// further call is needed to flush it.
    fn post(&mut self, batch: &[WorkRequest]) -> Result<usize>;

    /// Appends completions to `out` and returns how many. With nothing to hand, waits until
    /// `deadline` for the first, or until a post that was refused may be tried again, and then
    /// returns zero; a deadline in the past only looks.
    fn poll(&mut self, out: &mut Vec<Completion>, deadline: Instant) -> Result<usize>;

    /// Sends a fence behind everything posted so far, on every lane.
    fn fence(&mut self, tag: FenceTag) -> Result<()>;

    /// Sends the last fence: with it the target's lanes end, and nothing more may be posted. It may
    /// have no completion.
    fn last_fence(&mut self, tag: FenceTag) -> Result<()>;

    /// Bytes that crossed the lanes so far, headers included.
    fn bytes_on_wire(&self) -> u64;
}

/// The end that is written to: it runs on the destination host.
pub trait Target: Send {
    /// Allows the peer to write `region`, and returns how the peer must address it.
    fn expose(&mut self, region: &Arc<MemoryRegion>) -> Result<RemoteRegion>;

    /// Says which parts of an exposed region will be written, in about this order: see
    /// [`Initiator::expect`].
    fn expect(&mut self, region: &Arc<MemoryRegion>, parts: &[Range<usize>]) -> Result<()> {
        let _ = (region, parts);
        Ok(())
    }

    /// Waits until the fence `tag` has come on every lane: from then on this host's CPU sees every
    /// write that was posted before it. Fences may be skipped: waiting for a later tag is enough.
    fn wait_fence(&mut self, tag: FenceTag, deadline: Instant) -> Result<()>;

    /// Bytes placed so far. Rises while the peer is alive and sending, so a caller can tell a slow
    /// peer from a dead one. Returns the lane's error if one has broken.
    fn bytes_placed(&mut self) -> Result<u64>;

    /// Takes back every permission to write. When this returns no byte changes any more. After a
    /// last fence there is little left to do.
    fn revoke(&mut self) -> Result<()>;
}
