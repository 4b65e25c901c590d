//! Whether this host has room for what a guest's memory will take here, asked before it is
//! accepted.
//!
//! ```text
//!   this host                     MemAvailable
//!   the file system behind it     a size of its own (tmpfs, hugetlbfs with size=)
//!   a pool of huge pages          what is free and promised to nobody, where QEMU has set nothing aside
//!   every memory cgroup above     its limit, less what is in use, and file pages that it would give back
//! ```
//!
//! Swap is not counted: a guest that lies in it is paused. What the guest has here already takes
//! nothing more.

mod cgroup;

use crate::error::{Error, Result};
use crate::memory::bitmap::DirtyBitmap;
use crate::memory::page::{PAGE_BYTES, PageRun};
use crate::memory::staging::STAGING_BYTES;
use crate::memory::{GuestMemory, MemorySlot};
use rustix::fs::{fstat, fstatfs};
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Something that holds only so much.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bound {
    /// What it is.
    what: String,
    /// What can be done about it.
    fix: String,
    /// What it still takes, in bytes.
    available: u64,
}

/// What the slots of one kind need, in bytes.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Needs {
    /// All of it that lies in pages of 4 KiB.
    small: u64,
    /// By file system (its device), with a slot that lies there.
    file_systems: BTreeMap<u64, (usize, u64)>,
    /// By size of huge page.
    pools: BTreeMap<u64, u64>,
}

/// Fails if these pages do not fit. `set_aside` says that huge pages were reserved when QEMU
/// started, or it would not have started.
///
/// # Errors
/// [`Error::Refused`] with what is too small, by how much, and the fix.
pub(crate) fn check(memory: &GuestMemory, touched: &[PageRun], set_aside: bool) -> Result<()> {
    // What is here already is looked at only where room is short: it takes 13 ms a GiB.
    if short(memory, &needs(memory, touched, set_aside))?.is_none() {
        return Ok(());
    }
    let Some((bound, needed)) = short(memory, &needs_beside(memory, touched, set_aside)?)? else {
        return Ok(());
    };
    Err(Error::Refused(format!(
        "no room for the guest: it needs {} MiB of memory more than it has here, and {} has {} MiB available: {}",
        needed.div_ceil(1 << 20),
        bound.what,
        bound.available >> 20,
        bound.fix
    )))
}

/// Fails if a pool does not have all of the huge pages of this memory. To be asked before it is
/// looked through: where the kernel does not tell the holes of huge pages, all of it is allocated
/// then.
pub fn check_huge_pages(memory: &GuestMemory, set_aside: bool) -> Result<()> {
    let huge = memory.slots().iter().filter(|slot| slot.backing_page_bytes != PAGE_BYTES);
    check(memory, &huge.map(MemorySlot::run).collect::<Vec<_>>(), set_aside)
}

/// What these pages need beside what is here already.
fn needs_beside(memory: &GuestMemory, touched: &[PageRun], set_aside: bool) -> Result<Needs> {
    let mut missing = DirtyBitmap::new(memory.pages());
    touched.iter().for_each(|run| missing.insert(*run));
    memory
        .touched()?
        .into_iter()
        .filter(|run| memory.slots()[memory.locate(run.first.0).0].backing_page_bytes == PAGE_BYTES)
        .for_each(|run| missing.remove(run));
    let mut needs = needs(memory, &missing.runs(u64::MAX).collect::<Vec<_>>(), set_aside);
    for slot in memory.slots() {
        if let Some(bytes) = needs.pools.get_mut(&slot.backing_page_bytes) {
            let held = allocated(slot)?;
            *bytes = bytes.saturating_sub(held);
            if let Some((_, bytes)) = needs.file_systems.get_mut(&slot.file_id().device) {
                *bytes = bytes.saturating_sub(held);
            }
        }
    }
    Ok(needs)
}

/// Bytes that the file of a slot has been given: of huge pages, how many there are is all that is
/// told.
fn allocated(slot: &MemorySlot) -> Result<u64> {
    let file = slot.file()?;
    let stat = fstat(&file)
        .map_err(|e| Error::os(format!("looking at the memory of {}", slot.name), e))?;
    // In units of 512 bytes, says stat(2).
    Ok(u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512))
}

/// What these pages need, slot by slot.
fn needs(memory: &GuestMemory, runs: &[PageRun], set_aside: bool) -> Needs {
    let mut needs = Needs::default();
    for (index, (slot, parts)) in memory.slots().iter().zip(memory.parts(runs)).enumerate() {
        let page = slot.backing_page_bytes;
        let bytes = whole_pages(&parts, page);
        if page == PAGE_BYTES {
            needs.small += bytes;
        } else if set_aside {
            continue;
        } else {
            *needs.pools.entry(page).or_default() += bytes;
        }
        needs.file_systems.entry(slot.file_id().device).or_insert((index, 0)).1 += bytes;
    }
    needs
}

/// Bytes of the pages of this size that rising ranges lie in.
fn whole_pages(parts: &[std::ops::Range<usize>], page: u64) -> u64 {
    let (mut bytes, mut counted_to) = (0, 0);
    for part in parts {
        let begin = (part.start as u64 / page * page).max(counted_to);
        let end = (part.end as u64).next_multiple_of(page);
        bytes += end.saturating_sub(begin);
        counted_to = counted_to.max(end);
    }
    bytes
}

/// The first bound that these needs exceed, and what is needed of it.
fn short(memory: &GuestMemory, needs: &Needs) -> Result<Option<(Bound, u64)>> {
    for (index, bytes) in needs.file_systems.values() {
        if let Some(bound) =
            file_system(&memory.slots()[*index])?.filter(|bound| bound.available < *bytes)
        {
            return Ok(Some((bound, *bytes)));
        }
    }
    for (page, bytes) in &needs.pools {
        if let Some(bound) = pool(*page).filter(|bound| bound.available < *bytes) {
            return Ok(Some((bound, *bytes)));
        }
    }
    if needs.small == 0 {
        return Ok(None);
    }
    // Which a receiver takes for itself.
    let small = needs.small + STAGING_BYTES as u64;
    let bounds = cgroup::bounds().into_iter().chain(host());
    Ok(bounds.into_iter().find(|bound| bound.available < small).map(|bound| (bound, small)))
}

/// MemAvailable of /proc/meminfo.
fn host() -> Option<Bound> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bound {
        what: "this host".into(),
        fix: "free memory, or receive the guest elsewhere".into(),
        available: kib << 10,
    })
}

/// The file system behind a slot, if it has a size of its own.
fn file_system(slot: &MemorySlot) -> Result<Option<Bound>> {
    let file = slot.file()?;
    let stat = fstatfs(&file)
        .map_err(|e| Error::os(format!("looking at the memory of {}", slot.name), e))?;
    // Without a size, tmpfs says 0 blocks; hugetlbfs 0, or -1 where it only sets some aside.
    if stat.f_blocks == 0 || stat.f_blocks == u64::MAX {
        return Ok(None);
    }
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let path = path.map_or_else(|_| slot.name.clone(), |path| path.display().to_string());
    Ok(Some(Bound {
        what: format!("the file system of {path}"),
        fix: "make it larger (mount -o remount,size=...), or give the guest a mem-path elsewhere"
            .into(),
        available: stat.f_bavail.saturating_mul(u64::try_from(stat.f_bsize).unwrap_or(0)),
    }))
}

/// The pool of huge pages of this size.
fn pool(page_bytes: u64) -> Option<Bound> {
    let directory = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page_bytes >> 10);
    pool_at(Path::new(&directory), page_bytes)
}

/// The same, described by the files of this directory (Linux,
/// Documentation/admin-guide/mm/hugetlbpage.rst).
fn pool_at(directory: &Path, page_bytes: u64) -> Option<Bound> {
    let count = |file: &str| -> Option<u64> {
        std::fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok()
    };
    let free = count("free_hugepages")?.saturating_sub(count("resv_hugepages")?);
    let more = count("nr_overcommit_hugepages")?.saturating_sub(count("surplus_hugepages")?);
    Some(Bound {
        what: format!("the pool of huge pages of {} KiB", page_bytes >> 10),
        fix: format!("reserve more of them in {}/nr_hugepages", directory.display()),
        available: (free + more).saturating_mul(page_bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SlotSource;
    use pageferry_transport::Access;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn slot(pages: u64, backing_page_bytes: u64) -> SlotSource {
        let file = std::fs::File::from(memfd_create("room", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, pages * PAGE_BYTES).unwrap();
        SlotSource {
            name: "m".into(),
            file,
            file_offset: 0,
            bytes: pages * PAGE_BYTES,
            backing_page_bytes,
            process_address: 0,
        }
    }

    #[test]
    fn a_huge_page_is_counted_once_however_little_of_it_is_touched() {
        let huge = 2 << 20;
        assert_eq!(whole_pages(&[], huge), 0);
        let page = PAGE_BYTES as usize;
        assert_eq!(whole_pages(&[0..page, 9 * page..10 * page], huge), huge);
        assert_eq!(
            whole_pages(&[0..page, 511 * page..513 * page, 600 * page..601 * page], huge),
            2 * huge
        );
        assert_eq!(whole_pages(&[0..page, 9 * page..10 * page], PAGE_BYTES), 2 * PAGE_BYTES);
    }

    #[test]
    fn huge_pages_need_their_pool_unless_they_were_set_aside() {
        let memory =
            GuestMemory::map(vec![slot(16, PAGE_BYTES), slot(1024, 2 << 20)], Access::Write)
                .unwrap();
        let runs = [PageRun::between(0, 3), PageRun::between(16, 17)];
        let open = needs(&memory, &runs, false);
        assert_eq!((open.small, open.pools.get(&(2 << 20))), (3 * PAGE_BYTES, Some(&(2 << 20))));
        let set_aside = needs(&memory, &runs, true);
        assert_eq!((set_aside.small, set_aside.pools.len()), (3 * PAGE_BYTES, 0));
    }

    #[test]
    fn a_pool_has_what_is_free_and_promised_to_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let files = [
            ("free_hugepages", 10),
            ("resv_hugepages", 7),
            ("nr_overcommit_hugepages", 4),
            ("surplus_hugepages", 1),
        ];
        for (file, count) in files {
            std::fs::write(directory.path().join(file), format!("{count}\n")).unwrap();
        }
        assert_eq!(pool_at(directory.path(), 2 << 20).unwrap().available, 6 * (2 << 20));
    }

    #[test]
    fn what_is_here_already_takes_no_more_room() {
        let memory = GuestMemory::map(vec![slot(16, PAGE_BYTES)], Access::Write).unwrap();
        let all = [PageRun::between(0, 16)];
        check(&memory, &all, true).unwrap();
        let needed = needs(&memory, &all, true);
        assert_eq!(needed.file_systems.len(), 1);
        assert!(short(&memory, &Needs { small: 1 << 60, ..needed }).unwrap().is_some());
    }
}
