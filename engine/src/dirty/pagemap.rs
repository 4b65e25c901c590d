//! Dirty pages of another process: userfaultfd write-protection and `PAGEMAP_SCAN`.
//!
//! ```text
//!   new():      UFFDIO_API -> UFFDIO_REGISTER (write-protect) -> UFFDIO_WRITEPROTECT    per slot
//!   a write:    the kernel lifts the protection of that page by itself (WP_ASYNC); nobody waits
//!   harvest():  PAGEMAP_SCAN: "give me what is no longer protected, and protect it again", one step
//!   drop:       closing the descriptor unregisters the memory and lifts what is left
//! ```
//!
//! It sees every write that goes through a page table of that process: vCPUs, the process' own
//! threads, and the kernel on its behalf (`read(2)` into guest memory, vhost-net). It does not see
//! writes through another process' mapping of the same file. A transfer by DMA into pinned pages (direct
//! disk I/O) is reported when it begins and not when it ends; [`crate::guest::SourceGuest::settle_io`] is
//! there for that. See `ioctl_userfaultfd(2)` and
//! `Documentation/admin-guide/mm/pagemap.rst` in the kernel.
//!
//! What a page that no page table entry maps looks like (tried on Linux 6.18; the tests hold it):
//! the first write to it after `new` is reported, a mere read is not, and a hole that is punched into
//! the file (a balloon's `MADV_REMOVE`) is **not** reported: the pump looks for holes at the end
//! ([`crate::precopy::Pump::push_holes`]).

use super::{DirtySource, Harvest};
use crate::bitmap::DirtyBitmap;
use crate::error::{Error, Result};
use crate::page::{PAGE_BYTES, PageRun, pages_in};
use pageferry_transport::MemoryRegion;
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A piece of the process' memory to be followed, and the pages that it is on the engine's line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrackedRange {
    /// Where the process has it mapped, in bytes; a multiple of its backing's page size.
    pub process_address: u64,
    /// Length in bytes; a multiple of its backing's page size.
    pub bytes: u64,
    /// Its first page on the line of all slots.
    pub first_page: u64,
    /// Size of the pages that back it, in bytes: the kernel's 4096, or that of its huge pages.
    pub backing_page_bytes: u64,
}

impl TrackedRange {
    fn end(&self) -> u64 {
        self.process_address + self.bytes
    }
}

/// Regions that one scan call may report. 64 Ki of them are 1.5 MiB, and enough that even memory in
/// which every second page is dirty takes one call for half a GiB.
const REGIONS_PER_SCAN: usize = 64 * 1024;

/// Memory that one scan call walks, in bytes, unless its pages are larger: some 0.1 ms of walking, so that
/// the process' mmap lock is let go in between and threads share even a small guest evenly.
const SCAN_WINDOW_BYTES: u64 = 128 << 20;

/// Threads that scan at once, at most. Walking page tables is bound by memory latency, and the last two
/// harvests lie in the blackout.
const SCANNERS_MAX: usize = 8;

/// Follows the writes of one process. See the [module](self).
#[derive(Debug)]
pub struct PagemapSource {
    /// Held only so that the tracking ends when it is closed.
    _uffd: OwnedFd,
    pagemap: File,
    ranges: Vec<TrackedRange>,
    /// The ranges, cut into what one call walks.
    windows: Vec<TrackedRange>,
    scanners: Vec<Scanner>,
}

/// What one scanning thread writes into.
#[derive(Debug)]
struct Scanner {
    regions: Vec<abi::PageRegion>,
    runs: Vec<PageRun>,
}

impl PagemapSource {
    /// Starts to follow writes of the process `pid`, whose `uffd` must be fresh (one descriptor
    /// serves one source). Every page counts as not written until it is written again.
    ///
    /// # Errors
    /// Names the mend where the kernel is too old or the permission is missing. Whatever was
    /// registered until then is released again.
    pub fn new(uffd: OwnedFd, pid: u32, ranges: Vec<TrackedRange>) -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::with(uffd, pid, ranges, SCAN_WINDOW_BYTES, cores.min(SCANNERS_MAX))
    }

    fn with(
        uffd: OwnedFd,
        pid: u32,
        ranges: Vec<TrackedRange>,
        window_bytes: u64,
        scanners_max: usize,
    ) -> Result<Self> {
        if let Some(bad) = ranges.iter().find(|r| {
            r.bytes == 0
                || r.bytes % PAGE_BYTES != 0
                || r.process_address % PAGE_BYTES != 0
                || r.process_address.checked_add(r.bytes).is_none()
        }) {
            return Err(Error::refused(format!(
                "cannot follow writes to {} bytes at {:#x}: not whole pages",
                bad.bytes, bad.process_address
            )));
        }
        enable(uffd.as_fd())?;
        for range in &ranges {
            protect(uffd.as_fd(), pid, range)?;
        }
        let path = format!("/proc/{pid}/pagemap");
        let pagemap = File::options().read(true).open(&path).map_err(|e| {
            Error::os(
                format!(
                    "opening {path} (needs the same user as process {pid}, or CAP_SYS_PTRACE and CAP_PERFMON)"
                ),
                e,
            )
        })?;
        let windows: Vec<_> = ranges.iter().flat_map(|range| range.windows(window_bytes)).collect();
        let scanners = (0..scanners_max.clamp(1, windows.len().max(1))).map(|_| Scanner::new()).collect();
        let source = Self { _uffd: uffd, pagemap, ranges, windows, scanners };
        source.check_tracked()?;
        Ok(source)
    }

    /// Fails unless the first and the last page of every range are still mapped and registered. A
    /// scan of memory that is not there any more (the process died, or unmapped it) succeeds and
    /// finds nothing; only this check, made after it, tells that from an idle guest.
    fn check_tracked(&self) -> Result<()> {
        for range in &self.ranges {
            for page in [range.process_address, range.end() - PAGE_BYTES] {
                let mut region = abi::PageRegion::default();
                let mut arg = abi::PmScanArg {
                    start: page,
                    end: page + PAGE_BYTES,
                    vec: (&raw mut region) as u64,
                    vec_len: 1,
                    max_pages: 1,
                    category_mask: abi::PAGE_IS_WPALLOWED,
                    return_mask: abi::PAGE_IS_WPALLOWED,
                    ..abi::PmScanArg::default()
                };
                if scan_call(self.pagemap.as_fd(), &mut arg)? != 1 {
                    return Err(Error::Guest(format!(
                        "the guest's memory at {page:#x} is not tracked any more: its process died or unmapped it"
                    )));
                }
            }
        }
        Ok(())
    }
}

impl DirtySource for PagemapSource {
    fn harvest(&mut self, into: &mut DirtyBitmap) -> Result<Harvest> {
        let (pagemap, windows, next) = (self.pagemap.as_fd(), &self.windows[..], AtomicUsize::new(0));
        let scan = |scanner: &mut Scanner| -> Result<()> {
            while let Some(window) = windows.get(next.fetch_add(1, Ordering::Relaxed)) {
                scanner.walk(pagemap, window)?;
            }
            Ok(())
        };
        let (own, others) = self.scanners.split_first_mut().expect("at least one");
        let scanned = std::thread::scope(|scope| {
            // Whatever threads there are to be had share the work.
            let help = |other| std::thread::Builder::new().spawn_scoped(scope, || scan(other)).ok();
            let helping: Vec<_> = others.iter_mut().filter_map(help).collect();
            let own = scan(own);
            let died = |_| Err(Error::Guest("a thread that scans page tables panicked".into()));
            helping.into_iter().map(|thread| thread.join().unwrap_or_else(died)).fold(own, Result::and)
        });
        let mut harvest = Harvest::default();
        for run in self.scanners.iter_mut().flat_map(|scanner| scanner.runs.drain(..)) {
            into.insert(run);
            harvest.pages += run.count;
        }
        scanned?;
        self.check_tracked()?;
        Ok(harvest)
    }
}

impl TrackedRange {
    /// Itself in pieces of at most this many bytes; never less than a page of its backing, of which the
    /// kernel scans no part.
    fn windows(&self, bytes_max: u64) -> impl Iterator<Item = Self> + use<> {
        let (range, step) = (*self, bytes_max.max(self.backing_page_bytes));
        (0..range.bytes.div_ceil(step)).map(move |index| {
            let at = index * step;
            Self {
                process_address: range.process_address + at,
                bytes: step.min(range.bytes - at),
                first_page: range.first_page + at / PAGE_BYTES,
                ..range
            }
        })
    }
}

impl Scanner {
    fn new() -> Self {
        Self { regions: vec![abi::PageRegion::default(); REGIONS_PER_SCAN], runs: Vec::new() }
    }

    /// Notes what was written in a window, and protects it again.
    fn walk(&mut self, pagemap: BorrowedFd<'_>, window: &TrackedRange) -> Result<()> {
        let mut at = window.process_address;
        while at < window.end() {
            let (filled, next) = self.scan(pagemap, at, window.end())?;
            for region in &self.regions[..filled] {
                let start = region.start.max(window.process_address);
                let end = region.end.min(window.end());
                if start < end {
                    let first = window.first_page + (start - window.process_address) / PAGE_BYTES;
                    self.runs.push(PageRun::between(first, first + pages_in(end - start)));
                }
            }
            at = next;
        }
        Ok(())
    }

    /// Scans `[at, end)` and protects again what it reports. Returns how many entries of `regions` are
    /// filled, and where the next scan must start.
    fn scan(&mut self, pagemap: BorrowedFd<'_>, at: u64, end: u64) -> Result<(usize, u64)> {
        let mut arg = abi::PmScanArg {
            flags: abi::PM_SCAN_WP_MATCHING | abi::PM_SCAN_CHECK_WPASYNC,
            start: at,
            end,
            vec: self.regions.as_mut_ptr() as u64,
            vec_len: self.regions.len() as u64,
            category_mask: abi::PAGE_IS_WRITTEN,
            return_mask: abi::PAGE_IS_WRITTEN,
            ..abi::PmScanArg::default()
        };
        let filled = scan_call(pagemap, &mut arg)?;
        if filled > self.regions.len() || arg.walk_end <= at || arg.walk_end > end {
            return Err(Error::Guest(format!(
                "PAGEMAP_SCAN of {at:#x}..{end:#x} answered {filled} regions up to {:#x}, which makes no sense",
                arg.walk_end
            )));
        }
        Ok((filled, arg.walk_end))
    }
}

/// Whether this kernel can follow writes this way, tried on a page of our own.
///
/// # Errors
/// [`Error::Refused`] with what is missing and the mend.
pub fn probe() -> Result<()> {
    let uffd = own_userfaultfd()?;
    let page = MemoryRegion::anonymous(PAGE_BYTES as usize)?;
    let range = TrackedRange {
        process_address: page.as_ptr() as u64,
        bytes: PAGE_BYTES,
        first_page: 0,
        backing_page_bytes: PAGE_BYTES,
    };
    let mut source = PagemapSource::new(uffd, std::process::id(), vec![range])?;
    page.write(0, &[1])?;
    let mut dirty = DirtyBitmap::new(1);
    source.harvest(&mut dirty)?;
    if dirty.is_empty() {
        return Err(Error::refused(
            "this kernel takes write-protection and PAGEMAP_SCAN, but does not report a written page",
        ));
    }
    Ok(())
}

/// A userfaultfd of this process, as a guest's process would make one: no privilege is needed.
///
/// # Errors
/// [`Error::Refused`] with the mend where the kernel has none or does not let us.
pub fn own_userfaultfd() -> Result<OwnedFd> {
    // SAFETY: the call takes flags alone.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, i64::from(USERFAULTFD_FLAGS)) };
    if fd < 0 {
        return Err(userfaultfd_refused(last_errno()));
    }
    // SAFETY: a descriptor that the kernel has just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// What every userfaultfd is made with. User-mode-only needs no privilege, and takes nothing away:
/// with `WP_ASYNC` the kernel resolves its own faults too and hands out none.
pub const USERFAULTFD_FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK | abi::UFFD_USER_MODE_ONLY;

/// Why `userfaultfd(2)` failed, in words that an operator can act on.
#[must_use]
pub fn userfaultfd_refused(errno: Errno) -> Error {
    match errno {
        Errno::NOSYS => Error::refused(
            "this kernel has no userfaultfd, or a seccomp filter hides it: build it with CONFIG_USERFAULTFD, \
             or let the container's seccomp profile allow userfaultfd",
        ),
        Errno::PERM | Errno::ACCESS => Error::refused(
            "userfaultfd is not permitted: a seccomp filter or a security module denies it \
             (a container's seccomp profile must allow userfaultfd)",
        ),
        Errno::INVAL => Error::refused(
            "this kernel's userfaultfd does not know UFFD_USER_MODE_ONLY: pageferry needs Linux 6.7 or newer",
        ),
        Errno::MFILE => Error::refused(
            "the process has no file descriptor left for a userfaultfd: raise its RLIMIT_NOFILE \
             (prlimit --nofile --pid PID)",
        ),
        other => Error::os("userfaultfd(2)", other),
    }
}

fn enable(uffd: BorrowedFd<'_>) -> Result<()> {
    let mut api = abi::UffdioApi { api: abi::UFFD_API, features: abi::FEATURES, ioctls: 0 };
    ioctl(uffd, abi::UFFDIO_API, &mut api).map(drop).map_err(|e| match e {
        Errno::INVAL => Error::refused(
            "this kernel cannot write-protect memory asynchronously (UFFD_FEATURE_WP_ASYNC): \
             pageferry needs Linux 6.7 or newer, built with CONFIG_PTE_MARKER_UFFD_WP",
        ),
        other => Error::os("UFFDIO_API", other),
    })
}

fn protect(uffd: BorrowedFd<'_>, pid: u32, range: &TrackedRange) -> Result<()> {
    let what = |step: &str| {
        format!("{step} of {} bytes at {:#x} in process {pid}", range.bytes, range.process_address)
    };
    let uffd_range = abi::UffdioRange { start: range.process_address, len: range.bytes };
    let mut register =
        abi::UffdioRegister { range: uffd_range, mode: abi::UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
    ioctl(uffd, abi::UFFDIO_REGISTER, &mut register).map_err(|e| match e {
        Errno::BUSY => Error::refused(format!(
            "the memory of process {pid} is already followed by another userfaultfd: \
             is another migration or a background snapshot under way?"
        )),
        Errno::SRCH => Error::Guest(format!("process {pid} died")),
        other => Error::os(what("UFFDIO_REGISTER"), other),
    })?;
    let mut arm = abi::UffdioWriteprotect { range: uffd_range, mode: abi::UFFDIO_WRITEPROTECT_MODE_WP };
    ioctl(uffd, abi::UFFDIO_WRITEPROTECT, &mut arm).map(drop).map_err(|e| match e {
        Errno::SRCH => Error::Guest(format!("process {pid} died")),
        other => Error::os(what("UFFDIO_WRITEPROTECT"), other),
    })
}

fn scan_call(pagemap: BorrowedFd<'_>, arg: &mut abi::PmScanArg) -> Result<usize> {
    match ioctl(pagemap, abi::PAGEMAP_SCAN, arg) {
        Ok(filled) => Ok(filled),
        Err(Errno::NOTTY) => {
            Err(Error::refused("this kernel has no PAGEMAP_SCAN: pageferry needs Linux 6.7 or newer"))
        }
        Err(Errno::PERM) => Err(Error::Guest(
            "PAGEMAP_SCAN met memory that is not tracked: the guest's process changed its mapping".into(),
        )),
        Err(e) => Err(Error::os(format!("PAGEMAP_SCAN of {:#x}..{:#x}", arg.start, arg.end), e)),
    }
}

fn ioctl<T: abi::IoctlArg>(fd: BorrowedFd<'_>, number: libc::c_ulong, arg: &mut T) -> Result<usize, Errno> {
    debug_assert_eq!((number >> 16 & 0x3fff) as usize, size_of::<T>());
    // SAFETY: `number` encodes the size of `T` (asserted where the numbers are defined), `arg` is a
    // live exclusive reference to one, and a pointer inside it (the scan's vector) is to memory that
    // the caller holds exclusively and whose length it states.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), number as _, std::ptr::from_mut(arg)) };
    usize::try_from(answer).map_err(|_| last_errno())
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// The kernel's interface: `linux/userfaultfd.h` and `linux/fs.h`.
mod abi {
    pub const UFFD_USER_MODE_ONLY: i32 = 1;
    pub const UFFD_API: u64 = 0xAA;
    const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
    const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
    const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
    const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
    pub const FEATURES: u64 = UFFD_FEATURE_PAGEFAULT_FLAG_WP
        | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        | UFFD_FEATURE_WP_UNPOPULATED
        | UFFD_FEATURE_WP_ASYNC;
    pub const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
    pub const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
    pub const PAGE_IS_WPALLOWED: u64 = 1 << 0;
    pub const PAGE_IS_WRITTEN: u64 = 1 << 1;
    pub const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
    pub const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

    /// Types that are handed to an ioctl.
    pub trait IoctlArg {}

    #[repr(C)]
    pub struct UffdioApi {
        pub api: u64,
        pub features: u64,
        pub ioctls: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy)]
    pub struct UffdioRange {
        pub start: u64,
        pub len: u64,
    }

    #[repr(C)]
    pub struct UffdioRegister {
        pub range: UffdioRange,
        pub mode: u64,
        pub ioctls: u64,
    }

    #[repr(C)]
    pub struct UffdioWriteprotect {
        pub range: UffdioRange,
        pub mode: u64,
    }

    #[repr(C)]
    #[derive(Debug, Clone, Copy, Default)]
    pub struct PageRegion {
        pub start: u64,
        pub end: u64,
        pub categories: u64,
    }

    #[repr(C)]
    pub struct PmScanArg {
        pub size: u64,
        pub flags: u64,
        pub start: u64,
        pub end: u64,
        pub walk_end: u64,
        pub vec: u64,
        pub vec_len: u64,
        pub max_pages: u64,
        pub category_inverted: u64,
        pub category_mask: u64,
        pub category_anyof_mask: u64,
        pub return_mask: u64,
    }

    impl Default for PmScanArg {
        fn default() -> Self {
            Self {
                size: size_of::<Self>() as u64,
                flags: 0,
                start: 0,
                end: 0,
                walk_end: 0,
                vec: 0,
                vec_len: 0,
                max_pages: 0,
                category_inverted: 0,
                category_mask: 0,
                category_anyof_mask: 0,
                return_mask: 0,
            }
        }
    }

    impl IoctlArg for UffdioApi {}
    impl IoctlArg for UffdioRegister {}
    impl IoctlArg for UffdioWriteprotect {}
    impl IoctlArg for PmScanArg {}

    const fn iowr<T>(kind: u8, number: u8) -> libc::c_ulong {
        (3 << 30)
            | (size_of::<T>() as libc::c_ulong) << 16
            | (kind as libc::c_ulong) << 8
            | number as libc::c_ulong
    }

    pub const UFFDIO_REGISTER: libc::c_ulong = iowr::<UffdioRegister>(0xAA, 0x00);
    pub const UFFDIO_WRITEPROTECT: libc::c_ulong = iowr::<UffdioWriteprotect>(0xAA, 0x06);
    pub const UFFDIO_API: libc::c_ulong = iowr::<UffdioApi>(0xAA, 0x3F);
    pub const PAGEMAP_SCAN: libc::c_ulong = iowr::<PmScanArg>(b'f', 16);

    const _: () = {
        assert!(size_of::<UffdioApi>() == 24 && UFFDIO_API == 0xc018_aa3f);
        assert!(size_of::<UffdioRegister>() == 32 && UFFDIO_REGISTER == 0xc020_aa00);
        assert!(size_of::<UffdioWriteprotect>() == 24 && UFFDIO_WRITEPROTECT == 0xc018_aa06);
        assert!(size_of::<PageRegion>() == 24);
        assert!(size_of::<PmScanArg>() == 96 && PAGEMAP_SCAN == 0xc060_6610);
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_transport::Access;
    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
    use std::collections::BTreeSet;
    use std::io::Write;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    struct Memory {
        file: File,
        region: Arc<MemoryRegion>,
        pages: u64,
        backing_page_bytes: u64,
        /// What one scan walks, and how many threads do.
        window_bytes: u64,
        scanners: usize,
    }

    impl Memory {
        fn new(pages: u64) -> Self {
            let file = File::from(memfd_create("tracked", MemfdFlags::CLOEXEC).unwrap());
            Self::of(file, pages, PAGE_BYTES).unwrap()
        }

        fn of(file: File, pages: u64, backing_page_bytes: u64) -> pageferry_transport::Result<Self> {
            let bytes = pages * PAGE_BYTES;
            ftruncate(&file, bytes).unwrap();
            let region = MemoryRegion::map_shared(file.as_fd(), 0, bytes as usize, Access::Write)?;
            Ok(Self { file, region, pages, backing_page_bytes, window_bytes: SCAN_WINDOW_BYTES, scanners: 2 })
        }

        fn track(&self) -> PagemapSource {
            self.try_track().unwrap()
        }

        fn try_track(&self) -> Result<PagemapSource> {
            let address = self.region.as_ptr() as u64;
            let half = self.pages / 2;
            // Two ranges, laid the other way round on the line of pages.
            let ranges = vec![
                TrackedRange {
                    process_address: address + half * PAGE_BYTES,
                    bytes: (self.pages - half) * PAGE_BYTES,
                    first_page: half,
                    backing_page_bytes: self.backing_page_bytes,
                },
                TrackedRange {
                    process_address: address,
                    bytes: half * PAGE_BYTES,
                    first_page: 0,
                    backing_page_bytes: self.backing_page_bytes,
                },
            ];
            let uffd = own_userfaultfd()?;
            PagemapSource::with(uffd, std::process::id(), ranges, self.window_bytes, self.scanners)
        }

        fn write(&self, page: u64) {
            self.region.write((page * PAGE_BYTES) as usize, &[1, 2, 3]).unwrap();
        }
    }

    fn harvest(source: &mut PagemapSource, pages: u64) -> BTreeSet<u64> {
        let mut dirty = DirtyBitmap::new(pages);
        let said = source.harvest(&mut dirty).unwrap();
        assert_eq!(said.pages, dirty.count());
        dirty.runs(u64::MAX).flat_map(|r| r.first.0..r.end()).collect()
    }

    #[test]
    fn this_kernel_can_follow_writes() {
        probe().unwrap();
    }

    #[test]
    fn exactly_the_written_pages_are_harvested_and_armed_again() {
        let memory = Memory::new(64);
        memory.write(3);
        let mut source = memory.track();
        assert!(harvest(&mut source, 64).is_empty(), "what was written before does not count");
        for page in [0, 3, 4, 31, 32, 63] {
            memory.write(page);
        }
        assert_eq!(harvest(&mut source, 64), BTreeSet::from([0, 3, 4, 31, 32, 63]));
        assert!(harvest(&mut source, 64).is_empty());
        memory.write(31);
        assert_eq!(harvest(&mut source, 64), BTreeSet::from([31]), "armed again before it returned");
    }

    #[test]
    fn a_first_write_counts_and_a_first_read_does_not() {
        let memory = Memory::new(64);
        let mut source = memory.track();
        memory.write(5);
        memory.region.read(9 * PAGE_BYTES as usize, &mut [0]).unwrap();
        assert_eq!(harvest(&mut source, 64), BTreeSet::from([5]));
        memory.write(9);
        assert_eq!(harvest(&mut source, 64), BTreeSet::from([9]));
    }

    #[test]
    fn a_punched_hole_is_not_written_but_the_write_after_it_is() {
        let memory = Memory::new(64);
        for page in 0..64 {
            memory.write(page);
        }
        let mut source = memory.track();
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&memory.file, punch, 8 * PAGE_BYTES, PAGE_BYTES).unwrap();
        memory.write(10);
        fallocate(&memory.file, punch, 10 * PAGE_BYTES, 2 * PAGE_BYTES).unwrap();
        let seen = harvest(&mut source, 64);
        assert!(!seen.contains(&8) && !seen.contains(&11), "{seen:?}");
        memory.write(8);
        memory.write(11);
        let seen = harvest(&mut source, 64);
        assert!(seen.contains(&8) && seen.contains(&11), "{seen:?}");
    }

    #[test]
    fn writes_by_the_kernel_count() {
        let memory = Memory::new(64);
        let mut source = memory.track();
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(&[7; 100]).unwrap();
        let to = memory.region.as_ptr().wrapping_add(20 * PAGE_BYTES as usize);
        // SAFETY: the buffer is 100 bytes inside a writable mapping to which no reference exists.
        let got = unsafe { libc::read(reader.as_raw_fd(), to.cast(), 100) };
        assert_eq!(got, 100);
        assert_eq!(harvest(&mut source, 64), BTreeSet::from([20]));
    }

    #[test]
    fn dropping_the_source_ends_the_tracking_and_a_second_one_can_follow() {
        let memory = Memory::new(64);
        let registered = || {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let start = format!("{:x}-", memory.region.as_ptr() as usize);
            let at = smaps.lines().position(|l| l.starts_with(&start)).unwrap();
            let flags = smaps.lines().skip(at).find(|l| l.starts_with("VmFlags:")).unwrap();
            flags.split_whitespace().any(|f| f == "uw")
        };
        let mut source = memory.track();
        assert!(registered());
        let busy = memory.try_track().unwrap_err().to_string();
        assert!(busy.contains("already followed"), "{busy}");
        memory.write(1);
        drop(source);
        assert!(!registered());
        source = memory.track();
        memory.write(2);
        assert_eq!(harvest(&mut source, 64), BTreeSet::from([2]));
    }

    #[test]
    fn memory_that_went_away_is_an_error_and_not_an_idle_guest() {
        let memory = Memory::new(64);
        let mut source = memory.track();
        // Replaced, not unmapped: another test's memory could come to lie at a freed address.
        let (at, len) = (memory.region.as_ptr(), memory.region.len());
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: it replaces exactly the mapping that `memory.region` owns, which will unmap it.
        let now = unsafe { libc::mmap(at.cast(), len, libc::PROT_NONE, flags, -1, 0) };
        assert_eq!(now, at.cast());
        let error = source.harvest(&mut DirtyBitmap::new(64)).unwrap_err().to_string();
        assert!(error.contains("not tracked"), "{error}");
    }

    /// Writers note each write with the epochs before and after it. The epoch is odd while a harvest
    /// runs, so a write that saw `2k` twice came wholly before harvest `k`, which must have it.
    fn no_write_is_missed(memory: &Memory, harvests: u64) {
        let mut source = memory.track();
        let (epoch, done) = (AtomicU64::new(0), AtomicBool::new(false));
        let (mut seen, mut ledger) = (Vec::new(), Vec::new());
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..3u64)
                .map(|seed| {
                    let (epoch, done) = (&epoch, &done);
                    scope.spawn(move || {
                        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                        let mut writes = Vec::new();
                        while !done.load(Ordering::SeqCst) {
                            random ^= random << 13;
                            random ^= random >> 7;
                            random ^= random << 17;
                            let page = random % memory.pages;
                            let before = epoch.load(Ordering::SeqCst);
                            memory.write(page);
                            writes.push((page, before, epoch.load(Ordering::SeqCst)));
                        }
                        writes
                    })
                })
                .collect();
            for _ in 0..harvests {
                epoch.fetch_add(1, Ordering::SeqCst);
                seen.push(harvest(&mut source, memory.pages));
                epoch.fetch_add(1, Ordering::SeqCst);
                std::thread::yield_now();
            }
            done.store(true, Ordering::SeqCst);
            for writer in writers {
                ledger.extend(writer.join().unwrap());
            }
        });
        seen.push(harvest(&mut source, memory.pages));
        assert!(ledger.len() as u64 > harvests, "the writers hardly ran: {} writes", ledger.len());
        for (page, before, after) in ledger {
            // The first harvest that may have it, and the first that begins after it.
            let (first, last) = (before / 2, after.div_ceil(2));
            let found = (first..=last).any(|k| seen.get(k as usize).is_some_and(|s| s.contains(&page)));
            assert!(found, "page {page}, written in epochs {before} to {after}, is in no harvest");
        }
    }

    #[test]
    fn no_write_of_concurrent_threads_is_missed() {
        no_write_is_missed(&Memory::new(512), 400);
    }

    #[test]
    fn no_write_is_missed_where_several_threads_share_a_harvest() {
        let mut memory = Memory::new(512);
        // Windows that are no divisor of the ranges.
        (memory.window_bytes, memory.scanners) = (7 * PAGE_BYTES, 4);
        no_write_is_missed(&memory, 200);
    }

    #[test]
    fn windows_cover_a_range_exactly_and_never_cut_a_page_of_its_backing() {
        for (bytes, backing_page_bytes, bytes_max) in
            [(10 << 12, PAGE_BYTES, 3 << 12), (6 << 21, 2 << 20, 4096), (1 << 30, 1 << 30, 128 << 20)]
        {
            let range = TrackedRange { process_address: 7 << 30, bytes, first_page: 5, backing_page_bytes };
            let mut at = range.process_address;
            for window in range.windows(bytes_max) {
                assert_eq!(window.process_address, at);
                assert_eq!((window.first_page - 5) * PAGE_BYTES, at - range.process_address);
                assert_eq!(window.bytes % backing_page_bytes, 0);
                at = window.end();
            }
            assert_eq!(at, range.end());
        }
    }

    #[test]
    fn no_write_to_huge_pages_is_missed() {
        const HUGE_PAGES: u64 = 4;
        let Some(_reserved) = HugePages::reserve(HUGE_PAGES) else {
            eprintln!("NOT TESTED: no {HUGE_PAGES} huge pages of 2 MiB can be reserved on this machine");
            return;
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let file = File::from(memfd_create("huge", flags).unwrap());
        let memory = Memory::of(file, HUGE_PAGES * 512, 2 << 20).unwrap();
        {
            let mut source = memory.track();
            memory.write(700);
            assert_eq!(harvest(&mut source, memory.pages), (512..1024).collect(), "a huge page is one unit");
            assert!(harvest(&mut source, memory.pages).is_empty());
            memory.write(512);
            assert_eq!(harvest(&mut source, memory.pages).len(), 512);
        }
        no_write_is_missed(&memory, 100);
    }

    /// Huge pages reserved beyond what the machine had, given back on drop.
    struct HugePages(u64);

    impl HugePages {
        const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

        fn count(name: &str) -> Option<u64> {
            std::fs::read_to_string(name).ok()?.trim().parse().ok()
        }

        fn reserve(pages: u64) -> Option<Self> {
            let before = Self::count(Self::COUNT)?;
            std::fs::write(Self::COUNT, (before + pages).to_string()).ok()?;
            let this = Self(pages);
            (Self::count(Self::COUNT)? >= before + pages).then_some(this)
        }
    }

    impl Drop for HugePages {
        fn drop(&mut self) {
            if let Some(now) = Self::count(Self::COUNT) {
                let _ = std::fs::write(Self::COUNT, now.saturating_sub(self.0).to_string());
            }
        }
    }
}
