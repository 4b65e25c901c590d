//! A Linux guest that reads and writes a disk of QEMU's, opened past the host's page cache, without
//! a pause and with many transfers under way, and checks every sector: moved many times, the image
//! shared by both sides. A page that a transfer filled while a move read it would show as what was
//! there before (bench/workload, disk.rs). So that transfers are under way for long, the disk is
//! slowed down below QEMU where this host can do that: without the drain between sync and read,
//! pages are then lost in nearly every move.

use pageferry_tests::console::Console;
use pageferry_tests::linux::Linux;
use pageferry_tests::not_run;
use pageferry_tests::stage::Stage;
use pageferry_tests::throttle::Throttle;
use pageferry_workload::disk::write_image;
use rustix::fs::{Mode, OFlags, open};
use std::path::PathBuf;
use std::time::Duration;

const GUEST: Linux = Linux { memory_mib: 256, written_mib: 8, touched_mib: 16, rate: 20 };
/// Threads of the guest that do I/O, and the size of the disk.
const DISK_THREADS: &str = "pf.disk=8";
const DISK_MIB: u32 = 256;
/// One move, also on a machine that is busy with other things.
const MOVE_MAX: Duration = Duration::from_secs(120);
const MOVES: u32 = 6;
/// Two MiB are under way at any time, so that each transfer takes an eighth of a second.
const DISK_BYTES_PER_SECOND: u64 = 16 << 20;

/// A disk, and everything that uses it.
struct TestBed {
    // Dropped in this order: processes, their control group, the image.
    stage: Stage,
    _throttle: Option<Throttle>,
    _directory: tempfile::TempDir,
    image: PathBuf,
}

impl TestBed {
    /// None where it cannot be.
    fn new(test: &str) -> Option<Self> {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = directory.path().join("disk.raw");
        write_image(&image, DISK_MIB).unwrap();
        if open(&image, OFlags::RDONLY | OFlags::DIRECT, Mode::empty()).is_err() {
            not_run(test, "the file system of the build directory has no O_DIRECT");
            return None;
        }
        let throttle = Throttle::of(&image, DISK_BYTES_PER_SECOND);
        if let Err(why) = &throttle {
            not_run(
                "a disk that is slow",
                &format!("{test} ran on a disk so quick that it may hide a loss: {why}"),
            );
        }
        let throttle = throttle.ok();
        let stage = Stage::new();
        let stage = match &throttle {
            Some(throttle) => stage.behind(&throttle.enter()),
            None => stage,
        };
        Some(Self { stage, _throttle: throttle, _directory: directory, image })
    }

    fn qemu(&self, name: &str) -> String {
        let drive = format!(
            "-drive if=none,id=disk,file={},format=raw,cache=none,aio=threads -device virtio-blk-pci,drive=disk",
            self.image.display()
        );
        GUEST.qemu_with(&self.stage, name, DISK_THREADS, &drive)
    }
}

/// Waits until the guest has read and written its disk since `before`.
fn disk_since(console: &Console, before: (u64, u64)) -> (u64, u64) {
    loop {
        let now = console.disk_pages();
        assert!(now.0 >= before.0 && now.1 >= before.1, "{before:?}, then {now:?}");
        if now.0 > before.0 && now.1 > before.1 {
            return now;
        }
    }
}

const MOVING: [&str; 4] = ["--downtime-max", "300ms", "--when-stuck", "switchover"];

#[test]
fn a_disk_past_the_page_cache_is_moved_along() {
    let Some(bed) = TestBed::new("a_disk_past_the_page_cache_is_moved_along") else { return };
    let stage = &bed.stage;
    let mut here = stage.run("vm0", &bed.qemu("vm0"), "");
    let mut console = stage.console("vm0");
    console.wait_ready();
    let mut done = disk_since(&console, (0, 0));
    for index in 1..=MOVES {
        let name = format!("vm{index}");
        let there = stage.receive(&name, &bed.qemu(&name), "");
        let next = stage.console(&name);
        let ended = stage.migrate(&here.name, there.address(), &MOVING).end(MOVE_MAX);
        assert_eq!(ended.status, Some(0), "move {index}: {}", ended.stderr);
        assert_eq!(here.end(), Some(0));
        (here, console) = (there, next);
        println!("move {index} after {done:?} pages read and written");
        // All of its memory, at once: a slot that is used anew would hide what it lost.
        console.verdict();
        done = disk_since(&console, done);
    }
}

#[test]
fn a_disk_goes_on_at_the_source_when_the_destination_dies_with_the_state_loaded() {
    let name = "a_disk_goes_on_at_the_source_when_the_destination_dies_with_the_state_loaded";
    let Some(bed) = TestBed::new(name) else { return };
    let stage = &bed.stage;
    let mut source = stage.run("src", &bed.qemu("src"), "");
    let mut console = stage.console("src");
    console.wait_ready();
    let done = disk_since(&console, (0, 0));
    let mut doomed = stage.receive("doomed", &bed.qemu("doomed"), "loaded");
    let moving = stage.migrate("src", doomed.address(), &MOVING);
    doomed.wait_held("loaded");
    // The source has saved its state and given the image up.
    doomed.kill();
    assert_eq!(moving.end(MOVE_MAX).status, Some(1));
    console.verdict();
    let done = disk_since(&console, done);

    let destination = stage.receive("dst", &bed.qemu("dst"), "");
    let next = stage.console("dst");
    let ended = stage.migrate("src", destination.address(), &MOVING).end(MOVE_MAX);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_eq!(source.end(), Some(0));
    console = next;
    console.verdict();
    disk_since(&console, done);
}
