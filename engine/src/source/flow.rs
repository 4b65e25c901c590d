//! What is under way from the source: the pump, what the guest writes, what is still to be sent.

use crate::dirty::DirtySource;
use crate::error::Result;
use crate::guest::Facts;
use crate::memory::bitmap::DirtyBitmap;
use crate::memory::page::PageRun;
use crate::source::pump::Pump;
use crate::source::switchover::{Drained, Paused};
use crate::watch::Watch;
use pageferry_transport::MemoryRegion;
use std::sync::Arc;

/// How often the source looks for memory that was touched for the first time, right before the
/// pause. Each look takes as long as registering what the one before has found; what the last finds
/// goes by the staging region.
const FRESH_LOOKS_MAX: u32 = 4;

/// What is under way while it is sent.
pub(super) struct Flow<'p> {
    pub(super) pump: Pump<'p>,
    pub(super) tracking: Box<dyn DirtySource>,
    pub(super) dirty: DirtyBitmap,
    /// What the guest had ever touched when tracking began.
    pub(super) touched: Vec<PageRun>,
    /// As they were then.
    pub(super) facts: Facts,
    /// Whether the link pins what it reads.
    pub(super) by_rdma: bool,
}

impl Flow<'_> {
    /// The last push with the guest running, and a fence behind it.
    pub(super) fn push_ahead(
        &mut self,
        zeros: Option<&Arc<MemoryRegion>>,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let Self { pump, tracking, dirty, .. } = self;
        let mut draining = || watch().and_then(|()| tracking.drain_early());
        if let Some(zeros) = zeros {
            pump.push_freed(dirty, zeros, &mut draining)?;
        }
        pump.push(dirty, &mut draining, &mut |_| {})?;
        let tag = pump.fence()?;
        pump.wait_fence(tag, &mut draining)
    }

    /// Nothing shall be registered once the guest is paused, not even in the background.
    pub(super) fn register_ahead(
        &mut self,
        state_bytes: usize,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        self.pump.wait_for_downtime(state_bytes, watch)?;
        self.pump.make_ready(self.touched.iter().copied(), watch)?;
        for _ in 0..FRESH_LOOKS_MAX {
            // What is found is sent after the pause, which settles all I/O.
            self.tracking.sync(&mut self.dirty)?;
            if self.pump.make_ready(self.dirty.runs(u64::MAX), watch)? {
                break;
            }
        }
        Ok(())
    }

    /// See [`Paused::drain`].
    pub(super) fn drain<'g>(
        &mut self,
        paused: Paused<'g>,
        state: &Arc<MemoryRegion>,
        zeros: Option<&Arc<MemoryRegion>>,
        watch: &mut Watch<'_>,
    ) -> Result<Drained<'g>> {
        let tracking = self.tracking.as_mut();
        paused.drain(&mut self.pump, &mut self.dirty, tracking, state, zeros, watch)
    }
}
