//! Every claim of the module is tried on this kernel.

use super::*;
use pageferry_transport::Access;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use std::collections::BTreeSet;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

struct Memory {
    pub file: File,
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
        Ok(Self {
            file,
            region,
            pages,
            backing_page_bytes,
            window_bytes: SCAN_WINDOW_BYTES,
            scanners: 2,
        })
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
        PagemapSource::with(
            uffd,
            std::process::id(),
            ranges,
            self.window_bytes,
            self.scanners,
            &mut || Ok(()),
        )
    }

    fn write(&self, page: u64) {
        self.region.write((page * PAGE_BYTES) as usize, &[1, 2, 3]).unwrap();
    }
}

fn sync(source: &mut PagemapSource, pages: u64) -> BTreeSet<u64> {
    let mut dirty = DirtyBitmap::new(pages);
    let said = source.sync(&mut dirty).unwrap();
    assert_eq!(said.pages, dirty.count());
    dirty.runs(u64::MAX).flat_map(|r| r.first.0..r.end()).collect()
}

#[test]
fn this_kernel_can_follow_writes() {
    probe().unwrap();
}

#[test]
fn exactly_the_written_pages_are_synced_and_armed_again() {
    let memory = Memory::new(64);
    memory.write(3);
    let mut source = memory.track();
    assert!(sync(&mut source, 64).is_empty(), "what was written before does not count");
    for page in [0, 3, 4, 31, 32, 63] {
        memory.write(page);
    }
    assert_eq!(sync(&mut source, 64), BTreeSet::from([0, 3, 4, 31, 32, 63]));
    assert!(sync(&mut source, 64).is_empty());
    memory.write(31);
    assert_eq!(sync(&mut source, 64), BTreeSet::from([31]), "armed again before it returned");
}

#[test]
fn a_first_write_counts_and_a_first_read_does_not() {
    let memory = Memory::new(64);
    let mut source = memory.track();
    memory.write(5);
    memory.region.read(9 * PAGE_BYTES as usize, &mut [0]).unwrap();
    assert_eq!(sync(&mut source, 64), BTreeSet::from([5]));
    memory.write(9);
    assert_eq!(sync(&mut source, 64), BTreeSet::from([9]));
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
    let seen = sync(&mut source, 64);
    assert!(!seen.contains(&8) && !seen.contains(&11), "{seen:?}");
    memory.write(8);
    memory.write(11);
    let seen = sync(&mut source, 64);
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
    assert_eq!(sync(&mut source, 64), BTreeSet::from([20]));
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
    assert_eq!(sync(&mut source, 64), BTreeSet::from([2]));
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
    let error = source.sync(&mut DirtyBitmap::new(64)).unwrap_err().to_string();
    assert!(error.contains("not tracked"), "{error}");
}

/// For writers on a busy machine to have written once for each sync.
const WRITERS_MAX: Duration = Duration::from_secs(60);

/// Writers note each write with the epochs before and after it. The epoch is odd while a sync
/// runs, so a write that saw `2k` twice came wholly before sync `k`, which must have it.
fn no_write_is_missed(memory: &Memory, syncs: u64) {
    let mut source = memory.track();
    let (epoch, written, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let deadline = Instant::now() + WRITERS_MAX;
    let (mut seen, mut ledger) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3u64)
            .map(|seed| {
                let (epoch, written, done) = (&epoch, &written, &done);
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
                        written.fetch_add(1, Ordering::SeqCst);
                    }
                    writes
                })
            })
            .collect();
        for synced in 0..syncs {
            // On a busy machine all syncs could be over before a writer has run at all.
            while written.load(Ordering::SeqCst) <= synced && Instant::now() < deadline {
                std::thread::yield_now();
            }
            epoch.fetch_add(1, Ordering::SeqCst);
            seen.push(sync(&mut source, memory.pages));
            epoch.fetch_add(1, Ordering::SeqCst);
        }
        done.store(true, Ordering::SeqCst);
        for writer in writers {
            ledger.extend(writer.join().unwrap());
        }
    });
    seen.push(sync(&mut source, memory.pages));
    assert!(ledger.len() as u64 > syncs, "the writers hardly ran: {} writes", ledger.len());
    for (page, before, after) in ledger {
        // The first sync that may have it, and the first that begins after it.
        let (first, last) = (before / 2, after.div_ceil(2));
        let found = (first..=last).any(|k| seen.get(k as usize).is_some_and(|s| s.contains(&page)));
        assert!(found, "page {page}, written in epochs {before} to {after}, is in no sync");
    }
}

#[test]
fn no_write_of_concurrent_threads_is_missed() {
    no_write_is_missed(&Memory::new(512), 400);
}

#[test]
fn no_write_is_missed_where_several_threads_share_a_sync() {
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
        let range =
            TrackedRange { process_address: 7 << 30, bytes, first_page: 5, backing_page_bytes };
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
        eprintln!(
            "NOT TESTED: no {HUGE_PAGES} huge pages of 2 MiB can be reserved on this machine"
        );
        return;
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(memfd_create("huge", flags).unwrap());
    let memory = Memory::of(file, HUGE_PAGES * 512, 2 << 20).unwrap();
    {
        let mut source = memory.track();
        memory.write(700);
        assert_eq!(
            sync(&mut source, memory.pages),
            (512..1024).collect(),
            "a huge page is one unit"
        );
        assert!(sync(&mut source, memory.pages).is_empty());
        memory.write(512);
        assert_eq!(sync(&mut source, memory.pages).len(), 512);
    }
    no_write_is_missed(&memory, 100);
}

/// Huge pages reserved beyond what the machine had, given back on drop. One test at a time has
/// some.
pub(crate) struct HugePages {
    pages: u64,
    _alone: MutexGuard<'static, ()>,
}

impl HugePages {
    const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

    fn count(name: &str) -> Option<u64> {
        std::fs::read_to_string(name).ok()?.trim().parse().ok()
    }

    pub(crate) fn reserve(pages: u64) -> Option<Self> {
        static ONE: Mutex<()> = Mutex::new(());
        let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = Self::count(Self::COUNT)?;
        std::fs::write(Self::COUNT, (before + pages).to_string()).ok()?;
        let this = Self { pages, _alone: alone };
        (Self::count(Self::COUNT)? >= before + pages).then_some(this)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(now) = Self::count(Self::COUNT) {
            let _ = std::fs::write(Self::COUNT, now.saturating_sub(self.pages).to_string());
        }
    }
}
