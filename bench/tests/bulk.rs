//! `pageferry-bench bulk`, small: that every way moves its bytes and shows in table and samples.
//! The figures mean nothing here.

use pageferry_bench::record::Record;
use pageferry_tests::not_run;
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
    let small = ["--lanes", "2", "--sizes", "65536", "--scatter", "gaps,random", "--repeat", "2"];
    let little = ["--total", "33554432", "--region", "8388608"];
    let mut command = bulk(&[&small[..], &little].concat());
    let Output { status, stdout, stderr } =
        command.arg("--out").arg(directory.path()).output().unwrap();
    assert!(status.success(), "{}", text(&stderr));
    let files = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
    let json =
        files.into_iter().find(|path| path.extension().is_some_and(|e| e == "json")).unwrap();
    let record = Record::read(&json).unwrap();
    assert_eq!(record.failures, []);
    let wanted = [
        "raw pump, 2 lanes",
        "link, 2 lanes, 65536 bytes, gaps",
        "link, 2 lanes, 65536 bytes, gaps, zero-copy never",
        "link, 2 lanes, 65536 bytes, gaps, zero-copy always",
        "link, 2 lanes, 65536 bytes, random",
        "iperf3 -P 1",
        "iperf3 -P 2 -l 1M",
    ];
    for group in wanted {
        let figure =
            record.figure(group, "goodput").unwrap_or_else(|| panic!("{group} is missing"));
        assert_eq!(figure.samples.0.len(), 2, "{group}");
        assert!(figure.samples.min() > 1.0, "{group}: {figure:?}");
        assert!(
            text(&stdout).lines().any(|line| line.starts_with(group)),
            "{group}: {}",
            text(&stdout)
        );
    }
    assert!(json.with_extension("html").exists());
}

#[test]
fn without_iperf3_one_line_tells_the_mend() {
    let Output { status, stdout, stderr } = bulk(&[]).env("PATH", "/nowhere").output().unwrap();
    assert_eq!(status.code(), Some(1));
    assert_eq!(text(&stdout), "");
    assert_eq!(text(&stderr).lines().count(), 1, "{}", text(&stderr));
    assert!(text(&stderr).contains("iperf3") && text(&stderr).contains("scripts/setup --bench"));
}
