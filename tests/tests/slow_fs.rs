//! Disks on file systems that pin memory for a plain read, or that may: whatever QEMU was told
//! about its cache, transfers are drained between a sync and the read of its pages. A file system
//! in user space plays such a one (`SlowFs`).

use pageferry::supervisor::api::State;
use pageferry_qemu::qmp::Qmp;
use pageferry_tests::linux::Linux;
use pageferry_tests::slow_fs::SlowFs;
use pageferry_tests::stage::{BARE, Stage, Supervisor};
use pageferry_tests::words::Words;
use pageferry_tests::{SOON, not_run};
use pageferry_workload::disk::write_image;
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const GUEST: Linux = Linux { memory_mib: 256, written_mib: 4, touched_mib: 8, rate: 10 };
const DISK_MIB: u32 = 64;
/// So long is a read under way: much longer than a sync and the copy of its pages.
const SLOW: Duration = Duration::from_millis(60);
const MOVE_MAX: Duration = Duration::from_secs(120);
const MOVING: [&str; 4] = ["--downtime-max", "300ms", "--when-stuck", "switchover"];

/// One image, shown by two slow file systems: one pins the memory of a plain read, one copies.
/// Dropped in this order: processes, mounts, image.
struct Disk {
    stage: Stage,
    pinning: SlowFs,
    copying: SlowFs,
    _directory: tempfile::TempDir,
}

impl Disk {
    /// None where it cannot be.
    fn new(test: &str, delay: Duration) -> Option<Self> {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = directory.path().join("disk.raw");
        write_image(&image, DISK_MIB).unwrap();
        match (SlowFs::over(&image, true, delay), SlowFs::over(&image, false, delay)) {
            (Ok(pinning), Ok(copying)) => {
                Some(Self { stage: Stage::new(), pinning, copying, _directory: directory })
            }
            (Err(why), _) | (_, Err(why)) => {
                not_run(test, &why);
                None
            }
        }
    }
}

/// With QEMU's default cache the first of these pins, and on a code that asks QEMU's flags alone it
/// loses pages.
#[test]
fn a_disk_on_a_slow_file_system_is_moved_along_whatever_becomes_of_its_reads() {
    let test = "a_disk_on_a_slow_file_system_is_moved_along_whatever_becomes_of_its_reads";
    let Some(disk) = Disk::new(test, SLOW) else { return };
    let stage = &disk.stage;
    let qemu = |name: &str, on: &SlowFs, cache: &str| {
        let image = on.path();
        let drive = format!(
            "if=none,id=disk,file={},format=raw,cache={cache},aio=threads",
            image.display()
        );
        GUEST.qemu_with(
            stage,
            name,
            "pf.disk=4",
            &format!("-drive {drive} -device virtio-blk-pci,drive=disk"),
        )
    };
    let mut here = stage.run("vm0", &qemu("vm0", &disk.pinning, "writeback"), "");
    let mut console = stage.console("vm0");
    console.wait_ready();
    // Through the page cache, then past it, and away from there.
    let ways = [("vm1", "writeback"), ("vm2", "none"), ("vm3", "writeback")];
    for (name, cache) in ways {
        let there = stage.receive(name, &qemu(name, &disk.copying, cache), "");
        let next = stage.console(name);
        // Its disk is busy here.
        let before = console.disk_pages().0;
        while console.disk_pages().0 <= before {}
        let ended = stage.migrate(&here.name, there.address(), &MOVING).end(MOVE_MAX);
        assert_eq!(ended.status, Some(0), "to {name}: {}", ended.stderr);
        assert_eq!(here.end(), Some(0));
        (here, console) = (there, next);
        // All of its memory, at once: a slot that is used anew would hide what it lost.
        console.verdict();
    }
}

/// Everything that a QEMU's monitor says from now on.
fn heard(source: &Supervisor) -> Words {
    let mut monitor = UnixStream::connect(&source.monitor).unwrap();
    let words = Words::of(monitor.try_clone().unwrap());
    monitor.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
    words.wait("\"return\"", SOON);
    words
}

/// Moves an idle guest to a QEMU with these options. Returns how often it was stopped meanwhile,
/// and where it is.
fn stops(stage: &Stage, mut source: Supervisor, to: &str, options: &str) -> (usize, Supervisor) {
    source.wait_guest_runs();
    let words = heard(&source);
    let destination = stage.receive(to, &format!("{BARE} {options}"), "");
    let ended = stage.migrate(&source.name, destination.address(), &[]).end(SOON);
    assert_eq!(ended.status, Some(0), "from {}: {}", source.name, ended.stderr);
    assert_eq!(source.end(), Some(0));
    destination.wait_state(State::Hosting);
    (words.all(SOON).matches("\"event\": \"STOP\"").count(), destination)
}

#[test]
fn transfers_are_drained_unless_every_open_image_is_known_to_be_copied() {
    let test = "transfers_are_drained_unless_every_open_image_is_known_to_be_copied";
    let Some(disk) = Disk::new(test, Duration::ZERO) else { return };
    let stage = &disk.stage;
    // The target directory may lie on anything, also on an overlayfs.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let here = directory.path().join("here.raw");
    std::fs::write(&here, vec![0; 1 << 20]).unwrap();
    let plain =
        |path: &Path| format!("-blockdev driver=file,node-name=d,filename={}", path.display());
    // One guest goes from disk to disk: that of the QEMU which it leaves decides.
    let first = stage.run("copied", &format!("{BARE} {}", plain(&here)), "");
    let (stopped, at) = stops(stage, first, "slow", &plain(&disk.copying.path()));
    // Once, for the switchover.
    assert_eq!(stopped, 1);
    let drained = |at: Supervisor, to: &str, options: &str| {
        let name = at.name.clone();
        let (stopped, at) = stops(stage, at, to, options);
        assert!(stopped >= 3, "{name}: stopped {stopped} times");
        at
    };
    let at = drained(at, "direct", &format!("{},cache.direct=on", plain(&here)));
    let at = drained(at, "passed", "");
    // A descriptor that somebody passed in, and that no name leads to.
    let file = File::open(disk.copying.path()).unwrap();
    let deadline = Instant::now() + SOON;
    let mut qmp = Qmp::connect(&at.monitor, deadline).unwrap();
    qmp.execute_with_fd("add-fd", json!({ "fdset-id": 7 }), file.as_fd(), deadline).unwrap();
    drop(qmp);
    drained(at, "end", "");
}
