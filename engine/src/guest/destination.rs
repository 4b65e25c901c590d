//! A guest that waits to be filled.

use crate::clock;
use crate::error::Result;
use crate::guest::{GuestDescription, Liveness, always_alive};
use crate::memory::GuestMemory;
use crate::memory::prefault::MapAhead;
use pageferry_transport::MemoryRegion;
use std::sync::Arc;
use std::time::Instant;

/// A guest that waits to be filled.
///
/// Methods without a default are what every guest needs; each other one says for which guests its
/// default is right.
pub trait DestinationGuest: Send {
    /// What it is; must equal the source's.
    fn describe(&self) -> GuestDescription;

    /// Its memory, mapped writable in this process, and all zeros until the source writes it
    /// ([`GuestMemory::make_zero`]).
    fn memory(&self) -> &Arc<GuestMemory>;

    /// Takes the device state from the first `len` bytes of `state`. All memory has arrived.
    fn load(&mut self, state: &MemoryRegion, len: usize) -> Result<()>;

    /// Commit has come: from here on the guest must run here, if it ran before, even if this
    /// process dies.
    fn seal(&mut self, was_running: bool) -> Result<()>;

    /// Lets the vCPUs run, if they ran at the source. [`crate::Error::Unknown`] if it cannot be
    /// told whether they do; any other error means that they do not.
    fn run(&mut self, was_running: bool) -> Result<()>;

    /// Throws the copy away. When it returns `Ok` the guest does not run here and never will.
    fn discard(&mut self) -> Result<()>;

    /// A check, usable from anywhere, that the process that will run the guest still lives.
    ///
    /// The default never fails: for a guest that lives in this process, and ends with it.
    fn liveness(&self) -> Liveness {
        always_alive()
    }

    /// Fails, naming the difference, if a guest of this description cannot run here although the
    /// rest of the description is equal: its processor, above all. Touches nothing.
    ///
    /// The default takes every guest: for one whose description has an empty `platform`.
    fn admit(&mut self, theirs: &GuestDescription) -> Result<()> {
        let _ = theirs;
        Ok(())
    }

    /// Whether every huge page of its memory was reserved when it was made, so that none can be
    /// missing later.
    ///
    /// The default says so: for memory without huge pages, or with all of them reserved.
    fn has_huge_pages_set_aside(&self) -> bool {
        true
    }

    /// Maps pages of populated memory for the guest before it is here; `None`, the default, where
    /// that cannot be done.
    fn map_ahead(&self) -> Option<MapAhead> {
        None
    }

    /// Asked after [`Self::run`]: since when all of its vCPUs run; `None` while one does not. A
    /// busy guest may take the processor from the thread that let it run: a monitor that notes when
    /// each vCPU enters the guest knows better than the caller.
    ///
    /// The default says that they run when it is asked.
    fn running_since(&self) -> Option<Instant> {
        Some(clock::now())
    }
}
