//! What the engine needs of whoever runs the guest, at either end.
//!
//! ```text
//!   source:       describe, preflight, start_tracking ... arm, pause, begin_save, save, seal, end
//!                 any failure before seal(): resume()
//!   destination:  describe ... load, seal, run            any failure before seal(): discard()
//! ```

pub mod kvm;
pub mod qemu;
pub mod synthetic;

use crate::clock;
use crate::dirty::DirtySource;
use crate::error::Result;
use crate::memory::GuestMemory;
use crate::memory::lost::LostPage;
use crate::page::PageRun;
use crate::policy::FixedCosts;
use crate::precopy::Watch;
use crate::protocol::bounded;
use clap::Args;
use pageferry_transport::MemoryRegion;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Instant;

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

/// A block of guest memory that nobody writes, and that both ends have: an image that is mapped read-only.
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
    /// What only the monitor at the other end can compare, in a form of its own ([`DestinationGuest::admit`]).
    #[serde(deserialize_with = "bounded::list::<_, _, PLATFORM_BYTES_MAX>")]
    pub platform: Vec<u8>,
}

/// What the operator vouches for, where the engine cannot know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
pub struct Vouched {
    /// Move the guest although it has a device, netdev, object or block driver of this type: you know that it writes no
    /// guest memory that the tracking does not see. May be given again.
    #[arg(long = "allow-device", value_name = "TYPE")]
    pub devices: Vec<String>,
    /// Move the guest although it has virtualization switched on under KVM: you know that it runs no guest of its own.
    /// What the processor writes for one is not seen.
    #[arg(long)]
    #[serde(default)]
    pub no_nested_guest: bool,
}

/// Fails once the process that runs the guest has ended. Cheap enough for every batch.
pub type Liveness = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// Maps a run of pages, within one slot, for a guest that does not run yet. An error means that it need not be tried again.
pub type MapAhead = Arc<dyn Fn(PageRun) -> Result<()> + Send + Sync>;

/// A guest that can be moved away.
pub trait SourceGuest: Send {
    /// What the destination must match.
    fn describe(&self) -> GuestDescription;

    /// Takes note of what the operator vouches for. Called before [`Self::preflight`].
    fn vouch(&mut self, vouched: &Vouched) {
        let _ = vouched;
    }

    /// Fails, with the mend, if something stands against moving it. Touches nothing.
    fn preflight(&mut self) -> Result<()>;

    /// Its memory, mapped readable in this process; what it is now, right after [`Self::preflight`].
    fn memory(&self) -> &Arc<GuestMemory>;

    /// Fails if what [`Self::memory`] maps is not the memory that the guest has now: memory was plugged in or out, or
    /// replaced. Asked before a digest of it is taken.
    fn check_memory(&mut self) -> Result<()> {
        Ok(())
    }

    /// Largest device state that `save` may produce, in bytes.
    fn state_bytes_max(&self) -> u64;

    /// What the device state will probably be, in bytes.
    fn state_bytes_expected(&self) -> u64;

    /// What a blackout costs besides pushing pages; the harvest's part is measured by the engine.
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

    /// Returns when no device transfer that was under way at the call is any more. Called between a harvest
    /// and the first byte that is read of its pages: a transfer by DMA into pinned pages (direct disk I/O)
    /// is reported as a write when it begins, not when it ends.
    fn settle_io(&mut self) -> Result<()>;

    /// Does what can be done ahead of the blackout, with the guest still running.
    fn arm(&mut self) -> Result<()>;

    /// Stops the vCPUs, if they run. When it returns, the guest writes no more memory by itself; saving
    /// may still write some.
    fn pause(&mut self) -> Result<()>;

    /// Starts to save the device state, which goes on by itself until [`Self::save`] takes it.
    fn begin_save(&mut self) -> Result<()>;

    /// Hands the device state to `sink`, piece by piece, while it is being made; an empty piece every now
    /// and then where there is none, so that `sink` can end the wait.
    fn save(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>;

    /// The last act before Commit is sent: from here on nothing on this host, whatever dies, may let
    /// the guest run again by itself.
    fn seal(&mut self) -> Result<()>;

    /// Takes back everything since `settle_io` and `arm`; the guest runs again if it ran before. Must work
    /// from any state, may be called again (after an error it tries anew), and lifts the seal: it is
    /// called only when the guest can never run at the destination. Called first while its writes are still
    /// followed, so that it runs at once, and again when they are not any more.
    fn resume(&mut self) -> Result<()>;

    /// Keeps the tracking of a guest that runs at the destination until [`Self::end`]. Lifting the
    /// protection of its memory would keep a core busy (some 24 ms a GiB) for nothing, at a moment
    /// when, on one host, the guest needs that core for its first steps.
    fn retire(&mut self, tracking: Box<dyn DirtySource>);

    /// Ends the guest here: it runs at the destination. For the embedder, after the migration; not called
    /// by the engine.
    fn end(&mut self) -> Result<()>;
}

/// A guest that waits to be filled.
pub trait DestinationGuest: Send {
    /// What it is; must equal the source's.
    fn describe(&self) -> GuestDescription;

    /// Fails, naming the difference, if a guest of this description cannot run here although the rest of the
    /// description is equal: its processor, above all. Touches nothing.
    fn admit(&mut self, theirs: &GuestDescription) -> Result<()> {
        let _ = theirs;
        Ok(())
    }

    /// Its memory, mapped writable in this process, and all zeros until the source writes it
    /// ([`GuestMemory::make_zero`]).
    fn memory(&self) -> &Arc<GuestMemory>;

    /// A check, usable from anywhere, that whoever will run the guest still lives.
    fn liveness(&self) -> Liveness;

    /// Whether every huge page of its memory was reserved when it was made, so that none can be missing later.
    fn has_huge_pages_set_aside(&self) -> bool {
        true
    }

    /// Maps pages of populated memory for the guest before it is here; `None` where that cannot be done.
    fn map_ahead(&self) -> Option<MapAhead> {
        None
    }

    /// Takes the device state from the first `len` bytes of `state`. All memory has arrived.
    fn load(&mut self, state: &MemoryRegion, len: usize) -> Result<()>;

    /// Commit has come: from here on the guest must run here, if it ran before, even if this process dies.
    fn seal(&mut self, was_running: bool) -> Result<()>;

    /// Lets the vCPUs run, if they ran at the source. [`crate::Error::Unknown`] if it cannot be told whether
    /// they do; any other error means that they do not.
    fn run(&mut self, was_running: bool) -> Result<()>;

    /// Asked after [`Self::run`]: since when all of its vCPUs run; `None` while one does not. A busy guest may take the
    /// processor from the thread that let it run: a monitor that notes when each vCPU enters the guest knows better than
    /// the caller.
    fn running_since(&self) -> Option<Instant> {
        Some(clock::now())
    }

    /// Throws the copy away. When it returns `Ok` the guest does not run here and never will.
    fn discard(&mut self) -> Result<()>;
}
