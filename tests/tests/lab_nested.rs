//! Guests that could run, or do run, guests of their own, in QEMU under the lab machine's KVM. The
//! lab's processor is AMD's: `svm`. The guest is the smallest one (tests/guest/ledger.c), which
//! does as a hypervisor does when it is told to.

use pageferry::supervisor::api::State;
use pageferry_tests::console::Console;
use pageferry_tests::look::tracked_mappings;
use pageferry_tests::stage::{Ended, Running, Stage, Supervisor};
use pageferry_tests::{SOON, ledger, refuse_outside_the_lab};
use std::process::Command;
use std::time::Duration;

/// One move, in a machine that is emulated.
const MOVE_MAX: Duration = Duration::from_secs(120);
/// What a refusal tells the operator to do.
const REMEDIES: [&str; 3] = ["modprobe -r kvm_intel", "kvm_amd", "--no-nested-guest"];

/// A guest on this model of CPU, and a receiver for it.
struct Pair {
    stage: Stage,
    source: Supervisor,
    destination: Supervisor,
    here: Console,
}

impl Pair {
    /// The source is held at this point, if it is any.
    fn new(cpu: &str, hold: &str) -> Self {
        refuse_outside_the_lab();
        let loaded = Command::new("modprobe").arg("kvm_amd").status().expect("modprobe runs");
        assert!(loaded.success(), "the lab machine has KVM");
        let stage = Stage::new();
        let qemu = |name: &str| ledger::qemu_under(&stage, name, &format!("kvm -cpu {cpu}"));
        let source = stage.run("src", &qemu("src"), hold);
        let here = stage.console("src");
        let destination = stage.receive("dst", &qemu("dst"), "");
        here.progress_since(0);
        Self { stage, source, destination, here }
    }

    fn start(&self, more: &[&str]) -> Running {
        let more = [more, &["--verify", "--downtime-max", "10s"]].concat();
        self.stage.migrate("src", self.destination.address(), &more)
    }

    fn migrate(&self, more: &[&str]) -> Ended {
        self.start(more).end(MOVE_MAX)
    }

    /// The guest moves, and is whole. Returns its new console.
    #[track_caller]
    fn moves(&self, more: &[&str]) -> Console {
        // After an aborted move this is another QEMU than before.
        let mut there = self.stage.console("dst");
        let ended = self.migrate(more);
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        there.progress_since(0);
        there.verdict();
        there
    }

    /// Not moved with this status and these words, and untouched.
    #[track_caller]
    fn stays(&self, ended: &Ended, status: i32, words: &[&str]) {
        assert_eq!(ended.status, Some(status), "{}", ended.stderr);
        for word in words {
            assert!(ended.stderr.contains(word), "{word:?} is not in {}", ended.stderr);
        }
        self.source.wait_guest_runs();
        assert_eq!(tracked_mappings(self.source.qemu()), 0);
        self.here.progress_since(0);
        self.destination.wait_state(State::Waiting);
    }
}

/// Has the guest do something, and waits until it has.
fn tell(console: &mut Console, what: &str, answer: &str) {
    let mark = console.mark();
    console.type_keys(what);
    let _ = console.wait(mark, answer, SOON);
}

/// What loading KVM's module does, and no more.
fn switch_on(console: &mut Console) {
    tell(console, "1", "SVM on=1");
}

fn switch_off(console: &mut Console) {
    tell(console, "0", "SVM on=0");
}

fn run_nested(console: &mut Console) {
    tell(console, "2", "NESTED ran=1");
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_guest_that_cannot_run_guests_moves_without_a_word_about_them() {
    let pair = Pair::new("host,-svm", "");
    let _ = pair.moves(&[]);
    let said = pair.source.words.all(SOON);
    assert!(!said.contains("guest of its own"), "{said}");
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_guest_that_switched_virtualization_on_and_ran_no_guest_moves_with_a_warning() {
    let mut pair = Pair::new("host", "");
    switch_on(&mut pair.here);
    let mut there = pair.moves(&[]);
    pair.source.words.wait("vCPUs have svm", SOON);
    // The premise: it could have run one at any time.
    run_nested(&mut there);
    there.verdict();
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_guest_that_ran_a_guest_is_refused_before_it_is_touched_unless_the_operator_vouches() {
    let mut pair = Pair::new("host", "");
    switch_on(&mut pair.here);
    run_nested(&mut pair.here);
    run_nested(&mut pair.here);
    let counted = "may run a guest of its own, as it has done since QEMU started (2 entries)";
    let words = [&[counted, "vCPUs have svm"][..], &REMEDIES].concat();
    pair.stays(&pair.migrate(&[]), 2, &words);
    // A new supervisor sees the same: QEMU remembers.
    pair.source.kill();
    pair.source = pair.stage.attach("src", &[]);
    pair.stays(&pair.migrate(&[]), 2, &words);
    let _ = pair.moves(&["--no-nested-guest"]);
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_guest_in_a_guest_of_its_own_is_refused() {
    let mut pair = Pair::new("host", "");
    switch_on(&mut pair.here);
    // Into one that never leaves.
    tell(&mut pair.here, "3", "NESTED for good");
    let ended = pair.migrate(&[]);
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("runs a guest of its own at this moment"), "{}", ended.stderr);
    assert!(pair.source.guest_runs());
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_guest_that_runs_a_guest_while_it_is_moved_stays_and_moves_once_its_hypervisor_has_gone() {
    // In the rounds, and where nothing but the pause is to come.
    for point in ["rounds", "armed"] {
        let mut pair = Pair::new("host", point);
        let moving = pair.start(&[]);
        pair.source.wait_held(point);
        switch_on(&mut pair.here);
        run_nested(&mut pair.here);
        switch_off(&mut pair.here);
        pair.stage.release();
        let (_, mark) = pair.destination.words.wait_after(0, "waits for a guest on", SOON);
        pair.stays(&moving.end(MOVE_MAX), 1, &["has run a guest of its own while it was moved"]);
        let _ = pair.destination.words.wait_after(mark, "waits for a guest on", SOON);
        // Switched off it runs none, whatever it has run before.
        let _ = pair.moves(&[]);
    }
}
