use super::*;

/// Whether there is no KVM to test with. Says so where `scripts/test` repeats it.
pub(super) fn kvm_is_missing(test: &str) -> bool {
    let Err(e) = kvm::open() else { return false };
    let said = format!("NOT RUN: {test}: {}", e.chain());
    eprintln!("{said}");
    if let Some(path) = std::env::var_os("PAGEFERRY_NOT_RUN") {
        use std::io::Write;
        let mut file =
            std::fs::File::options().create(true).append(true).open(path).expect("a file");
        writeln!(file, "{said}").expect("written");
    }
    true
}

#[test]
fn the_probe_ends_and_finds_something_to_trust() {
    if kvm_is_missing("the_probe_ends_and_finds_something_to_trust") {
        return;
    }
    let begun = Instant::now();
    let trust = trust().expect("rings or log");
    println!("{trust:?} in {:?}", begun.elapsed());
    assert!(begun.elapsed() < TRIAL_MAX, "{:?}", begun.elapsed());
}

#[test]
fn the_log_tells_every_page_that_is_written() {
    if kvm_is_missing("the_log_tells_every_page_that_is_written") {
        return;
    }
    in_time("dirty log", try_log).expect("the log");
}

#[test]
#[ignore = "needs rings that are right: the lab machine"]
fn lab_the_rings_of_kvm_are_trusted() {
    let trust = trust().expect("rings or log");
    assert!(
        matches!(trust, Trust::Ring { entries_max, .. } if entries_max >= ENTRIES),
        "{trust:?}"
    );
}
