//! The layout of the house: imports go one way, between crates and within them, and the engine
//! knows nobody who uses it.

use pageferry_tests::layout::{Crate, Kept, bare, without_tests};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Every crate, by its folder, with the other crates of the project that it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("transport/rdma-sys", &[]),
    ("transport", &["pageferry-rdma-sys"]),
    ("engine", &["pageferry-transport"]),
    ("engine/guests/qemu", &["pageferry-engine", "pageferry-transport"]),
    ("engine/guests/microvm", &["pageferry-engine", "pageferry-transport"]),
    ("engine/guests/synthetic", &["pageferry-engine", "pageferry-transport"]),
    ("engine/app", GUESTS_AND_BELOW),
    ("bench/workload", &[]),
    ("bench", EVERYTHING),
    ("tests", EVERYTHING),
];

const GUESTS_AND_BELOW: &[&str] = &[
    "pageferry-engine",
    "pageferry-microvm",
    "pageferry-qemu",
    "pageferry-synthetic",
    "pageferry-transport",
];

const EVERYTHING: &[&str] = &[
    "pageferry",
    "pageferry-engine",
    "pageferry-microvm",
    "pageferry-qemu",
    "pageferry-rdma-sys",
    "pageferry-synthetic",
    "pageferry-tests",
    "pageferry-transport",
    "pageferry-workload",
];

/// What an embedder does not have to build.
const NOT_FOR_EMBEDDERS: &[&str] = &["clap", "indicatif", "linux-loader", "tracing-subscriber"];

/// What the engine does not know.
const VMMS: &[&str] = &["qemu", "qmp", "microvm", "libvirt"];

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in it")
}

/// The crates that a crate's manifest names, for whatever purpose.
fn dependencies(folder: &str) -> Vec<String> {
    let path = repository().join(folder).join("Cargo.toml");
    let manifest = std::fs::read_to_string(&path).expect("every crate has a manifest");
    let mut names = Vec::new();
    let mut is_inside = false;
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            is_inside = line.ends_with("dependencies]");
        } else if is_inside && !line.starts_with('#') {
            names.extend(
                line.split(['.', ' ', '=']).next().filter(|n| !n.is_empty()).map(Into::into),
            );
        }
    }
    names
}

/// The roots of a crate's files.
fn roots(folder: &str) -> Vec<PathBuf> {
    let source = repository().join(folder).join("src");
    ["lib.rs", "main.rs"]
        .map(|name| source.join(name))
        .into_iter()
        .filter(|p| p.is_file())
        .collect()
}

/// The files below a folder whose names end so, in order.
fn files(folder: &Path, end: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("it is a folder").flatten() {
        let path = entry.path();
        let is_made = matches!(entry.file_name().to_str(), Some("target" | ".cache" | ".git"));
        if path.is_dir() && !is_made {
            found.extend(files(&path, end));
        } else if path.to_string_lossy().ends_with(end) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn every_crate_of_the_project_has_its_place() {
    let manifest = std::fs::read_to_string(repository().join("Cargo.toml")).expect("a manifest");
    let members = manifest.split("members = [").nth(1).and_then(|m| m.split(']').next());
    let members: BTreeSet<&str> = members.expect("members").split('"').skip(1).step_by(2).collect();
    assert_eq!(members, MAY_USE.iter().map(|(folder, _)| *folder).collect());
}

#[test]
fn crates_are_used_one_way() {
    for (folder, may_use) in MAY_USE {
        for name in dependencies(folder).iter().filter(|name| name.starts_with("pageferry")) {
            assert!(may_use.contains(&name.as_str()), "{folder} must not use {name}");
        }
    }
}

#[test]
fn an_embedder_builds_no_command_line_and_no_loader() {
    for folder in ["engine", "transport"] {
        for name in dependencies(folder) {
            assert!(!NOT_FOR_EMBEDDERS.contains(&name.as_str()), "{folder} must not use {name}");
        }
    }
}

#[test]
fn no_files_of_a_crate_import_each_other_in_a_circle() {
    let mut circles = Vec::new();
    for root in MAY_USE.iter().flat_map(|(folder, _)| roots(folder)) {
        let read = Crate::read(&root);
        circles.extend(read.circles().into_iter().map(|c| format!("{}: {c}", root.display())));
    }
    assert!(
        circles.is_empty(),
        "move what they share to a file of its own:\n{}",
        circles.join("\n")
    );
}

#[test]
fn source_and_destination_do_not_import_each_other() {
    let engine = Crate::read(&repository().join("engine/src/lib.rs"));
    let is_of = |file: &str, side: &str| file == side || file.starts_with(&format!("{side}::"));
    for (from, to) in engine.edges() {
        for (one, other) in [("source", "destination"), ("destination", "source")] {
            assert!(!(is_of(&from, one) && is_of(&to, other)), "{from} imports {to}");
        }
    }
    // Both are there, and import what they share.
    for (from, to) in [("source", "source::attempt"), ("destination", "destination::session")] {
        assert!(engine.edges().contains(&(from.into(), to.into())), "{:?}", engine.edges());
    }
    assert!(engine.files() > 90, "{} files were read", engine.files());
}

#[test]
fn the_engine_names_no_vmm() {
    for path in files(&repository().join("engine/src"), ".rs") {
        // Tests may play any VMM.
        if path.ends_with("tests.rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("it can be read");
        let code = without_tests(&bare(&text, Kept::CodeAndStrings)).to_lowercase();
        for vmm in VMMS {
            assert!(!code.contains(vmm), "{} names {vmm}", path.display());
        }
    }
}
