//! `pageferry-bench simulate` and the shaped cables under it: what it makes is gone afterwards,
//! whatever happened.

use pageferry_bench::record::{CellEnding, Record};
use pageferry_tests::not_run;
use rustix::process::{Pid, Signal, geteuid, kill_process};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For a run of the smallest check, beside other tests.
const RUN_MAX: Duration = Duration::from_secs(240);

/// An account without rights, as Debian numbers it.
const NOBODY: u32 = 65534;

fn simulate(out: &Path, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    command.arg("simulate").args(arguments).arg("--out").arg(out);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn namespaces_of(pid: u32) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return Vec::new() };
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(&format!("pf-bench-{pid}-"))).collect()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + RUN_MAX;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn the_record(directory: &Path) -> Record {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let json: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|e| e == "json")).collect();
    assert_eq!(json.len(), 1, "{json:?}");
    Record::read(&json[0]).unwrap()
}

/// Whether shaped cables can be made here; says so loudly if not.
fn cables(test: &str) -> bool {
    if !geteuid().is_root() {
        not_run(test, "only root may make network namespaces");
        return false;
    }
    true
}

#[test]
fn two_checks_at_a_time_show_every_point_and_leave_nothing_behind() {
    if !cables("two_checks_at_a_time_show_every_point_and_leave_nothing_behind") {
        return;
    }
    let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let arguments = ["--check", "--quick", "--moves", "1", "--gbit", "1"];
    let runs = directories.each_ref().map(|directory| simulate(directory.path(), &arguments));
    for (run, directory) in runs.into_iter().zip(&directories) {
        let pid = run.id();
        let output = run.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(namespaces_of(pid), [] as [String; 0]);
        let record = the_record(directory.path());
        assert_eq!(record.failures, []);
        // Three guests over one cable; and what is no measurement says so in each row.
        let [check, scale] = record.tables.as_slice() else { panic!("{:?}", record.tables) };
        assert_eq!((check.rows.len(), record.model.as_ref().unwrap().points), (3, 3));
        assert!(scale.rows.iter().all(|row| row.iter().any(|cell| cell.contains("MODEL"))));
        // 64 MiB over 1 Gb/s take half a second, whatever else this host does: the cable was
        // shaped.
        for group in record.groups() {
            let figure = |name| record.figure(group, name).unwrap().samples.median();
            assert!(figure("total") > 500.0 && figure("total by the model") > 500.0, "{group}");
        }
    }
}

#[test]
fn a_run_that_is_interrupted_keeps_what_it_has_and_removes_its_cable() {
    if !cables("a_run_that_is_interrupted_keeps_what_it_has_and_removes_its_cable") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let run = simulate(directory.path(), &["--moves", "100"]);
    let pid = run.id();
    wait_until("it made no cable", || namespaces_of(pid).len() == 2);
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::INT).unwrap();
    let output = run.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(namespaces_of(pid), [] as [String; 0]);
    assert!(the_record(directory.path()).interrupted);
}

#[test]
fn what_a_killed_run_left_behind_is_swept_by_the_next() {
    if !cables("what_a_killed_run_left_behind_is_swept_by_the_next") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut run = simulate(directory.path(), &["--moves", "100"]);
    let pid = run.id();
    wait_until("it made no cable", || namespaces_of(pid).len() == 2);
    run.kill().unwrap();
    run.wait().unwrap();
    pageferry_bench::shaped::sweep().unwrap();
    assert_eq!(namespaces_of(pid), [] as [String; 0]);
}

#[test]
fn without_root_one_line_says_so_and_nothing_is_made() {
    if !cables("without_root_one_line_says_so_and_nothing_is_made") {
        return;
    }
    let script = include_bytes!("../../scripts/shaped");
    let mut child = Command::new("bash")
        .args(["-s", "--", "up", "1gbit", "never"])
        .uid(NOBODY)
        .gid(NOBODY)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(script).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.lines().count() == 1 && said.contains("root"), "{said}");
    assert!(!Path::new("/run/netns/pf-never-a").exists());
}

#[test]
fn a_record_that_is_none_of_a_model_is_refused_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("other.json");
    let record = Record::begin("downtime", "another".into(), &1).unwrap();
    std::fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
    let output =
        simulate(directory.path(), &["--from", path.to_str().unwrap()]).wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("no record of simulate"), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "{said}");
}

#[test]
fn a_sweep_fills_its_map_with_real_moves_and_the_model_beside_them() {
    if !cables("a_sweep_fills_its_map_with_real_moves_and_the_model_beside_them") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    command.args([
        "sweep",
        "--quick",
        "--gbit",
        "1",
        "--rates",
        "10,1000",
        "--working",
        "32",
        "--out",
    ]);
    let output = command.arg(directory.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let record = the_record(directory.path());
    assert_eq!(record.failures, []);
    let [real, model, large @ ..] = record.maps.as_slice() else { panic!("{:?}", record.maps) };
    for map in [real, model] {
        // A gigabit carries 120 MB/s: one of these guests writes a tenth of that, the other eight
        // times as much.
        let ending = |row| map.cells.iter().find(|cell| cell.at == (0, row)).unwrap().ending;
        assert_eq!(
            (map.rows.as_slice(), map.cells.len()),
            (["1000".to_owned(), "10".into()].as_slice(), 2)
        );
        assert_eq!(
            (ending(0), ending(1)),
            (CellEnding::Forced, CellEnding::Converged),
            "{}",
            map.title
        );
    }
    assert!(large.len() == 2 && large.iter().all(|map| map.title.contains("MODEL, not measured")));
}

#[test]
fn qemu_s_own_ways_are_swept_over_the_same_cable() {
    const NAME: &str = "qemu_s_own_ways_are_swept_over_the_same_cable";
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    if !repository.join(".cache/guest/initramfs.gz").is_file() {
        return not_run(NAME, "there is no guest: scripts/guest-image makes it");
    }
    if !cables(NAME) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    command
        .current_dir(repository)
        .args(["sweep", "--qemu", "--gbit", "2", "--rates", "10", "--moves", "1"]);
    let output = command.arg("--out").arg(directory.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let record = the_record(directory.path());
    assert_eq!(record.failures, []);
    for title in ["QEMU, measured", "QEMU multifd, measured"] {
        let map = record.maps.iter().find(|map| map.title == title).unwrap();
        // 2 Gb/s carry twenty times what this guest writes.
        assert_eq!(
            map.cells.iter().map(|cell| cell.ending).collect::<Vec<_>>(),
            [CellEnding::Converged]
        );
    }
    // What a booted Linux has touched takes 2 Gb/s a tenth of a second at least, so the cable was
    // shaped for QEMU, too.
    for group in ["QEMU, 2 Gb/s, 10 MB/s", "QEMU multifd, 2 Gb/s, 10 MB/s"] {
        assert!(record.figure(group, "total").unwrap().samples.median() > 100.0, "{group}");
    }
}
