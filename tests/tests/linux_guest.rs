//! A real Linux guest that checks every value of its memory (docs/guest.md): moved many times, and
//! through failed attempts.

use pageferry::supervisor::api::State;
use pageferry_tests::huge_pages::HugePages;
use pageferry_tests::linux::Linux;
use pageferry_tests::look::{self, memory_file, tracked_mappings};
use pageferry_tests::proxy::{Proxy, Which};
use pageferry_tests::stage::Stage;
use pageferry_tests::{SOON, eventually, not_run};
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

const GUEST: Linux = Linux { memory_mib: 256, written_mib: 32, touched_mib: 64, rate: 40 };
/// One move, also on a machine that is busy with other things.
const MOVE_MAX: Duration = Duration::from_secs(120);
const MOVES: u32 = 20;

#[test]
fn twenty_moves_back_and_forth_lose_nothing() {
    let stage = Stage::new();
    let mut here = stage.run("vm0", &GUEST.qemu(&stage, "vm0"), "");
    let mut console = stage.console("vm0");
    console.wait_ready();
    let mut written = console.progress_since(0);
    for index in 1..=MOVES {
        let name = format!("vm{index}");
        let there = stage.receive(&name, &GUEST.qemu(&stage, &name), "");
        let next = stage.console(&name);
        let mut more = vec!["--downtime-max", "300ms", "--when-stuck", "switchover"];
        if index == MOVES / 2 {
            more.push("--verify");
        }
        let ended = stage.migrate(&here.name, there.address(), &more).end(MOVE_MAX);
        assert_eq!(ended.status, Some(0), "move {index}: {}", ended.stderr);
        assert_eq!(here.end(), Some(0));
        assert_eq!(ended.stdout.contains("\"verified\": true"), index == MOVES / 2);
        (here, console) = (there, next);
        written = console.progress_since(written);
    }
    console.verdict();
}

#[test]
fn failed_attempts_of_all_kinds_lose_nothing_and_the_guest_writes_on() {
    let stage = Stage::new();
    let mut source = stage.run("src", &GUEST.qemu(&stage, "src"), "switchover");
    let mut console = stage.console("src");
    console.wait_ready();
    let qemu = source.qemu();
    let destination = stage.receive("dst", &GUEST.qemu(&stage, "dst"), "");
    let proxy = Proxy::to(destination.address());
    let mut written = console.progress_since(0);
    let mut goes_on = |what: &str| {
        written = console.progress_since(written);
        assert_eq!(tracked_mappings(qemu), 0, "after {what}");
        destination.wait_state(State::Waiting);
        assert!(!destination.guest_runs(), "after {what}");
    };
    let slow = ["--bandwidth-max", "20MB"];

    let cut = stage.migrate("src", proxy.address, &slow);
    cut.stderr.wait("round 0", SOON);
    assert!(proxy.cut(Which::Lanes) > 0, "a lane was cut");
    assert_eq!(cut.end(SOON).status, Some(1));
    goes_on("a lane was cut");

    let cut = stage.migrate("src", proxy.address, &slow);
    cut.stderr.wait("round 0", SOON);
    assert_eq!(proxy.cut(Which::Control), 1);
    assert_eq!(cut.end(SOON).status, Some(1));
    goes_on("the control connection was cut");

    let cancelled = stage.migrate("src", proxy.address, &slow);
    cancelled.stderr.wait("round 0", SOON);
    assert_eq!(stage.done(&["cancel", "src"]).status, Some(0));
    assert_eq!(cancelled.end(SOON).status, Some(1));
    goes_on("a cancel");

    let stopped = stage.migrate("src", proxy.address, &[]);
    source.words.wait("held at switchover", SOON);
    assert!(!source.guest_runs(), "it is paused for the switchover");
    source.kill();
    assert_eq!(stopped.end(SOON).status, Some(3));
    source.wait_guest_runs();
    goes_on("the supervisor was killed in the downtime");

    let mut source = stage.attach("src", &[]);
    let next = stage.console("dst");
    let ended = stage.migrate("src", destination.address(), &["--verify"]).end(MOVE_MAX);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_eq!(source.end(), Some(0));
    console = next;
    console.progress_since(written);
    console.verdict();
}

#[test]
fn a_guest_that_writes_too_fast_stays_unless_the_user_lets_it_go() {
    let stage = Stage::new();
    let guest = Linux { memory_mib: 256, written_mib: 64, touched_mib: 0, rate: 0 };
    let source = stage.run("src", &guest.qemu(&stage, "src"), "");
    let console = stage.console("src");
    console.wait_ready();
    let destination = stage.receive("dst", &guest.qemu(&stage, "dst"), "");
    let slow = ["--downtime-max", "200ms", "--bandwidth-max", "100MB"];
    let ended = stage.migrate("src", destination.address(), &slow).end(MOVE_MAX);
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    for text in ["as fast as the link carries it", "--downtime-max", "--when-stuck switchover"] {
        assert!(ended.stderr.contains(text), "{}", ended.stderr);
    }
    assert!(source.guest_runs());
    assert_eq!(tracked_mappings(source.qemu()), 0);
    let written = console.progress_since(0);

    destination.wait_state(State::Waiting);
    let mut next = stage.console("dst");
    let all_the_same = [&slow[..], &["--when-stuck", "switchover"]].concat();
    let ended = stage.migrate("src", destination.address(), &all_the_same).end(MOVE_MAX);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    next.progress_since(written);
    next.verdict();
}

/// The guest gives back what it does not use, and more of it while it moves: QEMU punches holes
/// into its memory, of which no dirty source hears. 128 huge pages at either end.
#[test]
fn a_guest_in_huge_pages_moves_while_it_gives_memory_back() {
    const NAME: &str = "a_guest_in_huge_pages_moves_while_it_gives_memory_back";
    const HUGE: u64 = 2 << 20;
    let _reserved = match HugePages::reserve(2 * 128 + 4) {
        Ok(reserved) => reserved,
        Err(why) => return not_run(NAME, &why),
    };
    let stage = Stage::new();
    let options = "-machine memory-backend=h -object memory-backend-memfd,id=h,size=256M,hugetlb=on,hugetlbsize=2M \
                   -device virtio-balloon-pci,free-page-reporting=on";
    let guest = Linux { touched_mib: 32, rate: 20, ..GUEST };
    let qemu = |name: &str| guest.qemu_with(&stage, name, "guest_balloon=1", options);
    let mut source = stage.run("src", &qemu("src"), "");
    let here = memory_file(source.qemu(), 256 << 20);
    let allocated = |file: &File| file.metadata().unwrap().blocks() * 512 / HUGE;
    let console = stage.console("src");
    console.wait_ready();
    // The kernel reports two seconds after it has so much to report.
    let before = eventually("free pages are reported", SOON, || {
        Some(allocated(&here)).filter(|count| *count < 100)
    });
    let destination = stage.receive("dst", &qemu("dst"), "");
    let there = memory_file(destination.qemu(), 256 << 20);
    let mut next = stage.console("dst");
    let written = console.progress_since(0);
    // Slowly, so that the balloon grows under it: down to 160 MiB.
    let options = ["--bandwidth-max", "60MB", "--downtime-max", "2s", "--verify"];
    let moving = stage.migrate("src", destination.address(), &options);
    moving.stderr.wait("round 0", SOON);
    look::ask(&source.monitor, "balloon", json!({ "value": 160 << 20 }))
        .expect("QEMU asks the guest");
    let ended = moving.end(MOVE_MAX);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    // A kernel that fills what it allocates touches memory for the balloon first.
    let most = before.max(allocated(&here)) + 16;
    assert!(allocated(&there) <= most, "{} of {most}", allocated(&there));
    assert_eq!(source.end(), Some(0));
    next.progress_since(written);
    next.verdict();
}
