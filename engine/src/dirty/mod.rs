//! Where dirty pages come from.
//!
//! Three sources, for two ways to run a guest. Of a process that is not ours (QEMU) the page tables
//! tell:
//! [`pagemap`]. Of a virtual machine that this process made, KVM tells: [`ring`], or [`log`] where
//! [`probe`] finds that the ring cannot be trusted. [`kvm`] is what these two know of the machine.

pub mod kvm;
pub mod log;
pub mod pagemap;
pub mod probe;
pub mod ring;

use crate::error::Result;
use crate::memory::bitmap::DirtyBitmap;

/// What one sync did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Synced {
    /// Pages reported as written since the sync before.
    pub pages: u64,
}

/// Tells which pages were written since it was asked last.
///
/// # Contract
/// Protection of every reported page is re-armed **before** `sync` returns, so a write that comes
/// while the page is being read or sent makes it dirty again. The first sync reports what was
/// written since the source was made. Dropping it ends the tracking: the guest runs at full speed
/// again and nothing of it is left behind.
pub trait DirtySource: Send {
    /// Adds to `into` every page written since the last call.
    fn sync(&mut self, into: &mut DirtyBitmap) -> Result<Synced>;

    /// Called in mid-round, between batches: may move what is pending out of buffers of the kernel
    /// that can run full, and must not lose or report anything. Cheap where there is nothing to
    /// move.
    fn drain_early(&mut self) -> Result<()> {
        Ok(())
    }
}
