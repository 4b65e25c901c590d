//! `pageferry-bench bulk`, small: that every way moves its bytes and shows in table and samples. The figures
//! mean nothing here.

use pageferry_tests::not_run;
use serde_json::Value;
use std::process::{Command, Output};

fn bulk(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    command.arg("bulk").args(arguments);
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn link_pump_and_iperf3_take_turns() {
    if let Err(e) = Command::new("iperf3").arg("--version").output() {
        let why = format!("iperf3 cannot be started ({e}): scripts/setup --bench installs it");
        return not_run("link_pump_and_iperf3_take_turns", &why);
    }
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("samples");
    let out = out.to_str().unwrap();
    let small = ["--lanes", "2", "--repeat", "2", "--total", "33554432", "--region", "8388608", "--out", out];
    let Output { status, stdout, stderr } = bulk(&small).output().unwrap();
    assert!(status.success(), "{}", text(&stderr));
    let samples: Value = serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap();
    let rows = samples["rows"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    let wanted = ["raw pump", "link", "link, zero-copy never", "link, zero-copy always", "iperf3 -P 1"];
    assert_eq!(names[..5], wanted);
    assert!(names.contains(&"iperf3 -P 2 -l 1M"), "{names:?}");
    for (name, row) in names.iter().zip(rows) {
        let rates: Vec<_> =
            row["samples"].as_array().unwrap().iter().map(|s| s["mb_per_s"].as_f64().unwrap()).collect();
        assert_eq!(rates.len(), 2, "{name}");
        assert!(rates.iter().all(|rate| *rate > 1.0), "{name}: {rates:?}");
        assert!(text(&stdout).lines().any(|line| line.starts_with(name)), "{name}: {}", text(&stdout));
    }
}

#[test]
fn without_iperf3_one_line_tells_the_mend() {
    let Output { status, stdout, stderr } = bulk(&[]).env("PATH", "/nowhere").output().unwrap();
    assert_eq!(status.code(), Some(1));
    assert_eq!(text(&stdout), "");
    assert_eq!(text(&stderr).lines().count(), 1, "{}", text(&stderr));
    assert!(text(&stderr).contains("iperf3") && text(&stderr).contains("scripts/setup --bench"));
}
