//! `pageferry-bench downtime` measures itself: a pause of known length is found wherever it must
//! show.

use pageferry_bench::record::Record;
use pageferry_tests::not_run;
use rustix::process::{Pid, Signal, geteuid, kill_process};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Small, so that moves take some milliseconds; allowed to be paused for longer than what is
/// planted.
const SMALL: [&str; 7] = ["downtime", "--memory", "64", "--working", "16", "--rate", "200"];

fn downtime(out: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    command.args(SMALL).args(arguments).arg("--out").arg(out);
    command
}

fn the_record(directory: &Path) -> Record {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let json: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|e| e == "json")).collect();
    assert_eq!(json.len(), 1, "{json:?}");
    Record::read(&json[0]).unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn a_planted_pause_is_found_by_engine_guest_and_client_within_5_percent() {
    const PLANTED_MS: f64 = 500.0;
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["--moves", "7", "--plant-pause", "500ms", "--downtime-max", "100ms"];
    let Output { status, stderr, .. } = downtime(directory.path(), &arguments).output().unwrap();
    assert!(status.success(), "{}", text(&stderr));
    let record = the_record(directory.path());
    assert_eq!(record.failures, []);
    assert_eq!(record.migrations.len(), 7);
    for name in ["downtime", "load", "guest gap", "client gap"] {
        let found = record.distributions.iter().find(|d| d.name == name).unwrap();
        let off = found.percentiles_ms[0] / PLANTED_MS - 1.0;
        assert!((0.0..0.05).contains(&off), "{name}: {found:?}");
    }
    // One wait in two thousand is the longest, and every tick of the pause has its own: no
    // coordinated omission.
    let requests =
        record.distributions.iter().find(|d| d.name == "every request of the client").unwrap();
    let long: u64 =
        requests.counts_us.iter().filter(|(us, _)| *us >= 250_000).map(|(_, count)| count).sum();
    assert!(
        (7 * 240..7 * 290).contains(&long),
        "{long} waits of 250 ms and more in 7 pauses of 500 ms"
    );
}

#[test]
fn what_was_measured_before_an_interruption_is_kept() {
    for signal in [Signal::INT, Signal::HUP] {
        interrupted_by(signal);
    }
}

fn interrupted_by(signal: Signal) {
    let directory = tempfile::tempdir().unwrap();
    let mut child = downtime(directory.path(), &["--moves", "5000"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
    // The first signal that is heard ends it; before it listens, nothing was measured and the
    // default ends it.
    let deadline = Instant::now() + Duration::from_secs(60);
    let listens = || {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let caught =
            status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or_default();
        // SIGHUP is the last that it begins to listen for, and the first bit.
        u64::from_str_radix(caught.trim(), 16).is_ok_and(|caught| caught & 1 != 0)
    };
    while !listens() {
        assert!(Instant::now() < deadline, "it does not listen for signals");
        std::thread::yield_now();
    }
    kill_process(pid, signal).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "an interrupted run is no success");
    let record = the_record(directory.path());
    assert!(record.interrupted);
    assert!(record.migrations.len() < 5000);
}

/// The processes of a run, by what it has put into their environment.
fn processes_of(run: u32) -> usize {
    let mark = format!("PAGEFERRY_BENCH_RUN={run}");
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let environments = entries.filter_map(|entry| std::fs::read(entry.path().join("environ")).ok());
    environments
        .filter(|all| all.split(|byte| *byte == 0).any(|word| word == mark.as_bytes()))
        .count()
}

/// The files of a run in this directory.
fn files_of(run: u32, directory: &Path, start: &str) -> usize {
    let start = format!("{start}{run}-");
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&start)).count()
}

#[test]
fn a_run_that_is_killed_leaves_nothing_behind() {
    const NAME: &str = "a_run_that_is_killed_leaves_nothing_behind";
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let beside = Path::new(env!("CARGO_BIN_EXE_pageferry-bench")).with_file_name("pageferry");
    for file in [repository.join(".cache/guest/vmlinuz"), beside] {
        if !file.is_file() {
            return not_run(NAME, &format!("{} is not there", file.display()));
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    command
        .current_dir(repository)
        .args(["downtime", "--guest", "linux", "--moves", "50", "--out"]);
    command
        .arg(directory.path())
        .env("TMPDIR", directory.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let run = child.id();
    let found = || {
        let memory = files_of(run, Path::new("/dev/shm"), "pageferry-bench-");
        let sockets = files_of(run, directory.path(), "pageferry-bench-");
        (processes_of(run), memory, sockets, files_of(run, Path::new("/run/netns"), "pf-bench-"))
    };
    let wait_for = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done() {
            assert!(
                Instant::now() < deadline,
                "{what}: {:?} processes, memory, sockets, namespaces",
                found()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    // It, its supervisor or QEMU, the guest's memory, and the network where it may be made.
    wait_for("it has begun", &|| {
        let (processes, memory, sockets, namespaces) = found();
        processes >= 2 && memory >= 1 && sockets >= 1 && (namespaces >= 1 || !geteuid().is_root())
    });
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("it is gone", &|| found() == (0, 0, 0, 0));
}

#[test]
fn a_linux_guest_is_moved_and_its_heartbeats_are_heard() {
    const NAME: &str = "a_linux_guest_is_moved_and_its_heartbeats_are_heard";
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let beside = Path::new(env!("CARGO_BIN_EXE_pageferry-bench")).with_file_name("pageferry");
    for (file, fix) in [
        (repository.join(".cache/guest/vmlinuz"), "scripts/guest-image"),
        (beside, "cargo build -p pageferry"),
    ] {
        if !file.is_file() {
            return not_run(NAME, &format!("{} is not there: {fix} makes it", file.display()));
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    // The guest is found from wherever it is called.
    command.current_dir(directory.path());
    command.args(["downtime", "--guest", "linux", "--moves", "2", "--out"]);
    let Output { status, stderr, .. } = command.arg(directory.path()).output().unwrap();
    assert!(status.success(), "{}", text(&stderr));
    let record = the_record(directory.path());
    assert_eq!(record.failures, []);
    let figure = |name: &str| record.figure("pageferry tcp", name).unwrap();
    assert_eq!(figure("guest gap").samples.0.len(), 2);
    // The guest beat neither while it was paused nor less than a millisecond apart.
    for (gap, downtime) in figure("guest gap").samples.0.iter().zip(&figure("downtime").samples.0) {
        assert!(*gap > 1.0 && *downtime > 0.5, "{gap} {downtime}");
    }
    // A client asks over a bridge where one may be made; where not, the run says why, and goes on
    // without.
    match record.figure("pageferry tcp", "client gap") {
        Some(gaps) => {
            assert!(geteuid().is_root() && gaps.samples.0.len() == 2);
            for (gap, downtime) in gaps.samples.0.iter().zip(&figure("downtime").samples.0) {
                // The engine's downtime ends when the source hears of it, the client's perhaps a
                // little before.
                assert!(*gap > downtime / 2.0 && *gap < 10_000.0, "{gap} {downtime}");
            }
        }
        None => {
            assert!(!geteuid().is_root());
            assert!(
                record.notes.iter().any(|note| note.contains("No client asks")),
                "{:?}",
                record.notes
            );
        }
    }
}

#[test]
fn what_cannot_be_is_said_at_once_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let wrong: [(&[&str], &str); 7] = [
        (&["--guest", "linux", "--threads", "2"], "--guest synthetic"),
        (
            &["--guest", "microvm", "--transport", "rdma", "--address", "127.0.0.2"],
            "--transport rdma",
        ),
        (&["--guest", "microvm", "--threads", "2"], "--guest microvm"),
        (&["--pattern", "hot-cold"], "--guest payload"),
        (&["--working", "65"], "--memory 64"),
        (&["--transport", "rdma"], "--address"),
        (&["--address", "192.0.2.1"], "192.0.2.1"),
    ];
    for (arguments, fix) in wrong {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
        let ended = command
            .args(["downtime", "--memory", "64", "--out"])
            .arg(directory.path())
            .args(arguments)
            .output();
        let Output { status, stderr, .. } = ended.unwrap();
        assert_eq!(status.code(), Some(1), "{arguments:?}");
        let said = text(&stderr);
        assert!(said.contains(fix) && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn a_downtime_of_nothing_is_bad_usage() {
    for command in ["downtime", "peers", "sweep"] {
        let mut bench = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
        let Output { status, stderr, .. } =
            bench.args([command, "--downtime-max", "0ms"]).output().unwrap();
        assert_eq!(status.code(), Some(2), "{command}");
        assert!(text(&stderr).contains("paused for some milliseconds"), "{}", text(&stderr));
    }
}
