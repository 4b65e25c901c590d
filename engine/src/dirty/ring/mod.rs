//! Dirty pages of a virtual machine of this process: KVM's dirty rings, one a vCPU.
//!
//! ```text
//!   RingSet::enable     before any vCPU exists: KVM_ENABLE_CAP
//!   RingSet::new        maps each vCPU's ring
//!   RingSource::start   KVM_MEM_LOG_DIRTY_PAGES on every slot: pages are protected
//!   a write             the kernel lifts the protection of that page and writes (slot, offset) into the vCPU's ring
//!   exit 31             the ring is full: serve_full, by that vCPU's own thread; the others run on
//!   drain_early             in mid-round: rings that are half full
//!   sync             all vCPUs leave the guest once; every entry is taken; KVM_RESET_DIRTY_RINGS protects
//!                       their pages again and frees the entries; only then are they reported
//!   drop                logging off, what is left in the rings is thrown away
//! ```
//!
//! What it costs depends on what was written, not on how much memory the guest has. It does not see
//! what this process writes into guest memory itself: whoever emulates a device marks those pages.
//! See "KVM_CAP_DIRTY_LOG_RING" in `Documentation/virt/kvm/api.rst` of the kernel, and
//! docs/ordering.md for why the order is right.
//!
//! The set works at all times, with a [`RingSource`] or without: a vCPU whose ring is full while
//! tracking begins or ends is served like any other.

pub mod entries;
pub mod pending;
pub mod sync;

mod mapped;
#[cfg(test)]
mod tests;

pub use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
pub use mapped::{EnabledRings, MappedRing, RING_ENTRIES};

use super::kvm::{KickVcpus, KvmSlots};
use super::{DirtySource, Synced};
use crate::error::{Error, Result};
use crate::memory::bitmap::DirtyBitmap;
use kvm_ioctls::{VcpuFd, VmFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use sync::Rings;

/// The rings of a machine, shared by its vCPUs' threads and the migration's. One for the life of
/// the machine.
#[derive(Debug)]
pub struct RingSet {
    slots: Arc<KvmSlots>,
    rings: Rings<MappedRing, Arc<KvmSlots>>,
    followed: AtomicBool,
}

impl RingSet {
    /// Switches rings of at least `entries` entries on, as far as the kernel has them, for a
    /// machine without a vCPU.
    /// [`RING_ENTRIES`] is a good number. Such a machine has no log ([`super::log`]), for good.
    ///
    /// # Errors
    /// [`Error::Refused`] if this kernel has no rings, or the machine has vCPUs already.
    pub fn enable(vm: &VmFd, entries: u32) -> Result<EnabledRings> {
        EnabledRings::enable(vm, entries)
    }

    /// Maps the rings of all vCPUs of the machine, which have not run with logging yet. Their order
    /// is what
    /// [`Self::serve_full`] counts by.
    ///
    /// # Errors
    /// If a ring cannot be mapped.
    pub fn new<'v>(
        slots: Arc<KvmSlots>,
        vcpus: impl IntoIterator<Item = &'v VcpuFd>,
        enabled: EnabledRings,
    ) -> Result<Arc<Self>> {
        let mapped = vcpus
            .into_iter()
            .map(|vcpu| MappedRing::new(vcpu, enabled))
            .collect::<Result<Vec<_>>>()?;
        let rings = Rings::new(Arc::clone(&slots), slots.table().clone(), mapped);
        Ok(Arc::new(Self { slots, rings, followed: AtomicBool::new(false) }))
    }

    /// For a vCPU's own thread, when the vCPU has stopped with [`KVM_EXIT_DIRTY_RING_FULL`]
    /// (kvm-ioctls hands that out as `VcpuExit::Unsupported`): empties its ring, and the vCPU can
    /// run on. It is right at any time, also when nothing is followed any more.
    ///
    /// # Errors
    /// [`Error::Guest`] if that vCPU cannot run on: see [`Rings::serve_full`].
    pub fn serve_full(&self, vcpu: usize) -> Result<()> {
        self.rings.serve_full(vcpu)
    }

    /// Empties rings that are at least half full. Cheap when none is.
    pub fn drain_early(&self) -> Result<()> {
        self.rings.drain_early()
    }

    /// How often a vCPU had to stop because its ring was full.
    #[must_use]
    pub fn full_exits(&self) -> u64 {
        self.rings.full_exits()
    }
}

/// Follows the writes of a machine through its rings. See the [module](self).
pub struct RingSource {
    set: Arc<RingSet>,
    kick: Arc<dyn KickVcpus>,
}

impl RingSource {
    /// Starts to follow. Every page counts as not written until it is written again.
    ///
    /// # Errors
    /// [`Error::Refused`] if the machine is followed already. Whatever was started until then is ended again.
    pub fn start(set: Arc<RingSet>, kick: Arc<dyn KickVcpus>) -> Result<Self> {
        if set.followed.swap(true, Ordering::AcqRel) {
            return Err(Error::refused(
                "the guest's writes are followed already: is another migration under way?",
            ));
        }
        // From here on dropping it ends the tracking.
        let source = Self { set, kick };
        // What an earlier source left.
        source.set.rings.discard()?;
        source.set.slots.set_logging(true)?;
        Ok(source)
    }

    /// Entries are reset before slots are changed, and once more for what came in between.
    fn stop(&self) -> Result<()> {
        let emptied = || self.kick.kick_all().and_then(|()| self.set.rings.discard());
        let before = emptied();
        self.set.slots.set_logging(false)?;
        before.and_then(|()| emptied())
    }
}

impl DirtySource for RingSource {
    fn sync(&mut self, into: &mut DirtyBitmap) -> Result<Synced> {
        self.kick.kick_all()?;
        Ok(Synced { pages: self.set.rings.sync(into)? })
    }

    fn drain_early(&mut self) -> Result<()> {
        self.set.drain_early()
    }
}

impl Drop for RingSource {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            tracing::warn!(error = %e.chain(), "the tracking of dirty pages did not end as it should");
        }
        self.set.followed.store(false, Ordering::Release);
    }
}

impl std::fmt::Debug for RingSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RingSource").field("set", &self.set).finish_non_exhaustive()
    }
}
