//! A Linux guest that reads and writes a disk of QEMU's, opened past the host's page cache, without a pause and
//! with many transfers under way, and checks every sector: moved many times, the image shared by both sides.
//! A page that a transfer filled while a move read it would show as what was there before (bench/workload,
//! disk.rs).

use pageferry_tests::console::{Console, Linux};
use pageferry_tests::not_run;
use pageferry_tests::stage::{Stage, Supervisor};
use pageferry_workload::disk::write_image;
use rustix::fs::{Mode, OFlags, open};
use std::path::Path;
use std::time::Duration;

const GUEST: Linux = Linux { memory_mib: 256, written_mib: 8, touched_mib: 16, rate: 20 };
/// Threads of the guest that do I/O, and the size of the disk.
const DISK_THREADS: &str = "pf.disk=8";
const DISK_MIB: u32 = 256;
/// One move, also on a machine that is busy with other things.
const MOVE_MAX: Duration = Duration::from_secs(120);
const MOVES: u32 = 6;

/// The guest's command with the disk; a directory that cannot do direct I/O has no such guest.
fn qemu(stage: &Stage, name: &str, image: &Path, aio: &str) -> String {
    let image = image.display();
    let drive = format!(
        "-drive if=none,id=disk,file={image},format=raw,cache=none,aio={aio} -device virtio-blk-pci,drive=disk"
    );
    GUEST.qemu_with(stage, name, DISK_THREADS, &drive)
}

fn image(directory: &Path, test: &str) -> Option<std::path::PathBuf> {
    let image = directory.join("disk.raw");
    write_image(&image, DISK_MIB).unwrap();
    if open(&image, OFlags::RDONLY | OFlags::DIRECT, Mode::empty()).is_err() {
        not_run(test, "the file system of the build directory has no O_DIRECT");
        return None;
    }
    Some(image)
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

fn moves(test: &str, aio: &str) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Some(image) = image(directory.path(), test) else { return };
    let stage = Stage::new();
    let mut here: Supervisor = stage.run("vm0", &qemu(&stage, "vm0", &image, aio), "");
    let mut console = Console::open(&stage, "vm0");
    console.wait_ready();
    let mut done = disk_since(&console, (0, 0));
    for index in 1..=MOVES {
        let name = format!("vm{index}");
        let there = stage.receive(&name, &qemu(&stage, &name, &image, aio), "");
        let next = Console::open(&stage, &name);
        let more = ["--downtime-max", "300ms", "--when-stuck", "switchover"];
        let ended = stage.migrate(&here.name, there.address(), &more).end(MOVE_MAX);
        assert_eq!(ended.status, Some(0), "move {index}: {}", ended.stderr);
        assert_eq!(here.end(), Some(0));
        (here, console) = (there, next);
        done = disk_since(&console, done);
        println!("move {index}: {done:?} pages read and written");
    }
    console.verdict();
}

#[test]
fn a_disk_read_and_written_by_threads_past_the_page_cache_is_moved_along() {
    moves("a_disk_read_and_written_by_threads_past_the_page_cache_is_moved_along", "threads");
}
