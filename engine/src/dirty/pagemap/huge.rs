//! Which huge pages a file has.
//!
//! hugetlbfs does not tell its holes: `SEEK_DATA` takes all of a file for data, and `mincore` and `pagemap` know of one
//! mapping alone. Reading a hole through a mapping allocates a huge page, or ends in SIGBUS where the pool is empty.
//! `UFFDIO_CONTINUE` tells (Linux 5.13, `ioctl_userfaultfd(2)`): it maps the pages that the file has, and answers EFAULT
//! where it has none, without making one. It is asked of a mapping of its own, which nobody touches.

use super::{abi, ioctl, own_userfaultfd};
use crate::error::{Error, Result};
use pageferry_transport::{Access, MemoryRegion};
use rustix::io::Errno;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// How often the kernel may ask to be asked again: it does while this process changes its mappings.
const ATTEMPTS_MAX: u32 = 1000;

/// A file of huge pages that can be asked. See the [module](self).
#[derive(Debug)]
pub(crate) struct HugeFile {
    uffd: OwnedFd,
    region: Arc<MemoryRegion>,
    page_bytes: u64,
}

impl HugeFile {
    /// The first `bytes` of this file, whose pages have this size. `None` where it cannot be asked: the kernel does not know
    /// how, or does not let us.
    pub(crate) fn open(file: BorrowedFd<'_>, bytes: u64, page_bytes: u64) -> Option<Self> {
        Self::through(file, bytes, page_bytes).or_else(|| {
            // The kernel does this only for who could write the file. Not opened without need: a destination takes it for
            // another process' doing.
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let file = File::options().read(true).write(true).open(path).ok()?;
            Self::through(file.as_fd(), bytes, page_bytes)
        })
    }

    fn through(file: BorrowedFd<'_>, bytes: u64, page_bytes: u64) -> Option<Self> {
        let region =
            MemoryRegion::map_unreserved(file, 0, usize::try_from(bytes).ok()?, Access::Read).ok()?;
        let uffd = own_userfaultfd().ok()?;
        let features = abi::UFFD_FEATURE_MINOR_HUGETLBFS;
        let mut api = abi::UffdioApi { api: abi::UFFD_API, features, ioctls: 0 };
        ioctl(uffd.as_fd(), abi::UFFDIO_API, &mut api).ok()?;
        let range = abi::UffdioRange { start: region.as_ptr() as u64, len: bytes };
        let mut register = abi::UffdioRegister { range, mode: abi::UFFDIO_REGISTER_MODE_MINOR, ioctls: 0 };
        ioctl(uffd.as_fd(), abi::UFFDIO_REGISTER, &mut register).ok()?;
        Some(Self { uffd, region, page_bytes })
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
                // Mapped here before; or the hardware lost it, and whoever reads it will hear of that.
                Err(Errno::EXIST | Errno::IO) => return Ok(self.page_bytes),
                Err(Errno::AGAIN) if arg.mapped > 0 => return Ok(arg.mapped as u64),
                Err(Errno::AGAIN) => range.len = self.page_bytes.min(range.len),
                Err(e) => return Err(Error::os("UFFDIO_CONTINUE, which tells holes of huge pages", e)),
            }
        }
        Err(Error::os("UFFDIO_CONTINUE, which tells holes of huge pages", Errno::AGAIN))
    }
}
