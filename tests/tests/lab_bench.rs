//! The bench that compares ways to move a guest, under the lab machine's KVM: that each way is
//! measured, not how fast it is.

use pageferry_tests::{binary, refuse_outside_the_lab};
use std::process::Command;

#[test]
#[ignore = "runs in the lab machine: scripts/test lab"]
fn peers_measures_microvm_by_ring_and_log_beside_qemu_under_kvm() {
    refuse_outside_the_lab();
    let bench = binary().with_file_name("pageferry-bench");
    assert!(bench.exists(), "cargo build -p pageferry-bench makes {}", bench.display());
    // The machine writes back below the repository's directory only; the record is not wanted.
    let out = tempfile::tempdir().expect("a directory");
    let ended = Command::new(&bench)
        .args([
            "peers",
            "--accel",
            "kvm",
            "--memory",
            "96",
            "--working",
            "4",
            "--touched",
            "8",
            "--rate",
            "2",
        ])
        .args(["--beat", "20ms", "--downtime-max", "300ms", "--repetitions", "1"])
        .args(["--tracking", "ring,log", "--ways", "microvm,qemu-low-downtime", "--out"])
        .arg(out.path())
        .output()
        .expect("it starts");
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&ended.stdout),
        String::from_utf8_lossy(&ended.stderr)
    );
    assert!(ended.status.success() && !said.contains("FAILED"), "{said}");
    let records: Vec<_> = (std::fs::read_dir(out.path()).expect("the directory"))
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    let [record] = records.as_slice() else { panic!("{records:?}: {said}") };
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(record).expect("the record")).expect("JSON");
    for group in ["microvm-ring", "microvm-log", "qemu-low-downtime"] {
        for name in ["total", "downtime", "guest gap"] {
            let figures = record["figures"].as_array().expect("figures");
            let figure = figures
                .iter()
                .find(|figure| figure["group"] == group && figure["name"] == name)
                .unwrap_or_else(|| panic!("{group} has no {name}: {said}"));
            let samples = figure["samples"].as_array().expect("samples");
            assert!(
                samples.len() == 1 && samples[0].as_f64().is_some_and(|ms| ms > 0.0),
                "{group}, {name}: {samples:?}"
            );
        }
    }
}
