//! Another monitor of the same QEMU (libvirt, a script, a person) lets a guest run that must not,
//! or resets it, in each stage of a switchover. The guest runs at one place, and the operator hears
//! of it.

use pageferry::supervisor::api::State;
use pageferry_tests::look;
use pageferry_tests::stage::{BARE, Running, Stage, Supervisor};
use pageferry_tests::{SOON, eventually};
use rustix::process::Signal;
use serde_json::json;

/// A source and a destination, one of them held at this point of a migration that is under way.
fn held_at(point: &str) -> (Stage, Supervisor, Supervisor, Running) {
    let stage = Stage::new();
    let at_source = ["switchover", "committed"].contains(&point);
    let source = stage.run("src", BARE, if at_source { point } else { "" });
    let destination = stage.receive("dst", BARE, if at_source { "" } else { point });
    source.wait_guest_runs();
    let moving = stage.migrate("src", destination.address(), &[]);
    let held = if at_source { &source } else { &destination };
    held.wait_held(point);
    (stage, source, destination, moving)
}

/// Says something on the test's own monitor, which QEMU takes.
fn says(guest: &Supervisor, command: &str) {
    assert!(look::ask(&guest.monitor, command, json!({})).is_some(), "{command} was refused");
}

/// Waits until somebody has said this so many times.
fn wait_times(speaker: &Supervisor, text: &str, times: usize) {
    let mut mark = 0;
    for _ in 0..times {
        mark = speaker.words.wait_after(mark, text, SOON).1;
    }
}

/// Waits until a guest that another monitor let run is stopped.
fn wait_stopped(guest: &Supervisor) {
    eventually(&format!("the guest {} is stopped again", guest.name), SOON, || {
        // Not merely paused: its state says that it was given away, to whoever comes next.
        (guest.guest_state()? == "postmigrate").then_some(())
    });
}

/// The migration was aborted with this reason, the guest runs at the source, and can be moved.
fn check_aborted(
    stage: &Stage,
    source: &mut Supervisor,
    destination: &Supervisor,
    moving: Running,
    why: &str,
) {
    let ended = moving.end(SOON);
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("another monitor") && ended.stderr.contains(why),
        "{}",
        ended.stderr
    );
    source.wait_guest_runs();
    assert!(!destination.guest_runs());
    wait_times(destination, "waits for a guest on", 2);
    let again = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert_eq!(again.status, Some(0), "{}", again.stderr);
    assert_eq!(source.end(), Some(0));
    destination.wait_guest_runs();
}

#[test]
fn a_cont_in_the_switchover_aborts_it() {
    let (stage, mut source, destination, moving) = held_at("switchover");
    says(&source, "cont");
    source.wait_guest_runs();
    stage.release();
    check_aborted(&stage, &mut source, &destination, moving, "cont");
}

#[test]
fn a_reset_in_the_switchover_aborts_it() {
    let (stage, mut source, destination, moving) = held_at("switchover");
    says(&source, "system_reset");
    stage.release();
    check_aborted(&stage, &mut source, &destination, moving, "system_reset");
}

#[test]
fn a_cont_after_commit_is_undone_at_once() {
    let (stage, mut source, destination, moving) = held_at("committed");
    destination.wait_guest_runs();
    for times in 1..=2 {
        says(&source, "cont");
        wait_times(&source, "ANOTHER MONITOR", times);
        wait_stopped(&source);
    }
    assert!(destination.guest_runs());
    stage.release();
    let ended = moving.end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_eq!(source.end(), Some(0));
    assert!(destination.guest_runs());
}

#[test]
fn a_cont_after_the_death_of_a_supervisor_whose_commit_is_out_is_undone() {
    let (stage, mut source, destination, moving) = held_at("committed");
    destination.wait_guest_runs();
    let qemu = source.qemu();
    source.kill();
    drop(moving);
    source.words.wait("the guest stays stopped here", SOON);
    says(&source, "cont");
    wait_stopped(&source);
    // A new supervisor does the same, until somebody decides. Nobody is left who could tell it.
    let mut destination = destination;
    destination.kill();
    let mut source = stage.attach_in_doubt("src");
    source.words.wait("asking", SOON);
    source.wait_state(State::Unknown);
    says(&source, "cont");
    source.words.wait("ANOTHER MONITOR", SOON);
    wait_stopped(&source);
    let moved = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert_eq!(moved.status, Some(2), "{}", moved.stderr);
    assert!(moved.stderr.contains("in doubt"), "{}", moved.stderr);
    // A move that was refused has not ended the watch.
    says(&source, "cont");
    wait_stopped(&source);
    // Nor has the end of this supervisor, in order or not.
    for signal in [Signal::TERM, Signal::KILL] {
        source.signal(signal);
        source.words.wait("the guest stays stopped here", SOON);
        says(&source, "cont");
        wait_stopped(&source);
        source.kill();
        source = stage.attach_in_doubt("src");
        source.wait_state(State::Unknown);
    }
    assert_eq!(stage.done(&["settle", "src", "--end"]).status, Some(0));
    assert_eq!(source.end(), Some(0));
    look::wait_gone(qemu);
    assert!(destination.guest_runs());
}

#[test]
fn a_cont_at_the_destination_before_commit_ends_the_copy() {
    let (stage, mut source, destination, moving) = held_at("loaded");
    let copy = destination.qemu();
    // It may be gone before it has answered.
    let _ = look::ask(&destination.monitor, "cont", json!({}));
    look::wait_gone(copy);
    stage.release();
    check_aborted(&stage, &mut source, &destination, moving, "let it run");
}

/// What another tool may have left in a QEMU's migration settings.
fn leave_settings(guest: &Supervisor) -> serde_json::Value {
    let parameters = json!({ "tls-creds": "tls0", "mode": "cpr-reboot", "downtime-limit": 7 });
    let capabilities = json!([{ "capability": "multifd", "state": true }, { "capability": "return-path", "state": true }]);
    look::ask(&guest.monitor, "migrate-set-parameters", parameters).expect("QEMU takes them");
    look::ask(&guest.monitor, "migrate-set-capabilities", json!({ "capabilities": capabilities }))
        .expect("QEMU takes them");
    settings(guest)
}

fn settings(guest: &Supervisor) -> serde_json::Value {
    let ask = |command| look::ask(&guest.monitor, command, json!({})).expect("QEMU answers");
    json!([ask("query-migrate-parameters"), ask("query-migrate-capabilities")])
}

#[test]
fn migration_settings_of_another_tool_do_no_harm_and_are_put_back() {
    let stage = Stage::new();
    let mut source = stage.run("src", BARE, "switchover");
    source.wait_guest_runs();
    let left = leave_settings(&source);
    let receiver = format!("{BARE} -global migration.tls-creds=tls0");
    let destination = stage.receive("dst", &receiver, "");
    // Given up in the switchover: the guest runs here, with the settings that it had.
    let moving = stage.migrate("src", destination.address(), &[]);
    source.wait_held("switchover");
    assert_eq!(stage.done(&["cancel", "src"]).status, Some(0));
    stage.release();
    assert_eq!(moving.end(SOON).status, Some(1));
    source.wait_guest_runs();
    eventually("the settings are back", SOON, || (settings(&source) == left).then_some(()));
    // And then moved, to a receiver that has such settings too.
    wait_times(&destination, "waits for a guest on", 2);
    let moved = stage.migrate("src", destination.address(), &[]).end(SOON);
    assert_eq!(moved.status, Some(0), "{}", moved.stderr);
    assert_eq!(source.end(), Some(0));
    destination.wait_guest_runs();
    eventually("the receiver's settings are back", SOON, || {
        (settings(&destination)[0]["tls-creds"] == "tls0").then_some(())
    });
}

#[test]
fn a_reset_of_the_waiting_qemu_ends_the_copy() {
    let (stage, mut source, destination, moving) = held_at("filling");
    says(&destination, "system_reset");
    stage.release();
    check_aborted(&stage, &mut source, &destination, moving, "reset");
}
