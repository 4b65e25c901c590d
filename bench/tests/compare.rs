//! `pageferry-bench compare` on records of real moves.

use pageferry_bench::record::{Record, Spec, save};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn bench() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pageferry-bench"))
}

/// The record of nine moves with a pause in each downtime, so long that the machine's noise is
/// small beside it.
fn measured(directory: &Path, pause: &str) -> PathBuf {
    let out = tempfile::tempdir_in(directory).unwrap().keep();
    let small = ["downtime", "--memory", "64", "--working", "16", "--rate", "200", "--moves", "9"];
    let mut command = bench();
    command
        .args(small)
        .args(["--downtime-max", "100ms", "--plant-pause", pause, "--out"])
        .arg(&out);
    let Output { status, stderr, .. } = command.output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let mut files = std::fs::read_dir(out).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| path.extension().is_some_and(|e| e == "json")).expect("a record")
}

/// What is said of the downtime as a whole.
fn verdict(before: &Path, after: &Path) -> String {
    let Output { status, stdout, stderr } =
        bench().arg("compare").args([before, after]).output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let table = String::from_utf8(stdout).unwrap();
    table
        .lines()
        .find(|line| line.starts_with("pageferry tcp, downtime"))
        .expect("a row")
        .to_owned()
}

#[test]
fn a_slow_down_of_a_tenth_is_found_and_a_repetition_is_no_change() {
    let directory = tempfile::tempdir().unwrap();
    let [first, again, slower] =
        ["400ms", "400ms", "440ms"].map(|pause| measured(directory.path(), pause));
    assert!(
        verdict(&first, &again).ends_with("no change beyond noise"),
        "{}",
        verdict(&first, &again)
    );
    assert!(verdict(&first, &slower).ends_with("WORSE"), "{}", verdict(&first, &slower));
    assert!(verdict(&slower, &first).ends_with("BETTER"), "{}", verdict(&slower, &first));
}

#[test]
fn what_is_no_record_is_named_in_one_line() {
    let Output { status, stderr, .. } =
        bench().args(["compare", "/nowhere.json", "/nowhere.json"]).output().unwrap();
    assert_eq!(status.code(), Some(1));
    let said = String::from_utf8_lossy(&stderr);
    assert!(said.contains("/nowhere.json") && said.lines().count() == 1, "{said}");
}

/// As of `pageferry-bench summary RECORD.json | true`.
#[test]
fn a_reader_that_has_gone_ends_it_quietly() {
    let directory = tempfile::tempdir().unwrap();
    let mut record = Record::begin("peers", "a test".into(), &1).unwrap();
    (0..3).for_each(|turn| record.sample("a", Spec::headline("total", "ms"), turn, 12.5));
    let saved = save::save(&record, directory.path()).unwrap();
    for arguments in [vec!["summary"], vec!["compare", saved.to_str().unwrap()]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = bench();
        let ended = command.args(&arguments).arg(&saved).stdout(writer).output().unwrap();
        assert_eq!(ended.status.code(), Some(0), "{arguments:?}");
        assert!(ended.stderr.is_empty(), "{}", String::from_utf8_lossy(&ended.stderr));
    }
}
