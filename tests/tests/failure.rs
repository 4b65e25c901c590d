//! The failure table, with real processes: in each phase, on each side, something dies, is cut off
//! or stops answering. Each case is one line: where the migration is held, what happens there, and
//! what must have come of it. See engine/src/protocol/phase.rs for the rules.
//!
//! After every case: never two guests ran; the guest runs at exactly the one place that the table
//! names; where that is the source, its memory is not followed any more, no process and no
//! descriptor is left behind, and a second attempt succeeds.

use pageferry::supervisor::api::State;
use pageferry::supervisor::claim::RuntimeDir;
use pageferry::supervisor::record::Doubt;
use pageferry_tests::look::{self, descriptors, tracked_mappings, wait_gone};
use pageferry_tests::proxy::{Proxy, Which};
use pageferry_tests::stage::{BARE, Ended, Running, Stage, Supervisor};
use pageferry_tests::{IN_THE_END, LOOK_EVERY, SOON, eventually};
use rustix::process::Signal;
use std::time::Instant;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    KillSourceSupervisor,
    KillDestinationSupervisor,
    KillSourceQemu,
    KillDestinationQemu,
    KillDestinationHost,
    CutLanes,
    CutControl,
    /// SIGSTOP, and SIGCONT once the other side has given up.
    FreezeSource,
    FreezeDestination,
    /// The network swallows everything until the source has given up.
    Stall,
}
use Fault::*;

/// Where the guest must run in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Source,
    Destination,
    /// Its own QEMU was what died.
    Nowhere,
}
use Place::*;

/// A source and a destination with a proxy between them.
struct Pair {
    stage: Stage,
    source: Supervisor,
    destination: Supervisor,
    proxy: Proxy,
    source_qemu: u32,
    destination_qemu: u32,
    descriptors: (usize, usize),
}

const SOURCE_POINTS: [&str; 6] = ["setup", "rounds", "switchover", "sealed", "committed", "moved"];

impl Pair {
    fn new(point: &str) -> Self {
        Self::on(Stage::new(), point)
    }

    fn on(stage: Stage, point: &str) -> Self {
        if SOURCE_POINTS.contains(&point) {
            Self::with(stage, point, "")
        } else {
            Self::with(stage, "", point)
        }
    }

    /// Held at these points.
    fn with(stage: Stage, at_source: &str, at_destination: &str) -> Self {
        let source = stage.run("src", BARE, at_source);
        let destination = stage.receive("dst", BARE, at_destination);
        source.wait_guest_runs();
        let proxy = Proxy::to(destination.address());
        let (source_qemu, destination_qemu) = (source.qemu(), destination.qemu());
        let descriptors = (descriptors(source.pid()), descriptors(source_qemu));
        Self { stage, source, destination, proxy, source_qemu, destination_qemu, descriptors }
    }

    /// Starts a migration and waits until it is held.
    fn held_at(&self, point: &str) -> Running {
        let moving = self.stage.migrate("src", self.proxy.address, &[]);
        let held = if SOURCE_POINTS.contains(&point) { &self.source } else { &self.destination };
        held.wait_held(point);
        moving
    }

    /// What the source's record has for a later supervisor to ask.
    fn kept(&self) -> Option<Doubt> {
        let runtime = RuntimeDir::at(self.stage.path("src.json").parent()?).ok()?;
        runtime.record("src")?.doubt
    }

    /// Never two. The destination is looked at first: once the guest runs there, it must not run at
    /// the source at any later time.
    fn look(&self) -> (bool, bool) {
        let destination = self.destination.guest_runs();
        let source = self.source.guest_runs();
        assert!(!(source && destination), "the guest runs at both places");
        (source, destination)
    }

    fn strike(&mut self, fault: Fault) {
        match fault {
            KillSourceSupervisor => self.source.kill(),
            KillDestinationSupervisor => self.destination.kill(),
            KillSourceQemu => {
                look::signal(self.source_qemu, Signal::KILL);
                wait_gone(self.source_qemu);
            }
            KillDestinationQemu => {
                look::signal(self.destination_qemu, Signal::KILL);
                wait_gone(self.destination_qemu);
            }
            KillDestinationHost => {
                // All at once, as far as the guardian can tell: it finds nobody to rescue.
                self.destination.signal(Signal::STOP);
                look::signal(self.destination_qemu, Signal::KILL);
                wait_gone(self.destination_qemu);
                self.destination.kill();
            }
            CutLanes => assert!(self.proxy.cut(Which::Lanes) > 0, "a lane was cut"),
            CutControl => {
                assert_eq!(self.proxy.cut(Which::Control), 1, "the control connection was cut")
            }
            FreezeSource => self.source.signal(Signal::STOP),
            FreezeDestination => self.destination.signal(Signal::STOP),
            Stall => self.proxy.stall(true),
        }
    }

    /// Follows the migration to its end, and never sees two guests. Whoever was frozen is thawed
    /// once the other side has done what it does without an answer.
    fn follow(&self, mut moving: Running, mut frozen: bool, thaw: impl Fn(&Self) -> bool) -> Ended {
        let deadline = Instant::now() + IN_THE_END;
        let mut ended = None;
        loop {
            self.look();
            if frozen && thaw(self) {
                self.source.signal(Signal::CONT);
                self.destination.signal(Signal::CONT);
                self.proxy.stall(false);
                frozen = false;
            }
            ended = ended.or_else(|| moving.try_end());
            if !frozen && let Some(ended) = ended {
                return ended;
            }
            assert!(
                Instant::now() < deadline,
                "the migration does not end; the source said:\n{}\nthe destination said:\n{}",
                self.source.words.text(),
                self.destination.words.text()
            );
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// The guest runs here, undisturbed: no tracking, no process, no descriptor left behind.
    fn check_source_is_as_before(&self) {
        let supervised = self.source.alive();
        eventually("the tracking ends", SOON, || {
            (tracked_mappings(self.source_qemu) == 0).then_some(())
        });
        eventually("the guardian ends", SOON, || self.source.guardians().is_empty().then_some(()));
        eventually("QEMU has no more descriptors than before", SOON, || {
            (descriptors(self.source_qemu) <= self.descriptors.1).then_some(())
        });
        if supervised {
            eventually("the supervisor has no more descriptors than before", SOON, || {
                (descriptors(self.source.pid()) <= self.descriptors.0).then_some(())
            });
        }
        let migration = look::ask(&self.source.monitor, "query-migrate", serde_json::json!({}))
            .expect("an answer");
        let status = migration.get("status").and_then(|s| s.as_str()).unwrap_or("none");
        assert!(
            ["none", "cancelled", "failed", "completed"].contains(&status),
            "QEMU's own migration is {status}"
        );
    }

    /// The copy has ended, and nothing of it is left: one QEMU and one guardian stand ready for the
    /// next attempt where the receiver lives, none where it does not.
    fn check_copy_is_gone(&self) {
        wait_gone(self.destination_qemu);
        let left = usize::from(self.destination.alive());
        eventually("the copy's guardian ends", SOON, || {
            (self.destination.guardians().len() == left).then_some(())
        });
    }

    /// Whatever the first attempt left, a second one works: with the same supervisors where they
    /// live, with new ones where they do not.
    fn second_attempt(&mut self) {
        self.stage.release();
        if !self.source.alive() {
            self.source = self.stage.attach("src", &[]);
        }
        self.source.wait_state(State::Hosting);
        if !self.destination.alive() {
            wait_gone(self.destination_qemu);
            self.destination = self.stage.receive("dst", BARE, "");
            self.proxy.retarget(self.destination.address());
        }
        self.destination.wait_state(State::Waiting);
        let moving = self.stage.migrate("src", self.proxy.address, &[]);
        let ended = self.follow(moving, false, |_| true);
        assert_eq!(ended.status, Some(0), "the second attempt: {}", ended.stderr);
        self.destination.wait_guest_runs();
        wait_gone(self.source_qemu);
    }
}

/// One line of the table. `statuses` are the exit statuses of `migrate` that are right: 3 ("not
/// known here") where its supervisor is dead or has been frozen for long.
fn case(point: &str, fault: Fault, statuses: &[i32], place: Place) {
    let mut pair = Pair::new(point);
    let moving = pair.held_at(point);
    if matches!(point, "rounds" | "switchover" | "loaded") {
        assert!(
            tracked_mappings(pair.source_qemu) > 0,
            "its writes are followed, or the check below means nothing"
        );
    }
    if point == "committed" {
        // What happens after Running must not race with it.
        pair.destination.words.wait("dst runs here", SOON);
    }
    pair.strike(fault);
    if (point, fault) == ("setup", KillDestinationQemu) {
        // A receiver without its QEMU ends; until it has, it would still take the connection.
        assert_eq!(pair.destination.end(), Some(2));
    }
    pair.stage.release();
    let frozen = matches!(fault, FreezeSource | FreezeDestination | Stall);
    let ended = pair.follow(moving, frozen, |pair| given_up(pair, point, fault));
    let status = ended.status.expect("no signal ended it");
    assert!(statuses.contains(&status), "exit status {status}: {}", ended.stderr);
    assert!(status == 0 || ended.stderr.contains("pageferry: "), "it says why: {}", ended.stderr);
    match place {
        Source => {
            eventually("the guest runs at the source", SOON, || {
                (pair.look() == (true, false)).then_some(())
            });
            pair.check_source_is_as_before();
            if point != "setup" {
                pair.check_copy_is_gone();
            }
            pair.second_attempt();
        }
        Destination => {
            eventually("the guest runs at the destination", SOON, || {
                (pair.look() == (false, true)).then_some(())
            });
            if fault == KillSourceSupervisor {
                a_new_supervisor_hears_that_it_has_moved(&mut pair);
            } else {
                pair.source.end();
            }
            wait_gone(pair.source_qemu);
            assert!(pair.destination.guest_runs());
        }
        Nowhere => {
            wait_gone(pair.source_qemu);
            pair.source.end();
            pair.destination.wait_state(State::Waiting);
            if point != "setup" {
                pair.check_copy_is_gone();
            }
            assert_eq!(pair.look(), (false, false));
        }
    }
}

/// Whether the side that was not frozen has given up waiting, as its words tell.
fn given_up(pair: &Pair, point: &str, fault: Fault) -> bool {
    let (source, destination) = (pair.source.words.text(), pair.destination.words.text());
    match (point, fault) {
        // Everything was said before: nothing is to be waited for.
        ("committed", _) => true,
        ("owner", FreezeSource) => destination.contains("dst runs here"),
        ("owner", _) => source.contains("asking again"),
        (_, FreezeSource) => destination.contains("was not taken in"),
        _ => source.contains("was not moved"),
    }
}

/// At a source whose supervisor died after Commit only the destination, or the operator, may
/// decide. A new supervisor asks.
fn a_new_supervisor_hears_that_it_has_moved(pair: &mut Pair) {
    assert!(look::alive(pair.source_qemu), "the guest outlives its supervisor");
    pair.source = pair.stage.attach_in_doubt("src");
    pair.source.words.wait("settled: src has moved", SOON);
    assert_eq!(pair.source.end(), Some(0));
    assert!(pair.kept().is_none());
}

macro_rules! table {
    ($($name:ident: $point:literal, $fault:ident => $statuses:expr, $place:ident;)*) => {
        $(#[test] fn $name() { case($point, $fault, &$statuses, $place); })*
    };
}

// Before anything is touched.
table! {
    setup_source_supervisor_killed: "setup", KillSourceSupervisor => [3], Source;
    setup_destination_supervisor_killed: "setup", KillDestinationSupervisor => [2], Source;
    setup_source_qemu_killed: "setup", KillSourceQemu => [1], Nowhere;
    setup_destination_qemu_killed: "setup", KillDestinationQemu => [2], Source;
    setup_destination_frozen: "setup", FreezeDestination => [2], Source;
}

// The guest runs, and is copied.
table! {
    rounds_source_supervisor_killed: "rounds", KillSourceSupervisor => [3], Source;
    rounds_destination_supervisor_killed: "rounds", KillDestinationSupervisor => [1], Source;
    rounds_source_qemu_killed: "rounds", KillSourceQemu => [1], Nowhere;
    rounds_destination_qemu_killed: "rounds", KillDestinationQemu => [1], Source;
    rounds_lane_cut: "rounds", CutLanes => [1], Source;
    rounds_control_connection_cut: "rounds", CutControl => [1], Source;
    rounds_source_frozen: "rounds", FreezeSource => [3], Source;
    rounds_destination_frozen: "rounds", FreezeDestination => [1], Source;
    rounds_network_stalled: "rounds", Stall => [1], Source;
    filling_source_supervisor_killed: "filling", KillSourceSupervisor => [3], Source;
    filling_destination_supervisor_killed: "filling", KillDestinationSupervisor => [1], Source;
    filling_destination_qemu_killed: "filling", KillDestinationQemu => [1], Source;
    filling_lane_cut: "filling", CutLanes => [1], Source;
    filling_control_connection_cut: "filling", CutControl => [1], Source;
}

// The guest is paused.
table! {
    switchover_source_supervisor_killed: "switchover", KillSourceSupervisor => [3], Source;
    switchover_destination_supervisor_killed: "switchover", KillDestinationSupervisor => [1], Source;
    switchover_source_qemu_killed: "switchover", KillSourceQemu => [1], Nowhere;
    switchover_destination_qemu_killed: "switchover", KillDestinationQemu => [1], Source;
    switchover_lane_cut: "switchover", CutLanes => [1], Source;
    switchover_control_connection_cut: "switchover", CutControl => [1], Source;
    switchover_source_frozen: "switchover", FreezeSource => [3], Source;
    switchover_destination_frozen: "switchover", FreezeDestination => [1], Source;
    loaded_source_supervisor_killed: "loaded", KillSourceSupervisor => [3], Source;
    loaded_destination_supervisor_killed: "loaded", KillDestinationSupervisor => [1], Source;
    loaded_destination_qemu_killed: "loaded", KillDestinationQemu => [1], Source;
    loaded_control_connection_cut: "loaded", CutControl => [1], Source;
    loaded_source_frozen: "loaded", FreezeSource => [3], Source;
    loaded_destination_frozen: "loaded", FreezeDestination => [1], Source;
    // The whole guest is at the destination, and goes on there. (Lanes cannot be cut any more: the
    // destination has closed them.)
    loaded_source_qemu_killed: "loaded", KillSourceQemu => [0], Destination;
}

// Commit was sent.
table! {
    owner_source_supervisor_killed: "owner", KillSourceSupervisor => [3], Destination;
    owner_source_qemu_killed: "owner", KillSourceQemu => [0], Destination;
    // It did not run there yet, and cannot any more; the destination says so.
    owner_destination_qemu_killed: "owner", KillDestinationQemu => [1], Source;
    owner_control_connection_cut: "owner", CutControl => [0], Destination;
    owner_destination_frozen: "owner", FreezeDestination => [0], Destination;
    owner_source_frozen: "owner", FreezeSource => [0, 3], Destination;
    owner_network_stalled: "owner", Stall => [0], Destination;
    committed_source_supervisor_killed: "committed", KillSourceSupervisor => [3], Destination;
    committed_destination_supervisor_killed: "committed", KillDestinationSupervisor => [0], Destination;
    committed_source_qemu_killed: "committed", KillSourceQemu => [0], Destination;
    committed_control_connection_cut: "committed", CutControl => [0], Destination;
    committed_source_frozen: "committed", FreezeSource => [0], Destination;
    committed_destination_frozen: "committed", FreezeDestination => [0], Destination;
}

#[test]
fn owner_destination_supervisor_killed_the_guest_runs_there_and_the_source_says_unknown() {
    let mut pair = Pair::on(Stage::new().impatient(), "owner");
    let moving = pair.held_at("owner");
    pair.strike(KillDestinationSupervisor);
    let ended = pair.follow(moving, false, |_| true);
    assert_eq!(ended.status, Some(3), "{}", ended.stderr);
    assert!(ended.stderr.contains("settle"), "{}", ended.stderr);
    assert_eq!(pair.look(), (false, true));
    let status = pair.stage.done(&["status", "src"]);
    assert!(status.stdout.contains("STOPPED"), "{}", status.stdout);
    let refused = pair.stage.migrate("src", pair.proxy.address, &[]).end(SOON);
    assert_eq!(refused.status, Some(2));
    assert!(refused.stderr.contains("settle"), "{}", refused.stderr);
    assert_eq!(pair.stage.done(&["settle", "src", "--end"]).status, Some(0));
    assert_eq!(pair.source.end(), Some(0));
    wait_gone(pair.source_qemu);
    // Its guest outlived it, and is attached again.
    pair.destination = pair.stage.attach("dst", &[]);
    assert!(pair.destination.words.text().contains("attached to dst"));
    pair.destination.wait_guest_runs();
}

/// A migration whose network goes away after Commit for longer than `migrate` asks: status 3, and
/// the guest is in doubt. With `cut` the old connection is lost too.
fn network_away_after_commit(cut: bool) -> Pair {
    let mut pair = Pair::on(Stage::new().impatient(), "owner");
    network_goes_away_after_commit(&mut pair, cut);
    pair
}

fn network_goes_away_after_commit(pair: &mut Pair, cut: bool) {
    let moving = pair.held_at("owner");
    pair.strike(Stall);
    if cut {
        pair.strike(CutControl);
    }
    let ended = moving.end(SOON);
    assert_eq!(ended.status, Some(3), "{}", ended.stderr);
    pair.source.words.wait("asking", SOON);
    let status = pair.stage.done(&["status", "src"]);
    assert!(status.stdout.contains("STOPPED"), "{}", status.stdout);
}

#[test]
fn when_the_network_is_back_after_status_3_the_source_hears_that_the_guest_runs_and_ends_its_own() {
    for cut in [false, true] {
        let mut pair = network_away_after_commit(cut);
        pair.stage.release();
        pair.destination.words.wait("dst runs here", SOON);
        assert_eq!(pair.look(), (false, true));
        pair.proxy.stall(false);
        pair.source.words.wait("settled: src has moved", SOON);
        assert_eq!(pair.source.end(), Some(0));
        wait_gone(pair.source_qemu);
        assert_eq!(pair.look(), (false, true));
    }
}

#[test]
fn when_the_network_is_back_after_status_3_the_source_hears_of_a_discarded_copy_and_resumes() {
    let mut pair = network_away_after_commit(true);
    pair.strike(KillDestinationQemu);
    pair.stage.release();
    pair.destination.wait_state(State::Waiting);
    assert_eq!(pair.look(), (false, false), "nothing was heard yet");
    pair.proxy.stall(false);
    pair.source.words.wait("settled: src was not moved", SOON);
    pair.source.wait_guest_runs();
    pair.check_source_is_as_before();
    pair.check_copy_is_gone();
    pair.second_attempt();
}

/// The source's supervisor ends, and a new one takes the guest up, which is still in doubt.
fn another_supervisor(pair: &mut Pair, signal: Signal) {
    let kept = pair.kept().expect("the question is kept");
    if signal == Signal::KILL {
        pair.source.kill();
    } else {
        pair.source.signal(signal);
        assert_eq!(pair.source.end(), Some(0));
    }
    pair.source = pair.stage.attach_in_doubt("src");
    pair.source.words.wait("asking", SOON);
    let status = pair.stage.done(&["status", "src"]);
    assert!(status.stdout.contains("STOPPED"), "{}", status.stdout);
    assert!(!pair.source.guest_runs(), "nothing was heard yet");
    assert_eq!(pair.kept(), Some(kept));
}

#[test]
fn a_supervisor_that_comes_after_one_that_ended_in_doubt_hears_that_the_guest_runs_and_ends_its_own()
 {
    for signal in [Signal::KILL, Signal::TERM] {
        let mut pair = network_away_after_commit(true);
        another_supervisor(&mut pair, signal);
        // And once more: it is kept until it is settled.
        another_supervisor(&mut pair, signal);
        pair.stage.release();
        pair.destination.words.wait("dst runs here", SOON);
        assert_eq!(pair.look(), (false, true));
        pair.proxy.stall(false);
        pair.source.words.wait("settled: src has moved", SOON);
        assert_eq!(pair.source.end(), Some(0));
        wait_gone(pair.source_qemu);
        assert_eq!(pair.look(), (false, true));
    }
}

#[test]
fn a_supervisor_that_comes_after_one_that_died_in_doubt_hears_of_a_discarded_copy_and_resumes() {
    let settings = |pair: &Pair| {
        ["query-migrate-capabilities", "query-migrate-parameters"].map(|what| {
            look::ask(&pair.source.monitor, what, serde_json::json!({})).expect("an answer")
        })
    };
    let mut pair = Pair::on(Stage::new().impatient(), "owner");
    let before = settings(&pair);
    network_goes_away_after_commit(&mut pair, true);
    assert_ne!(settings(&pair), before, "or the check below means nothing");
    // Before the other one has acted on the answer, if it has one.
    another_supervisor(&mut pair, Signal::KILL);
    pair.strike(KillDestinationQemu);
    pair.stage.release();
    pair.destination.wait_state(State::Waiting);
    assert_eq!(pair.look(), (false, false), "nothing was heard yet");
    pair.proxy.stall(false);
    pair.source.words.wait("settled: src was not moved", SOON);
    pair.source.wait_guest_runs();
    assert!(pair.kept().is_none(), "nobody may ask for a guest that runs");
    eventually("QEMU has its settings back", SOON, || (settings(&pair) == before).then_some(()));
    pair.check_copy_is_gone();
    pair.second_attempt();
}

/// The guest was sealed and the question revealed, but not a byte of Commit was sent.
#[test]
fn a_new_supervisor_sends_the_commit_that_a_dead_one_has_not_sent() {
    let mut pair = Pair::new("sealed");
    let moving = pair.held_at("sealed");
    pair.strike(KillSourceSupervisor);
    assert_eq!(moving.end(SOON).status, Some(3));
    pair.source.words.wait("the guest stays stopped here", SOON);
    assert_eq!(pair.look(), (false, false));
    let (pid, qmp) =
        (pair.source_qemu.to_string(), pair.stage.path("src.qmp").display().to_string());
    let refused = pair.stage.done(&["attach", "other", "--pid", &pid, "--qmp", &qmp]);
    assert_eq!(refused.status, Some(2), "{}", refused.stderr);
    assert!(refused.stderr.contains("`pageferry attach src`"), "{}", refused.stderr);
    a_new_supervisor_hears_that_it_has_moved(&mut pair);
    wait_gone(pair.source_qemu);
    pair.destination.wait_guest_runs();
}

#[test]
fn nobody_asks_for_a_guest_that_was_started_by_hand() {
    let mut pair = Pair::new("sealed");
    let moving = pair.held_at("sealed");
    let guardians = pair.source.guardians();
    assert_eq!(guardians.len(), 1, "one keeps it stopped");
    pair.strike(KillSourceSupervisor);
    drop(moving);
    guardians.iter().for_each(|guardian| look::signal(*guardian, Signal::KILL));
    guardians.iter().for_each(|guardian| wait_gone(*guardian));
    // As an operator who has made sure of the destination.
    look::ask(&pair.source.monitor, "cont", serde_json::json!({})).expect("QEMU lets it run");
    look::ask(&pair.source.monitor, "stop", serde_json::json!({})).expect("QEMU stops it");
    assert!(pair.kept().is_some());
    pair.source = pair.stage.attach("src", &[]);
    let words = pair.source.words.text();
    assert!(
        words.contains("somebody has started it since") && !words.contains("asking"),
        "{words}"
    );
    assert!(pair.kept().is_none(), "and nobody ever will");
    assert!(!pair.destination.words.text().contains("dst runs here"));
}

/// The guest has moved, and its QEMU here has not been ended yet.
#[test]
fn a_guardian_ends_the_qemu_of_a_guest_that_has_moved() {
    let stage = Stage::new();
    let mut pair = Pair::with(stage, "moved", "");
    let moving = pair.held_at("moved");
    assert_eq!(moving.end(SOON).status, Some(0), "it was told before");
    assert_eq!(pair.look(), (false, true));
    assert!(look::alive(pair.source_qemu), "it is still there, or nothing is shown");
    pair.strike(KillSourceSupervisor);
    wait_gone(pair.source_qemu);
    eventually("the guardian ends", SOON, || pair.source.guardians().is_empty().then_some(()));
    pair.source.words.wait("the supervisor died after the guest had moved", SOON);
    assert_eq!(pair.look(), (false, true));
    let listed = pair.stage.done(&["list"]);
    assert!(!listed.stdout.contains("src"), "{}", listed.stdout);
    let refused = pair.stage.done(&["attach", "src"]);
    assert_eq!(refused.status, Some(2), "{}", refused.stderr);
    // Its name is free.
    pair.stage.release();
    let _again = pair.stage.run("src", BARE, "");
}

/// The kernel sends SIGHUP and SIGCONT to a process group that becomes orphaned while a member is
/// stopped.
#[test]
fn a_guardian_that_is_stopped_when_its_supervisor_dies_acts_once_it_goes_on() {
    let mut pair = Pair::new("switchover");
    let moving = pair.held_at("switchover");
    assert_eq!(pair.look(), (false, false), "it is paused for the switchover");
    let guardians = pair.source.guardians();
    assert_eq!(guardians.len(), 1);
    look::signal(guardians[0], Signal::STOP);
    eventually("the guardian is stopped", SOON, || {
        (look::process_state(guardians[0]) == Some('T')).then_some(())
    });
    pair.strike(KillSourceSupervisor);
    // The kernel's come only where no parent in the session is left, as that of a subreaper.
    look::signal(guardians[0], Signal::HUP);
    look::signal(guardians[0], Signal::CONT);
    assert_eq!(moving.end(SOON).status, Some(3));
    eventually("the guest runs again", SOON, || (pair.look() == (true, false)).then_some(()));
    pair.check_source_is_as_before();
    pair.check_copy_is_gone();
    pair.second_attempt();
}

/// The guest runs again at the source, and its memory is not disarmed yet.
#[test]
fn a_guardian_disarms_the_memory_of_a_guest_that_was_taken_back() {
    for (point, fault) in [("loaded", KillDestinationSupervisor), ("owner", KillDestinationQemu)] {
        let stage = Stage::new();
        let held = stage.path("held-resumed");
        std::fs::write(&held, "").expect("a file of this point's own");
        let at_source = format!("resumed:60000:{}", held.display());
        let mut pair = Pair::with(stage, &at_source, point);
        let moving = pair.held_at(point);
        pair.strike(fault);
        pair.stage.release();
        pair.source.wait_held("resumed");
        assert_eq!(pair.look(), (true, false));
        assert!(tracked_mappings(pair.source_qemu) > 0, "it is armed, or nothing is shown");
        assert_eq!(pair.source.guardians().len(), 1, "one is on duty, and disarms in short calls");
        pair.strike(KillSourceSupervisor);
        assert_eq!(moving.end(SOON).status, Some(3));
        pair.check_source_is_as_before();
        assert_eq!(pair.look(), (true, false));
        assert!(
            !pair.source.words.text().contains("the supervisor died"),
            "nothing else was to be done"
        );
        pair.check_copy_is_gone();
        pair.second_attempt();
    }
}

#[test]
fn settle_run_forgets_the_question_first_and_refuses_where_it_cannot() {
    let mut pair = network_away_after_commit(true);
    let obstacle = pair.stage.path("src.json.new/full");
    std::fs::create_dir_all(&obstacle).expect("a directory in the way of a record");
    let settled = pair.stage.done(&["settle", "src", "--run"]);
    assert_eq!(settled.status, Some(2), "{}", settled.stdout);
    assert!(settled.stderr.contains("src.json"), "{}", settled.stderr);
    assert_eq!(pair.look(), (false, false));
    std::fs::remove_dir_all(obstacle.parent().expect("it has one")).expect("it goes");
    pair.strike(KillDestinationHost);
    let settled = pair.stage.done(&["settle", "src", "--run"]);
    assert_eq!(settled.status, Some(0), "{}", settled.stderr);
    assert!(pair.kept().is_none());
    pair.source.wait_guest_runs();
}

#[test]
fn owner_destination_host_lost_the_source_says_unknown_and_settle_run_brings_the_guest_back() {
    let mut pair = Pair::on(Stage::new().impatient(), "owner");
    let moving = pair.held_at("owner");
    pair.strike(KillDestinationHost);
    let ended = pair.follow(moving, false, |_| true);
    assert_eq!(ended.status, Some(3), "{}", ended.stderr);
    // By itself it never runs again.
    assert_eq!(pair.look(), (false, false));
    let settled = pair.stage.done(&["settle", "src", "--run"]);
    assert_eq!(settled.status, Some(0), "{}", settled.stderr);
    pair.source.wait_guest_runs();
    pair.check_source_is_as_before();
    let again = pair.stage.done(&["settle", "src", "--run"]);
    assert_eq!(again.status, Some(2), "nothing is left to settle: {}", again.stdout);
    pair.second_attempt();
}

#[test]
fn a_guest_outlives_its_supervisor_and_attach_takes_it_up_again() {
    let stage = Stage::new();
    let mut supervisor = stage.run("vm", BARE, "");
    let qemu = supervisor.qemu();
    supervisor.kill();
    assert!(supervisor.guest_runs(), "after SIGKILL of run");
    let listed = stage.done(&["list"]);
    assert!(listed.stdout.contains("pageferry attach vm"), "{}", listed.stdout);
    let refused = stage.done(&["run", "vm", "--", "qemu-system-x86_64"]);
    assert_eq!(refused.status, Some(2), "{}", refused.stderr);
    assert!(refused.stderr.contains("attach vm"), "{}", refused.stderr);

    supervisor = stage.attach("vm", &[]);
    assert_eq!(supervisor.qemu(), qemu);
    supervisor.kill();
    assert!(supervisor.guest_runs(), "after SIGKILL of attach");
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        supervisor = stage.attach("vm", &[]);
        supervisor.signal(signal);
        assert_eq!(supervisor.end(), Some(0), "after {signal:?} of attach");
        assert!(supervisor.guest_runs(), "after {signal:?} of attach");
    }
    supervisor = stage.attach("vm", &[]);
    assert_eq!(supervisor.qemu(), qemu);
    // And it can still be moved.
    let destination = stage.receive("dst", BARE, "");
    let ended = stage.migrate("vm", destination.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    destination.wait_guest_runs();
    assert_eq!(supervisor.end(), Some(0));
}

#[test]
fn run_that_is_told_to_end_leaves_its_guest_running() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let stage = Stage::new();
        let mut supervisor = stage.run("vm", BARE, "");
        supervisor.wait_guest_runs();
        let qemu = supervisor.qemu();
        supervisor.signal(signal);
        assert_eq!(supervisor.end(), Some(0), "after {signal:?}");
        assert!(supervisor.guest_runs(), "after {signal:?}");
        supervisor = stage.attach("vm", &[]);
        assert_eq!(supervisor.qemu(), qemu);
        // Where the guest ends, so does its supervisor, and its name is free.
        look::signal(qemu, Signal::KILL);
        assert_eq!(supervisor.end(), Some(0));
        assert!(!stage.path("vm.json").exists());
    }
}

#[test]
fn a_receiver_that_is_told_to_end_leaves_nothing() {
    let stage = Stage::new();
    let mut receiver = stage.receive("dst", BARE, "");
    let qemu = receiver.qemu();
    assert_eq!(receiver.guardians().len(), 1);
    receiver.signal(Signal::TERM);
    assert_eq!(receiver.end(), Some(0));
    wait_gone(qemu);
    eventually("its guardian ends", SOON, || receiver.guardians().is_empty().then_some(()));
    let listed = stage.done(&["list"]);
    assert!(listed.stderr.contains("no guests"), "{} {}", listed.stdout, listed.stderr);
}

#[test]
fn sigterm_during_a_migration_cancels_it_and_leaves_the_guest_running() {
    let mut pair = Pair::new("rounds");
    let moving = pair.held_at("rounds");
    pair.source.signal(Signal::TERM);
    pair.source.words.wait("cancelling the migration first", SOON);
    pair.stage.release();
    let ended = pair.follow(moving, false, |_| true);
    assert_eq!(ended.status, Some(1), "{}", ended.stderr);
    assert_eq!(pair.source.end(), Some(0));
    assert_eq!(pair.look(), (true, false));
    pair.check_source_is_as_before();
    pair.second_attempt();
}
