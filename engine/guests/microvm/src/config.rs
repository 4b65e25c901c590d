//! What kind of machine is wanted.

use pageferry_engine::error::{Error, Result};
use pageferry_engine::memory::page::PAGE_BYTES;
use serde::{Deserialize, Serialize};

/// This machine's type, with its version: raised when a guest would see another machine.
pub const MACHINE: &str = "pageferry-microvm-1";

/// Most vCPUs of one machine.
pub const VCPUS_MAX: u32 = 8;

/// Size of a huge page.
pub(crate) const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Least memory: what lies below 1 MiB is a PC's, and something must run.
pub const MEMORY_BYTES_MIN: u64 = 2 << 20;

/// How writes of the guest are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrackingChoice {
    /// The ring, where it passes the probe, else the log.
    #[default]
    Auto,
    /// KVM's dirty ring, one a vCPU.
    Ring,
    /// KVM's dirty log, one bit a page.
    Log,
}

/// What kind of machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs, up to [`VCPUS_MAX`].
    pub vcpus: u32,
    /// Memory of huge pages of 2 MiB, which the host must have set aside.
    pub huge_pages: bool,
    /// All of memory is taken from the host when the machine is made, and mapped for the guest
    /// where KVM can do that: a guest that is received finds it ready.
    pub preallocate: bool,
    /// How writes are followed.
    pub tracking: TrackingChoice,
    /// Entries of each vCPU's ring, a power of two.
    pub ring_entries: Option<u32>,
}

impl MachineConfig {
    /// A machine of this size, with everything else as is usual.
    #[must_use]
    pub fn new(memory_bytes: u64, vcpus: u32) -> Self {
        Self {
            memory_bytes,
            vcpus,
            huge_pages: false,
            preallocate: false,
            tracking: TrackingChoice::Auto,
            ring_entries: None,
        }
    }

    /// Fails, with the fix, if no such machine can be. Touches nothing.
    pub fn check(&self) -> Result<()> {
        let (page, name) = if self.huge_pages {
            (HUGE_PAGE_BYTES, "huge pages of 2 MiB")
        } else {
            (PAGE_BYTES, "pages of 4 KiB")
        };
        if self.memory_bytes < MEMORY_BYTES_MIN || !self.memory_bytes.is_multiple_of(page) {
            return Err(Error::refused(format!(
                "a guest cannot have {} bytes of memory: it takes whole {name}, and 2 MiB at the least",
                self.memory_bytes
            )));
        }
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(Error::refused(format!(
                "a guest cannot have {} vCPUs: 1 to {VCPUS_MAX} are possible",
                self.vcpus
            )));
        }
        Ok(())
    }
}
