//! Pages that were sent and are holes now: memory that a balloon took away. No dirty source reports that.
//!
//! Asking the file costs some 14 ms a GiB, as it looks at every page that is there. But a page that is freed is unmapped
//! everywhere, and whatever was sent was read through our own mapping. So our page tables are walked first, in parallel,
//! and the file is asked only about what they do not map.

use super::{GuestMemory, MemorySlot};
use crate::bitmap::DirtyBitmap;
use crate::dirty::pagemap::unmapped_here;
use crate::error::{Error, Result};
use crate::page::{PAGE_BYTES, PageRun};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::ops::Range;
use std::os::unix::fs::FileExt;

impl GuestMemory {
    /// Those of these pages that are holes in their file.
    pub fn holes(&self, sent: &DirtyBitmap) -> Result<DirtyBitmap> {
        let mut holes = DirtyBitmap::new(self.pages);
        for run in self.unmapped_here()? {
            let mut at = run.first.0;
            while let Some(part) = sent.next_run(at, u64::MAX).filter(|part| part.first.0 < run.end()) {
                let part = PageRun::between(part.first.0, part.end().min(run.end()));
                self.holes_within(part, &mut holes)?;
                at = part.end();
            }
        }
        Ok(holes)
    }

    /// What our page tables do not map, in runs within one slot; all of it where the kernel cannot tell.
    fn unmapped_here(&self) -> Result<Vec<PageRun>> {
        let range = |slot: &MemorySlot| {
            let start = slot.region.as_ptr() as u64;
            start..start + slot.region.len() as u64
        };
        let ranges: Vec<Range<u64>> = self.slots.iter().map(range).collect();
        let Some(unmapped) = unmapped_here(&ranges)? else {
            return Ok(self.slots.iter().map(MemorySlot::run).collect());
        };
        let run = |part: Range<u64>| {
            let index = ranges.iter().position(|range| range.contains(&part.start))?;
            let page =
                |address: u64| self.slots[index].first_page + (address - ranges[index].start) / PAGE_BYTES;
            Some(PageRun::between(page(part.start), page(part.end)))
        };
        Ok(unmapped.into_iter().filter_map(run).collect())
    }

    /// Adds the holes of a run within one slot.
    fn holes_within(&self, run: PageRun, holes: &mut DirtyBitmap) -> Result<()> {
        let (index, offset) = self.locate(run.first.0);
        let slot = &self.slots[index];
        if slot.backing_page_bytes != PAGE_BYTES {
            return zeros_within(slot, run, holes);
        }
        let asked = |e| Error::os(format!("looking for holes of {}", slot.name), e);
        let (mut at, end) = (offset, offset + run.bytes());
        while at < end {
            let hole = seek(&slot.file, SeekFrom::Hole(at)).map_err(asked)?;
            if hole >= end {
                break;
            }
            let data = match seek(&slot.file, SeekFrom::Data(hole)) {
                Ok(data) => data.min(end),
                Err(Errno::NXIO) => end,
                Err(e) => return Err(asked(e)),
            };
            let page = |at: u64| slot.first_page + at / PAGE_BYTES;
            holes.insert(PageRun::between(page(hole), page(data)));
            at = data;
        }
        Ok(())
    }
}

/// The same for huge pages, whose files cannot be asked for holes: a page that reads as zeros is as good as one, and
/// reading the file, unlike reading a mapping, allocates nothing.
fn zeros_within(slot: &MemorySlot, run: PageRun, holes: &mut DirtyBitmap) -> Result<()> {
    let mut bytes = [0; PAGE_BYTES as usize];
    for page in run.first.0..run.end() {
        let offset = (page - slot.first_page) * PAGE_BYTES;
        slot.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|e| Error::os(format!("looking for holes of {}", slot.name), e))?;
        if bytes.iter().all(|byte| *byte == 0) {
            holes.insert(PageRun::between(page, page + 1));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SlotSource;
    use pageferry_transport::Access;
    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
    use std::fs::File;

    /// Two slots, as the guest's process has them: every page written, and read by us.
    fn memory(pages: u64) -> (GuestMemory, Vec<File>) {
        let files: Vec<_> = (0..2)
            .map(|_| {
                let file = File::from(memfd_create("holes", MemfdFlags::CLOEXEC).unwrap());
                ftruncate(&file, pages * PAGE_BYTES).unwrap();
                file
            })
            .collect();
        let slot = |file: &File| SlotSource {
            name: "m".into(),
            file: file.try_clone().unwrap(),
            file_offset: 0,
            bytes: pages * PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
            process_address: 0,
        };
        let memory = GuestMemory::map(files.iter().map(slot).collect(), Access::Write).unwrap();
        for page in 0..2 * pages {
            let (slot, offset) = memory.locate(page);
            memory.slots()[slot].region().write(offset as usize, &[1]).unwrap();
        }
        (memory, files)
    }

    fn punch(file: &File, page: u64, pages: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, flags, page * PAGE_BYTES, pages * PAGE_BYTES).unwrap();
    }

    #[test]
    fn exactly_the_sent_pages_that_are_holes_now_are_found_in_every_slot() {
        let (memory, files) = memory(32);
        let mut sent = DirtyBitmap::new(64);
        sent.insert(PageRun::between(0, 60));
        assert!(memory.holes(&sent).unwrap().is_empty());
        punch(&files[0], 3, 2);
        punch(&files[0], 31, 1);
        punch(&files[1], 0, 1);
        punch(&files[1], 26, 6);
        let (_, offset) = memory.locate(4);
        // What was given back and is there again is no hole.
        memory.slots()[0].region().write(offset as usize, &[2]).unwrap();
        let found: Vec<_> =
            memory.holes(&sent).unwrap().runs(u64::MAX).flat_map(|r| r.first.0..r.end()).collect();
        assert_eq!(found, [3, 31, 32, 58, 59], "not page 60 and above, which were never sent");
    }

    /// The file is asked about nothing that is mapped: it takes the walk, not the look at every page.
    #[test]
    fn a_page_that_is_there_but_not_mapped_here_is_no_hole() {
        let (memory, _files) = memory(16);
        let fresh = memory.map_again(Access::Read).unwrap();
        let mut sent = DirtyBitmap::new(32);
        sent.insert(PageRun::between(0, 32));
        assert!(fresh.holes(&sent).unwrap().is_empty());
    }
}
