//! `pageferry-bench peers`, small: every way has its turn, one that cannot be is a failed row, and
//! nothing is left behind. The figures mean nothing here.

use pageferry_bench::record::Record;
use pageferry_tests::not_run;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn peers(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    command.current_dir(repository()).arg("peers").args(arguments);
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// What the guest needs, where it is not there.
fn missing() -> Option<String> {
    let beside = Path::new(env!("CARGO_BIN_EXE_pageferry-bench")).with_file_name("pageferry");
    let needed: [(PathBuf, &str); 2] = [
        (repository().join(".cache/guest/vmlinuz"), "scripts/guest-image"),
        (beside, "cargo build -p pageferry"),
    ];
    let absent = needed.into_iter().find(|(file, _)| !file.is_file());
    absent.map(|(file, fix)| format!("{} is not there: {fix} makes it", file.display()))
}

#[test]
fn ways_take_turns_and_one_that_cannot_be_is_a_failed_row() {
    if let Some(why) = missing() {
        return not_run("ways_take_turns_and_one_that_cannot_be_is_a_failed_row", &why);
    }
    let directory = tempfile::tempdir().unwrap();
    let small = [
        "--memory",
        "192",
        "--working",
        "8",
        "--touched",
        "16",
        "--rate",
        "10",
        "--downtime-max",
        "1s",
    ];
    let ways = ["--repetitions", "1", "--ways", "floor,pageferry,qemu-postcopy,qemu-rdma"];
    let mut command = peers(&[&small[..], &ways].concat());
    let mut child = command.arg("--out").arg(directory.path()).spawn().unwrap();
    let id = child.id();
    assert!(child.wait().unwrap().success());

    let files = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
    let json =
        files.into_iter().find(|path| path.extension().is_some_and(|e| e == "json")).unwrap();
    let record = Record::read(&json).unwrap();
    assert_eq!(record.groups(), ["floor", "pageferry", "qemu-postcopy", "qemu-rdma"]);
    let [failure] = record.failures.as_slice() else { panic!("{:?}", record.failures) };
    assert!(failure.group == "qemu-rdma" && failure.why.contains("--rdma-address"), "{failure:?}");
    for group in ["floor", "pageferry", "qemu-postcopy"] {
        for name in ["total", "downtime", "guest gap"] {
            let figure =
                record.figure(group, name).unwrap_or_else(|| panic!("{group} has no {name}"));
            assert!(
                figure.samples.0.len() == 1 && figure.samples.median() > 0.1,
                "{group}: {figure:?}"
            );
        }
    }
    let total = |group| record.figure(group, "total").unwrap().samples.median();
    let ratio =
        record.ratios.iter().find(|r| r.figure == "total" && r.to == "the best of QEMU's").unwrap();
    assert!((ratio.ratio - total("pageferry") / total("qemu-postcopy")).abs() < 1e-9, "{ratio:?}");
    let page = std::fs::read_to_string(json.with_extension("html")).unwrap();
    assert!(page.contains("Side by side") && page.contains("--rdma-address"));

    let shared = std::fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().file_name());
    let ours = format!("pageferry-bench-{id}-");
    let left: Vec<_> = shared.filter(|name| name.to_string_lossy().starts_with(&ours)).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_cannot_be_is_said_at_once_in_one_line() {
    if let Some(why) = missing() {
        return not_run("what_cannot_be_is_said_at_once_in_one_line", &why);
    }
    let wrong: [(&[&str], &str); 5] = [
        (&["--ways", "microvm"], "--accel kvm"),
        (&["--memory", "128", "--working", "64", "--touched", "64"], "--memory 128"),
        (&["--kernel", "/nowhere/vmlinuz"], "--kernel"),
        (&["--rdma-address", "192.0.2.1"], "192.0.2.1"),
        (&["--out", "/proc/nowhere"], "--out"),
    ];
    for (arguments, fix) in wrong {
        let Output { status, stderr, .. } = peers(arguments).output().unwrap();
        assert_eq!(status.code(), Some(1), "{arguments:?}");
        let said = text(&stderr);
        assert!(said.contains(fix) && said.lines().count() == 1, "{said}");
    }
}
