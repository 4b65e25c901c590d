//! What `pageferry microvm` cannot do is refused: exit status 2, one clear line with the fix, and
//! nothing is left. Guests of it that run need KVM: `lab_microvm`.

use pageferry_tests::stage::Stage;

#[track_caller]
fn refused(arguments: &[&str], texts: &[&str]) {
    let stage = Stage::new();
    let ended = stage.done(&[&["microvm", "vm"], arguments].concat());
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    let lines: Vec<&str> = ended.stderr.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(lines.len(), 1, "one line: {}", ended.stderr);
    for text in texts {
        assert!(lines[0].contains(text), "{text:?} is not in {:?}", lines[0]);
    }
    let left = ["vm.sock", "vm.json"].map(|file| stage.path(file).exists());
    assert_eq!(left, [false, false]);
}

/// Refused by the parser of the command line, in its words.
#[track_caller]
fn not_understood(arguments: &[&str], text: &str) {
    let ended = Stage::new().done(&[&["microvm", "vm"], arguments].concat());
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains(text), "{text:?} is not in {:?}", ended.stderr);
}

#[test]
fn memory_that_cannot_be() {
    refused(&["--payload", "--memory", "0"], &["0 bytes of memory", "2 MiB"]);
    refused(&["--payload", "--memory", "8388609"], &["8388609 bytes", "whole pages of 4 KiB"]);
    refused(
        &["--payload", "--memory", "5M", "--huge-pages"],
        &["5242880 bytes", "huge pages of 2 MiB"],
    );
    refused(&["--payload", "--memory", "100000T"], &["this host has", "--memory"]);
    not_understood(&["--payload", "--memory", "much"], "such as 512M");
}

#[test]
fn vcpus_that_cannot_be() {
    for count in ["0", "9", "4294967295"] {
        refused(&["--payload", "--cpus", count], &[&format!("{count} vCPUs"), "1 to 8"]);
    }
}

#[test]
fn a_kernel_that_is_none() {
    refused(&["--kernel", "/nowhere/vmlinuz"], &["/nowhere/vmlinuz", "No such file"]);
    refused(&["--kernel", "/"], &["it is not a file"]);
    refused(
        &["--kernel", "/proc/self/exe", "--initrd", "/nowhere/initrd"],
        &["initial RAM disk /nowhere/initrd", "No such file"],
    );
}

#[test]
fn listening_off_loopback_without_a_word() {
    refused(&["--listen", "0.0.0.0:0"], &["not a loopback address", "--insecure"]);
}

#[test]
fn options_that_make_no_sense_together() {
    not_understood(&[], "--kernel");
    not_understood(&["--payload", "--listen", "127.0.0.1:0"], "cannot be used with");
    refused(&["--payload", "--append", "quiet"], &["--append go with --kernel"]);
    refused(&["--listen", "127.0.0.1:0", "--payload-rate", "5"], &["go with --payload"]);
    refused(&["--payload", "--insecure"], &["--insecure goes with --listen"]);
    not_understood(&["--payload", "--payload-rate", "1KB"], "less than one page");
}
