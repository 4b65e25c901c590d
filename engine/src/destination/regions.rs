//! What a session has at the destination besides the guest: the lanes' target, and memory for the
//! device state and for staged pages. Exposes it, and takes it down.

use crate::clock;
use crate::error::Result;
use crate::limits::STATE_WARM_BYTES;
use crate::memory::GuestMemory;
use crate::memory::page::{PAGE_BYTES, PageRun};
use crate::memory::staging::STAGING_BYTES;
use crate::protocol::{Accept, Features, Hello};
use pageferry_transport::{MemoryRegion, Target};
use std::sync::Arc;
use std::time::Duration;

/// How long a session's memory and lanes stay after the guest has begun to run.
const RETIRE_AFTER: Duration = Duration::from_millis(300);

/// What a session has besides the guest.
pub(crate) struct SessionResources {
    /// The lanes' end.
    pub(crate) target: Box<dyn Target>,
    /// For the device state.
    pub(crate) state: Arc<MemoryRegion>,
    /// For pages that are not registered when they come.
    pub(crate) staging: Arc<MemoryRegion>,
}

impl SessionResources {
    /// For a source that says this.
    pub(crate) fn new(target: Box<dyn Target>, hello: &Hello) -> Result<Self> {
        let state = MemoryRegion::anonymous(hello.state_bytes_max.max(PAGE_BYTES) as usize)?;
        Ok(Self { target, state, staging: MemoryRegion::anonymous(STAGING_BYTES)? })
    }

    /// Takes them down a while after the guest has begun to run: unmapping holds up the faults of a
    /// guest that lives in this process, and it has many at first.
    pub(crate) fn retire(self) {
        let retiring = clock::spawn("retire", move || {
            clock::sleep(RETIRE_AFTER);
            drop(self);
        });
        if let Err(e) = retiring {
            tracing::debug!(error = %e, "a session is taken down at once");
        }
    }

    /// Exposes every slot, the state and the staging region. The memory reads as zeros: whoever
    /// made the destination saw to that ([`GuestMemory::make_zero`]).
    pub(crate) fn expose(&mut self, memory: &GuestMemory, touched: &[PageRun]) -> Result<Accept> {
        let Self { target, state, staging } = self;
        let mut slots = Vec::with_capacity(memory.slots().len());
        // The state first: it is written last, in the downtime, and must not wait behind all of
        // memory then.
        let exposed_state = target.expose(state)?.into();
        let warm = 0..STATE_WARM_BYTES.min(state.len());
        state.populate(0, warm.len())?;
        target.expect(state, std::slice::from_ref(&warm))?;
        let exposed_staging = target.expose(staging)?.into();
        let whole = 0..staging.len();
        target.expect(staging, std::slice::from_ref(&whole))?;
        for (slot, parts) in memory.slots().iter().zip(memory.parts(touched)) {
            slots.push(target.expose(slot.region())?.into());
            target.expect(slot.region(), &parts)?;
        }
        let (state, staging, features) = (exposed_state, exposed_staging, Features::default());
        Ok(Accept { slots, state, staging, features })
    }
}
