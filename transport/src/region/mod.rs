//! Memory that both this process and others write: mapped, bounds-checked, never `&mut [u8]`.
//!
//! Guest memory changes under our feet (vCPUs and QEMU's threads write it at any moment), so no
//! Rust reference to its bytes ever exists: only copies in and out, and addresses handed to the
//! kernel or to a NIC together with something that keeps the mapping alive.

mod guard;
mod memfd;

pub(crate) use guard::faults;
pub use guard::{LOST_MAX, Loss, Lost};
pub use memfd::sealed_memfd;

use crate::error::{Error, Result};
use guard::Guard;
use memmap2::{MmapOptions, MmapRaw};
use rustix::mm::Advice;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

/// What this process may do with a mapped region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read only: the source's view of a running guest.
    Read,
    /// Read and write: the destination's view.
    Write,
}

/// A mapping of memory that can be registered with a link. Unmapped when the last owner is gone.
#[derive(Debug)]
pub struct MemoryRegion {
    /// Before the mapping, which it must not outlive.
    guard: Option<Guard>,
    map: MmapRaw,
    access: Access,
}

/// `HUGETLBFS_MAGIC` of `linux/magic.h`; memfds of huge pages lie in it too.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// Of every backing but huge pages.
const PAGE_BYTES: usize = 4096;

impl MemoryRegion {
    /// Maps `len` bytes of `file` (a memfd, a file in a memory file system) at `offset`, shared
    /// with everyone else who maps it. Huge pages are reserved for all of it.
    pub fn map_shared(
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        access: Access,
    ) -> Result<Arc<Self>> {
        Self::map(&mut MmapOptions::new(), file, offset, len, access)
    }

    /// The same for memory that somebody else has made, who has reserved its huge pages, or has not
    /// on purpose: all of the memory of a guest that touches little of it may be more than the host
    /// has.
    pub fn map_unreserved(
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        access: Access,
    ) -> Result<Arc<Self>> {
        Self::map(MmapOptions::new().no_reserve_swap(), file, offset, len, access)
    }

    fn map(
        options: &mut MmapOptions,
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        access: Access,
    ) -> Result<Arc<Self>> {
        if len == 0 {
            return Err(Error::Bounds { what: "a memory region of zero bytes".into() });
        }
        options.offset(offset).len(len);
        let map = match access {
            Access::Read => options.map_raw_read_only(file.as_raw_fd()),
            Access::Write => options.map_raw(file.as_raw_fd()),
        }
        .map_err(|e| {
            Error::os(format!("mapping {len} bytes of guest memory at offset {offset:#x}"), e)
        })?;
        Ok(Arc::new(Self { guard: None, map, access }))
    }

    /// [`Self::map_shared`] for memory that may go away under us: a page that cannot be read, because the hardware lost it
    /// or the file was cut, reads as zeros from then on, and [`Self::lost`] names it. Not for a
    /// mapping in which a guest runs.
    pub fn map_guarded(
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        access: Access,
    ) -> Result<Arc<Self>> {
        Self::map_shared(file, offset, len, access)?.guarded(file, offset)
    }

    /// The same as [`Self::map_unreserved`].
    pub fn map_guarded_unreserved(
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        access: Access,
    ) -> Result<Arc<Self>> {
        Self::map_unreserved(file, offset, len, access)?.guarded(file, offset)
    }

    fn guarded(mut self: Arc<Self>, file: BorrowedFd<'_>, offset: u64) -> Result<Arc<Self>> {
        let kind = rustix::fs::fstatfs(file)
            .map_err(|e| Error::os("looking at a file of guest memory", e))?;
        let page_bytes = match kind.f_type as u64 {
            HUGETLBFS_MAGIC => usize::try_from(kind.f_bsize).unwrap_or(PAGE_BYTES).max(PAGE_BYTES),
            _ => PAGE_BYTES,
        };
        let start = self.as_ptr().expose_provenance();
        let kept = file
            .try_clone_to_owned()
            .map_err(|e| Error::os("keeping a file of guest memory", e))?;
        let guard = Guard::new((start, self.len()), page_bytes, self.writable(), (kept, offset))?;
        Arc::get_mut(&mut self).expect("just made").guard = Some(guard);
        Ok(self)
    }

    /// How often a page of it could not be read, of a guarded region. Unchanged means that
    /// everything read since then was there.
    #[must_use]
    pub fn faults(&self) -> usize {
        self.guard.as_ref().map_or(0, Guard::faults)
    }

    /// The pages of a guarded region that could not be read and read as zeros since; rising. At
    /// most [`LOST_MAX`].
    #[must_use]
    pub fn lost(&self) -> Vec<Lost> {
        self.guard.as_ref().map(Guard::lost).unwrap_or_default()
    }

    /// Whether more are lost than [`Self::lost`] can name.
    #[must_use]
    pub fn lost_too_many(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::overflowed)
    }

    /// Maps the lost page at this offset from its file again: it may be another page by now.
    pub fn look_again(&self, lost: Lost) -> Result<()> {
        let Some(guard) = &self.guard else { return Ok(()) };
        // Forgotten first: a lane may touch it as soon as it is mapped, and what is noted then is
        // to stay.
        guard.forget(lost.offset);
        self.map_again(guard, lost.offset, lost.bytes)
    }

    /// Maps all of a guarded region from its file again, if any of it was lost. Nobody uses it
    /// meanwhile.
    pub fn look_at_all_again(&self) -> Result<()> {
        let Some(guard) = self.guard.as_ref().filter(|guard| guard.faults() > 0) else {
            return Ok(());
        };
        self.map_again(guard, 0, self.len())?;
        guard.forget_all();
        Ok(())
    }

    fn map_again(&self, guard: &Guard, offset: usize, len: usize) -> Result<()> {
        self.check(offset, len)?;
        let (file, file_offset) = guard.file();
        let protection = libc::PROT_READ | if self.writable() { libc::PROT_WRITE } else { 0 };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let (flags, at) = (flags, self.as_ptr().wrapping_add(offset).cast());
        let file_offset = file_offset + offset as u64;
        // SAFETY: within our own mapping, which stays as long as it was; nobody holds a reference
        // into it.
        let mapped = unsafe {
            libc::mmap(at, len, protection, flags, file.as_raw_fd(), file_offset as libc::off_t)
        };
        if mapped == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            return Err(Error::os(format!("mapping {len} bytes of guest memory again"), error));
        }
        Ok(())
    }

    /// Maps `len` bytes of zeros that belong to this process.
    pub fn anonymous(len: usize) -> Result<Arc<Self>> {
        let fd = sealed_memfd("pageferry", rustix::fs::MemfdFlags::empty(), len as u64)
            .map_err(|e| Error::os(format!("making a memfd of {len} bytes"), e))?;
        Self::map_shared(rustix::fd::AsFd::as_fd(&fd), 0, len, Access::Write)
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Never: a region has at least one byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Whether this process may write it.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.access == Access::Write
    }

    /// Address of the first byte, for the kernel or a NIC. Whoever keeps it keeps the `Arc` too.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Fails unless `[offset, offset + len)` lies inside.
    #[inline]
    pub fn check(&self, offset: usize, len: usize) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(self.outside(offset, len)),
        }
    }

    #[cold]
    fn outside(&self, offset: usize, len: usize) -> Error {
        let what = format!(
            "{len} bytes at offset {offset:#x} do not fit a region of {:#x} bytes",
            self.len()
        );
        Error::Bounds { what }
    }

    /// A checked piece of this region, which keeps it mapped.
    #[inline]
    pub fn slice(self: &Arc<Self>, offset: usize, len: usize) -> Result<LocalSlice> {
        self.check(offset, len)?;
        Ok(LocalSlice { region: Arc::clone(self), offset, len })
    }

    /// Copies bytes out. Bytes that somebody writes meanwhile may come torn.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        self.check(offset, out.len())?;
        // SAFETY: the range was checked, the mapping lives as long as `self`, and `out` is memory
        // of this process that cannot overlap it: nobody holds a reference into a region.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.as_ptr().add(offset).cast_const(),
                out.as_mut_ptr(),
                out.len(),
            )
        };
        Ok(())
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.check(offset, bytes.len())?;
        if !self.writable() {
            return Err(Error::State("writing a region that is mapped read-only"));
        }
        // SAFETY: the range was checked, the mapping is writable and lives as long as `self`, and
        // no reference into it exists that `bytes` could be.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr().add(offset), bytes.len())
        };
        Ok(())
    }

    /// Whether every byte of the range is zero, at some moment while it was looked at. Offset and
    /// length must be multiples of 64.
    pub fn is_zero(&self, offset: usize, len: usize) -> Result<bool> {
        const WORDS: usize = 8;
        self.check(offset, len)?;
        if !offset.is_multiple_of(64) || !len.is_multiple_of(64) {
            return Err(Error::Bounds {
                what: format!("{len} bytes at {offset:#x} are not whole cache lines"),
            });
        }
        let mut word = self.as_ptr().wrapping_add(offset).cast_const().cast::<u64>();
        for _ in 0..len / (WORDS * 8) {
            let mut any = 0;
            for _ in 0..WORDS {
                // SAFETY: within the range that was checked, and aligned, as mappings begin on a
                // page. Volatile, because somebody may write it meanwhile.
                any |= unsafe { word.read_volatile() };
                word = word.wrapping_add(1);
            }
            if any != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Has the kernel make every page of the range present and writable now, so that nobody faults
    /// on it later (`MADV_POPULATE_WRITE`, Linux 5.14).
    pub fn populate(&self, offset: usize, len: usize) -> Result<()> {
        self.check(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let advice =
            if self.writable() { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
        // SAFETY: the range was checked and is a mapping of ours; populating it changes no content.
        unsafe { rustix::mm::madvise(self.as_ptr().add(offset).cast(), len, advice) }
            .map_err(|e| Error::os(format!("populating {len} bytes of guest memory"), e))
    }
}

/// Touches these bytes of mapped memory, so that a lost page among them is replaced. True if one
/// was.
///
/// # Safety
/// The bytes must be mapped and readable.
pub(crate) unsafe fn touch(address: usize, len: usize) -> bool {
    let before = faults();
    let (first, end) = (address & !(PAGE_BYTES - 1), address + len);
    for page in (first..end).step_by(PAGE_BYTES) {
        let byte = std::ptr::with_exposed_provenance::<u8>(page.max(address));
        // SAFETY: the caller's word. Volatile, because somebody may write it meanwhile, and so that
        // it is read at all.
        let _ = unsafe { byte.read_volatile() };
    }
    faults() != before
}

/// A piece of a region, checked when it was made. Cloning counts a reference to the mapping.
#[derive(Debug, Clone)]
pub struct LocalSlice {
    region: Arc<MemoryRegion>,
    offset: usize,
    len: usize,
}

impl LocalSlice {
    /// The region it is a piece of.
    #[must_use]
    pub fn region(&self) -> &Arc<MemoryRegion> {
        &self.region
    }

    /// Offset within the region, in bytes.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes it another piece of the same region: cheaper than a new one, which counts a reference.
    #[inline]
    pub fn set(&mut self, offset: usize, len: usize) -> Result<()> {
        self.region.check(offset, len)?;
        (self.offset, self.len) = (offset, len);
        Ok(())
    }

    /// Address of the first byte; valid while this slice or its region lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.region.as_ptr().wrapping_add(self.offset)
    }
}

/// The target's name for an exposed region, as it travels with every write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RemoteKey(pub u32);

/// How the peer must address an exposed region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteRegion {
    /// Address of its first byte in the target's terms.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
    /// Goes with every write.
    pub key: RemoteKey,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_beyond_the_region_is_refused() {
        let region = MemoryRegion::anonymous(8192).unwrap();
        assert!(region.slice(0, 8192).is_ok());
        assert!(region.slice(1, 8192).is_err());
        assert!(region.slice(usize::MAX, 2).is_err());
        let mut slice = region.slice(0, 4096).unwrap();
        slice.set(4096, 4096).unwrap();
        assert!(slice.set(4097, 4096).is_err() && slice.set(usize::MAX, 2).is_err());
        assert_eq!(
            (slice.offset(), slice.len(), slice.as_ptr()),
            (4096, 4096, region.as_ptr().wrapping_add(4096))
        );
    }

    #[test]
    fn one_byte_that_is_not_zero_is_found_wherever_it_is() {
        let region = MemoryRegion::anonymous(8192).unwrap();
        assert!(region.is_zero(0, 8192).unwrap());
        for at in [0, 63, 64, 4095, 4096, 8191] {
            region.write(at, &[1]).unwrap();
            assert!(!region.is_zero(0, 8192).unwrap(), "{at}");
            assert_eq!(region.is_zero(4096, 4096).unwrap(), at < 4096);
            region.write(at, &[0]).unwrap();
        }
        assert!(
            region.is_zero(1, 64).is_err()
                && region.is_zero(0, 65).is_err()
                && region.is_zero(8192, 64).is_err()
        );
    }

    #[test]
    fn bytes_written_are_bytes_read() {
        let region = MemoryRegion::anonymous(4096).unwrap();
        region.write(100, b"ferry").unwrap();
        let mut out = [0; 5];
        region.read(100, &mut out).unwrap();
        assert_eq!(&out, b"ferry");
        assert!(region.read(4093, &mut out).is_err());
    }
}
