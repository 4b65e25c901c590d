//! Pages that may have been taken away from the guest: by a balloon, free page reporting,
//! virtio-mem. No dirty source reports that.
//!
//! Asking the file costs some 14 ms a GiB, as it looks at every page that is there; and it does not
//! tell of a page that was freed and is back: whoever touches a hole makes a page there, and a mere
//! read of it is reported by no dirty source. But a page that is freed is unmapped everywhere. So
//! each page is mapped once more before it is read to be sent, by a [`Witness`]. Its page tables
//! are walked, in parallel, and the file is asked only about what they do not map.
//!
//! ```text
//!   mapped in the witness             not freed since it was sent
//!   not mapped, the file has none     a hole: it reads as zeros
//!   not mapped, the file has it       back: freed and touched again, or unmapped by the kernel for
//!                                     reasons of its own
//! ```
//!
//! The lanes' own mapping would not do. Whoever reads a page there maps its neighbours, too
//! (fault-around, a folio of many pages): one that was freed and came back is mapped again, and
//! looks as if it had never been away.
//!
//! Why "mapped" is proof:
//!
//! 1. In the witness nothing is mapped but by [`Witness::note`], which maps pages of the run that
//!    it is told of and no others. Nobody touches it, so no fault maps anything (`FileView`).
//! 2. Between two looks a page is mapped at most once, before the first read of it in that time:
//!    `note` comes ahead of every read, and does nothing for what it has mapped since the look.
//!    What is freed meanwhile stays unmapped until the next.
//! 3. What a look finds unmapped becomes dirty, or is zeros at both ends, before it may be mapped
//!    again ([`Freed`]).
//!
//! So of what is mapped, every byte that counts was read after it was mapped (3), and it was not
//! freed since (1, 2). The unit is the page of the backing: that a part of a huge page is sent does
//! not map it again for the parts sent before (2).

use super::{GuestMemory, MemorySlot};
use crate::dirty::pagemap::{FileView, unmapped_here};
use crate::error::{Error, Result};
use crate::memory::bitmap::DirtyBitmap;
use crate::memory::extents;
use crate::memory::page::{PAGE_BYTES, PageRun};
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

/// What became of pages that may have been taken away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Freed {
    /// Those that are holes in their file.
    pub holes: DirtyBitmap,
    /// Those that may have been holes and are there now: what they hold may be another thing than
    /// what was read here.
    pub back: DirtyBitmap,
    /// What the witness does not map, whether or not it was asked for.
    unmapped: Vec<PageRun>,
}

/// Mappings of a guest's memory in which exactly those pages are mapped that were noted and not
/// freed since.
#[derive(Debug)]
pub struct Witness {
    views: Vec<FileView>,
    /// What was noted since a look found it unmapped; whole pages of the backing.
    noted: DirtyBitmap,
}

/// The files of huge pages that were asked so far, by slot.
type HugeFiles = BTreeMap<usize, Option<FileView>>;

impl Witness {
    /// One that maps nothing yet.
    ///
    /// # Errors
    /// [`Error::Refused`] where the kernel cannot do it or does not let us.
    pub fn new(memory: &GuestMemory) -> Result<Self> {
        let view = |slot: &MemorySlot| {
            FileView::open(slot.file.as_fd(), slot.region.len() as u64, slot.backing_page_bytes).map_err(|e| {
                Error::refused(format!(
                    "memory may be taken away from this guest (balloon, virtio-mem), and for {} it cannot be told which: {}; \
                     unplug that device, or let this user write the memory file and call userfaultfd",
                    slot.name,
                    e.chain()
                ))
            })
        };
        let views = memory.slots.iter().map(view).collect::<Result<_>>()?;
        let witness = Self { views, noted: DirtyBitmap::new(memory.pages) };
        witness.unmapped(memory)?;
        Ok(witness)
    }

    /// Takes note of pages within one slot that are about to be read and sent. Pages that the file
    /// has not got are not noted: they count as freed.
    pub fn note(&mut self, memory: &GuestMemory, run: PageRun) -> Result<()> {
        let (index, _) = memory.locate(run.first.0);
        let slot = &memory.slots[index];
        let backing_pages = slot.backing_page_bytes / PAGE_BYTES;
        let within = |page: u64| page - slot.first_page;
        let first = within(run.first.0) / backing_pages * backing_pages;
        let end = within(run.end()).next_multiple_of(backing_pages).min(slot.pages());
        let (mut at, end) = (slot.first_page + first, slot.first_page + end);
        while let Some(missing) = self.noted.next_gap(at, end) {
            self.views[index]
                .map(within(missing.first.0) * PAGE_BYTES..within(missing.end()) * PAGE_BYTES)?;
            self.noted.insert(missing);
            at = missing.end();
        }
        Ok(())
    }

    /// What became of these pages. All that was sent was noted before it was read.
    pub fn look(&self, memory: &GuestMemory, pages: &DirtyBitmap) -> Result<Freed> {
        let empty = || DirtyBitmap::new(memory.pages);
        let mut freed = Freed { holes: empty(), back: empty(), unmapped: self.unmapped(memory)? };
        let mut huge = HugeFiles::new();
        for run in &freed.unmapped {
            let mut at = run.first.0;
            while let Some(part) = pages.next_run_within(at, run.end()) {
                freed.back.insert(part);
                memory.holes_within(part, &mut freed.holes, &mut huge)?;
                at = part.end();
            }
        }
        freed.holes.runs(u64::MAX).for_each(|hole| freed.back.remove(hole));
        Ok(freed)
    }

    /// What a look has found unmapped is noted anew from now on. To be called once its pages are
    /// dirty, or zeros at both ends.
    pub fn forget(&mut self, freed: &Freed) {
        freed.unmapped.iter().for_each(|run| self.noted.remove(*run));
    }

    /// What its page tables do not map, in runs within one slot.
    fn unmapped(&self, memory: &GuestMemory) -> Result<Vec<PageRun>> {
        let ranges: Vec<Range<u64>> = self.views.iter().map(FileView::addresses).collect();
        let Some(unmapped) = unmapped_here(&ranges)? else {
            return Err(Error::refused(
                "memory may be taken away from this guest (balloon, virtio-mem), which takes Linux 6.7 or newer to follow",
            ));
        };
        let run = |part: Range<u64>| {
            let index = ranges.iter().position(|range| range.contains(&part.start))?;
            let page = |address: u64| {
                memory.slots[index].first_page + (address - ranges[index].start) / PAGE_BYTES
            };
            Some(PageRun::between(page(part.start), page(part.end)))
        };
        Ok(unmapped.into_iter().filter_map(run).collect())
    }
}

impl GuestMemory {
    /// Adds the holes of a run within one slot.
    fn holes_within(
        &self,
        run: PageRun,
        holes: &mut DirtyBitmap,
        huge: &mut HugeFiles,
    ) -> Result<()> {
        let (index, offset) = self.locate(run.first.0);
        let slot = &self.slots[index];
        if slot.backing_page_bytes != PAGE_BYTES {
            return match huge.entry(index).or_insert_with(|| slot.huge_file()) {
                Some(file) => huge_holes_within(slot, file, run, holes),
                None => zeros_within(slot, run, holes),
            };
        }
        let data = extents::data_within(&slot.file, offset..offset + run.bytes())
            .map_err(|e| Error::os(format!("looking for holes of {}", slot.name), e))?;
        holes_between(run, data.iter().map(|part| slot.pages_of(part)), holes);
        Ok(())
    }
}

impl MemorySlot {
    /// Its file, if that has huge pages and can be asked which.
    fn huge_file(&self) -> Option<FileView> {
        FileView::open(self.file.as_fd(), self.region.len() as u64, self.backing_page_bytes).ok()
    }

    /// The pages that its file of huge pages has; `None` where that cannot be told.
    pub(super) fn huge_pages(&self) -> Result<Option<Vec<PageRun>>> {
        let Some(file) = self.huge_file() else { return Ok(None) };
        let run = |part: Range<u64>| self.pages_of(&part);
        Ok(Some(file.data(0..self.region.len() as u64)?.into_iter().map(run).collect()))
    }

    /// The pages of a part of its file.
    pub(super) fn pages_of(&self, part: &Range<u64>) -> PageRun {
        PageRun::between(
            self.first_page + part.start / PAGE_BYTES,
            self.first_page + part.end / PAGE_BYTES,
        )
    }
}

/// The same for huge pages.
fn huge_holes_within(
    slot: &MemorySlot,
    file: &FileView,
    run: PageRun,
    holes: &mut DirtyBitmap,
) -> Result<()> {
    let offset = |page: u64| (page - slot.first_page) * PAGE_BYTES;
    let page_bytes = slot.backing_page_bytes;
    let begin = offset(run.first.0) / page_bytes * page_bytes;
    let end = offset(run.end()).next_multiple_of(page_bytes).min(slot.region.len() as u64);
    let data = file.data(begin..end)?;
    holes_between(run, data.iter().map(|part| slot.pages_of(part)), holes);
    Ok(())
}

/// Adds what lies in a run beside these parts, rising.
fn holes_between(run: PageRun, data: impl Iterator<Item = PageRun>, holes: &mut DirtyBitmap) {
    let mut at = run.first.0;
    for data in data {
        let first = data.first.0.max(run.first.0);
        if at < first {
            holes.insert(PageRun::between(at, first));
        }
        at = data.end().min(run.end());
    }
    if at < run.end() {
        holes.insert(PageRun::between(at, run.end()));
    }
}

/// The same for huge pages that the kernel does not tell of: a page that reads as zeros is as good
/// as a hole, and reading the file, unlike reading a mapping, allocates nothing.
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

    /// A witness that has noted all of it.
    fn witness(memory: &GuestMemory) -> Witness {
        let mut witness = Witness::new(memory).unwrap();
        memory.slots().iter().for_each(|slot| witness.note(memory, slot.run()).unwrap());
        witness
    }

    fn set(memory: &GuestMemory, runs: &[(u64, u64)]) -> DirtyBitmap {
        let mut set = DirtyBitmap::new(memory.pages());
        runs.iter().for_each(|&(first, end)| set.insert(PageRun::between(first, end)));
        set
    }

    fn listed(pages: &DirtyBitmap) -> Vec<u64> {
        pages.runs(u64::MAX).flat_map(|run| run.first.0..run.end()).collect()
    }

    #[test]
    fn exactly_the_sent_pages_that_are_holes_now_are_found_in_every_slot() {
        let (memory, files) = memory(32);
        let (witness, sent) = (witness(&memory), set(&memory, &[(0, 60)]));
        let freed = witness.look(&memory, &sent).unwrap();
        assert!(freed.holes.is_empty() && freed.back.is_empty());
        punch(&files[0], 3, 2);
        punch(&files[0], 31, 1);
        punch(&files[1], 0, 1);
        punch(&files[1], 26, 6);
        let (_, offset) = memory.locate(4);
        // What was given back and is there again is no hole.
        memory.slots()[0].region().write(offset as usize, &[2]).unwrap();
        let freed = witness.look(&memory, &sent).unwrap();
        assert_eq!(
            listed(&freed.holes),
            [3, 31, 32, 58, 59],
            "not page 60 and above, which were never sent"
        );
        assert_eq!(listed(&freed.back), [4]);
    }

    /// The file is asked about nothing that is mapped: it takes the walk, not the look at every
    /// page.
    #[test]
    fn a_page_that_is_there_but_was_not_noted_is_no_hole() {
        let (memory, _files) = memory(16);
        let freed =
            Witness::new(&memory).unwrap().look(&memory, &set(&memory, &[(0, 32)])).unwrap();
        assert!(freed.holes.is_empty());
        assert_eq!(freed.back.count(), 32, "it may have been one");
    }

    /// As where a guest reads memory that it gave back: the kernel makes a page of zeros there, and
    /// no dirty source tells.
    #[test]
    fn a_page_that_was_freed_and_only_read_since_is_back_until_it_is_noted_again() {
        let (memory, files) = memory(16);
        let (mut witness, sent) = (witness(&memory), set(&memory, &[(0, 32)]));
        punch(&files[1], 4, 2);
        // As the lanes do, whose faults map what lies around.
        assert!(memory.is_zero(16 + 5).unwrap());
        let look = |witness: &Witness| witness.look(&memory, &sent).unwrap();
        let freed = look(&witness);
        assert_eq!((listed(&freed.holes), listed(&freed.back)), (vec![20], vec![21]));
        // Within one push, whatever is sent.
        witness.note(&memory, PageRun::between(16, 32)).unwrap();
        assert_eq!(look(&witness), freed);
        witness.forget(&freed);
        witness.note(&memory, PageRun::between(21, 22)).unwrap();
        let freed = look(&witness);
        assert_eq!((listed(&freed.holes), listed(&freed.back)), (vec![20], vec![]));
    }

    /// Fault-around and folios of many pages map more than was asked for.
    #[test]
    fn nothing_is_mapped_beside_what_is_noted() {
        let (memory, _files) = memory(64);
        let mut witness = Witness::new(&memory).unwrap();
        for page in [0, 17, 18, 63, 64, 127] {
            witness.note(&memory, PageRun::between(page, page + 1)).unwrap();
        }
        let back = witness.look(&memory, &set(&memory, &[(0, 128)])).unwrap().back;
        let mut others = set(&memory, &[(1, 17), (19, 63), (65, 127)]);
        assert_eq!(back, others);
        // Not if they are noted together with what is mapped already.
        witness.note(&memory, PageRun::between(16, 20)).unwrap();
        [16, 19].iter().for_each(|&page| others.remove(PageRun::between(page, page + 1)));
        assert_eq!(witness.look(&memory, &set(&memory, &[(0, 128)])).unwrap().back, others);
    }

    /// hugetlbfs calls all of a file data. Nothing may be allocated by looking, and the pool may be
    /// empty.
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
        let there =
            || rustix::fs::fstat(&file).unwrap().st_blocks as u64 * 512 / (HUGE * PAGE_BYTES);
        for page in [0, 1, 2, 5, 6] {
            memory.slots()[0].region().write((page * HUGE * PAGE_BYTES) as usize, &[1]).unwrap();
        }
        assert_eq!(memory.touched().unwrap(), [huge(0, 3), huge(5, 7)]);
        let guest = memory.map_again(Access::Read).unwrap();
        let mut witness = Witness::new(&memory).unwrap();
        [
            huge(0, 3),
            PageRun::between(5 * HUGE, 5 * HUGE + 1),
            PageRun::between(6 * HUGE + 100, 6 * HUGE + 110),
        ]
        .into_iter()
        .for_each(|run| witness.note(&memory, run).unwrap());
        punch(&file, HUGE, 2 * HUGE);
        punch(&file, 6 * HUGE, HUGE);
        assert!(guest.is_zero(2 * HUGE + 7).unwrap());
        let mut sent = DirtyBitmap::new(8 * HUGE);
        [huge(0, 3), huge(5, 6), PageRun::between(6 * HUGE + 100, 6 * HUGE + 110)]
            .into_iter()
            .for_each(|run| sent.insert(run));
        // What is sent of a page later in the same push does not make the rest of it look as if it
        // had stayed.
        witness.note(&memory, PageRun::between(2 * HUGE + 9, 2 * HUGE + 10)).unwrap();
        let freed = witness.look(&memory, &sent).unwrap();
        let holes = [huge(1, 2), PageRun::between(6 * HUGE + 100, 6 * HUGE + 110)];
        assert_eq!(freed.holes.runs(u64::MAX).collect::<Vec<_>>(), holes);
        assert_eq!(freed.back.runs(u64::MAX).collect::<Vec<_>>(), [huge(2, 3)]);
        assert_eq!(memory.touched().unwrap(), [huge(0, 1), huge(2, 3), huge(5, 6)]);
        assert_eq!(there(), 3, "what was punched stays so");
    }
}
