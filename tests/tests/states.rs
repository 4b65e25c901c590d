//! A guest that QEMU stopped, for an error of its disk or one of its own, is moved as what it is:
//! the destination ends in the same state, and the guest runs again when somebody says so there.

use pageferry::supervisor::api::State;
use pageferry_tests::look;
use pageferry_tests::stage::{BARE, Stage, Supervisor};
use pageferry_tests::{SOON, eventually};
use rustix::process::Signal;
use serde_json::{Value, json};

fn ask(supervisor: &Supervisor, command: &str, arguments: Value) -> Value {
    look::ask(&supervisor.monitor, command, arguments)
        .unwrap_or_else(|| panic!("{command} is refused"))
}

/// Writes to a port of the guest's, as its driver would.
fn out(supervisor: &Supervisor, size: &str, port: u32, value: u32) {
    let line = format!("o /{size} {port:#x} {value:#x}");
    ask(supervisor, "human-monitor-command", json!({ "command-line": line }));
}

fn wait_state(supervisor: &Supervisor, state: &str) {
    eventually(&format!("{} is in the state {state}", supervisor.name), SOON, || {
        (supervisor.guest_state().as_deref() == Some(state)).then_some(())
    });
}

/// Moves a guest that is in this state already; returns the destination, where it is in it too.
fn moved(stage: &Stage, source: &mut Supervisor, qemu: &str, state: &str) -> Supervisor {
    wait_state(source, state);
    let destination = stage.receive("dst", qemu, "");
    let ended = stage.migrate("src", destination.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_eq!(source.end(), Some(0));
    assert_eq!(destination.guest_state().as_deref(), Some(state));
    destination
}

#[test]
fn a_guest_that_stopped_for_its_disk_is_stopped_at_the_destination_and_goes_on_there() {
    let stage = Stage::new();
    // The firmware reads the first sector to boot from it; every read of this one fails.
    let disk = "-device virtio-blk-pci,drive=d,rerror=stop,bootindex=0";
    let broken = format!(
        "{BARE} -blockdev driver=blkdebug,node-name=d,image.driver=null-co,image.read-zeroes=on,inject-error.0.event=none,\
         inject-error.0.iotype=read,inject-error.0.errno=5 {disk}"
    );
    let healthy = format!("{BARE} -blockdev driver=null-co,node-name=d,read-zeroes=on {disk}");
    let mut source = stage.run("src", &broken, "");
    let destination = moved(&stage, &mut source, &healthy, "io-error");
    // The read that failed is tried again, on a disk that is well.
    ask(&destination, "cont", json!({}));
    destination.wait_guest_runs();
    eventually("the guest reads its disk", SOON, || {
        let stats = look::ask(&destination.monitor, "query-blockstats", json!({}))?;
        (stats[0]["stats"]["rd_operations"].as_u64()? > 0).then_some(())
    });
    assert!(destination.guest_runs(), "and does not stop again");
}

#[test]
fn a_guest_that_stopped_for_its_disk_stays_stopped_if_its_move_is_aborted() {
    let stage = Stage::new();
    let broken = format!(
        "{BARE} -blockdev driver=blkdebug,node-name=d,image.driver=null-co,image.read-zeroes=on,inject-error.0.event=none,\
         inject-error.0.iotype=read,inject-error.0.errno=5 -device virtio-blk-pci,drive=d,rerror=stop,bootindex=0"
    );
    let source = stage.run("src", &broken, "");
    wait_state(&source, "io-error");
    let mut doomed = stage.receive("doomed", &broken, "loaded");
    let moving = stage.migrate("src", doomed.address(), &[]);
    doomed.wait_held("loaded");
    doomed.kill();
    let ended = moving.end(SOON);
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    assert!(!source.guest_runs(), "{:?}", source.guest_state());
    // Its state was saved, and QEMU moves no such guest again before it has run. That is said
    // before anything is touched.
    let destination = stage.receive("dst", &broken, "");
    let ended = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("`cont`"), "{}", ended.stderr);
    // And it goes on here when somebody says so: to the next read that fails.
    ask(&source, "cont", json!({}));
    wait_state(&source, "io-error");
    let ended = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_eq!(destination.guest_state().as_deref(), Some("io-error"));
}

/// A guest that can stop in each of these ways.
fn stoppable() -> String {
    format!("{BARE} -device pvpanic -action panic=pause,shutdown=pause")
}

/// Brings such a guest, which runs, into this state.
fn bring_to(source: &Supervisor, state: &str) {
    match state {
        "paused" => drop(ask(source, "stop", json!({}))),
        "guest-panicked" => out(source, "b", 0x505, 1),
        _ => eventually("the guest has shut down", SOON, || {
            out(source, "w", 0x604, 0x2000);
            (source.guest_state().as_deref() == Some("shutdown")).then_some(())
        }),
    }
    wait_state(source, state);
}

const STOPPED: [&str; 3] = ["paused", "guest-panicked", "shutdown"];

#[test]
fn a_guest_that_stops_at_the_moment_of_the_switchover_stays_stopped_and_is_moved_so() {
    for state in STOPPED {
        let stage = Stage::new();
        let mut source = stage.run("src", &stoppable(), "pausing");
        source.wait_guest_runs();
        let destination = stage.receive("dst", &stoppable(), "");
        let moving = stage.migrate("src", destination.address(), &[]);
        source.wait_held("pausing");
        bring_to(&source, state);
        stage.release();
        let ended = moving.end(SOON);
        assert_eq!(ended.status, Some(1), "{state}: {}", ended.stderr);
        assert!(ended.stderr.contains("at the moment of the switchover"), "{}", ended.stderr);
        assert_eq!(source.guest_state().as_deref(), Some(state));
        destination.wait_state(State::Waiting);
        let ended = stage.migrate("src", destination.address(), &["--verify"]).end(SOON);
        assert_eq!(ended.status, Some(0), "{state}: {}", ended.stderr);
        assert_eq!(source.end(), Some(0));
        assert_eq!(destination.guest_state().as_deref(), Some(state));
    }
}

/// Whoever takes a guest back after its state was saved, in which QEMU forgets why it did not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TakenBack {
    BySupervisor,
    ByGuardian,
    OnAbortAfterCommit,
}

#[test]
fn a_guest_that_did_not_run_is_not_let_run_when_it_is_taken_back() {
    for state in STOPPED {
        for how in [TakenBack::BySupervisor, TakenBack::ByGuardian, TakenBack::OnAbortAfterCommit] {
            let stage = Stage::new();
            let mut source = stage.run("src", &stoppable(), "");
            source.wait_guest_runs();
            bring_to(&source, state);
            let point = if how == TakenBack::OnAbortAfterCommit { "owner" } else { "loaded" };
            let mut destination = stage.receive("dst", &stoppable(), point);
            let copy = destination.qemu();
            let mut moving = stage.migrate("src", destination.address(), &[]);
            destination.wait_held(point);
            assert_eq!(
                source.guest_state().as_deref(),
                Some("postmigrate"),
                "it was saved, or nothing is shown"
            );
            match how {
                TakenBack::BySupervisor => destination.kill(),
                TakenBack::ByGuardian => source.kill(),
                TakenBack::OnAbortAfterCommit => {
                    look::signal(copy, Signal::KILL);
                    look::wait_gone(copy);
                }
            }
            stage.release();
            let ended = eventually("the move ends", SOON, || {
                assert!(!source.guest_runs(), "{state}, {how:?}");
                moving.try_end()
            });
            let status = if how == TakenBack::ByGuardian { 3 } else { 1 };
            assert_eq!(ended.status, Some(status), "{state}, {how:?}: {}", ended.stderr);
            eventually("the guardian has put right what was to be", SOON, || {
                assert!(!source.guest_runs(), "{state}, {how:?}");
                source.guardians().is_empty().then_some(())
            });
            assert_eq!(source.guest_state().as_deref(), Some("postmigrate"), "{state}, {how:?}");
        }
    }
}

#[test]
fn a_guest_that_panicked_is_moved_panicked() {
    let stage = Stage::new();
    let qemu = format!("{BARE} -device pvpanic -action panic=pause");
    let mut source = stage.run("src", &qemu, "");
    source.wait_guest_runs();
    // Bit 0 at its port: panicked (QEMU, docs/specs/pvpanic.rst).
    out(&source, "b", 0x505, 1);
    let destination = moved(&stage, &mut source, &qemu, "guest-panicked");
    ask(&destination, "system_reset", json!({}));
    ask(&destination, "cont", json!({}));
    destination.wait_guest_runs();
}

#[test]
fn a_guest_that_shut_down_is_moved_shut_down() {
    let stage = Stage::new();
    let qemu = format!("{BARE} -action shutdown=pause");
    let mut source = stage.run("src", &qemu, "");
    source.wait_guest_runs();
    // Where q35's firmware puts the PM1 control register, once it has come so far; SLP_EN is its
    // bit 13.
    eventually("the guest has shut down", SOON, || {
        out(&source, "w", 0x604, 0x2000);
        (source.guest_state().as_deref() == Some("shutdown")).then_some(())
    });
    let destination = moved(&stage, &mut source, &qemu, "shutdown");
    assert!(
        look::ask(&destination.monitor, "cont", json!({})).is_none(),
        "a guest that has shut down goes on after a reset only"
    );
    ask(&destination, "system_reset", json!({}));
    ask(&destination, "cont", json!({}));
    destination.wait_guest_runs();
}

#[test]
fn a_guest_that_its_watchdog_stopped_is_moved_stopped() {
    let stage = Stage::new();
    let qemu = format!("{BARE} -device ib700 -action watchdog=pause");
    let mut source = stage.run("src", &qemu, "");
    source.wait_guest_runs();
    // The shortest time-out: no seconds at all (Linux, drivers/watchdog/ib700wdt.c).
    out(&source, "b", 0x443, 0xf);
    let destination = moved(&stage, &mut source, &qemu, "watchdog");
    ask(&destination, "cont", json!({}));
    destination.wait_guest_runs();
}
