//! The file behind a block of a QEMU's memory, found in its mappings and opened through its
//! descriptors.

use crate::memory::table::RamBlock;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::host::maps::Mapping;
use pageferry_engine::memory::SlotSource;
use pageferry_transport::Access;
use rustix::fs::{fstat, fstatfs};
use std::fs;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// The file that all of a block is a shared mapping of, in one piece.
pub(crate) fn shared_file(maps: &[Mapping], block: &RamBlock) -> Option<Mapping> {
    let end = block.address.checked_add(block.used_bytes)?;
    let first = maps.iter().find(|m| m.start <= block.address && block.address < m.end)?;
    let offset = first.offset + (block.address - first.start);
    let mut at = block.address;
    // The kernel splits a mapping where NUMA policy or advice changes.
    for part in maps.iter().filter(|m| m.end > block.address && m.start < end) {
        let same = part.shared
            && part.inode != 0
            && part.device == first.device
            && part.inode == first.inode;
        let reached = part.start.max(block.address);
        if !same
            || reached != at
            || part.offset + (reached - part.start) != offset + (at - block.address)
        {
            return None;
        }
        at = part.end.min(end);
    }
    (at == end && at > block.address).then(|| Mapping { offset, ..first.clone() })
}

/// Opens the file behind a block through one of QEMU's own descriptors: the file may have no name
/// any more, and this needs no more permission than tracing does.
pub(crate) fn open(
    pid: u32,
    block: &RamBlock,
    file: &Mapping,
    access: Access,
) -> Result<SlotSource> {
    let name = block.backend_id();
    let path = descriptor_of(pid, file)?.ok_or_else(|| {
        Error::refused(format!(
            "QEMU (process {pid}) holds no descriptor of the file behind memory block {name}, so pageferry cannot open it"
        ))
    })?;
    let opened =
        File::options().read(true).write(access == Access::Write).open(&path).map_err(|e| {
            Error::os(format!("opening the memory of block {name} ({})", path.display()), e)
        })?;
    let stat = fstat(&opened)
        .map_err(|e| Error::os(format!("looking at the memory of block {name}"), e))?;
    if !is_file(file, stat.st_dev, stat.st_ino) {
        return Err(Error::Guest(format!(
            "QEMU closed the file behind memory block {name} meanwhile"
        )));
    }
    let kind = fstatfs(&opened)
        .map_err(|e| Error::os(format!("looking at the memory of block {name}"), e))?
        .f_type;
    if ![TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&(kind as u64)) {
        return Err(Error::refused(format!(
            "memory block {name} lies in a file on a disk, whose writes the kernel cannot follow: give it a mem-path \
             in /dev/shm or in a hugetlbfs"
        )));
    }
    Ok(SlotSource {
        name: block.name.clone(),
        file: opened,
        file_offset: file.offset,
        bytes: block.used_bytes,
        backing_page_bytes: block.page_bytes,
        process_address: block.address,
    })
}

/// `TMPFS_MAGIC` and `HUGETLBFS_MAGIC` of `linux/magic.h`; memfds lie in these too.
const TMPFS_MAGIC: u64 = 0x0102_1994;

const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

fn descriptor_of(pid: u32, file: &Mapping) -> Result<Option<PathBuf>> {
    let directory = format!("/proc/{pid}/fd");
    let entries =
        fs::read_dir(&directory).map_err(|e| Error::os(format!("reading {directory}"), e))?;
    for entry in entries.flatten() {
        // A descriptor may be closed between the listing and here.
        if let Ok(metadata) = fs::metadata(entry.path())
            && is_file(file, metadata.dev(), metadata.ino())
        {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

fn is_file(file: &Mapping, device: u64, inode: u64) -> bool {
    let major_minor = (u64::from(rustix::fs::major(device)), u64::from(rustix::fs::minor(device)));
    file.inode == inode && file.device == major_minor
}
