//! Page-aligned memory straight from the kernel.
//!
//! Words are relaxed atomics: every load is a real load (a migration may put other bytes there),
//! and the compiler never turns the loops into vector code, which QEMU's TCG emulates slowly.

use std::io;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// Words of 8 bytes in a page.
pub const PAGE_WORDS: usize = 512;
/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;

/// One page.
#[repr(C, align(4096))]
pub struct Page(pub [AtomicU64; PAGE_WORDS]);

const _: () = assert!(size_of::<Page>() == PAGE_BYTES && align_of::<Page>() == PAGE_BYTES);

/// A private anonymous mapping of whole pages, zero at first.
pub struct PageMemory {
    first: NonNull<Page>,
    count: usize,
}

// SAFETY: the mapping is owned by this value alone, and all access goes through atomics.
unsafe impl Send for PageMemory {}
// SAFETY: as above: shared access is to atomics only.
unsafe impl Sync for PageMemory {}

impl PageMemory {
    /// Maps `count` pages; the kernel gives them when they are first touched.
    pub fn new(count: usize) -> io::Result<Self> {
        if count == 0 {
            return Ok(Self { first: NonNull::dangling(), count });
        }
        let bytes = count.checked_mul(PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice overlaps nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        match NonNull::new(address.cast::<Page>()) {
            Some(first) if address != libc::MAP_FAILED => Ok(Self { first, count }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Deref for PageMemory {
    type Target = [Page];

    fn deref(&self) -> &[Page] {
        // SAFETY: `first` is page-aligned and, unless count is zero, a live mapping of `count`
        // pages that ends with self; all-zero bytes are valid atomics.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

impl Drop for PageMemory {
    fn drop(&mut self) {
        if self.count > 0 {
            // SAFETY: exactly the mapping made in new(); nobody can hold a borrow of it any more.
            unsafe { libc::munmap(self.first.as_ptr().cast(), self.count * PAGE_BYTES) };
        }
    }
}
