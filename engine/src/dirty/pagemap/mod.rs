//! Dirty pages of another process: userfaultfd write-protection and `PAGEMAP_SCAN`.
//!
//! ```text
//!   new():      UFFDIO_API -> UFFDIO_REGISTER (write-protect) -> UFFDIO_WRITEPROTECT    per slot
//!   a write:    the kernel lifts the protection of that page by itself (WP_ASYNC); nobody waits
//!   sync():  PAGEMAP_SCAN: "give me what is no longer protected, and protect it again", one step
//!   drop:       UFFDIO_UNREGISTER lifts what is left
//! ```
//!
//! It sees every write that goes through a page table of that process: vCPUs, the process' own
//! threads, and the kernel on its behalf (`read(2)` into guest memory, vhost-net). It does not see
//! writes through another process' mapping of the same file. A transfer by DMA into pinned pages
//! (direct disk I/O) is reported when it begins and not when it ends;
//! [`crate::guest::SourceGuest::drain_io`] is there for that. See `ioctl_userfaultfd(2)` and
//! `Documentation/admin-guide/mm/pagemap.rst` in the kernel.
//!
//! What a page that no page table entry maps looks like (tried on Linux 6.18; the tests hold it):
//! the first write to it after `new` is reported, a mere read is not, and a hole that is punched
//! into the file (a balloon's `MADV_REMOVE`) is **not** reported: the pump looks for holes at the
//! end ([`crate::source::pump::Pump::push_freed`]).

mod abi;
pub mod arming;
mod poison;
#[cfg(test)]
pub(crate) mod tests;
mod unmapped;
pub(crate) mod view;

pub use arming::disarm;
pub use poison::Poison;
pub(crate) use unmapped::unmapped_here;
pub(crate) use view::FileView;

use super::{DirtySource, Synced};
use crate::error::{Error, Result};
use crate::memory::bitmap::DirtyBitmap;
use crate::memory::page::{PAGE_BYTES, PageRun, pages_in};
use crate::watch::Watch;
use arming::Armed;
use pageferry_transport::MemoryRegion;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Weak;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A piece of the process' memory to be followed, and the pages that it is on the engine's line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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

/// Memory that one scan call walks, in bytes, unless its pages are larger: some 0.1 ms of walking,
/// so that the process' mmap lock is let go in between and threads share even a small guest evenly.
const SCAN_WINDOW_BYTES: u64 = 128 << 20;

/// Threads that scan at once, at most. Walking page tables is bound by memory latency, and the last
/// two syncs lie in the downtime.
const SCANNERS_MAX: usize = 8;

/// Follows the writes of one process. See the [module](self).
#[derive(Debug)]
pub struct PagemapSource {
    /// Ends the tracking when it is dropped.
    armed: Armed,
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
    /// Names the fix where the kernel is too old or the permission is missing. Whatever was
    /// registered until then is released again.
    pub fn new(uffd: OwnedFd, pid: u32, ranges: Vec<TrackedRange>) -> Result<Self> {
        Self::watched(uffd, pid, ranges, &mut || Ok(()))
    }

    /// The same, which ends at once when the watch fails: a terabyte takes a minute.
    pub fn watched(
        uffd: OwnedFd,
        pid: u32,
        ranges: Vec<TrackedRange>,
        watch: &mut Watch<'_>,
    ) -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::with(uffd, pid, ranges, SCAN_WINDOW_BYTES, cores.min(SCANNERS_MAX), watch)
    }

    fn with(
        uffd: OwnedFd,
        pid: u32,
        ranges: Vec<TrackedRange>,
        window_bytes: u64,
        scanners_max: usize,
        watch: &mut Watch<'_>,
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
        let armed = Armed::new(uffd, pid, &ranges, watch)?;
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
        let scanners =
            (0..scanners_max.clamp(1, windows.len().max(1))).map(|_| Scanner::new()).collect();
        let source = Self { armed, pagemap, ranges, windows, scanners };
        source.check_tracked()?;
        Ok(source)
    }

    /// Can be upgraded for as long as the memory is armed, which may take a moment longer than this
    /// lives. What is disarmed in the background does not count.
    #[must_use]
    pub fn while_armed(&self) -> Weak<()> {
        self.armed.while_armed()
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
    fn sync(&mut self, into: &mut DirtyBitmap) -> Result<Synced> {
        let (pagemap, windows, next) =
            (self.pagemap.as_fd(), &self.windows[..], AtomicUsize::new(0));
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
            helping
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(died))
                .fold(own, Result::and)
        });
        let mut sync = Synced::default();
        for run in self.scanners.iter_mut().flat_map(|scanner| scanner.runs.drain(..)) {
            into.insert(run);
            sync.pages += run.count;
        }
        scanned?;
        self.check_tracked()?;
        Ok(sync)
    }
}

impl TrackedRange {
    /// Itself in pieces of at most this many bytes; never less than a page of its backing, of which
    /// the kernel scans no part.
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

    /// Scans `[at, end)` and protects again what it reports. Returns how many entries of `regions`
    /// are filled, and where the next scan must start.
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
/// [`Error::Refused`] with what is missing and the fix.
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
    source.sync(&mut dirty)?;
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
/// [`Error::Refused`] with the fix where the kernel has none or does not let us.
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

fn scan_call(pagemap: BorrowedFd<'_>, arg: &mut abi::PmScanArg) -> Result<usize> {
    match ioctl(pagemap, abi::PAGEMAP_SCAN, arg) {
        Ok(filled) => Ok(filled),
        Err(Errno::NOTTY) => Err(Error::refused(
            "this kernel has no PAGEMAP_SCAN: pageferry needs Linux 6.7 or newer",
        )),
        Err(Errno::PERM) => Err(Error::Guest(
            "PAGEMAP_SCAN met memory that is not tracked: the guest's process changed its mapping"
                .into(),
        )),
        // Newer kernels say so, older ones find nothing.
        Err(Errno::SRCH) => Err(Error::Guest(format!(
            "the guest's memory at {:#x} is not tracked any more: its process died",
            arg.start
        ))),
        Err(e) => Err(Error::os(format!("PAGEMAP_SCAN of {:#x}..{:#x}", arg.start, arg.end), e)),
    }
}

fn ioctl<T: abi::IoctlArg>(
    fd: BorrowedFd<'_>,
    number: libc::c_ulong,
    arg: &mut T,
) -> Result<usize, Errno> {
    debug_assert_eq!((number >> 16 & 0x3fff) as usize, size_of::<T>());
    // SAFETY: `number` encodes the size of `T` (asserted where the numbers are defined), `arg` is a
    // live exclusive reference to one, and a pointer inside it (the scan's vector) is to memory
    // that the caller holds exclusively and whose length it states.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), number as _, std::ptr::from_mut(arg)) };
    usize::try_from(answer).map_err(|_| last_errno())
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
