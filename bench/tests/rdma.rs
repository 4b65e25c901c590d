//! `pageferry-bench rdma` where it cannot measure: one line says why. What it measures needs an
//! RDMA device, as in the lab machine.

use std::process::{Command, Output};

fn fails(rdma: &mut Command) -> String {
    let Output { status, stdout, stderr } = rdma.output().unwrap();
    assert_eq!(status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&stdout), "");
    let said = String::from_utf8(stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

fn rdma(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    command.arg("rdma").args(arguments);
    command
}

#[test]
fn without_perftest_one_line_tells_the_mend() {
    let said = fails(rdma(&[]).env("PATH", "/nowhere"));
    assert!(said.contains("ib_write_bw") && said.contains("scripts/setup --lab"), "{said}");
}

#[test]
fn without_a_device_one_line_says_so() {
    // A stand-in, so that it comes as far as that on any host.
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("ib_write_bw");
    std::fs::write(&program, "#!/bin/sh\necho Version: 6\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&program, mode).unwrap();
    // Addresses for documentation (RFC 5737): no device has them.
    let path = format!("{}:/usr/bin:/bin", directory.path().display());
    let said = fails(rdma(&["--from", "192.0.2.1", "--to", "192.0.2.2"]).env("PATH", path));
    assert!(said.contains("RDMA") || said.contains("libibverbs"), "{said}");
}

#[test]
fn a_size_that_is_no_page_is_refused() {
    assert!(fails(&mut rdma(&["--sizes", "4096,5000"])).contains("--sizes: 5000"));
}
