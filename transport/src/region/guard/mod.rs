//! Memory that may go away under us: pages that the hardware lost, files that were cut.
//!
//! The kernel answers a touch of such a page with SIGBUS, which ends a process that does not handle
//! it. For a guarded mapping this handler puts a page of zeros of our own in the place of the lost
//! one, notes which it was, and lets the access go on. So no access costs more than it did, whoever
//! makes it, and the lanes and the NIC find memory there too. Who uses what was read asks
//! [`Guard::lost`] before it counts.
//!
//! ```text
//!   load of a lost page --> SIGBUS --> on_sigbus: note the page, map zeros over it --> the load again: zeros
//!   a fault elsewhere   --> the handler that was there before
//! ```
//!
//! Only the mapping in this process changes. A mapping in which a guest runs must not be guarded:
//! the guest would read zeros where its hardware has to report an error.
//!
//! The handler runs at any moment on any thread. It takes no lock and allocates nothing: it reads a
//! table of atomics and calls `mmap` and `lseek`, bare system calls.

use crate::error::{Error, Result};
use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// Guarded mappings at once. QEMU has at most 256 memory slots for DIMMs, and a process of ours has
/// a few guests at most.
const GUARDS_MAX: usize = 1024;

/// Lost pages noted singly, a mapping. Each costs the kernel two mappings, of which it allows 65530
/// a process; a guest that lost more than so many pages is not moved.
pub const LOST_MAX: usize = 1024;

/// No page: a place in [`Record::pages`] that is not used, or not any more.
const NONE: usize = usize::MAX;
/// Beside an offset, which is a multiple of a page: the hardware lost the page. Without it: there
/// is no such page.
const POISONED: usize = 1;

/// Why a page could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Loss {
    /// The hardware lost its content, and the kernel took it out of use: the file has data there,
    /// and no page is given.
    Poisoned,
    /// There is nothing to map: the file was cut, or its file system has no room. Nothing from here
    /// to the end of the mapping can be used.
    Absent,
}

/// A page that could not be read, and reads as zeros since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lost {
    /// Of its first byte in the mapping.
    pub offset: usize,
    /// Length in bytes: a page, or a huge page.
    pub bytes: usize,
    /// Why.
    pub loss: Loss,
}

/// What the handler must know of a mapping, and what it tells of it.
#[derive(Debug)]
struct Record {
    start: usize,
    len: usize,
    page_bytes: usize,
    protection: c_int,
    /// What is mapped, and from where on.
    file: OwnedFd,
    file_offset: u64,
    /// Faults so far. Threads that touch a page at once fault once each.
    faults: AtomicUsize,
    /// The lost pages, each once.
    pages: [AtomicUsize; LOST_MAX],
    /// Whether a page was lost for which there was no place left.
    full: AtomicBool,
}

/// A place in the table that the handler reads. `start` and `len` are looked at first, so that a
/// record is followed only if it is that of the mapping in which this thread faults, which the
/// thread keeps.
struct Place {
    /// Odd while the place is being changed.
    version: AtomicU64,
    start: AtomicUsize,
    len: AtomicUsize,
    record: AtomicPtr<Record>,
}

static TABLE: [Place; GUARDS_MAX] = [const {
    Place {
        version: AtomicU64::new(0),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        record: AtomicPtr::new(ptr::null_mut()),
    }
}; GUARDS_MAX];

/// Of all mappings of this process.
static FAULTS: AtomicU64 = AtomicU64::new(0);

/// What handled SIGBUS before; made once, before the handler is.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();
static INSTALLED: OnceLock<Result<(), c_int>> = OnceLock::new();

/// Guards a mapping until it is dropped, which must be before the mapping goes.
#[derive(Debug)]
pub(super) struct Guard {
    place: &'static Place,
    record: Arc<Record>,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Place").finish_non_exhaustive()
    }
}

impl Guard {
    /// Guards `len` bytes at `start`, a whole mapping of the caller's, backed by this file's pages
    /// of this size.
    pub(super) fn new(
        (start, len): (usize, usize),
        page_bytes: usize,
        writable: bool,
        (file, file_offset): (OwnedFd, u64),
    ) -> Result<Self> {
        let installed = INSTALLED.get_or_init(install);
        if let Err(errno) = installed {
            let source = std::io::Error::from_raw_os_error(*errno);
            return Err(Error::os(
                "handling SIGBUS, which pages that the hardware lost raise",
                source,
            ));
        }
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let record = Arc::new(Record {
            start,
            len,
            page_bytes,
            protection,
            file,
            file_offset,
            faults: AtomicUsize::new(0),
            pages: [const { AtomicUsize::new(NONE) }; LOST_MAX],
            full: AtomicBool::new(false),
        });
        let pointer = Arc::as_ptr(&record).cast_mut();
        let free = TABLE.iter().find(|place| {
            place
                .record
                .compare_exchange(ptr::null_mut(), pointer, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        let Some(place) = free else {
            return Err(Error::State("more guest memory is mapped at once than can be guarded"));
        };
        place.set(start, len);
        Ok(Self { place, record })
    }

    /// What is mapped, and from where on.
    pub(super) fn file(&self) -> (BorrowedFd<'_>, u64) {
        (self.record.file.as_fd(), self.record.file_offset)
    }

    /// Faults in this mapping since it is guarded. Unchanged means that everything read since was
    /// there.
    pub(super) fn faults(&self) -> usize {
        self.record.faults.load(Ordering::Acquire)
    }

    /// The pages that read as zeros because they are lost, rising, each once.
    pub(super) fn lost(&self) -> Vec<Lost> {
        let record = &self.record;
        let bytes = record.page_bytes;
        let mut lost: Vec<Lost> = record
            .pages
            .iter()
            .map(|page| page.load(Ordering::Acquire))
            .filter(|page| *page != NONE)
            .map(|page| match page & POISONED {
                0 => Lost { offset: page, bytes: record.len - page, loss: Loss::Absent },
                _ => Lost { offset: page & !POISONED, bytes, loss: Loss::Poisoned },
            })
            .collect();
        lost.sort_unstable();
        lost.dedup_by_key(|lost| lost.offset);
        lost
    }

    /// Whether more pages are lost than could be noted.
    pub(super) fn overflowed(&self) -> bool {
        self.record.full.load(Ordering::Acquire)
    }

    /// The page at this offset is mapped from its file again.
    pub(super) fn forget(&self, offset: usize) {
        for page in &self.record.pages {
            let _ = page.compare_exchange(offset, NONE, Ordering::AcqRel, Ordering::Relaxed);
            let _ =
                page.compare_exchange(offset | POISONED, NONE, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// All of the mapping is that of its file again, and nobody touches it meanwhile.
    pub(super) fn forget_all(&self) {
        self.record.pages.iter().for_each(|page| page.store(NONE, Ordering::Release));
        self.record.full.store(false, Ordering::Release);
        self.record.faults.store(0, Ordering::Release);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.place.set(0, 0);
        self.place.record.store(ptr::null_mut(), Ordering::Release);
    }
}

impl Place {
    fn set(&self, start: usize, len: usize) {
        self.version.fetch_add(1, Ordering::AcqRel);
        self.start.store(start, Ordering::Release);
        self.len.store(len, Ordering::Release);
        self.version.fetch_add(1, Ordering::AcqRel);
    }

    /// The record, if its mapping holds this address. A place that is being changed is not that of
    /// the address: whoever touches it keeps its mapping.
    fn holding(&self, address: usize) -> Option<*mut Record> {
        let version = self.version.load(Ordering::Acquire);
        let (start, len) = (self.start.load(Ordering::Acquire), self.len.load(Ordering::Acquire));
        let record = self.record.load(Ordering::Acquire);
        let same = version.is_multiple_of(2) && self.version.load(Ordering::Acquire) == version;
        (same && address.wrapping_sub(start) < len && !record.is_null()).then_some(record)
    }
}

impl Record {
    /// Whether the file has data at this offset of the mapping: not beyond its end, and no hole. A
    /// file of huge pages cannot be asked.
    fn has_data(&self, offset: usize) -> bool {
        if self.page_bytes != super::PAGE_BYTES {
            return false;
        }
        let Ok(at) = libc::off_t::try_from(self.file_offset + offset as u64) else { return false };
        // SAFETY: a descriptor of our own. Nobody relies on where it stands.
        unsafe { libc::lseek(self.file.as_raw_fd(), at, libc::SEEK_DATA) == at }
    }
}

impl Record {
    /// Whether this page has a place, or could have one.
    fn has_place(&self, offset: usize) -> bool {
        self.pages.iter().any(|page| {
            let page = page.load(Ordering::Acquire);
            page == NONE || page & !POISONED == offset
        })
    }

    /// Gives this page a place, unless it has one: another thread may have touched it at the same
    /// time.
    fn note(&self, offset: usize, poisoned: bool) {
        let value = offset | if poisoned { POISONED } else { 0 };
        // A page that was forgotten may have left a place ahead of the one that this page has.
        let has_it = self.pages.iter().any(|page| Self::is_noted(page, offset, poisoned));
        let takes = |page: &AtomicUsize| {
            page.compare_exchange(NONE, value, Ordering::AcqRel, Ordering::Relaxed).is_ok()
                || Self::is_noted(page, offset, poisoned)
        };
        if !has_it && !self.pages.iter().any(takes) {
            self.full.store(true, Ordering::Release);
        }
    }

    /// Whether this place is that page's. If there is no page, nor is there one behind it: that is
    /// not forgotten for a thread that found another reason.
    fn is_noted(place: &AtomicUsize, offset: usize, poisoned: bool) -> bool {
        let noted = place.load(Ordering::Acquire);
        if noted == NONE || noted & !POISONED != offset {
            return false;
        }
        if !poisoned {
            let _ = place.compare_exchange(noted, offset, Ordering::AcqRel, Ordering::Relaxed);
        }
        true
    }
}

/// Faults in all guarded mappings of this process so far.
pub(crate) fn faults() -> u64 {
    FAULTS.load(Ordering::Acquire)
}

fn install() -> Result<(), c_int> {
    // SAFETY: a sigaction of zeros is valid, and is filled by the first call; the handler is
    // async-signal-safe, as this module's head says, and takes the three arguments that SA_SIGINFO
    // gives it. On the alternate stack, as Rust's own.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before) != 0 {
            return Err(*libc::__errno_location());
        }
        let _ = BEFORE.set(before);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigemptyset(&raw mut action.sa_mask);
        if libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) != 0 {
            return Err(*libc::__errno_location());
        }
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands a valid siginfo; si_addr is that of a fault, which these codes are.
    // errno is this thread's own, and whoever was interrupted finds it as it was.
    unsafe {
        let errno = libc::__errno_location();
        let kept = *errno;
        let code = (*info).si_code;
        let handled = match code {
            libc::BUS_ADRERR | libc::BUS_MCEERR_AR => {
                replace((*info).si_addr().addr(), code == libc::BUS_MCEERR_AR)
            }
            // News of a page that this thread has not touched, so its mapping may be about to go.
            // Who touches it faults.
            libc::BUS_MCEERR_AO => is_guarded((*info).si_addr().addr()),
            _ => false,
        };
        *errno = kept;
        if !handled {
            pass_on(signal, info, context);
        }
    }
}

/// Whether a guarded mapping holds this address.
fn is_guarded(address: usize) -> bool {
    TABLE.iter().any(|place| place.holding(address).is_some())
}

/// Puts zeros in the place of the page at this address, if it is in a guarded mapping. The kernel
/// may have said that the hardware lost it; one that is built without that says nothing more than
/// that there is no page.
fn replace(address: usize, said_poisoned: bool) -> bool {
    let Some(record) = TABLE.iter().find_map(|place| place.holding(address)) else { return false };
    // SAFETY: the record belongs to the mapping that holds the address, and whoever touches that
    // address keeps the mapping, and with it the guard and its record.
    let record = unsafe { &*record };
    let offset = (address - record.start) / record.page_bytes * record.page_bytes;
    let poisoned = said_poisoned || record.has_data(offset);
    // Where there is nothing, there is nothing behind it either: one mapping, not one a page.
    let to_the_end = !poisoned || !record.has_place(offset);
    let bytes =
        if to_the_end { record.len - offset } else { record.page_bytes.min(record.len - offset) };
    let bytes = bytes.next_multiple_of(record.page_bytes);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let address = ptr::with_exposed_provenance_mut(record.start + offset);
    // SAFETY: a part of the guarded mapping, which is ours alone and whole pages of its backing.
    // Nobody holds a reference into it, as MemoryRegion gives out none.
    let mapped = unsafe { libc::mmap(address, bytes, record.protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    record.faults.fetch_add(1, Ordering::AcqRel);
    record.note(offset, poisoned);
    FAULTS.fetch_add(1, Ordering::AcqRel);
    true
}

/// Does what would be done without this handler.
///
/// # Safety
/// To be called in a handler, with what it was called with.
unsafe fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let before = BEFORE.get().map_or(libc::SIG_DFL, |before| before.sa_sigaction);
    let takes_info = BEFORE.get().is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0);
    // SAFETY: the handler that was installed takes what its flag says. Without one the signal does
    // what it always does when the instruction is run again.
    unsafe {
        match before {
            libc::SIG_DFL | libc::SIG_IGN => {
                libc::signal(signal, libc::SIG_DFL);
            }
            handler if takes_info => {
                let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                    std::mem::transmute(ptr::with_exposed_provenance::<()>(handler));
                handler(signal, info, context);
            }
            handler => {
                let handler: extern "C" fn(c_int) =
                    std::mem::transmute(ptr::with_exposed_provenance::<()>(handler));
                handler(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests;
