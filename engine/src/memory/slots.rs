//! Guest memory as this process has it: slots, each a file that is mapped.

use super::file::FileId;
use crate::error::{Error, Result};
use crate::memory::bitmap::DirtyBitmap;
use crate::memory::extents;
use crate::memory::lost_page::Poisoned;
use crate::memory::page::{PAGE_BYTES, PageRun, pages_in};
use pageferry_transport::{Access, MemoryRegion};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

/// One block of guest memory: a memfd or a file in a memory file system, shared with whoever runs
/// the guest.
#[derive(Debug)]
pub struct MemorySlot {
    /// The name by which both ends know it (QEMU: the RAM block's name).
    pub name: String,
    /// First page on the line of all slots.
    pub first_page: u64,
    /// Page size of its backing in bytes: 4096, or that of its huge pages.
    pub backing_page_bytes: u64,
    /// Where the guest's process has it mapped: what a dirty source scans.
    pub process_address: u64,
    pub(super) region: Arc<MemoryRegion>,
    pub(super) file: File,
    pub(super) id: FileId,
}

impl MemorySlot {
    /// Its mapping in this process.
    #[must_use]
    pub fn region(&self) -> &Arc<MemoryRegion> {
        &self.region
    }

    /// Which file it is.
    #[must_use]
    pub fn file_id(&self) -> FileId {
        self.id
    }

    /// Another descriptor of its file, for who maps it a second time.
    pub fn file(&self) -> Result<File> {
        self.file
            .try_clone()
            .map_err(|e| Error::os(format!("keeping the file of {}", self.name), e))
    }

    /// Whether it maps this very block: the same part of the same file, for the same addresses of
    /// the guest's process.
    fn is_of(&self, block: &SlotSource) -> Result<bool> {
        Ok(self.name == block.name
            && self.region.len() as u64 == block.bytes
            && block.file_offset == 0
            && self.backing_page_bytes == block.backing_page_bytes
            && self.process_address == block.process_address
            && self.id == FileId::of(&block.file)?)
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        pages_in(self.region.len() as u64)
    }

    /// The pages on the line of all slots.
    #[must_use]
    pub fn run(&self) -> PageRun {
        PageRun::between(self.first_page, self.first_page + self.pages())
    }
}

/// A block of memory to be mapped: what [`GuestMemory::map`] takes.
#[derive(Debug)]
pub struct SlotSource {
    /// See [`MemorySlot::name`].
    pub name: String,
    /// An open file description of our own of the memory file.
    pub file: File,
    /// Where the block begins in the file, in bytes. Only zero can be mapped today.
    pub file_offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// See [`MemorySlot::backing_page_bytes`].
    pub backing_page_bytes: u64,
    /// See [`MemorySlot::process_address`].
    pub process_address: u64,
}

/// One of the two ways to map a block: file, offset, length, access.
pub(crate) type MapRegion =
    fn(BorrowedFd<'_>, u64, usize, Access) -> pageferry_transport::Result<Arc<MemoryRegion>>;

/// All memory of one guest.
#[derive(Debug)]
pub struct GuestMemory {
    pub(super) slots: Vec<MemorySlot>,
    pub(super) pages: u64,
    /// What [`Self::make_zero`] found allocated, and mapped.
    pub(super) mapped: OnceLock<DirtyBitmap>,
}

impl GuestMemory {
    /// Maps every block, in this order. Huge pages are reserved for all of them. No guest may run
    /// in these mappings: a page that the host lost reads as zeros in them ([`super::lost`]).
    pub fn map(blocks: Vec<SlotSource>, access: Access) -> Result<Self> {
        Self::map_by(blocks, access, MemoryRegion::map_guarded)
    }

    /// The same of a guest whose monitor has reserved its huge pages, or has not on purpose.
    pub fn map_unreserved(blocks: Vec<SlotSource>, access: Access) -> Result<Self> {
        Self::map_by(blocks, access, MemoryRegion::map_guarded_unreserved)
    }

    /// Maps every block of a machine of this process, which runs in these mappings.
    pub fn map_for_machine(blocks: Vec<SlotSource>) -> Result<Self> {
        Self::map_by(blocks, Access::Write, MemoryRegion::map_shared)
    }

    /// Maps the same memory once more, as [`Self::map_unreserved`] does.
    pub fn map_again(&self, access: Access) -> Result<Self> {
        let blocks = self.slots.iter().map(|slot| {
            Ok(SlotSource {
                name: slot.name.clone(),
                file: slot.file()?,
                file_offset: 0,
                bytes: slot.region.len() as u64,
                backing_page_bytes: slot.backing_page_bytes,
                process_address: slot.process_address,
            })
        });
        Self::map_unreserved(blocks.collect::<Result<_>>()?, access)
    }

    fn map_by(blocks: Vec<SlotSource>, access: Access, map: MapRegion) -> Result<Self> {
        let mut slots = Vec::with_capacity(blocks.len());
        let mut pages = 0;
        for block in blocks {
            if block.bytes == 0 || block.bytes % PAGE_BYTES != 0 || block.file_offset != 0 {
                return Err(Error::refused(format!(
                    "memory block {}: {} bytes at offset {} of its file; only whole files of whole 4 KiB pages can be moved",
                    block.name, block.bytes, block.file_offset
                )));
            }
            let len = usize::try_from(block.bytes)
                .map_err(|_| Error::refused("guest memory exceeds the address space"))?;
            let region = map(block.file.as_fd(), block.file_offset, len, access)?;
            slots.push(MemorySlot {
                name: block.name,
                first_page: pages,
                backing_page_bytes: block.backing_page_bytes,
                process_address: block.process_address,
                region,
                id: FileId::of(&block.file)?,
                file: block.file,
            });
            pages += block.bytes / PAGE_BYTES;
        }
        if slots.is_empty() {
            return Err(Error::refused("the guest has no memory that could be moved"));
        }
        Ok(Self { slots, pages, mapped: OnceLock::new() })
    }

    /// Whether this maps these very blocks: files, addresses and lengths, and not names alone.
    pub fn maps(&self, blocks: &[SlotSource]) -> Result<bool> {
        let mut same = self.slots.len() == blocks.len();
        for (slot, block) in self.slots.iter().zip(blocks) {
            same = same && slot.is_of(block)?;
        }
        Ok(same)
    }

    /// The slots in order.
    #[must_use]
    pub fn slots(&self) -> &[MemorySlot] {
        &self.slots
    }

    /// Pages in all.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes in all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    /// Index of the slot that holds a page, and the page's byte offset in it.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn locate(&self, pfn: u64) -> (usize, u64) {
        assert!(pfn < self.pages, "page {pfn} of {}", self.pages);
        let index = self.slots.partition_point(|s| s.first_page <= pfn) - 1;
        (index, (pfn - self.slots[index].first_page) * PAGE_BYTES)
    }

    /// Every run of pages that was ever touched (`SEEK_DATA` and `SEEK_HOLE`; of huge pages, those
    /// that their file has); the rest is a hole and reads as zeros. Reading a hole through a
    /// mapping would allocate it, so nobody should. Where a file of huge pages cannot be asked, all
    /// of it counts as touched.
    pub fn touched(&self) -> Result<Vec<PageRun>> {
        let mut runs = Vec::new();
        for slot in &self.slots {
            slot.check_size()?;
            if slot.backing_page_bytes != PAGE_BYTES
                && let Some(pages) = slot.huge_pages()?
            {
                runs.extend(pages);
                continue;
            }
            let data = extents::data_within(&slot.file, 0..slot.region.len() as u64)
                .map_err(|e| Error::os(format!("looking for touched pages of {}", slot.name), e))?;
            runs.extend(data.iter().map(|part| slot.pages_of(part)));
        }
        Ok(runs)
    }

    /// Makes all of it read as zeros, maps what is allocated already, and returns how many pages
    /// were not zero. For a destination ahead of a migration: then a page of zeros need not be
    /// sent, memory that was allocated ahead stays so, and the lanes find it mapped.
    pub fn make_zero(&self) -> Result<u64> {
        let mut zeroed = 0;
        let mut mapped = DirtyBitmap::new(self.pages);
        for run in self.touched()? {
            mapped.insert(run);
            let (index, offset) = self.locate(run.first.0);
            let slot = &self.slots[index];
            slot.region.populate(offset as usize, run.bytes() as usize)?;
            for page in run.first.0..run.end() {
                if !self.is_zero(page)? {
                    self.punch(PageRun::between(page, page + 1))?;
                    mapped.remove(PageRun::between(page, page + 1));
                    zeroed += 1;
                }
            }
        }
        self.check_readable(Poisoned::Refuse)?;
        // A second call finds the same, or less: what it would add costs a fault and no more.
        let _ = self.mapped.set(mapped);
        Ok(zeroed)
    }

    /// To be called once all of it is allocated and mapped, and still zeros: nothing is left to be
    /// done ahead of the data.
    pub fn note_mapped(&self) {
        let mut mapped = DirtyBitmap::new(self.pages);
        mapped.insert(PageRun::between(0, self.pages));
        let _ = self.mapped.set(mapped);
    }

    /// These runs, rising, as byte ranges of each slot's region.
    #[must_use]
    pub fn parts(&self, runs: &[PageRun]) -> Vec<Vec<Range<usize>>> {
        let mut parts = vec![Vec::new(); self.slots.len()];
        for run in runs {
            let mut at = run.first.0;
            while at < run.end() {
                let (index, offset) = self.locate(at);
                let end = run.end().min(self.slots[index].run().end());
                let begin = offset as usize;
                parts[index].push(begin..begin + ((end - at) * PAGE_BYTES) as usize);
                at = end;
            }
        }
        parts
    }

    /// The parts of these runs that are not mapped yet, as far as is known.
    #[must_use]
    pub fn unmapped(&self, runs: &[PageRun]) -> Vec<PageRun> {
        let Some(mapped) = self.mapped.get() else { return runs.to_vec() };
        let mut missing = DirtyBitmap::new(self.pages);
        runs.iter().for_each(|run| missing.insert(*run));
        mapped.runs(u64::MAX).for_each(|run| missing.remove(run));
        missing.runs(u64::MAX).collect()
    }

    /// Whether a page reads as zeros. A hole is allocated by looking.
    pub fn is_zero(&self, pfn: u64) -> Result<bool> {
        let (index, offset) = self.locate(pfn);
        Ok(self.slots[index].region.is_zero(offset as usize, PAGE_BYTES as usize)?)
    }

    /// Makes a run within one slot a hole. Part of a huge page cannot be freed, only zeroed, which
    /// the kernel does by itself.
    fn punch(&self, run: PageRun) -> Result<()> {
        let (index, offset) = self.locate(run.first.0);
        let slot = &self.slots[index];
        fallocate(
            &slot.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            run.bytes(),
        )
        .map_err(|e| Error::os(format!("punching a hole into {}", slot.name), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn block(name: &str, pages: u64) -> SlotSource {
        let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, pages * PAGE_BYTES).unwrap();
        SlotSource {
            name: name.into(),
            file,
            file_offset: 0,
            bytes: pages * PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
            process_address: 0,
        }
    }

    #[test]
    fn touched_pages_are_found_and_made_zero() {
        let memory = GuestMemory::map(vec![block("a", 16), block("b", 16)], Access::Write).unwrap();
        for page in [3u64, 4, 20] {
            let (slot, offset) = memory.locate(page);
            memory.slots()[slot].region().write(offset as usize, &[7]).unwrap();
        }
        assert_eq!(memory.touched().unwrap(), [PageRun::between(3, 5), PageRun::between(20, 21)]);
        assert_eq!(memory.make_zero().unwrap(), 3);
        assert_eq!(memory.touched().unwrap(), []);
        assert!(memory.is_zero(4).unwrap());
        // What is allocated and zero stays allocated.
        assert_eq!(memory.touched().unwrap(), [PageRun::between(4, 5)]);
        assert_eq!(memory.make_zero().unwrap(), 0);
        assert_eq!(memory.touched().unwrap(), [PageRun::between(4, 5)]);
    }
}
