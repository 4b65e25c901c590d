//! The wall clock is stepped in the middle of a move, as by an operator or a time server. QEMU
//! stamps its events with that clock. Only in the lab machine: its clock is nobody else's.

use pageferry_tests::stage::{BARE, Stage};
use pageferry_tests::{SOON, refuse_outside_the_lab};
use std::process::Command;
use std::time::{Duration, Instant};

/// One move, in a machine that is emulated, is much faster than the 30 s that QEMU's end of the
/// stream is waited for.
const MOVE_MAX: Duration = Duration::from_secs(15);

fn step_clock(seconds: i64) {
    let date = format!("{seconds:+} seconds");
    let stepped = Command::new("date").args(["--set", &date]).output().expect("date runs");
    assert!(stepped.status.success(), "{stepped:?}");
}

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn a_wall_clock_that_is_stepped_in_the_switchover_holds_up_nobody() {
    refuse_outside_the_lab();
    for seconds in [-3600, 3600] {
        let stage = Stage::new();
        let mut source = stage.run("src", BARE, "switchover");
        source.wait_guest_runs();
        let destination = stage.receive("dst", BARE, "");
        let moving = stage.migrate("src", destination.address(), &["--downtime-max", "10s"]);
        source.wait_held("switchover");
        step_clock(seconds);
        let begun = Instant::now();
        stage.release();
        let ended = moving.end(SOON);
        assert_eq!(ended.status, Some(0), "{seconds}: {}", ended.stderr);
        assert!(begun.elapsed() < MOVE_MAX, "{seconds}: {:?}", begun.elapsed());
        assert_eq!(source.end(), Some(0));
        destination.wait_guest_runs();
    }
}
