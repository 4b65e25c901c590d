//! Memory that the kernel itself took out of use (`MADV_HWPOISON`), as it does when hardware
//! reports a lost page. The lab machine's kernel can; others that lack it have stand-ins in
//! `lost_memory`.

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
use pageferry_tests::{SOON, refuse_outside_the_lab};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Instant;

const GUEST: SyntheticOptions = SyntheticOptions {
    pages: 4096,
    touched_pages: 2048,
    threads: 1,
    pages_per_second: Some(500),
    seed: 20_261_129,
    discards: false,
};

/// Not written by the guest's threads, which would end this process with the page.
const LOST: u64 = 3000;

/// Maps a page of a file and has the kernel lose it; the kernel may end this process for it.
const LOSE: &str = r"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
int main(int n, char **args) {
    int file = open(args[1], O_RDWR);
    char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, atol(args[2]));
    if (file < 0 || page == MAP_FAILED) return perror(args[1]), 3;
    volatile char touched = *page;
    (void)touched;
    if (madvise(page, 4096, 100)) return perror(`MADV_HWPOISON`), 4;
    return 0;
}
";

fn attempt(
    guest: &mut SyntheticSource,
    poisoned: Poisoned,
) -> (MigrationReport, SyntheticDestination) {
    let listener = SessionListener::open("127.0.0.1:0".parse().unwrap()).unwrap();
    let mut options = MigrateOptions::to(listener.address.to_string());
    (options.poisoned, options.verify, options.downtime_us_max) = (poisoned, true, 5_000_000);
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

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_page_that_the_kernel_took_out_of_use_ends_nobody_and_moves_as_zeros() {
    refuse_outside_the_lab();
    let directory = tempfile::tempdir().unwrap();
    let (source, program) = (directory.path().join("lose.c"), directory.path().join("lose"));
    std::fs::write(&source, LOSE.replace('`', "\"")).unwrap();
    let built = Command::new("cc").arg("-o").arg(&program).arg(&source).status().expect("cc runs");
    assert!(built.success());

    let mut guest = SyntheticSource::start(GUEST).unwrap();
    for page in [LOST - 1, LOST, LOST + 1] {
        let region = guest.memory().slots()[0].region();
        region.write((page * PAGE_BYTES) as usize, &[7; PAGE_BYTES as usize]).unwrap();
    }
    let file = guest.memory().slots()[0].file().unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let lost =
        Command::new(&program).arg(path).arg((LOST * PAGE_BYTES).to_string()).output().unwrap();
    // No status: the kernel ended it for touching the page, which is lost all the same.
    assert!(matches!(lost.status.code(), None | Some(0)), "{lost:?}");

    for _ in 0..2 {
        let (report, _) = attempt(&mut guest, Poisoned::Refuse);
        let reason = report.reason.unwrap_or_default();
        assert!(
            report.outcome == Outcome::Aborted && reason.contains("synthetic at 0xbb8000"),
            "{reason}"
        );
        guest.check().unwrap();
    }
    let (report, destination) = attempt(&mut guest, Poisoned::Zero);
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.reason);
    assert_eq!(report.lost_pages.len(), 1);
    for (page, value) in [(LOST - 1, 7), (LOST, 0), (LOST + 1, 7)] {
        let mut bytes = [1; PAGE_BYTES as usize];
        let region = destination.memory().slots()[0].region();
        region.read((page * PAGE_BYTES) as usize, &mut bytes).unwrap();
        assert_eq!(bytes, [value; PAGE_BYTES as usize], "page {page}");
    }
    destination.into_source().expect("it runs there").check().unwrap();
}
