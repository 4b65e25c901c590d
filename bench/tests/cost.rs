//! `pageferry-bench cost`, small: that every row is measured, in table and samples. The figures mean nothing here.

use pageferry_tests::not_run;
use serde_json::Value;
use std::process::{Command, Output};

fn cost(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    command.args(["cost", "--memory", "8"]).args(arguments);
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Table and samples of a run that succeeded.
fn samples(arguments: &[&str]) -> (String, Value) {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("samples");
    let Output { status, stdout, stderr } = cost(arguments).arg("--out").arg(&out).output().unwrap();
    assert!(status.success(), "{}", text(&stderr));
    (text(&stdout).into(), serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap())
}

#[test]
fn every_row_costs_something() {
    let (table, samples) = samples(&["--repeat", "3"]);
    let rows = samples["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 10);
    for row in rows {
        let name = row["name"].as_str().unwrap();
        let page_ns: Vec<_> =
            row["page_ns"].as_array().unwrap().iter().map(|ns| ns.as_f64().unwrap()).collect();
        assert!(page_ns.len() == 3 && page_ns.iter().all(|&ns| ns > 0.0), "{name}: {page_ns:?}");
        assert!(table.lines().any(|line| line.starts_with(name)), "{name}: {table}");
    }
}

#[test]
fn instructions_are_counted_and_a_merged_page_needs_fewer() {
    if let Err(e) = Command::new("valgrind").arg("--version").output() {
        return not_run("instructions_are_counted_and_a_merged_page_needs_fewer", &format!("valgrind: {e}"));
    }
    let (table, samples) = samples(&["--repeat", "1", "--instructions"]);
    let count = |name: &str| {
        let row = samples["rows"].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap();
        row["page_instructions"].as_f64().unwrap()
    };
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
