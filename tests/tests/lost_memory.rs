//! Guest memory that goes away under the supervisor: pages that the hardware lost, files that are
//! cut. Nobody dies of it: what was lost is named, and the guest runs on or moves, as the operator
//! chose. And pages that a balloon takes away: they arrive as what the guest would read there.

use pageferry_engine::destination::Receiver;
use pageferry_engine::destination::listener::SessionListener;
use pageferry_engine::guest::{DestinationGuest, SourceGuest};
use pageferry_engine::memory::lost_page::Poisoned;
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::net::choice::LinkChoice;
use pageferry_engine::report::progress::Monitor;
use pageferry_engine::report::{MigrationReport, Outcome};
use pageferry_engine::source::{MigrateOptions, migrate};
use pageferry_synthetic::{SyntheticDestination, SyntheticOptions, SyntheticSource};
use pageferry_tests::huge_pages::HugePages;
use pageferry_tests::look::memory_file;
use pageferry_tests::stage::Stage;
use pageferry_tests::{SOON, not_run};
use pageferry_transport::{Access, MemoryRegion};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Instant;

/// 16 MiB, of which the guest's threads write the first half.
const GUEST: SyntheticOptions = SyntheticOptions {
    pages: 4096,
    touched_pages: 2048,
    threads: 1,
    pages_per_second: Some(2_000),
    seed: 20_261_129,
    discards: false,
};

/// Pages that the guest's threads leave alone; what is lost and what is beside it.
const LOST: u64 = 3000;
const BESIDE: [u64; 2] = [LOST - 1, LOST + 1];

fn attempt(
    guest: &mut SyntheticSource,
    poisoned: Poisoned,
    verify: bool,
) -> (MigrationReport, SyntheticDestination) {
    let listener = SessionListener::open("127.0.0.1:0".parse().unwrap()).unwrap();
    let mut options = MigrateOptions::to(listener.address.to_string());
    (options.poisoned, options.verify, options.downtime_us_max) = (poisoned, verify, 1_000_000);
    let mut destination = SyntheticDestination::new(GUEST.pages).unwrap();
    let report = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut receiver = Receiver::new(listener, LinkChoice::default());
            let incoming =
                receiver.listener().next(Instant::now() + SOON).expect("the source connects");
            receiver.serve(incoming, &mut destination, &mut || Ok(()))
        });
        migrate(guest, &options, &Monitor::default())
    });
    (report, destination)
}

fn page_of(guest: &dyn DestinationGuest, page: u64) -> Vec<u8> {
    let mut bytes = vec![1; PAGE_BYTES as usize];
    guest.memory().slots()[0].region().read((page * PAGE_BYTES) as usize, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_page_that_the_hardware_lost_is_named_and_the_guest_runs_on_or_moves_with_zeros_there() {
    let mut guest = SyntheticSource::start(GUEST).unwrap();
    for page in [LOST, BESIDE[0], BESIDE[1]] {
        let region = guest.memory().slots()[0].region();
        region.write((page * PAGE_BYTES) as usize, &[7; PAGE_BYTES as usize]).unwrap();
    }
    guest.lose(LOST).unwrap();
    let (report, _) = attempt(&mut guest, Poisoned::Refuse, false);
    assert_eq!((report.outcome, report.refused), (Outcome::Aborted, false));
    let reason = report.reason.unwrap();
    assert!(
        reason.contains("synthetic at 0xbb8000") && reason.contains("--poisoned zero"),
        "{reason}"
    );
    assert_eq!(report.lost_pages.len(), 1);
    guest.check().unwrap();

    let mut guest = SyntheticSource::start(GUEST).unwrap();
    for page in [LOST, BESIDE[0], BESIDE[1]] {
        let region = guest.memory().slots()[0].region();
        region.write((page * PAGE_BYTES) as usize, &[7; PAGE_BYTES as usize]).unwrap();
    }
    guest.lose(LOST).unwrap();
    let (report, destination) = attempt(&mut guest, Poisoned::Zero, true);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    let lost = &report.lost_pages[..];
    assert!(
        matches!(lost, [page] if page.offset == LOST * PAGE_BYTES && page.bytes == PAGE_BYTES),
        "{lost:?}"
    );
    assert_eq!(page_of(&destination, LOST), [0; PAGE_BYTES as usize]);
    BESIDE
        .iter()
        .for_each(|page| assert_eq!(page_of(&destination, *page), [7; PAGE_BYTES as usize]));
    destination.into_source().expect("it runs there").check().unwrap();
}

/// Cut when the set-up has found its pages and before they are read, as by a neighbour's mistake.
/// QEMU does not run, so that it does not die of it first.
#[test]
fn a_memory_file_that_is_cut_is_named_and_neither_supervisor_nor_guest_dies() {
    const MIB: u64 = 1 << 20;
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = memory.path().join("ram");
    let qemu = |path: &str| {
        format!(
            "qemu-system-x86_64 -S -accel tcg -machine q35,memory-backend=m -m 64 -nodefaults -display none \
             -object memory-backend-file,id=m,size=64M,mem-path={path},share=on"
        )
    };
    let stage = Stage::new();
    let source = stage.run("src", &qemu(&path.display().to_string()), "rounds");
    let destination =
        stage.receive("dst", &qemu(&memory.path().join("other").display().to_string()), "");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.write_all_at(&[9; 4096], 40 * MIB).unwrap();
    let moving = stage.migrate("src", destination.address(), &[]);
    source.wait_held("rounds");
    file.set_len(32 * MIB).unwrap();
    stage.release();
    let ended = moving.end(SOON);
    let cut = "memory block m was cut to 0x2000000 of 0x4000000 bytes";
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains(cut), "{}", ended.stderr);
    assert!(source.alive() && source.guest_state().as_deref() == Some("prelaunch"));
    // Cut before, and nobody touches what is gone: it is not taken for memory that was never
    // touched.
    let ended = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert!(ended.status == Some(1) && ended.stderr.contains(cut), "{}", ended.stderr);
    file.set_len(64 * MIB).unwrap();
    let ended = stage.migrate("src", destination.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
}

/// Takes pages away as QEMU does for a balloon and for free page reporting, after they were sent.
/// The guest of the one that reads such a page finds zeros, and so must the one that reads it at
/// the destination.
fn taken_away_while_it_moves(hugetlb: &str, page_bytes: u64) {
    const BYTES: u64 = 64 << 20;
    const FIRST: u64 = 8;
    let qemu = format!(
        "qemu-system-x86_64 -S -accel tcg -machine q35,memory-backend=m -m 64 -nodefaults -display none \
         -device virtio-balloon-pci -object memory-backend-memfd,id=m,size=64M{hugetlb}"
    );
    let map = |file: &File| {
        MemoryRegion::map_unreserved(file.as_fd(), 0, BYTES as usize, Access::Write).unwrap()
    };
    let at = |index: u64| ((FIRST + index) * page_bytes) as usize;
    let stage = Stage::new();
    let source = stage.run("src", &qemu, "switchover");
    let destination = stage.receive("dst", &qemu, "");
    let (here, there) = (memory_file(source.qemu(), BYTES), memory_file(destination.qemu(), BYTES));
    let allocated = |file: &File| file.metadata().unwrap().blocks() * 512 / page_bytes;
    (0..8).for_each(|index| map(&here).write(at(index), &[7; 4096]).unwrap());
    let before = allocated(&here);
    let moving = stage.migrate("src", destination.address(), &["--verify", "--downtime-max", "1s"]);
    source.wait_held("switchover");
    assert_eq!(
        allocated(&here),
        before,
        "what the guest never touched is not allocated by a look at it"
    );
    // 0 and 1 stay. 2 to 5 are taken away, and 4 and 5 are read again: there are pages of zeros
    // then.
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&here, punch, at(2) as u64, 4 * page_bytes).unwrap();
    (4..6).for_each(|index| assert!(map(&here).is_zero(at(index), 4096).unwrap()));
    stage.release();
    let ended = moving.end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    let arrived = map(&there);
    let mut page = [1; 4096];
    for index in 0..8 {
        let wanted = if (2..6).contains(&index) { 0 } else { 7 };
        arrived.read(at(index), &mut page).unwrap();
        assert!(page == [wanted; 4096], "page {index} of the eight begins with {}", page[0]);
    }
    assert!(allocated(&there) <= before + 2, "{} of {before}", allocated(&there));
}

#[test]
fn what_a_balloon_takes_away_reads_as_zeros_at_the_destination() {
    taken_away_while_it_moves("", 4096);
}

#[test]
fn what_a_balloon_takes_away_in_huge_pages_reads_as_zeros_at_the_destination() {
    const NAME: &str = "what_a_balloon_takes_away_in_huge_pages_reads_as_zeros_at_the_destination";
    match HugePages::reserve(64 + 4) {
        Ok(_reserved) => taken_away_while_it_moves(",hugetlb=on,hugetlbsize=2M", 2 << 20),
        Err(why) => not_run(NAME, &why),
    }
}

/// The kernel would disarm all of memory in one call when the last descriptor is closed. So
/// somebody who outlives the supervisor holds one.
#[test]
fn memory_is_disarmed_by_the_guardian_when_the_supervisor_is_killed() {
    use pageferry_tests::eventually;
    use pageferry_tests::look::tracked_mappings;
    use pageferry_tests::stage::BARE;
    let stage = Stage::new();
    let mut source = stage.run("src", BARE, "rounds");
    let destination = stage.receive("dst", BARE, "");
    let qemu = source.qemu();
    let _moving = stage.migrate("src", destination.address(), &[]);
    source.wait_held("rounds");
    assert!(tracked_mappings(qemu) > 0);
    let guardians = source.guardians();
    assert_eq!(guardians.len(), 1, "before memory is armed");
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", guardians[0])).unwrap();
    let held = descriptors.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    assert_eq!(held.filter(|link| link.to_string_lossy().contains("userfaultfd")).count(), 1);
    source.kill();
    eventually("the guardian disarms", SOON, || (tracked_mappings(qemu) == 0).then_some(()));
    eventually("the guardian ends", SOON, || source.guardians().is_empty().then_some(()));
    assert!(source.guest_runs());
}
