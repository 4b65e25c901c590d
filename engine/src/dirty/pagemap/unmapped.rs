//! Which pages of this process' own mappings its page tables do not map: one walk, which touches
//! nothing.
//!
//! A page that is freed in its file, by whichever process, is unmapped everywhere. So of pages that
//! were read here before, those that are still mapped were not freed since.

use super::{SCAN_WINDOW_BYTES, SCANNERS_MAX, abi, ioctl};
use crate::error::{Error, Result};
use rustix::io::Errno;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Regions that one call may report: what was freed is few and long; where it is not, there are
/// more calls.
const REGIONS: usize = 4096;

/// The parts of these ranges of our own addresses that are not mapped, in no order. `None` where
/// the kernel cannot tell (before Linux 6.7).
pub fn unmapped_here(ranges: &[Range<u64>]) -> Result<Option<Vec<Range<u64>>>> {
    let pagemap =
        File::open("/proc/self/pagemap").map_err(|e| Error::os("opening /proc/self/pagemap", e))?;
    let pagemap = pagemap.as_fd();
    let windows: Vec<_> = ranges.iter().flat_map(windows).collect();
    let next = AtomicUsize::new(0);
    let walk = || -> Result<Vec<Range<u64>>, Errno> {
        let mut found = Vec::new();
        while let Some(window) = windows.get(next.fetch_add(1, Ordering::Relaxed)) {
            walk(pagemap, window, &mut found)?;
        }
        Ok(found)
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let helpers = cores.min(SCANNERS_MAX).min(windows.len()).saturating_sub(1);
    let all = std::thread::scope(|scope| {
        // Whatever threads there are to be had share the work.
        let help = |_| std::thread::Builder::new().spawn_scoped(scope, walk).ok();
        let helping: Vec<_> = (0..helpers).filter_map(help).collect();
        let own = walk();
        let helped = helping.into_iter().map(|thread| thread.join().unwrap_or(Err(Errno::IO)));
        std::iter::once(own).chain(helped.collect::<Vec<_>>()).collect::<Result<Vec<_>, _>>()
    });
    match all {
        Ok(found) => Ok(Some(found.into_iter().flatten().collect())),
        Err(Errno::NOTTY) => Ok(None),
        Err(e) => Err(Error::os("PAGEMAP_SCAN of this process", e)),
    }
}

fn windows(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let range = range.clone();
    (range.start..range.end)
        .step_by(SCAN_WINDOW_BYTES as usize)
        .map(move |start| start..range.end.min(start + SCAN_WINDOW_BYTES))
}

fn walk(
    pagemap: BorrowedFd<'_>,
    window: &Range<u64>,
    found: &mut Vec<Range<u64>>,
) -> Result<(), Errno> {
    let mut regions = vec![abi::PageRegion::default(); REGIONS];
    let mut at = window.start;
    while at < window.end {
        let mut arg = abi::PmScanArg {
            start: at,
            end: window.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: abi::PAGE_IS_PRESENT,
            category_mask: abi::PAGE_IS_PRESENT,
            return_mask: abi::PAGE_IS_PRESENT,
            ..abi::PmScanArg::default()
        };
        let filled = ioctl(pagemap, abi::PAGEMAP_SCAN, &mut arg)?;
        let regions = regions.get(..filled).ok_or(Errno::IO)?;
        // A region may reach beyond the window where a page is huge.
        let within = |r: &abi::PageRegion| r.start.max(window.start)..r.end.min(window.end);
        found.extend(regions.iter().map(within).filter(|part| part.start < part.end));
        if arg.walk_end <= at {
            return Err(Errno::IO);
        }
        at = arg.walk_end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::page::PAGE_BYTES;
    use pageferry_transport::{Access, MemoryRegion};
    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};

    #[test]
    fn pages_that_were_never_touched_or_freed_since_are_found_and_no_others() {
        let file = File::from(memfd_create("unmapped", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 64 * PAGE_BYTES).unwrap();
        let region = MemoryRegion::map_shared(file.as_fd(), 0, 64 * 4096, Access::Write).unwrap();
        (0..48).for_each(|page| region.write(page * 4096, &[1]).unwrap());
        // By another descriptor, as the guest's process would.
        let at = |page: u64| page * PAGE_BYTES;
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, punch, at(5), PAGE_BYTES).unwrap();
        fallocate(&file, punch, at(20), 3 * PAGE_BYTES).unwrap();
        let base = region.as_ptr() as u64;
        let here =
            |pages: u64| unmapped_here(std::slice::from_ref(&(base..base + at(pages)))).unwrap();
        let mut found = here(64).expect("this kernel can");
        found.sort_by_key(|range| range.start);
        let pages: Vec<_> = found
            .iter()
            .map(|r| (r.start - base) / PAGE_BYTES..(r.end - base) / PAGE_BYTES)
            .collect();
        assert_eq!(pages, [5..6, 20..23, 48..64]);
        assert_eq!(here(5), Some(Vec::new()));
    }
}
