//! Direct disk reads into tracked memory: the kernel reports the pages when a transfer begins, and
//! the disk writes them later. What `SourceGuest::drain_io` promises (no transfer that was under
//! way at the call is any more) makes a sync safe to read; these tests show it on the real kernel,
//! with a reader that can be settled in place of QEMU's `stop`.

use pageferry_engine::dirty::DirtySource;
use pageferry_engine::dirty::pagemap::{PagemapSource, TrackedRange, own_userfaultfd};
use pageferry_engine::memory::bitmap::DirtyBitmap;
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_tests::not_run;
use pageferry_tests::slow_fs::SlowFs;
use pageferry_transport::MemoryRegion;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::pread;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

const PAGES: u64 = 4096;
const READ_PAGES: u64 = 64;
const READERS: u64 = 4;
const SWEEPS: u64 = 5;

/// How long each read of the slow file system takes: long beside a sync.
const SLOW: Duration = Duration::from_millis(5);

/// A file whose page `p` is full of bytes that tell `p`.
fn write_disk(path: &Path) {
    let mut file = File::create(path).unwrap();
    for page in 0..PAGES {
        file.write_all(&[(page % 251 + 1) as u8; PAGE_BYTES as usize]).unwrap();
    }
    file.sync_all().unwrap();
}

fn disk(path: &Path) -> Option<OwnedFd> {
    write_disk(path);
    open(path, OFlags::RDONLY | OFlags::DIRECT, Mode::empty()).ok()
}

/// Reads the disk into `guest` over and over while syncs send pages to a copy; returns how many
/// pages of the copy differ in the end. Memory is wiped before it is read into, so that every read
/// changes its pages.
fn pages_lost(disk: &OwnedFd, settled: bool) -> u64 {
    let guest = MemoryRegion::anonymous((PAGES * PAGE_BYTES) as usize).unwrap();
    let copy = MemoryRegion::anonymous((PAGES * PAGE_BYTES) as usize).unwrap();
    guest.populate(0, guest.len()).unwrap();
    let range = TrackedRange {
        process_address: guest.as_ptr() as u64,
        bytes: guest.len() as u64,
        first_page: 0,
        backing_page_bytes: PAGE_BYTES,
    };
    let mut source =
        PagemapSource::new(own_userfaultfd().unwrap(), std::process::id(), vec![range]).unwrap();
    // Held for reading by each transfer; whoever holds it for writing has settled them all.
    let transfers = RwLock::new(());
    let done = AtomicBool::new(false);
    let mut dirty = DirtyBitmap::new(PAGES);
    let mut buffer = vec![0; PAGE_BYTES as usize];
    std::thread::scope(|scope| {
        let reading: Vec<_> = (0..READERS)
            .map(|reader| {
                let (guest, transfers) = (Arc::clone(&guest), &transfers);
                scope.spawn(move || {
                    for _ in 0..SWEEPS {
                        for piece in (reader..PAGES / READ_PAGES).step_by(READERS as usize) {
                            let at = piece * READ_PAGES * PAGE_BYTES;
                            let len = (READ_PAGES * PAGE_BYTES) as usize;
                            let transfer = transfers.read().unwrap();
                            guest.write(at as usize, &vec![0; len]).unwrap();
                            // SAFETY: within the region, which outlives the scope; no reference to
                            // its bytes exists, and the other threads have pieces of their own.
                            let memory = unsafe {
                                std::slice::from_raw_parts_mut(guest.as_ptr().add(at as usize), len)
                            };
                            assert_eq!(pread(disk, memory, at).unwrap(), len);
                            drop(transfer);
                        }
                    }
                })
            })
            .collect();
        let watching = scope.spawn(|| {
            reading.into_iter().for_each(|reader| reader.join().unwrap());
            done.store(true, Ordering::Release);
        });
        loop {
            // Read before the sync: the last sync begins after the last transfer has ended.
            let last = done.load(Ordering::Acquire);
            source.sync(&mut dirty).unwrap();
            if settled {
                drop(transfers.write().unwrap());
            }
            let runs: Vec<_> = dirty.runs(u64::MAX).collect();
            for run in runs {
                for page in run.first.0..run.end() {
                    guest.read((page * PAGE_BYTES) as usize, &mut buffer).unwrap();
                    copy.write((page * PAGE_BYTES) as usize, &buffer).unwrap();
                }
                dirty.remove(run);
            }
            if last {
                break;
            }
        }
        watching.join().unwrap();
    });
    let mut other = buffer.clone();
    (0..PAGES)
        .filter(|page| {
            guest.read((page * PAGE_BYTES) as usize, &mut buffer).unwrap();
            copy.read((page * PAGE_BYTES) as usize, &mut other).unwrap();
            buffer != other
        })
        .count() as u64
}

#[test]
fn direct_reads_lose_no_page_once_they_are_settled_between_sync_and_copy() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Some(disk) = disk(&directory.path().join("disk")) else {
        return not_run(
            "direct_reads_lose_no_page_once_they_are_settled_between_sync_and_copy",
            "the file system of the build directory has no O_DIRECT",
        );
    };
    for _ in 0..5 {
        assert_eq!(pages_lost(&disk, true), 0);
    }
    // That the danger is real: without settling, pages are lost. Not asserted, for a quick disk may
    // hide it.
    let lost: u64 = (0..5).map(|_| pages_lost(&disk, false)).sum();
    println!("without settling, {lost} pages were lost");
}

/// What the drain rests on: whether a read copies through the page tables is the file system's
/// doing, and not the reader's, who opens its file alike each time.
#[test]
fn a_file_system_that_pins_plain_reads_loses_pages_unless_they_are_settled_and_one_that_copies_does_not()
 {
    let name = "a_file_system_that_pins_plain_reads_loses_pages_unless_they_are_settled_and_one_that_copies_does_not";
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("disk");
    write_disk(&path);
    let mount = |direct| {
        let slow = SlowFs::over(&path, direct, SLOW)?;
        let flags = |more| open(slow.path(), OFlags::RDONLY | more, Mode::empty());
        let (plain, direct) = (flags(OFlags::empty()).unwrap(), flags(OFlags::DIRECT).unwrap());
        Ok::<_, String>((slow, plain, direct))
    };
    let (pinning, copying) = match (mount(true), mount(false)) {
        (Ok(pinning), Ok(copying)) => (pinning, copying),
        (Err(why), _) | (_, Err(why)) => return not_run(name, &why),
    };
    assert_eq!(pages_lost(&copying.1, false), 0, "through the page cache");
    let lost = pages_lost(&pinning.1, false);
    assert!(lost > 0, "plain reads past the page cache");
    assert_eq!(pages_lost(&pinning.1, true), 0, "the same, settled");
    assert_eq!(pages_lost(&copying.2, true), 0, "direct reads, settled");
    println!("without settling, {lost} pages were lost");
}
