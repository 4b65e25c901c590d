//! The supervisor dies while it has QEMU's main thread stopped for the injected call, at each step
//! of it and at random: the guest runs on right, and is attached and moved afterwards.
//!
//! `PAGEFERRY_KILLS=40` for more kills at random; `scripts/test` makes some.

use pageferry::supervisor::api::State;
use pageferry_qemu::inject::POINTS;
use pageferry_tests::console::Console;
use pageferry_tests::random::Random;
use pageferry_tests::stage::{Stage, Supervisor};
use pageferry_tests::{SOON, eventually, ledger};
use std::time::{Duration, Instant};

/// Kills at random of the short form.
const KILLS: u32 = 15;

/// A guest that has run since before everything, and a receiver that is never reached.
struct Bench {
    stage: Stage,
    source: Supervisor,
    destination: Supervisor,
    console: Console,
    qemu: u32,
    written: u64,
}

impl Bench {
    fn new() -> Self {
        let stage = Stage::new();
        let source = stage.run("src", &ledger::qemu(&stage, "src"), "");
        let console = stage.console("src");
        let destination = stage.receive("dst", &ledger::qemu(&stage, "dst"), "");
        let qemu = source.qemu();
        Self { stage, source, destination, console, qemu, written: 0 }
    }

    fn tracer(&self) -> u32 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.qemu)).expect("QEMU lives");
        let line = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        line.and_then(|text| text.trim().parse().ok()).expect("a number")
    }

    /// The supervisor is killed; the guest goes on, and its QEMU answers.
    fn kill(&mut self) {
        self.source.kill();
        eventually("nobody traces QEMU", SOON, || (self.tracer() == 0).then_some(()));
        self.source.wait_guest_runs();
        self.written = self.console.progress_since(self.written);
        // Until it has heard of the dead source it would refuse the next one.
        self.destination.wait_state(State::Waiting);
    }

    /// Looks without a pause until QEMU is traced, or was traced unseen.
    fn is_seen_traced(&self) -> bool {
        let deadline = Instant::now() + SOON;
        while !self.source.words.text().contains("held at rounds") {
            if (0..100).any(|_| self.tracer() != 0) {
                return true;
            }
            assert!(Instant::now() < deadline, "no migration: {}", self.source.words.text());
        }
        false
    }

    fn moves(mut self) {
        self.source = self.stage.attach("src", &[]);
        let mut next = self.stage.console("dst");
        let ended = self.stage.migrate("src", self.destination.address(), &["--verify"]).end(SOON);
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        next.progress_since(self.written);
        next.verdict();
    }
}

#[test]
fn a_supervisor_killed_at_any_step_of_the_injected_call_leaves_the_guest_running() {
    let mut bench = Bench::new();
    bench.source.kill();
    for point in POINTS {
        bench.source = bench.stage.supervise("src", &["attach", "src"], None, point);
        bench.source.wait_state(State::Hosting);
        let moving = bench.stage.migrate("src", bench.destination.address(), &[]);
        bench.source.wait_held(point);
        assert_ne!(bench.tracer(), 0, "it is traced at {point}");
        bench.kill();
        assert_eq!(moving.end(SOON).status, Some(3), "at {point}");
    }
    bench.moves();
}

#[test]
fn a_supervisor_killed_at_random_in_the_injected_call_leaves_the_guest_running() {
    let kills =
        std::env::var("PAGEFERRY_KILLS").map_or(KILLS, |text| text.parse().expect("a number"));
    let mut random = Random::by_the_clock();
    let mut bench = Bench::new();
    bench.source.kill();
    let (mut traced, mut tries) = (0, 0);
    while traced < kills {
        tries += 1;
        assert!(tries < 10 * kills, "it is hardly ever seen to trace");
        // Held in the rounds if the kill comes too late: the guest is to stay.
        bench.source = bench.stage.supervise("src", &["attach", "src"], None, "rounds");
        bench.source.wait_state(State::Hosting);
        let moving = bench.stage.migrate("src", bench.destination.address(), &[]);
        if bench.is_seen_traced() {
            let at = Instant::now() + random.within(Duration::from_micros(300));
            while Instant::now() < at {
                std::hint::spin_loop();
            }
            traced += 1;
        }
        bench.kill();
        drop(moving);
    }
    println!("{traced} kills while traced, in {tries} tries");
    bench.moves();
}
