//! A file that is cut, and pages with the kernel's own poison (`UFFDIO_POISON`), which raise what
//! broken memory raises.

use super::*;
use crate::region::{Access, MemoryRegion, sealed_memfd, touch};
use rustix::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::unix::process::ExitStatusExt;

const PAGE: usize = 4096;

fn file(pages: u64) -> OwnedFd {
    let file = memfd_create("guarded", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, pages * PAGE as u64).unwrap();
    file
}

/// Has every touch of these bytes answered as if the hardware had lost them. Lasts while the
/// descriptor is open.
fn poison(address: usize, region: &MemoryRegion) -> OwnedFd {
    // SAFETY: the call takes flags alone; its answer is a new descriptor.
    let uffd = unsafe {
        OwnedFd::from_raw_fd(libc::syscall(libc::SYS_userfaultfd, 1 | libc::O_CLOEXEC) as i32)
    };
    let call = |number: u64, arg: &mut [u64; 4]| {
        // SAFETY: these calls take structures of three or four words.
        let answer = unsafe { libc::ioctl(uffd.as_raw_fd(), number as _, arg.as_mut_ptr()) };
        assert_eq!(answer, 0, "{number:#x}: {}", std::io::Error::last_os_error());
    };
    // UFFD_API with UFFD_FEATURE_POISON, UFFDIO_REGISTER for missing pages, UFFDIO_POISON
    // (linux/userfaultfd.h).
    call(0xc018_aa3f, &mut [0xAA, 1 << 14, 0, 0]);
    call(0xc020_aa00, &mut [region.as_ptr().addr() as u64, region.len() as u64, 1, 0]);
    call(0xc020_aa08, &mut [address as u64, PAGE as u64, 0, 0]);
    uffd
}

#[test]
fn a_page_that_the_hardware_lost_is_named_reads_as_zeros_and_the_others_are_read() {
    let file = file(4);
    let region = MemoryRegion::map_guarded(file.as_fd(), 0, 4 * PAGE, Access::Write).unwrap();
    // No holes: whoever touches one while its mapping is registered for poison waits for ever.
    rustix::io::pwrite(&file, &[8; 4 * PAGE], 0).unwrap();
    region.write(0, &[7; PAGE]).unwrap();
    region.write(PAGE, &[0; PAGE]).unwrap();
    region.write(3 * PAGE, &[9; PAGE]).unwrap();
    assert_eq!((region.faults(), region.lost()), (0, Vec::new()));
    let _uffd = poison(region.as_ptr().addr() + 2 * PAGE, &region);
    assert!(region.is_zero(2 * PAGE, PAGE).unwrap());
    let lost = Lost { offset: 2 * PAGE, bytes: PAGE, loss: Loss::Poisoned };
    assert_eq!((region.faults(), region.lost()), (1, vec![lost]));
    let mut bytes = [1; 4 * PAGE];
    region.read(0, &mut bytes).unwrap();
    assert!(
        bytes[..PAGE] == [7; PAGE]
            && bytes[PAGE..3 * PAGE] == [0; 2 * PAGE]
            && bytes[3 * PAGE..] == [9; PAGE]
    );
    assert_eq!(region.faults(), 1, "once found it costs nothing");
}

#[test]
fn what_was_cut_off_a_file_is_named_with_all_behind_it_and_found_again_when_it_is_back() {
    let file = file(8);
    let region = MemoryRegion::map_guarded(file.as_fd(), 0, 8 * PAGE, Access::Write).unwrap();
    (0..8).for_each(|page| region.write(page * PAGE, &[5]).unwrap());
    ftruncate(&file, 3 * PAGE as u64).unwrap();
    assert!(region.is_zero(5 * PAGE, PAGE).unwrap() && !region.is_zero(2 * PAGE, PAGE).unwrap());
    region.write(6 * PAGE, &[1]).unwrap();
    let lost = Lost { offset: 5 * PAGE, bytes: 3 * PAGE, loss: Loss::Absent };
    assert_eq!((region.faults(), region.lost()), (1, vec![lost]), "no fault a page");
    // SAFETY: mapped memory.
    assert!(unsafe { touch(region.as_ptr().addr() + 3 * PAGE, 2 * PAGE) });
    ftruncate(&file, 8 * PAGE as u64).unwrap();
    region.look_at_all_again().unwrap();
    assert_eq!((region.faults(), region.lost()), (0, Vec::new()));
    region.write(5 * PAGE, &[3]).unwrap();
    let mut byte = [0];
    assert_eq!(rustix::io::pread(&file, &mut byte, 5 * PAGE as u64), Ok(1));
    assert_eq!(byte, [3], "the file's page, and no other");
}

#[test]
fn one_lost_page_is_looked_at_again_and_the_others_stay_noted() {
    let file = file(4);
    let region = MemoryRegion::map_guarded(file.as_fd(), 0, 4 * PAGE, Access::Read).unwrap();
    rustix::io::pwrite(&file, &[4; 4 * PAGE], 0).unwrap();
    let uffd = poison(region.as_ptr().addr(), &region);
    assert!(region.is_zero(0, PAGE).unwrap());
    drop(uffd);
    region.look_again(region.lost()[0]).unwrap();
    assert!(region.lost().is_empty() && !region.is_zero(0, PAGE).unwrap());
    assert_eq!(region.faults(), 1, "who counts sees that something was lost");
}

/// As the handler is called: lanes, the zero check and a digest touch a page at once.
#[test]
fn a_page_on_which_many_threads_fault_is_one_lost_page() {
    const PAGES: usize = LOST_MAX - 1;
    let file = file(PAGES as u64 + 2);
    let region =
        MemoryRegion::map_guarded(file.as_fd(), 0, (PAGES + 2) * PAGE, Access::Read).unwrap();
    let start = region.as_ptr().addr();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..PAGES).for_each(|page| assert!(replace(start + page * PAGE, true))));
        }
    });
    assert_eq!(region.faults(), 4 * PAGES);
    assert!(!region.lost_too_many());
    let offsets: Vec<_> = region.lost().iter().map(|lost| lost.offset / PAGE).collect();
    assert_eq!(offsets, (0..PAGES).collect::<Vec<_>>());
    assert!(
        replace(start + PAGES * PAGE, true) && !region.lost_too_many(),
        "as many as have a place"
    );
    assert!(replace(start, true) && !region.lost_too_many(), "it has one");
    assert!(replace(start + (PAGES + 1) * PAGE, true) && region.lost_too_many());
    region.look_at_all_again().unwrap();
    assert!(region.lost().is_empty() && !region.lost_too_many());
}

/// In a process of its own, which must die of it.
#[test]
fn a_fault_in_memory_that_is_not_guarded_ends_the_process_as_ever() {
    const NAME: &str =
        "region::guard::tests::a_fault_in_memory_that_is_not_guarded_ends_the_process_as_ever";
    const INNER: &str = "PAGEFERRY_TEST_UNGUARDED";
    if std::env::var_os(INNER).is_some() {
        let (file, other) =
            (file(1), sealed_memfd("guarded", MemfdFlags::empty(), PAGE as u64).unwrap());
        let _guarded = MemoryRegion::map_guarded(other.as_fd(), 0, PAGE, Access::Read).unwrap();
        let region = MemoryRegion::map_shared(file.as_fd(), 0, PAGE, Access::Read).unwrap();
        ftruncate(&file, 0).unwrap();
        let _ = region.is_zero(0, PAGE);
        return;
    }
    let ended = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME])
        .env(INNER, "1")
        .output()
        .unwrap();
    assert_eq!(ended.status.signal(), Some(libc::SIGBUS), "{ended:?}");
}
