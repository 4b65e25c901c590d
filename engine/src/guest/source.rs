//! A guest that can be moved away.

use crate::dirty::DirtySource;
use crate::error::Result;
use crate::guest::{FixedCosts, GuestDescription, Liveness, Vouched};
use crate::memory::GuestMemory;
use crate::memory::lost_page::LostPage;
use crate::watch::Watch;
use std::sync::Arc;

/// A guest that can be moved away.
pub trait SourceGuest: Send {
    /// What the destination must match.
    fn describe(&self) -> GuestDescription;

    /// Takes note of what the operator vouches for. Called before [`Self::preflight`].
    fn vouch(&mut self, vouched: &Vouched) {
        let _ = vouched;
    }

    /// Fails, with the fix, if something stands against moving it. Touches nothing.
    fn preflight(&mut self) -> Result<()>;

    /// Its memory, mapped readable in this process; what it is now, right after
    /// [`Self::preflight`].
    fn memory(&self) -> &Arc<GuestMemory>;

    /// Fails if what [`Self::memory`] maps is not the memory that the guest has now: memory was
    /// plugged in or out, or replaced. Asked before a digest of it is taken.
    fn check_memory(&mut self) -> Result<()> {
        Ok(())
    }

    /// Largest device state that `save` may produce, in bytes.
    fn state_bytes_max(&self) -> u64;

    /// What the device state will probably be, in bytes.
    fn state_bytes_expected(&self) -> u64;

    /// What a downtime costs besides pushing pages; the sync's part is measured by the engine.
    fn fixed_costs(&self) -> FixedCosts;

    /// A check, usable from anywhere, that whoever runs the guest still lives.
    fn liveness(&self) -> Liveness;

    /// Notes the addresses by which the guest knows these pages, where that can be told.
    fn name_guest_physical(&mut self, pages: &mut [LostPage]) {
        let _ = pages;
    }

    /// Whether memory may be taken away from it while it runs (balloon, free page reporting,
    /// virtio-mem). No dirty source reports that, so the engine looks for holes at the end.
    fn may_discard(&mut self) -> Result<bool>;

    /// Whether its vCPUs run. A guest that its operator paused is moved paused.
    fn is_running(&mut self) -> Result<bool>;

    /// Starts to follow writes. Everything already in memory counts as not written. What takes long
    /// asks the watch now and then, and ends with its error, with nothing followed any more.
    fn start_tracking(&mut self, watch: &mut Watch<'_>) -> Result<Box<dyn DirtySource>>;

    /// Returns when no device transfer that was under way at the call is any more. Called between a
    /// sync and the first byte that is read of its pages: a transfer by DMA into pinned pages
    /// (direct disk I/O) is reported as a write when it begins, not when it ends.
    fn drain_io(&mut self) -> Result<()>;

    /// Does what can be done ahead of the downtime, with the guest still running.
    fn arm(&mut self) -> Result<()>;

    /// Stops the vCPUs, if they run. When it returns, the guest writes no more memory by itself;
    /// saving may still write some.
    fn pause(&mut self) -> Result<()>;

    /// Starts to save the device state, which goes on by itself until [`Self::save`] takes it.
    fn begin_save(&mut self) -> Result<()>;

    /// Hands the device state to `sink`, piece by piece, while it is being made; an empty piece
    /// every now and then where there is none, so that `sink` can end the wait.
    fn save(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>;

    /// The last act before Commit is sent: from here on nothing on this host, whatever dies, may
    /// let the guest run again by itself.
    fn seal(&mut self) -> Result<()>;

    /// Takes back everything since `drain_io` and `arm`; the guest runs again if it ran before.
    /// Must work from any state, may be called again (after an error it tries anew), and lifts the
    /// seal: it is called only when the guest can never run at the destination. Called first while
    /// its writes are still followed, so that it runs at once, and again when they are not any
    /// more.
    fn resume(&mut self) -> Result<()>;

    /// Keeps the tracking of a guest that runs at the destination until [`Self::end`]. Lifting the
    /// protection of its memory would keep a core busy (some 24 ms a GiB) for nothing, at a moment
    /// when, on one host, the guest needs that core for its first steps.
    fn retire(&mut self, tracking: Box<dyn DirtySource>);

    /// Ends the guest here: it runs at the destination. For the embedder, after the migration; not
    /// called by the engine.
    fn end(&mut self) -> Result<()>;
}
