//! Guest memory that was written, and sets of its pages.

use anyhow::{Context, Result};
use pageferry_engine::memory::bitmap::DirtyBitmap;
use pageferry_engine::memory::page::{PAGE_BYTES, PageRun};
use pageferry_engine::memory::{GuestMemory, SlotSource};
use pageferry_transport::Access;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::fs::File;

/// One block without a page that is zero.
pub(crate) fn written(mib: u32) -> Result<GuestMemory> {
    let bytes = u64::from(mib) << 20;
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).context("creating memory")?);
    ftruncate(&file, bytes).context("sizing memory")?;
    let slot = SlotSource {
        name: "guest".into(),
        file,
        file_offset: 0,
        bytes,
        backing_page_bytes: PAGE_BYTES,
        process_address: 0,
    };
    let memory = GuestMemory::map(vec![slot], Access::Write)?;
    let region = memory.slots()[0].region();
    region.populate(0, region.len())?;
    for page in 0..memory.pages() {
        region.write((page * PAGE_BYTES) as usize, &(page + 1).to_le_bytes())?;
    }
    Ok(memory)
}

/// All of so many pages.
pub(crate) fn every(pages: u64) -> DirtyBitmap {
    let mut set = DirtyBitmap::new(pages);
    set.insert(PageRun::between(0, pages));
    set
}

/// Runs of `run` pages with gaps as long, so that none can be merged.
pub(crate) fn every_second(pages: u64, run: u64) -> DirtyBitmap {
    let mut set = DirtyBitmap::new(pages);
    let fits = |first: &u64| first + run <= pages;
    for first in (0..).step_by(2 * run as usize).take_while(fits) {
        set.insert(PageRun::between(first, first + run));
    }
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_leave_gaps_as_long_as_themselves() {
        let runs = |pages, run| every_second(pages, run).runs(u64::MAX).collect::<Vec<_>>();
        assert_eq!(runs(5, 1), [0, 2, 4].map(|first| PageRun::between(first, first + 1)));
        assert_eq!(runs(11, 4), [PageRun::between(0, 4)]);
        assert_eq!(runs(12, 4), [PageRun::between(0, 4), PageRun::between(8, 12)]);
    }
}
