//! A guest moved back and forth many times, with cancelled attempts before the first move and one
//! before each other: nothing piles up. Descriptors, threads, resident memory and guardians are, in
//! the same process, as before its first attempt, and in a later one as in the first of its part.
//!
//! Resident memory is that of the process itself (`RssAnon`): pages of the guest that a supervisor
//! has read count for both. It is measured after a first attempt, which brings in what stays.
//!
//! `PAGEFERRY_MOVES=30` for the long form; `scripts/test` makes some.

use pageferry::supervisor::api::State;
use pageferry_engine::report::progress;
use pageferry_tests::look::{self, descriptors, tracked_mappings};
use pageferry_tests::stage::{Stage, Supervisor};
use pageferry_tests::{SOON, eventually, ledger};

/// Moves of the short form.
const MOVES: u32 = 6;
/// Resident memory that a process may have more, in KiB: a receiver remembers its last 64 sessions.
/// Much less than a leaked buffer, lane or thread would be after so many attempts.
const MORE_KIB: u64 = 1 << 10;

/// What a process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Has {
    descriptors: usize,
    threads: usize,
    resident_kib: u64,
}

impl Has {
    fn of(pid: u32) -> Option<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let number = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        Some(Self {
            descriptors: descriptors(pid),
            threads: number("Threads:")? as usize,
            resident_kib: number("RssAnon:")?,
        })
    }

    fn is_as(&self, first: &Self) -> bool {
        self.descriptors <= first.descriptors
            && self.threads <= first.threads
            && self.resident_kib <= first.resident_kib + MORE_KIB
    }
}

/// Waits until a process has no more than `first`: threads and connections end a moment later.
fn settles(what: &str, pid: u32, first: &Has) -> Has {
    let (mut last, deadline) = (None, std::time::Instant::now() + SOON);
    while std::time::Instant::now() < deadline {
        last = Has::of(pid);
        if let Some(has) = last.filter(|has| has.is_as(first)) {
            return has;
        }
        std::thread::sleep(pageferry_tests::LOOK_EVERY);
    }
    panic!("{what} has {last:?}, and the first one had {first:?}");
}

/// One that has come to rest: it has not changed for a while.
fn at_rest(pid: u32) -> Has {
    let (mut last, mut same) = (None, 0);
    eventually("a process at rest", SOON, || {
        let has = Has::of(pid)?;
        let key = Some((has.descriptors, has.threads));
        same = if key == last { same + 1 } else { 0 };
        last = key;
        (same >= 50).then_some(has)
    })
}

/// The supervisor and the QEMU of one end.
fn both(supervisor: &Supervisor) -> [(&'static str, u32); 2] {
    [("the supervisor", supervisor.pid()), ("QEMU", supervisor.qemu())]
}

/// What lives on through a cancelled attempt: the receiver's QEMU does not.
fn three(here: &Supervisor, there: &Supervisor) -> [(&'static str, u32); 3] {
    let [supervisor, qemu] = both(here);
    [supervisor, qemu, ("the receiver", there.pid())]
}

/// An attempt that is cancelled in its rounds.
fn cancelled(stage: &Stage, here: &Supervisor, there: &Supervisor) {
    let attempt = stage.migrate(&here.name, there.address(), &["--bandwidth-max", "10MB"]);
    eventually("the rounds", SOON, || {
        here.status()?
            .progress
            .filter(|progress| progress.stage == progress::Stage::Rounds)
            .map(drop)
    });
    assert_eq!(stage.done(&["cancel", &here.name]).status, Some(0));
    assert_eq!(attempt.end(SOON).status, Some(1));
    there.wait_state(State::Waiting);
}

#[test]
fn many_moves_back_and_forth_leave_every_process_as_at_the_start() {
    let moves =
        std::env::var("PAGEFERRY_MOVES").map_or(MOVES, |text| text.parse().expect("a number"));
    // With an arena for each thread the C library keeps freed memory in whichever it took last, up
    // to 16 times on two cores: with one, what grows is a leak.
    let stage = Stage::new().behind("export MALLOC_ARENA_MAX=1");
    let mut here = stage.run("vm0", &ledger::qemu(&stage, "vm0"), "");
    let mut console = stage.console("vm0");
    let mut written = console.progress_since(0);
    let mut first: Option<[Has; 2]> = None;
    for index in 1..=moves {
        let name = format!("vm{index}");
        let there = stage.receive(&name, &ledger::qemu(&stage, &name), "");
        let mut before = three(&here, &there).map(|(_, pid)| at_rest(pid));
        for attempt in 0..if index == 1 { moves } else { 1 } {
            cancelled(&stage, &here, &there);
            let processes = three(&here, &there);
            if attempt == 0 {
                for ((_, pid), before) in processes.iter().zip(&mut before) {
                    before.resident_kib = before.resident_kib.max(at_rest(*pid).resident_kib);
                }
            }
            for ((what, pid), before) in processes.iter().zip(&before) {
                settles(
                    &format!("{what}, after attempt {attempt} before move {index},"),
                    *pid,
                    before,
                );
            }
        }

        // Only now: the cancelled attempt had a QEMU of its own.
        let next = stage.console(&name);
        let (supervisor, qemu) = (here.pid(), here.qemu());
        let ended = stage.migrate(&here.name, there.address(), &[]).end(SOON);
        assert_eq!(ended.status, Some(0), "move {index}: {}", ended.stderr);
        assert_eq!(here.end(), Some(0));
        (here, console) = (there, next);
        here.wait_state(State::Hosting);
        written = console.progress_since(written);
        assert!(!look::alive(supervisor) && !look::alive(qemu), "the source is gone");
        // The first end that came by a move is what all later ones are measured by.
        match &first {
            None => first = Some(both(&here).map(|(_, pid)| at_rest(pid))),
            Some(first) => {
                for ((what, pid), first) in both(&here).into_iter().zip(first) {
                    settles(&format!("{what} after move {index}"), pid, first);
                }
            }
        }
        eventually("every guardian ends", SOON, || {
            look::processes_with(&["guardian", &stage.path("").display().to_string()])
                .is_empty()
                .then_some(())
        });
        assert_eq!(tracked_mappings(here.qemu()), 0);
    }
    console.verdict();
    println!(
        "{moves} moves; the first end had {first:?}, the last {:?}",
        both(&here).map(|p| Has::of(p.1))
    );
}
