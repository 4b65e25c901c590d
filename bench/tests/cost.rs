//! `pageferry-bench cost`, small: that every row is measured, in table and samples. The figures
//! mean nothing here.

use pageferry_bench::record::Record;
use pageferry_tests::not_run;
use std::process::{Command, Output};

fn cost(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    command.args(["cost", "--memory", "8"]).args(arguments);
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Table and record of a run that succeeded.
fn record(arguments: &[&str]) -> (String, Record) {
    let directory = tempfile::tempdir().unwrap();
    let Output { status, stdout, stderr } =
        cost(arguments).arg("--out").arg(directory.path()).output().unwrap();
    assert!(status.success(), "{}", text(&stderr));
    let files = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
    let json =
        files.into_iter().find(|path| path.extension().is_some_and(|e| e == "json")).unwrap();
    (text(&stdout).into(), Record::read(&json).unwrap())
}

#[test]
fn every_row_costs_something() {
    let (table, record) = record(&["--repeat", "3"]);
    let groups = record.groups();
    assert_eq!(groups.len(), 10);
    for name in groups {
        let page_ns = &record.figure(name, "page").unwrap().samples;
        assert!(page_ns.0.len() == 3 && page_ns.min() > 0.0, "{name}: {page_ns:?}");
        assert!(table.lines().any(|line| line.starts_with(name)), "{name}: {table}");
    }
}

#[test]
fn instructions_are_counted_and_a_merged_page_needs_fewer() {
    if let Err(e) = Command::new("valgrind").arg("--version").output() {
        return not_run(
            "instructions_are_counted_and_a_merged_page_needs_fewer",
            &format!("valgrind: {e}"),
        );
    }
    let (table, record) = record(&["--repeat", "1", "--instructions"]);
    let count = |name: &str| record.figure(name, "instructions a page").unwrap().samples.median();
    let (scattered, merged) = (count("scattered-later-1"), count("contiguous-later-1"));
    assert!(1.0 < merged && merged < scattered && scattered < 1e5, "{table}");
}

#[test]
fn without_valgrind_one_line_tells_the_mend() {
    let Output { status, stdout, stderr } =
        cost(&["--instructions"]).env("PATH", "/nowhere").output().unwrap();
    assert_eq!(status.code(), Some(1));
    assert_eq!(text(&stdout), "");
    assert_eq!(text(&stderr).lines().count(), 1, "{}", text(&stderr));
    assert!(text(&stderr).contains("valgrind") && text(&stderr).contains("--instructions"));
}
