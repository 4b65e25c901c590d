//! What a guest is, for both ends to compare, and what it costs.

use crate::error::Result;
use crate::memory::page::PAGE_BYTES;
use crate::protocol::bounded;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What the engine must know of a guest that it moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// What the destination must match.
    pub description: GuestDescription,
    /// Largest device state that [`save`](super::SourceGuest::save) may produce, in bytes: room for
    /// it is made at both ends.
    pub state_bytes_max: u64,
    /// What the device state will probably be, in bytes: the downtime is predicted from it.
    pub state_bytes_expected: u64,
    /// What a downtime costs besides pushing pages; the sync's part is measured by the engine.
    pub fixed_costs: FixedCosts,
    /// Whether memory may be taken away from it while it runs (balloon, free page reporting,
    /// virtio-mem). No dirty source reports that, so the engine looks for holes at the end. True
    /// where it was false, as after hot-plugging, aborts the migration.
    pub may_discard: bool,
}

impl Facts {
    /// What both ends set aside for the device state: a page at least.
    pub(crate) fn state_region_bytes(&self) -> u64 {
        self.state_bytes_max.max(PAGE_BYTES)
    }
}

/// The parts of a downtime that do not depend on the remaining dirty pages, in microseconds. All
/// zero, the default, says that nothing is known: then predictions are too short.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FixedCosts {
    /// Stopping the vCPUs.
    pub pause_us: u64,
    /// The last syncs.
    pub sync_us: u64,
    /// Saving the device state; goes on while the remaining dirty pages are pushed.
    pub save_us: u64,
    /// Loading it.
    pub load_us: u64,
    /// Letting the vCPUs run.
    pub resume_us: u64,
}

/// Memory blocks of a guest at most. QEMU has 256 slots for DIMMs.
pub const BLOCKS_MAX: usize = 1 << 10;

/// A name in a description at most, in bytes.
const NAME_BYTES_MAX: usize = 1 << 10;

/// [`GuestDescription::platform`] at most, in bytes: what Hello, of 64 KiB at most, has left for it.
pub const PLATFORM_BYTES_MAX: usize = 40 << 10;

/// One block of guest memory, as the two ends compare it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDescription {
    /// Name of the block.
    #[serde(deserialize_with = "bounded::text::<_, NAME_BYTES_MAX>")]
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
}

/// A block of guest memory that nobody writes, and that both ends have: an image that is mapped
/// read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDescription {
    /// Name of the block.
    #[serde(deserialize_with = "bounded::text::<_, NAME_BYTES_MAX>")]
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Digest of all of it.
    pub digest: u128,
}

/// What must be equal on both sides for a guest to move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDescription {
    /// Who runs it: `qemu`, `kvm`, `synthetic`.
    #[serde(deserialize_with = "bounded::text::<_, NAME_BYTES_MAX>")]
    pub monitor: String,
    /// Machine type, with its version (`pc-q35-10.0`).
    #[serde(deserialize_with = "bounded::text::<_, NAME_BYTES_MAX>")]
    pub machine: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The memory blocks, in order.
    #[serde(deserialize_with = "bounded::list::<_, _, BLOCKS_MAX>")]
    pub blocks: Vec<BlockDescription>,
    /// The blocks that are not moved because nobody writes them, in the order of their names.
    #[serde(deserialize_with = "bounded::list::<_, _, BLOCKS_MAX>")]
    pub images: Vec<ImageDescription>,
    /// What only the monitor at the other end can compare, in a form of its own
    /// ([`DestinationGuest::admit`](super::DestinationGuest::admit)).
    #[serde(deserialize_with = "bounded::list::<_, _, PLATFORM_BYTES_MAX>")]
    pub platform: Vec<u8>,
}

/// What the operator vouches for, where the engine cannot know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vouched {
    /// Move the guest although it has a device, netdev, object or block driver of this type: you
    /// know that it writes no guest memory that the tracking does not see. May be given again.
    pub devices: Vec<String>,
    /// Move the guest although it has virtualization switched on under KVM: you know that it runs
    /// no guest of its own. What the processor writes for one is not seen.
    #[serde(default)]
    pub no_nested_guest: bool,
}

/// Fails once the process that runs the guest has ended. Cheap enough for every batch.
pub type Liveness = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// That of a guest that lives in this process.
pub(crate) fn always_alive() -> Liveness {
    Arc::new(|| Ok(()))
}
