//! An operator lets a guest in doubt run at the source: its supervisor asks the destination once
//! more before it does, and the destination's word counts.
//!
//! The destination is out of reach until the operator decides.

use pageferry::supervisor::api::State;
use pageferry_tests::look::{self, wait_gone};
use pageferry_tests::proxy::{Proxy, Which};
use pageferry_tests::stage::{BARE, Ended, Stage, Supervisor};
use pageferry_tests::{LOOK_EVERY, SOON, eventually};
use rustix::process::Signal;
use std::net::{SocketAddr, TcpListener};

/// A guest that is stopped at the source after a Commit without an answer.
struct Doubt {
    stage: Stage,
    source: Supervisor,
    destination: Supervisor,
    proxy: Proxy,
    qemus: (u32, u32),
}

impl Doubt {
    /// The network goes away where one side is held at this point, and the guest is in doubt.
    fn after(point: &str) -> Self {
        // Its own second question would be asked long after the operator has decided.
        let stage = Stage::new().limited("ask-again:1000,ask-later:600000");
        let (at_source, at_destination) = if point == "sealed" { (point, "") } else { ("", point) };
        let source = stage.run("src", BARE, at_source);
        let destination = stage.receive("dst", BARE, at_destination);
        source.wait_guest_runs();
        let (qemus, proxy) =
            ((source.qemu(), destination.qemu()), Proxy::to(destination.address()));
        let doubt = Self { stage, source, destination, proxy, qemus };
        let moving = doubt.stage.migrate("src", doubt.proxy.address, &[]);
        if point == "sealed" { &doubt.source } else { &doubt.destination }.wait_held(point);
        doubt.proxy.retarget(nobody());
        assert_eq!(doubt.proxy.cut(Which::Control), 1);
        if point == "sealed" {
            doubt.stage.release();
        }
        let ended = moving.end(SOON);
        assert_eq!(ended.status, Some(3), "{}", ended.stderr);
        eventually("the supervisor has asked in vain", SOON, || {
            let lines = doubt.source.words.lines();
            let since = lines
                .iter()
                .position(|line| line.contains("asking") && line.contains("on about src"))?;
            lines[since..].iter().any(|line| line.contains("no answer to Commit")).then_some(())
        });
        assert_eq!(doubt.look(), (false, false));
        doubt
    }

    fn network_is_back(&self) {
        self.proxy.retarget(self.destination.address());
    }

    fn look(&self) -> (bool, bool) {
        (self.source.guest_runs(), self.destination.guest_runs())
    }

    /// `settle --run`. The guest never runs at the source meanwhile, if it must not.
    fn settle_run(&self, must_not_run: bool) -> Ended {
        let mut settling = self.stage.start(&["settle", "src", "--run"]);
        loop {
            assert!(!(must_not_run && self.source.guest_runs()), "it runs at the source");
            if let Some(ended) = settling.try_end() {
                return ended;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// An address at which nobody listens.
fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("its address")
}

#[test]
fn an_operator_who_lets_a_guest_run_that_runs_at_the_destination_is_refused() {
    let mut doubt = Doubt::after("owner");
    doubt.stage.release();
    doubt.destination.words.wait("dst runs here", SOON);
    assert_eq!(doubt.look(), (false, true));
    doubt.network_is_back();
    let settled = doubt.settle_run(true);
    assert_eq!(settled.status, Some(2), "{} {}", settled.stdout, settled.stderr);
    assert!(settled.stderr.contains("the guest runs there, so it ends here"), "{}", settled.stderr);
    assert_eq!(doubt.source.end(), Some(0));
    wait_gone(doubt.qemus.0);
    assert!(doubt.destination.guest_runs());
}

#[test]
fn an_operator_who_lets_a_guest_run_hears_that_its_copy_was_discarded() {
    let doubt = Doubt::after("owner");
    look::signal(doubt.qemus.1, Signal::KILL);
    wait_gone(doubt.qemus.1);
    doubt.stage.release();
    doubt.destination.wait_state(State::Waiting);
    doubt.network_is_back();
    let settled = doubt.settle_run(false);
    assert_eq!(settled.status, Some(0), "{}", settled.stderr);
    assert!(
        settled.stdout.contains("it does not have the guest, so it stays here"),
        "{}",
        settled.stdout
    );
    assert_eq!(doubt.look(), (true, false));
    assert!(doubt.source.alive());
}

#[test]
fn a_destination_that_still_waits_for_commit_gives_its_copy_up_to_the_operator() {
    let doubt = Doubt::after("sealed");
    assert!(look::alive(doubt.qemus.1), "it waits, or nothing is shown");
    doubt.network_is_back();
    let settled = doubt.settle_run(false);
    assert_eq!(settled.status, Some(0), "{}", settled.stderr);
    assert!(settled.stdout.contains("the guest runs here"), "{}", settled.stdout);
    wait_gone(doubt.qemus.1);
    assert_eq!(doubt.look(), (true, false));
    assert!(!doubt.destination.words.text().contains("dst runs here"));
}

#[test]
fn an_operator_whom_nobody_answers_decides_alone() {
    let mut doubt = Doubt::after("owner");
    look::signal(doubt.qemus.1, Signal::KILL);
    wait_gone(doubt.qemus.1);
    doubt.destination.kill();
    let settled = doubt.settle_run(false);
    assert_eq!(settled.status, Some(0), "{}", settled.stderr);
    assert!(settled.stdout.contains("the guest runs here"), "{}", settled.stdout);
    assert!(doubt.source.guest_runs());
}
