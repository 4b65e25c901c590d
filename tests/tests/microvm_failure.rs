//! The failure table for guests of `pageferry microvm`, which live in their supervisor's process:
//! whoever dies there takes its guest with it. Each case is one line: where the migration is held,
//! what happens there, what `migrate` may say, and where the guest must run in the end. A second
//! attempt must work wherever it runs at the source.
//!
//! Whether a guest runs is seen by the processor time of its vCPUs: a payload never rests.

use pageferry::supervisor::api::State;
use pageferry_microvm::machine::open_kvm;
use pageferry_tests::look::{self, vcpu_time};
use pageferry_tests::proxy::{Proxy, Which};
use pageferry_tests::stage::{Ended, Running, Stage, Supervisor};
use pageferry_tests::{IN_THE_END, LOOK_EVERY, SOON, eventually, not_run};
use rustix::process::Signal;
use std::time::{Duration, Instant};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    KillSource,
    KillDestination,
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
    /// The process that had it was what died.
    Nowhere,
}
use Place::*;

const PAYLOAD: &[&str] =
    &["--payload", "--memory", "8M", "--cpus", "1", "--payload-working-set", "1M"];
const WAITING: &[&str] = &["--listen", "127.0.0.1:0", "--memory", "8M", "--cpus", "1"];

/// Processor time within one look that only running the guest takes: reading its state takes some
/// 0.2 ms.
const RUNS: Duration = Duration::from_millis(3);
/// How long a look waits for it, on two cores that others share.
const ONE_LOOK: Duration = Duration::from_millis(150);

const SOURCE_POINTS: [&str; 4] = ["setup", "rounds", "switchover", "committed"];

/// Whether this supervisor's guest runs now.
fn runs(supervisor: &Supervisor) -> bool {
    let Some(before) = vcpu_time(supervisor.pid()) else { return false };
    let until = Instant::now() + ONE_LOOK;
    while Instant::now() < until {
        match vcpu_time(supervisor.pid()) {
            None => return false,
            Some(now) if now.saturating_sub(before) >= RUNS => return true,
            Some(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
    false
}

/// A source and a destination with a proxy between them.
struct Pair {
    stage: Stage,
    source: Supervisor,
    destination: Supervisor,
    proxy: Proxy,
}

impl Pair {
    fn new(point: &str) -> Self {
        Self::on(Stage::new(), point)
    }

    fn on(stage: Stage, point: &str) -> Self {
        let at_source = SOURCE_POINTS.contains(&point);
        let (source, _) = stage.microvm("src", PAYLOAD, if at_source { point } else { "" });
        let (destination, _) = stage.microvm("dst", WAITING, if at_source { "" } else { point });
        eventually("the guest runs at the source", SOON, || runs(&source).then_some(()));
        let proxy = Proxy::to(destination.address());
        Self { stage, source, destination, proxy }
    }

    /// Starts a migration and waits until it is held.
    fn held_at(&self, point: &str) -> Running {
        let moving = self.stage.migrate("src", self.proxy.address, &[]);
        let held = if SOURCE_POINTS.contains(&point) { &self.source } else { &self.destination };
        held.wait_held(point);
        moving
    }

    /// Where it runs; never at two places. The destination is looked at first: once the guest runs
    /// there, it must not run at the source at any later time.
    fn look(&self) -> Place {
        match (runs(&self.destination), runs(&self.source)) {
            (false, false) => Nowhere,
            (true, false) => Destination,
            (false, true) => Source,
            (true, true) => panic!("the guest runs at both places"),
        }
    }

    fn strike(&mut self, fault: Fault) {
        match fault {
            KillSource => self.source.kill(),
            KillDestination => self.destination.kill(),
            CutLanes => assert!(self.proxy.cut(Which::Lanes) > 0, "a lane was cut"),
            CutControl => {
                assert_eq!(self.proxy.cut(Which::Control), 1, "the control connection was cut")
            }
            FreezeSource => self.source.signal(Signal::STOP),
            FreezeDestination => self.destination.signal(Signal::STOP),
            Stall => self.proxy.stall(true),
        }
    }

    /// Follows the migration to its end, and never sees two guests. Who was frozen is thawed once
    /// the other side has done what it does without an answer.
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
        }
    }

    fn runs_in_the_end(&self, place: Place) {
        eventually(&format!("the guest runs: {place:?}"), SOON, || {
            (self.look() == place).then_some(())
        });
    }

    /// Whatever the first attempt left, a second one works, and its memory is whole.
    fn second_attempt(&mut self) {
        self.stage.release();
        self.source.wait_state(State::Hosting);
        if !self.destination.alive() {
            (self.destination, _) = self.stage.microvm("dst", WAITING, "");
            self.proxy.retarget(self.destination.address());
        }
        self.destination.wait_state(State::Waiting);
        let ended = self.stage.migrate("src", self.proxy.address, &["--verify"]).end(SOON);
        assert_eq!(ended.status, Some(0), "the second attempt: {}", ended.stderr);
        assert_eq!(self.source.end(), Some(0));
        self.runs_in_the_end(Destination);
    }
}

/// Whether there is a KVM to test with.
fn kvm_is_here(test: &str) -> bool {
    open_kvm().inspect_err(|e| not_run(test, &e.chain())).is_ok()
}

/// One line of the table.
fn case(name: &str, point: &str, fault: Fault, statuses: &[i32], place: Place) {
    if !kvm_is_here(name) {
        return;
    }
    let mut pair = Pair::new(point);
    let moving = pair.held_at(point);
    if point == "committed" {
        // What happens after Running must not race with it.
        pair.destination.words.wait("dst runs here", SOON);
    }
    pair.strike(fault);
    pair.stage.release();
    let frozen = matches!(fault, FreezeSource | FreezeDestination | Stall);
    let ended = pair.follow(moving, frozen, |pair| given_up(pair, point, fault));
    let status = ended.status.expect("no signal ended it");
    assert!(statuses.contains(&status), "exit status {status}: {}", ended.stderr);
    assert!(status == 0 || ended.stderr.contains("pageferry: "), "it says why: {}", ended.stderr);
    pair.runs_in_the_end(place);
    match place {
        Source => pair.second_attempt(),
        Destination => {
            if fault != KillSource {
                assert_eq!(pair.source.end(), Some(0));
            }
            pair.destination.wait_state(State::Hosting);
        }
        // Whoever is left waits for the next guest, or has nothing more to do.
        Nowhere if fault == KillSource => pair.destination.wait_state(State::Waiting),
        Nowhere => assert_eq!(pair.source.end(), Some(0)),
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

macro_rules! table {
    ($($name:ident: $point:literal, $fault:ident => $statuses:expr, $place:ident;)*) => {
        $(#[test] fn $name() { case(stringify!($name), $point, $fault, &$statuses, $place); })*
    };
}

// Until Commit the guest is the source's.
table! {
    setup_source_killed: "setup", KillSource => [3], Nowhere;
    setup_destination_killed: "setup", KillDestination => [2], Source;
    rounds_source_killed: "rounds", KillSource => [3], Nowhere;
    rounds_destination_killed: "rounds", KillDestination => [1], Source;
    rounds_lane_cut: "rounds", CutLanes => [1], Source;
    rounds_source_frozen: "rounds", FreezeSource => [3], Source;
    rounds_network_stalled: "rounds", Stall => [1], Source;
    switchover_source_killed: "switchover", KillSource => [3], Nowhere;
    switchover_destination_killed: "switchover", KillDestination => [1], Source;
    switchover_lane_cut: "switchover", CutLanes => [1], Source;
    switchover_control_connection_cut: "switchover", CutControl => [1], Source;
    switchover_source_frozen: "switchover", FreezeSource => [3], Source;
    switchover_destination_frozen: "switchover", FreezeDestination => [1], Source;
    loaded_source_killed: "loaded", KillSource => [3], Nowhere;
    loaded_destination_killed: "loaded", KillDestination => [1], Source;
    loaded_control_connection_cut: "loaded", CutControl => [1], Source;
    loaded_source_frozen: "loaded", FreezeSource => [3], Source;
    loaded_destination_frozen: "loaded", FreezeDestination => [1], Source;
}

// From then on it is the destination's.
table! {
    owner_source_killed: "owner", KillSource => [3], Destination;
    owner_control_connection_cut: "owner", CutControl => [0], Destination;
    owner_source_frozen: "owner", FreezeSource => [0, 3], Destination;
    owner_destination_frozen: "owner", FreezeDestination => [0], Destination;
    owner_network_stalled: "owner", Stall => [0], Destination;
    committed_source_killed: "committed", KillSource => [3], Destination;
    committed_destination_killed: "committed", KillDestination => [0], Nowhere;
    committed_source_frozen: "committed", FreezeSource => [0], Destination;
}

/// The destination died with Commit in its hands: whether the guest ran there is known to nobody
/// here.
fn in_doubt(name: &str) -> Option<Pair> {
    if !kvm_is_here(name) {
        return None;
    }
    let mut pair = Pair::on(Stage::new().impatient(), "owner");
    let moving = pair.held_at("owner");
    pair.strike(KillDestination);
    let ended = pair.follow(moving, false, |_| true);
    assert_eq!(ended.status, Some(3), "{}", ended.stderr);
    assert!(ended.stderr.contains("settle"), "{}", ended.stderr);
    assert_eq!(pair.look(), Nowhere, "by itself it never runs again");
    let status = pair.stage.done(&["status", "src"]);
    assert!(status.stdout.contains("STOPPED"), "{}", status.stdout);
    Some(pair)
}

#[test]
fn when_the_network_is_back_after_status_3_the_source_hears_that_the_guest_runs_and_ends_its_own() {
    if !kvm_is_here(
        "when_the_network_is_back_after_status_3_the_source_hears_that_the_guest_runs_and_ends_its_own",
    ) {
        return;
    }
    let mut pair = Pair::on(Stage::new().impatient(), "owner");
    let moving = pair.held_at("owner");
    pair.strike(Stall);
    pair.strike(CutControl);
    let ended = moving.end(SOON);
    assert_eq!(ended.status, Some(3), "{}", ended.stderr);
    pair.stage.release();
    pair.destination.words.wait("dst runs here", SOON);
    assert_eq!(pair.look(), Destination);
    pair.proxy.stall(false);
    pair.source.words.wait("settled: src has moved", SOON);
    assert_eq!(pair.source.end(), Some(0));
    pair.runs_in_the_end(Destination);
}

#[test]
fn a_guest_in_doubt_survives_one_signal_and_settle_run_brings_it_back() {
    let Some(mut pair) =
        in_doubt("a_guest_in_doubt_survives_one_signal_and_settle_run_brings_it_back")
    else {
        return;
    };
    let refused = pair.stage.migrate("src", pair.proxy.address, &[]).end(SOON);
    assert_eq!(refused.status, Some(2));
    assert!(refused.stderr.contains("settle"), "{}", refused.stderr);
    pair.source.signal(Signal::TERM);
    pair.source.words.wait("may be its only copy", SOON);
    let settled = pair.stage.done(&["settle", "src", "--run"]);
    assert_eq!(settled.status, Some(0), "{}", settled.stderr);
    pair.runs_in_the_end(Source);
    let again = pair.stage.done(&["settle", "src", "--run"]);
    assert_eq!(again.status, Some(2), "nothing is left to settle: {}", again.stdout);
    pair.second_attempt();
}

#[test]
fn a_guest_in_doubt_ends_by_settle_end_or_by_a_second_signal() {
    for by_signal in [false, true] {
        let Some(mut pair) = in_doubt("a_guest_in_doubt_ends_by_settle_end_or_by_a_second_signal")
        else {
            return;
        };
        if by_signal {
            pair.source.signal(Signal::TERM);
            pair.source.words.wait("may be its only copy", SOON);
            pair.source.signal(Signal::TERM);
        } else {
            assert_eq!(pair.stage.done(&["settle", "src", "--end"]).status, Some(0));
        }
        assert_eq!(pair.source.end(), Some(0));
        assert!(!look::alive(pair.source.pid()));
    }
}
