//! What the scripts, and the operator's page, promise of themselves, as far as it takes no machine
//! to see it.

use pageferry_tests::not_run;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Runs scripts/lab with a QEMU that ends at once, by these commands of a shell. Returns its exit
/// status, what it said, and how often QEMU was started; nothing where the machine's kernel is not
/// there.
fn lab_with_a_qemu_that(ends: &str) -> Option<(Option<i32>, String, usize)> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in it");
    if !repository.join(".cache/lab/kernel/vmlinuz").exists() {
        not_run("the lab machine's boot", "its kernel is not there; scripts/lab makes it");
        return None;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let (qemu, starts) =
        (directory.path().join("qemu-system-x86_64"), directory.path().join("starts"));
    // scripts/setup asks whether it is new enough.
    let version = "[ \"$1\" != --version ] || PATH=${PATH#*:} exec qemu-system-x86_64 --version";
    let script = format!("#!/bin/sh\n{version}\necho >>{}\n{ends}\n", starts.display());
    std::fs::write(&qemu, script).expect("written");
    std::fs::set_permissions(&qemu, std::fs::Permissions::from_mode(0o700)).expect("executable");
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH").expect("a PATH"));
    let ended = Command::new(repository.join("scripts/lab"))
        .args(["--", "true"])
        .env("PATH", path)
        .output()
        .expect("the script runs");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    Some((
        ended.status.code(),
        said,
        std::fs::read_to_string(starts).expect("it was started").lines().count(),
    ))
}

#[test]
fn a_crash_of_the_lab_machines_qemu_at_boot_is_tried_again_and_said() {
    let crash = "echo 'iotlb_to_section: Assertion failed' >&2; ulimit -c 0; kill -ABRT $$";
    let Some((status, said, starts)) = lab_with_a_qemu_that(crash) else { return };
    assert_eq!((status, starts), (Some(125), 3), "{said}");
    for text in [
        "booting it anew, 2 of 3",
        "booting it anew, 3 of 3",
        "in each of 3 boots",
        "iotlb_to_section",
    ] {
        assert!(said.contains(text), "{text:?} is not in {said}");
    }
}

#[test]
fn what_the_lab_machines_qemu_refuses_is_not_tried_again() {
    let Some((status, said, starts)) = lab_with_a_qemu_that("echo 'no such option' >&2; exit 1")
    else {
        return;
    };
    assert_eq!((status, starts), (Some(125), 1), "{said}");
    assert!(said.contains("QEMU's exit status is 1") && said.contains("no such option"), "{said}");
}

/// All that the engine's sources say, with texts that go on in the next line in one.
fn sources(directory: &Path, text: &mut String) {
    for entry in std::fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let file = std::fs::read_to_string(&path).expect("readable");
            let mut parts = file.split("\\\n");
            text.push_str(parts.next().unwrap_or_default());
            parts.for_each(|part| text.push_str(part.trim_start()));
        }
    }
}

/// Who looks up what is on the screen must find it.
#[test]
fn the_words_of_each_refusal_on_the_operators_page_are_those_that_are_said() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in it");
    let mut said = String::new();
    sources(&repository.join("engine"), &mut said);
    let page = std::fs::read_to_string(repository.join("docs/operations.md")).expect("the page");
    let section = page
        .split("\n## ")
        .find(|section| section.starts_with("What is refused"))
        .expect("its section");
    let rows: Vec<_> = section.lines().filter(|line| line.starts_with("| `")).collect();
    assert!(rows.len() >= 15, "{} rows", rows.len());
    for row in rows {
        let cells: Vec<_> = row.split(" | ").collect();
        assert_eq!(cells.len(), 5, "{row}");
        for words in cells[0].split('`').skip(1).step_by(2).flat_map(|message| message.split("..."))
        {
            assert!(said.contains(words.trim()), "{:?} is said nowhere", words.trim());
        }
        for option in cells[4].split(['`', ' ']).filter(|word| word.starts_with("--")) {
            assert!(
                said.contains(option) || said.contains(&option[2..].replace('-', "_")),
                "{option} is no option"
            );
        }
    }
}
