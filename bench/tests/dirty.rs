//! `pageferry-bench dirty`, small: what this host has is measured, what it has not is a failed row.
//! The figures mean nothing here.

use pageferry_bench::record::Record;
use std::process::{Command, Output};

#[test]
fn every_tracker_has_figures_or_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    let small = [
        "--memories",
        "16",
        "--rates",
        "0,20",
        "--repetitions",
        "3",
        "--window",
        "60ms",
        "--every",
        "15ms",
    ];
    let Output { stderr, .. } =
        command.arg("dirty").args(small).arg("--out").arg(directory.path()).output().unwrap();
    let files = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
    let json = files.into_iter().find(|path| path.extension().is_some_and(|e| e == "json"));
    let record =
        Record::read(&json.unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&stderr))))
            .unwrap();
    let groups = record.groups();
    assert_eq!(groups.len(), 6, "{groups:?}");
    for group in groups {
        let failed = record.failures.iter().find(|failure| failure.group == group);
        let Some(figure) = record.figure(group, "slowdown of the guest") else {
            assert!(
                failed.is_some_and(|f| !f.why.is_empty()),
                "{group} has neither figures nor a reason"
            );
            continue;
        };
        assert_eq!(figure.samples.0.len(), 3, "{group}");
        let pages = record.figure(group, "pages a sync").unwrap().samples.max();
        assert!(pages > 0.0, "{group} wrote and nothing was told");
        assert!(record.figure(group, "sync a page").unwrap().samples.min() > 0.0, "{group}");
    }
}
