//! Pages that may have been taken away from the guest: by a balloon, free page reporting, virtio-mem. No dirty source
//! reports that.
//!
//! Asking the file costs some 14 ms a GiB, as it looks at every page that is there. But a page that is freed is unmapped
//! everywhere, and whatever was sent was read through our own mapping. So our page tables are walked first, in parallel,
//! and the file is asked only about what they do not map.
//!
//! ```text
//!   mapped here                       taken as not freed since it was read here. Known gap: reading a neighbour may map a
//!                                     page again (a huge folio, fault-around) that was freed and came back within one push
//!   not mapped, the file has none     a hole: it reads as zeros
//!   not mapped, the file has it       back: whoever touches a hole makes a page there, and a mere read of it is reported
//!                                     by no dirty source. The kernel may also have unmapped it for reasons of its own
//! ```

use super::{GuestMemory, MemorySlot};
use crate::bitmap::DirtyBitmap;
use crate::dirty::pagemap::{HugeFile, unmapped_here};
use crate::error::{Error, Result};
use crate::page::{PAGE_BYTES, PageRun};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

/// What became of pages that may have been taken away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Freed {
    /// Those that are holes in their file.
    pub holes: DirtyBitmap,
    /// Those that may have been holes and are there now: what they hold may be another thing than what was read here.
    pub back: DirtyBitmap,
}

/// The files of huge pages that were asked so far, by slot.
type HugeFiles = BTreeMap<usize, Option<HugeFile>>;

impl GuestMemory {
    /// What became of these pages, all of which were read through this mapping.
    pub fn freed(&self, pages: &DirtyBitmap) -> Result<Freed> {
        let mut freed = Freed { holes: DirtyBitmap::new(self.pages), back: DirtyBitmap::new(self.pages) };
        let unmapped = self.unmapped_here()?;
        let told = unmapped.is_some();
        let mut huge = HugeFiles::new();
        for run in unmapped.unwrap_or_else(|| self.slots.iter().map(MemorySlot::run).collect()) {
            let mut at = run.first.0;
            while let Some(part) = pages.next_run(at, u64::MAX).filter(|part| part.first.0 < run.end()) {
                let part = PageRun::between(part.first.0, part.end().min(run.end()));
                if told {
                    freed.back.insert(part);
                }
                self.holes_within(part, &mut freed.holes, &mut huge)?;
                at = part.end();
            }
        }
        freed.holes.runs(u64::MAX).for_each(|hole| freed.back.remove(hole));
        Ok(freed)
    }

    /// What our page tables do not map, in runs within one slot; `None` where the kernel cannot tell.
    fn unmapped_here(&self) -> Result<Option<Vec<PageRun>>> {
        let range = |slot: &MemorySlot| {
            let start = slot.region.as_ptr() as u64;
            start..start + slot.region.len() as u64
        };
        let ranges: Vec<Range<u64>> = self.slots.iter().map(range).collect();
        let Some(unmapped) = unmapped_here(&ranges)? else {
            return Ok(None);
        };
        let run = |part: Range<u64>| {
            let index = ranges.iter().position(|range| range.contains(&part.start))?;
            let page =
                |address: u64| self.slots[index].first_page + (address - ranges[index].start) / PAGE_BYTES;
            Some(PageRun::between(page(part.start), page(part.end)))
        };
        Ok(Some(unmapped.into_iter().filter_map(run).collect()))
    }

    /// Adds the holes of a run within one slot.
    fn holes_within(&self, run: PageRun, holes: &mut DirtyBitmap, huge: &mut HugeFiles) -> Result<()> {
        let (index, offset) = self.locate(run.first.0);
        let slot = &self.slots[index];
        if slot.backing_page_bytes != PAGE_BYTES {
            return match huge.entry(index).or_insert_with(|| slot.huge_file()) {
                Some(file) => huge_holes_within(slot, file, run, holes),
                None => zeros_within(slot, run, holes),
            };
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

impl MemorySlot {
    /// Its file, if that has huge pages and can be asked which.
    fn huge_file(&self) -> Option<HugeFile> {
        HugeFile::open(self.file.as_fd(), self.region.len() as u64, self.backing_page_bytes)
    }

    /// The pages that its file of huge pages has; `None` where that cannot be told.
    pub(super) fn huge_pages(&self) -> Result<Option<Vec<PageRun>>> {
        let Some(file) = self.huge_file() else { return Ok(None) };
        let run = |part: Range<u64>| self.pages_of(&part);
        Ok(Some(file.data(0..self.region.len() as u64)?.into_iter().map(run).collect()))
    }

    /// The pages of a part of its file.
    fn pages_of(&self, part: &Range<u64>) -> PageRun {
        PageRun::between(self.first_page + part.start / PAGE_BYTES, self.first_page + part.end / PAGE_BYTES)
    }
}

/// The same for huge pages.
fn huge_holes_within(
    slot: &MemorySlot,
    file: &HugeFile,
    run: PageRun,
    holes: &mut DirtyBitmap,
) -> Result<()> {
    let offset = |page: u64| (page - slot.first_page) * PAGE_BYTES;
    let page_bytes = slot.backing_page_bytes;
    let begin = offset(run.first.0) / page_bytes * page_bytes;
    let end = offset(run.end()).next_multiple_of(page_bytes).min(slot.region.len() as u64);
    let mut at = run.first.0;
    let data = file.data(begin..end)?;
    for data in data.iter().map(|part| slot.pages_of(part)) {
        let first = data.first.0.max(run.first.0);
        if at < first {
            holes.insert(PageRun::between(at, first));
        }
        at = data.end().min(run.end());
    }
    if at < run.end() {
        holes.insert(PageRun::between(at, run.end()));
    }
    Ok(())
}

/// The same for huge pages that the kernel does not tell of: a page that reads as zeros is as good as a hole, and reading
/// the file, unlike reading a mapping, allocates nothing.
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
    use crate::dirty::pagemap::tests::HugePages;
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
        assert!(memory.freed(&sent).unwrap().holes.is_empty());
        punch(&files[0], 3, 2);
        punch(&files[0], 31, 1);
        punch(&files[1], 0, 1);
        punch(&files[1], 26, 6);
        let (_, offset) = memory.locate(4);
        // What was given back and is there again is no hole.
        memory.slots()[0].region().write(offset as usize, &[2]).unwrap();
        let freed = memory.freed(&sent).unwrap();
        assert!(freed.back.is_empty(), "what was written again was written here");
        let found: Vec<_> = freed.holes.runs(u64::MAX).flat_map(|r| r.first.0..r.end()).collect();
        assert_eq!(found, [3, 31, 32, 58, 59], "not page 60 and above, which were never sent");
    }

    /// The file is asked about nothing that is mapped: it takes the walk, not the look at every page.
    #[test]
    fn a_page_that_is_there_but_not_mapped_here_is_no_hole() {
        let (memory, _files) = memory(16);
        let fresh = memory.map_again(Access::Read).unwrap();
        let mut sent = DirtyBitmap::new(32);
        sent.insert(PageRun::between(0, 32));
        let freed = fresh.freed(&sent).unwrap();
        assert!(freed.holes.is_empty());
        assert_eq!(freed.back.count(), 32, "it may have been one");
    }

    /// As where a guest reads memory that it gave back: the kernel makes a page of zeros there, and no dirty source tells.
    #[test]
    fn a_page_that_was_freed_and_only_read_since_is_back() {
        let (memory, files) = memory(16);
        let guest = memory.map_again(Access::Read).unwrap();
        let mut sent = DirtyBitmap::new(32);
        sent.insert(PageRun::between(0, 32));
        punch(&files[1], 4, 2);
        assert!(guest.is_zero(16 + 5).unwrap());
        let freed = memory.freed(&sent).unwrap();
        let only = |page| [PageRun::between(page, page + 1)];
        assert_eq!(freed.holes.runs(u64::MAX).collect::<Vec<_>>(), only(20));
        assert_eq!(freed.back.runs(u64::MAX).collect::<Vec<_>>(), only(21));
        // Once it was read here, it is like any other.
        assert!(memory.is_zero(21).unwrap());
        assert!(memory.freed(&sent).unwrap().back.is_empty());
    }

    /// hugetlbfs calls all of a file data. Nothing may be allocated by looking, and the pool may be empty.
    #[test]
    fn holes_among_huge_pages_are_found_and_not_filled() {
        const HUGE: u64 = 512;
        let Some(_reserved) = HugePages::reserve(8) else {
            eprintln!("NOT TESTED: no 8 huge pages of 2 MiB can be reserved on this machine");
            return;
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let file = File::from(memfd_create("huge", flags).unwrap());
        ftruncate(&file, 8 * HUGE * PAGE_BYTES).unwrap();
        let slot = SlotSource {
            name: "m".into(),
            file: file.try_clone().unwrap(),
            file_offset: 0,
            bytes: 8 * HUGE * PAGE_BYTES,
            backing_page_bytes: HUGE * PAGE_BYTES,
            process_address: 0,
        };
        let memory = GuestMemory::map_unreserved(vec![slot], Access::Write).unwrap();
        let huge = |first: u64, end: u64| PageRun::between(first * HUGE, end * HUGE);
        let there = || rustix::fs::fstat(&file).unwrap().st_blocks as u64 * 512 / (HUGE * PAGE_BYTES);
        for page in [0, 1, 2, 5, 6] {
            memory.slots()[0].region().write((page * HUGE * PAGE_BYTES) as usize, &[1]).unwrap();
        }
        assert_eq!(memory.touched().unwrap(), [huge(0, 3), huge(5, 7)]);
        let guest = memory.map_again(Access::Read).unwrap();
        punch(&file, HUGE, 2 * HUGE);
        punch(&file, 6 * HUGE, HUGE);
        assert!(guest.is_zero(2 * HUGE + 7).unwrap());
        let mut sent = DirtyBitmap::new(8 * HUGE);
        [huge(0, 3), PageRun::between(6 * HUGE + 100, 6 * HUGE + 110)]
            .into_iter()
            .for_each(|run| sent.insert(run));
        let freed = memory.freed(&sent).unwrap();
        let holes = [huge(1, 2), PageRun::between(6 * HUGE + 100, 6 * HUGE + 110)];
        assert_eq!(freed.holes.runs(u64::MAX).collect::<Vec<_>>(), holes);
        assert_eq!(freed.back.runs(u64::MAX).collect::<Vec<_>>(), [huge(2, 3)]);
        assert_eq!(memory.touched().unwrap(), [huge(0, 1), huge(2, 3), huge(5, 6)]);
        assert_eq!(there(), 3, "what was punched stays so");
    }
}
