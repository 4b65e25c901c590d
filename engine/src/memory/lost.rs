//! Pages of guest memory that this host cannot read any more: found, named, and what becomes of
//! them.
//!
//! Hardware loses a page (the kernel calls it poisoned), or somebody cuts the memory file. Our
//! mapping shows zeros in the place of such a page and remembers it
//! ([`MemoryRegion::lost`](pageferry_transport::MemoryRegion::lost)); nothing that was read counts
//! before [`GuestMemory::check_readable`] has said so.
//!
//! | lost | the source | the destination |
//! | --- | --- | --- |
//! | poisoned page | refused, or moved as zeros, by choice ([`Poisoned`]) | refused |
//! | file cut, no room for a hole that is looked at | refused | refused |

use super::{GuestMemory, MemorySlot};
use crate::error::{Error, Result};
use crate::memory::bitmap::DirtyBitmap;
use crate::memory::lost_page::{LostPage, Poisoned};
use crate::memory::page::{PAGE_BYTES, PageRun};
use pageferry_transport::{LOST_MAX, Loss, Lost};
use rustix::fs::fstat;

impl MemorySlot {
    /// Fails if the file ends before the slot does: whoever touches what is missing, dies of it.
    pub(super) fn check_size(&self) -> Result<()> {
        let stat = fstat(&self.file)
            .map_err(|e| Error::os(format!("looking at the memory of block {}", self.name), e))?;
        let (len, wanted) = (u64::try_from(stat.st_size).unwrap_or(0), self.region.len() as u64);
        if len >= wanted {
            return Ok(());
        }
        Err(Error::Guest(format!(
            "the file behind memory block {} was cut to {len:#x} of {wanted:#x} bytes: what the guest had there is lost, \
             and its process ends when it touches it; shut the guest down and start it anew",
            self.name
        )))
    }

    fn named(&self, lost: &Lost) -> LostPage {
        let (offset, bytes) = (lost.offset as u64, lost.bytes as u64);
        LostPage { block: self.name.clone(), offset, bytes, guest_physical: None }
    }
}

impl GuestMemory {
    /// Maps what was lost from its file again: it may be another page by now. Before a migration,
    /// when nobody uses the mappings.
    pub fn look_again(&self) -> Result<()> {
        self.slots.iter().try_for_each(|slot| Ok(slot.region.look_at_all_again()?))
    }

    /// The same for lost pages that were written since: the guest's process has put another page
    /// there.
    pub(crate) fn look_again_at(&self, written: &DirtyBitmap) -> Result<()> {
        for slot in self.slots.iter().filter(|slot| slot.region.faults() > 0) {
            for lost in slot.region.lost() {
                let first = slot.first_page + lost.offset as u64 / PAGE_BYTES;
                let run = PageRun::between(first, first + (lost.bytes as u64).div_ceil(PAGE_BYTES));
                if (run.first.0..run.end()).any(|page| written.contains(page)) {
                    slot.region.look_again(lost)?;
                }
            }
        }
        Ok(())
    }

    /// How often a page could not be read so far. Unchanged means that everything read in between
    /// was there.
    #[must_use]
    pub fn faults(&self) -> usize {
        self.slots.iter().map(|slot| slot.region.faults()).sum()
    }

    /// The pages that the hardware lost.
    #[must_use]
    pub fn lost_pages(&self) -> Vec<LostPage> {
        let of = |slot: &MemorySlot| -> Vec<_> {
            let poisoned = |lost: &Lost| lost.loss == Loss::Poisoned;
            slot.region
                .lost()
                .iter()
                .filter(|lost| poisoned(lost))
                .map(|lost| slot.named(lost))
                .collect()
        };
        self.slots.iter().flat_map(of).collect()
    }

    /// Fails, naming them, if pages could not be read, unless the hardware lost them and they may
    /// go as zeros. Costs nothing where none was lost.
    pub fn check_readable(&self, poisoned: Poisoned) -> Result<()> {
        if self.faults() == 0 {
            return Ok(());
        }
        for slot in &self.slots {
            slot.check_size()?;
            if let Some(absent) = slot.region.lost().iter().find(|lost| lost.loss == Loss::Absent) {
                return Err(Error::Guest(format!(
                    "no page can be had for {}: is the file system of its memory full, or are the huge pages used up?",
                    slot.named(absent)
                )));
            }
            if slot.region.lost_too_many() {
                return Err(Error::Guest(format!(
                    "the hardware of this host lost more than {LOST_MAX} pages of memory block {}: a guest with so many \
                     holes is not moved; shut it down and start it elsewhere",
                    slot.name
                )));
            }
        }
        let pages = self.lost_pages();
        if pages.is_empty() || poisoned == Poisoned::Zero {
            return Ok(());
        }
        Err(Error::Poisoned(pages))
    }

    /// Fails if a memory file was cut, whether or not anybody touched what is missing.
    pub fn check_sizes(&self) -> Result<()> {
        self.slots.iter().try_for_each(MemorySlot::check_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SlotSource;
    use pageferry_transport::Access;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::fs::File;

    #[test]
    fn a_file_that_is_cut_is_named_wherever_it_is_noticed() {
        let file = File::from(memfd_create("cut", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 16 * PAGE_BYTES).unwrap();
        let slot = SlotSource {
            name: "pc.ram".into(),
            file: file.try_clone().unwrap(),
            file_offset: 0,
            bytes: 16 * PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
            process_address: 0,
        };
        let memory = GuestMemory::map(vec![slot], Access::Write).unwrap();
        memory.slots()[0].region().write(0, &[1; 16 * PAGE_BYTES as usize]).unwrap();
        memory.check_readable(Poisoned::Refuse).unwrap();
        ftruncate(&file, 8 * PAGE_BYTES).unwrap();
        let cut = |result: Result<()>| {
            let text = result.unwrap_err().chain();
            assert!(
                text.contains("memory block pc.ram was cut to 0x8000 of 0x10000 bytes"),
                "{text}"
            );
        };
        cut(memory.touched().map(drop));
        cut(memory.check_sizes());
        memory.check_readable(Poisoned::Refuse).unwrap();
        assert!(memory.is_zero(9).unwrap());
        cut(memory.check_readable(Poisoned::Zero));
        ftruncate(&file, 16 * PAGE_BYTES).unwrap();
        memory.look_again().unwrap();
        memory.check_readable(Poisoned::Refuse).unwrap();
    }
}
