//! What the tests with real processes stand on.
//!
//! ```text
//!   Stage        a runtime directory of its own; everything started in it ends with it, also on panic
//!   Supervisor   `pageferry run`, `receive` or `attach`: its pid, its words, its QEMU
//!   Moving       `pageferry migrate` under way
//!   Proxy        a TCP proxy between source and destination that can cut and stall connections
//!   random       numbers by seed
//!   recorded     conversations of each protocol version that is still spoken
//!   look         what /proc and a second QMP monitor say about a QEMU
//!   throttle     a bound on the speed of a disk
//!   ledger       a guest of two kilobytes that checks its memory
//!   huge_pages   huge pages that a test has for itself
//!   layout       which file of a crate imports which
//!   slow_fs      a file system in user space that answers slowly
//!   linux        the Linux guest of docs/guest.md
//!   console      a guest's serial port
//! ```
//!
//! Every wait has a deadline and panics with everything that was said until then. A test that
//! cannot run here says so through [`not_run`].

pub mod console;
pub mod huge_pages;
pub mod layout;
pub mod ledger;
pub mod linux;
pub mod look;
pub mod proxy;
pub mod random;
pub mod recorded;
pub mod simulation;
pub mod slow_fs;
pub mod stage;
pub mod throttle;
pub mod words;

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// For anything that takes milliseconds on an idle machine.
pub const SOON: Duration = Duration::from_secs(60);
/// For anything that ends at a deadline of the engine's own: the longest is asking again after
/// Commit (20 s for the first answer, 60 s of asking, 20 s for the last one).
pub const IN_THE_END: Duration = Duration::from_secs(150);
/// Pause between two looks at something that tells of itself in no other way.
pub const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Says that a test could not run here, and why, where scripts/test repeats it at its end.
pub fn not_run(name: &str, why: &str) {
    eprintln!("NOT RUN: {name}: {why}");
    if let Some(path) = std::env::var_os("PAGEFERRY_NOT_RUN") {
        let mut file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(path)
            .expect("a file to say so");
        writeln!(file, "NOT RUN: {name}: {why}").expect("written");
    }
}

/// Whether this is the lab machine.
#[must_use]
pub fn in_the_lab() -> bool {
    std::env::var_os("PAGEFERRY_LAB").is_some()
}

/// For a test that must run in the lab machine, and whose `#[ignore]` somebody has overruled.
///
/// # Panics
/// Outside the lab machine, where the test would change the host's network and devices.
pub fn refuse_outside_the_lab() {
    assert!(
        in_the_lab(),
        "this test runs in the lab machine only: scripts/test WORD, or scripts/lab -- TEST_BINARY --ignored"
    );
}

/// Asks until there is an answer; panics at the deadline.
pub fn eventually<T>(what: &str, wait: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + wait;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {} s: {what}", wait.as_secs());
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The `pageferry` that was built next to this test.
///
/// # Panics
/// If it is missing, or older than its sources.
#[must_use]
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("the test has a path");
    let directory =
        test.parent().and_then(std::path::Path::parent).expect("target/PROFILE/deps/TEST");
    let release = if directory.ends_with("release") { " --release" } else { "" };
    let binary = directory.join("pageferry");
    let build = format!("build it first: cargo build{release} -p pageferry");
    let built = match std::fs::metadata(&binary).and_then(|m| m.modified()) {
        Ok(built) => built,
        Err(_) => panic!("{} is missing; {build}", binary.display()),
    };
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    for sources in ["engine", "transport"] {
        if let Some(newer) = newer_than(&root.join(sources), built) {
            panic!("{} is older than {}; {build}", binary.display(), newer.display());
        }
    }
    binary
}

fn newer_than(directory: &std::path::Path, time: std::time::SystemTime) -> Option<PathBuf> {
    std::fs::read_dir(directory).ok()?.filter_map(Result::ok).find_map(|entry| {
        let metadata = entry.metadata().ok()?;
        if metadata.is_dir() {
            return newer_than(&entry.path(), time);
        }
        let is_source = entry.path().components().any(|part| part.as_os_str() == "src");
        (is_source && metadata.modified().ok()? > time).then(|| entry.path())
    })
}
