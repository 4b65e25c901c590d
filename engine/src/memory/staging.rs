//! A place at both ends for pages whose memory is not registered when the guest already is paused.
//!
//! ```text
//!   source                                            destination
//!   page, touched first right before the pause
//!      | copied
//!   staging region  == a write, as any other ======>  staging region
//!   Prepare { staged: [(page, slot)] } ------------>     | copied, before the guest is loaded
//!                                                     the page
//! ```
//!
//! Registering 2 MiB of untouched memory takes longer than copying a few pages. Both regions are
//! registered ahead. On a link that registers nothing no page ever goes this way.

use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::memory::page::{PAGE_BYTES, PageRun};
use pageferry_transport::{MemoryRegion, RemoteRegion};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Size of the region. A guest touches no more between the last look and the pause, in some
/// milliseconds, unless it allocates gigabytes a second; copying all of it at both ends takes a few
/// milliseconds.
pub const STAGING_BYTES: usize = 8 << 20;

const SLOTS: u32 = (STAGING_BYTES as u64 / PAGE_BYTES) as u32;

/// Pages that a Prepare names at most: each is in a slot of its own.
pub const STAGED_PAGES_MAX: usize = SLOTS as usize;

/// The source's side.
#[derive(Debug)]
pub struct Staging {
    local: Arc<MemoryRegion>,
    remote: RemoteRegion,
    /// The slot of each page that goes this way; of one that was staged twice, the later.
    pages: BTreeMap<u64, u32>,
    used: u32,
}

impl Staging {
    /// Pages are copied to `local` and written to `remote`; both have [`STAGING_BYTES`].
    ///
    /// # Panics
    /// If `local` is smaller.
    #[must_use]
    pub fn new(local: Arc<MemoryRegion>, remote: RemoteRegion) -> Self {
        assert!(local.len() >= STAGING_BYTES, "the source makes it so large");
        Self { local, remote, pages: BTreeMap::new(), used: 0 }
    }

    /// Its region here and at the destination.
    #[must_use]
    pub fn regions(&self) -> (&Arc<MemoryRegion>, RemoteRegion) {
        (&self.local, self.remote)
    }

    /// Copies as many pages of the run as there is room for, and returns how many and where in the
    /// region they are. A page that comes again gets a new slot, so that none is written twice.
    pub fn take(&mut self, memory: &GuestMemory, run: PageRun) -> Result<(u64, Range<usize>)> {
        let count = run.count.min(u64::from(SLOTS - self.used));
        let begin = u64::from(self.used) * PAGE_BYTES;
        let mut bytes = [0; PAGE_BYTES as usize];
        for page in run.first.0..run.first.0 + count {
            let (slot, offset) = memory.locate(page);
            memory.slots()[slot].region().read(offset as usize, &mut bytes)?;
            self.local.write(self.used as usize * bytes.len(), &bytes)?;
            self.pages.insert(page, self.used);
            self.used += 1;
        }
        Ok((count, begin as usize..(begin + count * PAGE_BYTES) as usize))
    }

    /// These pages have gone the usual way since: what was staged of them is old.
    pub fn forget(&mut self, run: PageRun) {
        if !self.pages.is_empty() {
            self.pages.retain(|page, _| !(run.first.0..run.end()).contains(page));
        }
    }

    /// The pages and their slots, for Prepare.
    #[must_use]
    pub fn staged(&self) -> Vec<(u64, u32)> {
        self.pages.iter().map(|(page, slot)| (*page, *slot)).collect()
    }
}

/// The destination's side: puts the staged pages where they belong. All of the region has arrived.
pub fn place(staged: &[(u64, u32)], staging: &MemoryRegion, memory: &GuestMemory) -> Result<()> {
    let mut bytes = [0; PAGE_BYTES as usize];
    for &(page, slot) in staged {
        if page >= memory.pages() || slot >= SLOTS {
            return Err(Error::Protocol(format!(
                "a Prepare with page {page} in slot {slot}, where there are {} pages and {SLOTS} slots",
                memory.pages()
            )));
        }
        staging.read(slot as usize * bytes.len(), &mut bytes)?;
        let (index, offset) = memory.locate(page);
        memory.slots()[index].region().write(offset as usize, &bytes)?;
    }
    Ok(())
}
