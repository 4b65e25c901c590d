//! Memory of a VMM that is built on vm-memory, as pageferry takes it. Behind the feature
//! `vm-memory`.
//!
//! ```text
//!   GuestMemoryMmap --+-- guest_memory    the same files, mapped once more: what the lanes read and write
//!                     +-- kvm_slots       the monitor's own mapping, as it registered it with KVM
//! ```
//!
//! Both lay the regions end to end in the order of their guest addresses. A region's name, by which
//! the other end knows it, is its guest address.
//!
//! ```
//! use pageferry_engine::embed::vm_memory::{guest_memory, kvm_slots};
//! use pageferry_transport::Access;
//! use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
//!
//! # let file = std::fs::File::from(rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC)?);
//! # file.set_len(1 << 20)?;
//! // `file` is a memfd of 1 MiB.
//! let range = (GuestAddress(0), 1 << 20, Some(FileOffset::new(file, 0)));
//! let memory = GuestMemoryMmap::<()>::from_ranges_with_files([range])?;
//! let lanes = guest_memory(&memory, Access::Write)?;
//! let slots = kvm_slots(&memory, 0..)?;
//! assert_eq!((lanes.bytes(), slots[0].bytes), (1 << 20, 1 << 20));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::dirty::kvm::KvmSlot;
use crate::error::{Error, Result};
use crate::memory::page::PAGE_BYTES;
use crate::memory::{GuestMemory, SlotSource};
use pageferry_transport::Access;
use rustix::fs::{fstat, fstatfs};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

/// `TMPFS_MAGIC` and `HUGETLBFS_MAGIC` of `linux/magic.h`; memfds lie in these too.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Maps the files of all regions once more, for the lanes. The regions stay the monitor's.
///
/// # Errors
/// [`Error::Refused`], with the fix, for a region that is anonymous or private, that does not begin with its file, is
/// not whole pages, lies on a disk, or shares its file with another.
pub fn guest_memory<B: Bitmap>(memory: &GuestMemoryMmap<B>, access: Access) -> Result<GuestMemory> {
    let mut files = Vec::new();
    let mut blocks = Vec::new();
    for region in memory.iter() {
        let (block, file) = block(region)?;
        if files.contains(&file) {
            return Err(refused(
                region,
                "shares its file with another region: give each a file of its own",
            ));
        }
        files.push(file);
        blocks.push(block);
    }
    GuestMemory::map(blocks, access)
}

/// What KVM has of these regions, for [`crate::dirty::kvm::KvmSlots::new`]. `numbers` are the
/// numbers under which the monitor has registered them, in the order of their guest addresses.
///
/// # Errors
/// [`Error::Refused`] if a region is not whole pages, or there is no number for it.
pub fn kvm_slots<B: Bitmap>(
    memory: &GuestMemoryMmap<B>,
    numbers: impl IntoIterator<Item = u32>,
) -> Result<Vec<KvmSlot>> {
    let (mut numbers, mut first_page) = (numbers.into_iter(), 0);
    let mut slots = Vec::new();
    for region in memory.iter() {
        check_whole(region, PAGE_BYTES)?;
        let slot = numbers.next().ok_or_else(|| {
            refused(
                region,
                "has no number: name the slot of KVM under which each region is registered",
            )
        })?;
        let (guest_address, bytes) = (region.start_addr().raw_value(), region.len());
        slots.push(KvmSlot {
            slot,
            guest_address,
            bytes,
            host_address: region.as_ptr() as u64,
            first_page,
        });
        first_page += bytes / PAGE_BYTES;
    }
    Ok(slots)
}

/// A region as it is to be mapped, and which file it is: device and inode.
fn block<B: Bitmap>(region: &GuestRegionMmap<B>) -> Result<(SlotSource, (u64, u64))> {
    let Some(backing) = region.file_offset() else {
        return Err(refused(region, "is anonymous: give it a memfd (vm_memory::FileOffset)"));
    };
    if region.flags() & libc::MAP_SHARED == 0 {
        return Err(refused(region, "is a private mapping of its file: map it with MAP_SHARED"));
    }
    if backing.start() != 0 {
        return Err(refused(
            region,
            &format!(
                "begins at offset {:#x} of its file: give it a file of its own, mapped from the beginning",
                backing.start()
            ),
        ));
    }
    let looking = |e| Error::os(format!("looking at the file of {}", called(region)), e);
    let file = backing.file().try_clone().map_err(looking)?;
    let system = fstatfs(&file).map_err(|e| looking(e.into()))?;
    let backing_page_bytes = match system.f_type as u64 {
        TMPFS_MAGIC => PAGE_BYTES,
        HUGETLBFS_MAGIC => system.f_bsize as u64,
        _ => {
            return Err(refused(
                region,
                "is a file on a disk: use a memfd, or a file in /dev/shm or in a hugetlbfs",
            ));
        }
    };
    check_whole(region, backing_page_bytes)?;
    let stat = fstat(&file).map_err(|e| looking(e.into()))?;
    if (stat.st_size as u64) < region.len() {
        return Err(refused(
            region,
            &format!("is longer than its file of {} bytes: it must not be cut", stat.st_size),
        ));
    }
    let name = format!("{:#x}", region.start_addr().raw_value());
    let (bytes, process_address) = (region.len(), region.as_ptr() as u64);
    let block =
        SlotSource { name, file, file_offset: 0, bytes, backing_page_bytes, process_address };
    Ok((block, (stat.st_dev, stat.st_ino)))
}

/// KVM takes whole pages only, and huge ones are not divided.
fn check_whole<B: Bitmap>(region: &GuestRegionMmap<B>, page_bytes: u64) -> Result<()> {
    let address = region.start_addr().raw_value();
    if region.len().is_multiple_of(page_bytes) && address.is_multiple_of(PAGE_BYTES) {
        Ok(())
    } else {
        Err(refused(
            region,
            &format!("has {} bytes there, which are not whole pages of {page_bytes}", region.len()),
        ))
    }
}

fn called<B: Bitmap>(region: &GuestRegionMmap<B>) -> String {
    format!("the memory at guest address {:#x}", region.start_addr().raw_value())
}

fn refused<B: Bitmap>(region: &GuestRegionMmap<B>, why: &str) -> Error {
    Error::refused(format!("{} {why}", called(region)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::fs::File;
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, FileOffset, GuestAddress};

    const BYTES: usize = 64 << 10;

    fn file() -> File {
        let file = memfd_create("region", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 2 * BYTES as u64).unwrap();
        file.into()
    }

    fn at(
        address: u64,
        bytes: usize,
        file: Option<FileOffset>,
    ) -> (GuestAddress, usize, Option<FileOffset>) {
        (GuestAddress(address), bytes, file)
    }

    fn mapped<const N: usize>(
        ranges: [(GuestAddress, usize, Option<FileOffset>); N],
    ) -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()
    }

    fn refusal(memory: &GuestMemoryMmap) -> String {
        let error = guest_memory(memory, Access::Write).unwrap_err();
        assert!(matches!(error, Error::Refused(_)), "{error:?}");
        error.to_string()
    }

    #[test]
    fn regions_are_slots_in_the_order_of_their_addresses_and_the_same_memory() {
        let part = || Some(FileOffset::new(file(), 0));
        let memory = mapped([at(0, BYTES, part()), at(1 << 32, 2 * BYTES, part())]);
        let lanes = guest_memory(&memory, Access::Write).unwrap();
        let slots = kvm_slots(&memory, [3, 5]).unwrap();
        let names: Vec<_> = lanes.slots().iter().map(|slot| slot.name.as_str()).collect();
        assert_eq!(names, ["0x0", "0x100000000"]);
        for (slot, lane) in slots.iter().zip(lanes.slots()) {
            assert_eq!((slot.first_page, slot.pages()), (lane.first_page, lane.pages()));
            assert_eq!(slot.host_address, lane.process_address);
        }
        assert_eq!((slots[0].slot, slots[1].slot, slots[1].guest_address), (3, 5, 1 << 32));
        memory.write_obj(0x5046_u32, GuestAddress((1 << 32) + 0x1000)).unwrap();
        let mut bytes = [0; 4];
        lanes.slots()[1].region().read(0x1000, &mut bytes).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), 0x5046);
    }

    #[test]
    fn what_cannot_be_shared_is_refused_with_its_address_and_the_mend() {
        let whole = |file| Some(FileOffset::new(file, 0));
        let private = MmapRegionBuilder::new(BYTES)
            .with_mmap_flags(libc::MAP_PRIVATE)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_file_offset(FileOffset::new(file(), 0))
            .build()
            .unwrap();
        let private = GuestRegionMmap::new(private, GuestAddress(0x10_0000)).unwrap();
        let private = GuestMemoryMmap::from_regions(vec![private]).unwrap();
        let shared = file();
        let twice =
            [at(0, BYTES, whole(shared.try_clone().unwrap())), at(0x10_0000, BYTES, whole(shared))];
        let cut = file();
        let short = mapped([at(0x10_0000, BYTES, whole(cut.try_clone().unwrap()))]);
        ftruncate(&cut, 4096).unwrap();
        for (memory, why) in [
            (private, "MAP_SHARED"),
            (mapped([at(0x10_0000, BYTES, None)]), "anonymous"),
            (mapped([at(0x10_0000, BYTES, Some(FileOffset::new(file(), 4096)))]), "offset 0x1000"),
            (mapped([at(0x10_0000, BYTES + 512, whole(file()))]), "66048 bytes"),
            (mapped(twice), "shares its file"),
            (short, "its file of 4096 bytes"),
        ] {
            let said = refusal(&memory);
            assert!(said.contains("0x100000") && said.contains(why), "{said}");
        }
    }

    #[test]
    fn a_region_without_a_number_and_one_of_half_a_page_are_no_slots() {
        let memory = mapped([at(0x10_0000, BYTES, None), at(0x20_0000, BYTES, None)]);
        let said = kvm_slots(&memory, [0]).unwrap_err().to_string();
        assert!(said.contains("0x200000 has no number"), "{said}");
        for memory in [mapped([at(0x10_0000, 6000, None)]), mapped([at(0x10_0200, BYTES, None)])] {
            let said = kvm_slots(&memory, 0..).unwrap_err().to_string();
            assert!(said.contains("not whole pages of 4096"), "{said}");
        }
    }
}
