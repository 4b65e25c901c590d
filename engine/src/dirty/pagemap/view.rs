//! A mapping of a memory file that nobody touches, and in which pages are mapped one by one, on
//! demand alone.
//!
//! `UFFDIO_CONTINUE` (`ioctl_userfaultfd(2)`; Linux 5.13, 5.14 for shmem) sets the page table
//! entries of a range to the pages that the file has, one entry a page, and answers EFAULT where
//! the file has none, without making one. No fault is ever taken here, so there is no fault-around,
//! and no folio is mapped as a whole. Two things follow:
//!
//! - It tells which pages a file has. hugetlbfs tells its holes in no other way: `SEEK_DATA` takes
//!   all of a file for data, `mincore` and `pagemap` know of one mapping alone, and reading a hole
//!   through a mapping allocates a huge page, or ends in SIGBUS where the pool is empty.
//! - What is mapped here was not freed since it was mapped: a page that is freed is unmapped
//!   everywhere.

use super::{abi, ioctl, own_userfaultfd};
use crate::error::{Error, Result};
use crate::memory::page::PAGE_BYTES;
use pageferry_transport::{Access, MemoryRegion};
use rustix::io::Errno;
use rustix::mm::Advice;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// How often the kernel may ask to be asked again: it does while this process changes its mappings.
const ATTEMPTS_MAX: u32 = 1000;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct FileView {
    uffd: OwnedFd,
    region: Arc<MemoryRegion>,
    page_bytes: u64,
}

impl FileView {
    /// The first `bytes` of this file, whose pages have this size.
    ///
    /// # Errors
    /// If the kernel does not know how, or does not let us.
    pub(crate) fn open(file: BorrowedFd<'_>, bytes: u64, page_bytes: u64) -> Result<Self> {
        Self::through(file, bytes, page_bytes).or_else(|_| {
            // The kernel does this only for who could write the file. Not opened without need: a
            // destination takes it for another process' doing.
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let file = File::options()
                .read(true)
                .write(true)
                .open(path)
                .map_err(|e| Error::os("opening a memory file for writing", e))?;
            Self::through(file.as_fd(), bytes, page_bytes)
        })
    }

    fn through(file: BorrowedFd<'_>, bytes: u64, page_bytes: u64) -> Result<Self> {
        let len = usize::try_from(bytes)
            .map_err(|_| Error::refused("guest memory exceeds the address space"))?;
        let region = MemoryRegion::map_unreserved(file, 0, len, Access::Read)?;
        if page_bytes == PAGE_BYTES {
            // SAFETY: a mapping of ours; the advice changes no content. A kernel without huge pages
            // refuses it, and needs none.
            let _ = unsafe {
                rustix::mm::madvise(region.as_ptr().cast(), len, Advice::LinuxNoHugepage)
            };
        }
        let uffd = own_userfaultfd()?;
        let features = match page_bytes {
            PAGE_BYTES => abi::UFFD_FEATURE_MINOR_SHMEM,
            _ => abi::UFFD_FEATURE_MINOR_HUGETLBFS,
        };
        let mut api = abi::UffdioApi { api: abi::UFFD_API, features, ioctls: 0 };
        let asking = "UFFDIO_CONTINUE, which tells which pages a memory file has (Linux 5.14)";
        ioctl(uffd.as_fd(), abi::UFFDIO_API, &mut api).map_err(|e| Error::os(asking, e))?;
        let range = abi::UffdioRange { start: region.as_ptr() as u64, len: bytes };
        let mut register =
            abi::UffdioRegister { range, mode: abi::UFFDIO_REGISTER_MODE_MINOR, ioctls: 0 };
        ioctl(uffd.as_fd(), abi::UFFDIO_REGISTER, &mut register)
            .map_err(|e| Error::os(asking, e))?;
        Ok(Self { uffd, region, page_bytes })
    }

    /// Its addresses in this process.
    pub(crate) fn addresses(&self) -> Range<u64> {
        let start = self.region.as_ptr() as u64;
        start..start + self.region.len() as u64
    }

    /// Maps the pages of this range, of whole pages, that the file has.
    pub(crate) fn map(&self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            at += self.data_at(at, range.end)?.max(self.page_bytes);
        }
        Ok(())
    }

    /// The parts of this range, of whole pages, that the file has; rising.
    pub(crate) fn data(&self, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let there = self.data_at(at, range.end)?;
            let end = range.end.min(at + there.max(self.page_bytes));
            match found.last_mut() {
                _ if there == 0 => {}
                Some(last) if last.end == at => last.end = end,
                _ => found.push(at..end),
            }
            at = end;
        }
        Ok(found)
    }

    /// How many bytes the file surely has from here on; none if there is a hole.
    fn data_at(&self, at: u64, end: u64) -> Result<u64> {
        let start = self.region.as_ptr() as u64 + at;
        let mut range = abi::UffdioRange { start, len: end - at };
        for _ in 0..ATTEMPTS_MAX {
            let mut arg = abi::UffdioContinue { range, mode: 0, mapped: 0 };
            match ioctl(self.uffd.as_fd(), abi::UFFDIO_CONTINUE, &mut arg) {
                Ok(_) => return Ok(range.len),
                Err(Errno::FAULT) => return Ok(0),
                // Mapped here before; or lost by the hardware, of which whoever reads it will hear.
                Err(Errno::EXIST | Errno::IO) => return Ok(self.page_bytes),
                Err(Errno::AGAIN) if arg.mapped > 0 => return Ok(arg.mapped as u64),
                Err(Errno::AGAIN) => range.len = self.page_bytes.min(range.len),
                Err(e) => {
                    return Err(Error::os(
                        "UFFDIO_CONTINUE, which tells which pages a file has",
                        e,
                    ));
                }
            }
        }
        Err(Error::os("UFFDIO_CONTINUE, which tells which pages a file has", Errno::AGAIN))
    }
}
