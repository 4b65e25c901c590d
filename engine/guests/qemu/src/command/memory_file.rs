//! The memory files that are made for a QEMU.

use pageferry_engine::error::{Error, Result};
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_transport::sealed_memfd;
use rustix::fs::MemfdFlags;
use std::os::fd::OwnedFd;

/// A memory file that QEMU is to inherit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryFile {
    /// The id of the backend, for `/proc/PID/maps`.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Huge pages, and their size in bytes; zero is the system's default size.
    pub huge_page_bytes: Option<u64>,
}

pub(crate) fn make_memory(file: &MemoryFile) -> Result<OwnedFd> {
    let mut flags = MemfdFlags::empty();
    let mut page = PAGE_BYTES;
    if let Some(bytes) = file.huge_page_bytes {
        flags |= MemfdFlags::HUGETLB;
        if bytes != 0 {
            if !bytes.is_power_of_two() {
                return Err(Error::refused(format!(
                    "memory {}: no huge page has {bytes} bytes",
                    file.name
                )));
            }
            // MFD_HUGE_SHIFT: the size travels as its logarithm.
            flags |= MemfdFlags::from_bits_retain(bytes.trailing_zeros() << 26);
            page = bytes;
        }
    }
    let bytes = file.bytes.checked_next_multiple_of(page).filter(|b| *b > 0).ok_or_else(|| {
        Error::refused(format!("memory {}: {} bytes is no size", file.name, file.bytes))
    })?;
    sealed_memfd(&format!("pageferry-{}", file.name), flags, bytes).map_err(|e| match file.huge_page_bytes {
        Some(huge) => Error::os(
            format!(
                "making memory {} of {bytes} bytes in huge pages ({huge} bytes each): does this kernel have that size?",
                file.name
            ),
            e,
        ),
        None => Error::os(format!("making memory {} of {bytes} bytes", file.name), e),
    })
}
