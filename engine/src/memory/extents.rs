//! What a memory file has, in short calls.
//!
//! `SEEK_HOLE` looks at every page up to the next hole, which may be the end of the file, and lets
//! go of nothing meanwhile: of no processor (where the kernel is not built to be preempted), not of
//! the file, whose holes a balloon cannot punch then. Of 6 GiB without a hole it took 60 ms, in
//! which a guest that shared the processor was paused. So `cachestat` (Linux 6.5) counts the pages
//! of a window first, which can be preempted, and `SEEK_HOLE` is asked only where it finds one
//! there.

use crate::memory::page::PAGE_BYTES;
use rustix::fs::{SeekFrom, fstatfs, seek};
use rustix::io::Errno;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// What one `SEEK_HOLE` may have to look through.
const WINDOW_BYTES: u64 = 64 << 20;

/// Of x86-64; `linux/mman.h` has the structures.
const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    /// Of shared memory: swapped out.
    evicted: u64,
    recently_evicted: u64,
}

/// The parts of this range that the file has, rising. What changes meanwhile may be told either
/// way, and a hole that was punched meanwhile may be followed by more that are told as data.
pub(super) fn data_within(file: &File, range: Range<u64>) -> Result<Vec<Range<u64>>, Errno> {
    // Memfds lie on a tmpfs too. Elsewhere what is cached is not all that the file has.
    let is_shmem = fstatfs(file).is_ok_and(|about| about.f_type == libc::TMPFS_MAGIC);
    found_within(file, range, |window| is_shmem.then(|| count(file, window)).flatten())
}

fn found_within(
    file: &File,
    range: Range<u64>,
    count: impl Fn(Range<u64>) -> Option<u64>,
) -> Result<Vec<Range<u64>>, Errno> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut add = |part: Range<u64>| match found.last_mut() {
        Some(last) if last.end == part.start => last.end = part.end,
        _ => found.push(part),
    };
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at + WINDOW_BYTES);
        let pages = (end - at).div_ceil(PAGE_BYTES);
        match count(at..end) {
            Some(0) => {}
            Some(there) if there >= pages => add(at..end),
            Some(there) => sought(file, at..end, Some(pages - there), &mut add)?,
            // Asked in windows, `SEEK_HOLE` would look through the rest of the file once for each.
            None => {
                sought(file, at..range.end, None, &mut add)?;
                break;
            }
        }
        at = end;
    }
    Ok(found)
}

/// Of a window that has so many pages of holes, if that is known.
fn sought(
    file: &File,
    window: Range<u64>,
    mut holes: Option<u64>,
    add: &mut impl FnMut(Range<u64>),
) -> Result<(), Errno> {
    let mut at = window.start;
    while at < window.end {
        // Fast, as what is not there need not be looked at.
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < window.end => data,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(e) => return Err(e),
        };
        if let Some(left) = &mut holes {
            *left = left.saturating_sub((data - at) / PAGE_BYTES);
        }
        at = match holes {
            Some(0) => window.end,
            _ => seek(file, SeekFrom::Hole(data))?.next_multiple_of(PAGE_BYTES).min(window.end),
        };
        add(data..at);
    }
    Ok(())
}

/// How many pages of this range the file has; `None` where the kernel does not tell.
fn count(file: &File, range: Range<u64>) -> Option<u64> {
    let (asked, mut told) = (
        CachestatRange { offset: range.start, len: range.end - range.start },
        Cachestat::default(),
    );
    // SAFETY: a descriptor that lives, and two structures of the kernel's layout, which it reads
    // and fills.
    let answer = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const asked, &raw mut told, 0)
    };
    (answer == 0).then_some(told.cached + told.evicted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Advice, MemfdFlags, fadvise, ftruncate, memfd_create};
    use std::cell::Cell;
    use std::os::unix::fs::FileExt;

    /// Full windows, empty ones, and some with both; with and without the kernel's count.
    #[test]
    fn exactly_what_the_file_has_is_found() {
        const WINDOW_PAGES: u64 = WINDOW_BYTES / PAGE_BYTES;
        let file = File::from(memfd_create("extents", MemfdFlags::CLOEXEC).unwrap());
        let bytes = 4 * WINDOW_BYTES + 10 * PAGE_BYTES;
        ftruncate(&file, bytes).unwrap();
        let runs = [
            3..4,
            9..WINDOW_PAGES - 1,
            WINDOW_PAGES..2 * WINDOW_PAGES + 5,
            4 * WINDOW_PAGES + 7..4 * WINDOW_PAGES + 10,
        ];
        let runs = runs.map(|run| run.start * PAGE_BYTES..run.end * PAGE_BYTES);
        for run in &runs {
            file.write_all_at(&vec![1; (run.end - run.start) as usize], run.start).unwrap();
        }
        assert_eq!(data_within(&file, 0..bytes).unwrap(), runs);
        let asked = Cell::new(0);
        let uncounted = |_| {
            asked.set(asked.get() + 1);
            None
        };
        assert_eq!(found_within(&file, 0..bytes, uncounted).unwrap(), runs);
        assert_eq!(asked.get(), 1, "the file is walked once, and not once a window");
        let part = data_within(&file, 4 * PAGE_BYTES..10 * PAGE_BYTES).unwrap();
        assert_eq!((part.len(), part[0].start, part[0].end), (1, 9 * PAGE_BYTES, 10 * PAGE_BYTES));
        assert_eq!(count(&file, 0..10 * PAGE_BYTES), Some(2), "this kernel counts");
    }
    #[test]
    fn what_a_file_on_a_disk_has_is_found_although_nothing_of_it_is_cached() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.set_len(WINDOW_BYTES).unwrap();
        file.write_all_at(&[1; 2 * PAGE_BYTES as usize], 0).unwrap();
        file.sync_all().unwrap();
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        let found = data_within(&file, 0..WINDOW_BYTES).unwrap();
        let written = 0..2 * PAGE_BYTES;
        assert_eq!(found.as_slice(), std::slice::from_ref(&written));
    }
}
