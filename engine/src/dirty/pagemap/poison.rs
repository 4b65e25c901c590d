//! Memory of this process that answers as broken memory does, for tests: the kernel's own poison
//! (`UFFDIO_POISON`, Linux 6.6), which is what a monitor puts in the place of pages that were lost
//! elsewhere.

use super::{abi, ioctl, own_userfaultfd};
use crate::error::{Error, Result};
use crate::memory::page::PAGE_BYTES;
use pageferry_transport::MemoryRegion;
use std::os::fd::{AsFd, OwnedFd};

/// Poisons pages of one mapping. New poison ends with it; what is poisoned stays so until it is
/// mapped anew.
#[derive(Debug)]
pub struct Poison {
    uffd: OwnedFd,
    start: u64,
}

impl Poison {
    /// For this mapping, which nobody follows. Holes of its file must not be touched through it any
    /// more: whoever does waits for ever.
    pub fn of(region: &MemoryRegion) -> Result<Self> {
        let uffd = own_userfaultfd()?;
        let mut api =
            abi::UffdioApi { api: abi::UFFD_API, features: abi::UFFD_FEATURE_POISON, ioctls: 0 };
        ioctl(uffd.as_fd(), abi::UFFDIO_API, &mut api).map_err(|e| Error::os("UFFDIO_API", e))?;
        let start = region.as_ptr() as u64;
        let range = abi::UffdioRange { start, len: region.len() as u64 };
        let mut register =
            abi::UffdioRegister { range, mode: abi::UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
        ioctl(uffd.as_fd(), abi::UFFDIO_REGISTER, &mut register)
            .map_err(|e| Error::os("UFFDIO_REGISTER", e))?;
        Ok(Self { uffd, start })
    }

    /// Every touch of the page at this offset raises what broken memory raises.
    pub fn page(&self, offset: u64) -> Result<()> {
        let start = self.start + offset;
        // SAFETY: a page of a shared mapping of a file: what it holds stays in the file.
        unsafe {
            let address = std::ptr::with_exposed_provenance_mut(start as usize);
            rustix::mm::madvise(address, PAGE_BYTES as usize, rustix::mm::Advice::LinuxDontNeed)
        }
        .map_err(|e| Error::os("unmapping a page", e))?;
        let range = abi::UffdioRange { start, len: PAGE_BYTES };
        let mut poison = abi::UffdioPoison { range, mode: 0, updated: 0 };
        ioctl(self.uffd.as_fd(), abi::UFFDIO_POISON, &mut poison)
            .map(drop)
            .map_err(|e| Error::os("UFFDIO_POISON", e))
    }
}
