//! Block jobs and exports, which do not go along with a guest.
//!
//! A job that copies a disk, and a server that shows one to somebody else, live in the QEMU that is
//! left. QEMU fails on some of them when it hands the disks over, with the guest stopped, and
//! forgets others without a word. So they are refused before anything is touched, by name and with
//! what ends them.

use crate::qmp::Qmp;
use pageferry_engine::error::{Error, Result};
use serde_json::{Value, json};
use std::time::Instant;

/// Fails if a block job is under way or a disk is exported.
pub fn check(qmp: &mut Qmp, deadline: Instant) -> Result<()> {
    // All jobs, not only those of `query-block-jobs`: images are made and snapshots saved by
    // others.
    let jobs = qmp.execute("query-jobs", json!({}), deadline)?;
    let exports = qmp.execute("query-block-exports", json!({}), deadline)?;
    let mut found: Vec<String> = elements(&jobs).filter_map(job_against).collect();
    found.extend(elements(&exports).map(export_against));
    if found.is_empty() {
        return Ok(());
    }
    Err(Error::refused(format!("{}; it would not go along with the guest", found.join("; "))))
}

fn elements(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn word<'v>(value: &'v Value, field: &str) -> &'v str {
    value[field].as_str().unwrap_or("?")
}

/// A job that is not over. One that has ended and waits to be dismissed holds nothing.
fn job_against(job: &Value) -> Option<String> {
    let (id, kind, status) = (word(job, "id"), word(job, "type"), word(job, "status"));
    if matches!(status, "concluded" | "null") {
        return None;
    }
    // A mirror and an active commit run until somebody ends them.
    let way = if status == "ready" {
        format!("end it with `job-complete` or `job-cancel` (id {id})")
    } else {
        format!("wait for its end, or cancel it with `job-cancel` (id {id})")
    };
    Some(format!("the block job {id} ({kind}) is under way ({status}): {way}"))
}

fn export_against(export: &Value) -> String {
    let (id, kind, node) = (word(export, "id"), word(export, "type"), word(export, "node-name"));
    format!("the disk {node} is exported by {kind}: take it back with `block-export-del` (id {id})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestQemu;

    #[test]
    fn only_a_job_that_is_over_does_not_stand_against_a_move() {
        let job = |status| job_against(&json!({ "id": "j", "type": "mirror", "status": status }));
        for over in ["concluded", "null"] {
            assert_eq!(job(over), None);
        }
        for status in [
            "created",
            "running",
            "paused",
            "waiting",
            "pending",
            "aborting",
            "standby",
            "of-tomorrow",
        ] {
            assert!(job(status).unwrap().contains("`job-cancel` (id j)"), "{status}");
        }
        assert!(job("ready").unwrap().contains("job-complete"));
    }

    #[test]
    fn a_mirror_and_an_export_of_a_real_qemu_are_refused_with_what_ends_them() {
        let mut qemu = TestQemu::start(&["-m", "16"]);
        let deadline = TestQemu::soon();
        let run = |qemu: &mut TestQemu, command: &str, arguments: Value| {
            qemu.qmp.execute(command, arguments, deadline).unwrap();
        };
        for name in ["a", "b"] {
            run(
                &mut qemu,
                "blockdev-add",
                json!({ "driver": "null-co", "node-name": name, "read-zeroes": true }),
            );
        }
        check(&mut qemu.qmp, deadline).unwrap();

        let mirror = json!({ "job-id": "m", "device": "a", "target": "b", "sync": "none" });
        run(&mut qemu, "blockdev-mirror", mirror);
        let text = check(&mut qemu.qmp, deadline).unwrap_err().to_string();
        assert!(text.contains("the block job m (mirror)") && text.contains("job-cancel"), "{text}");
        run(&mut qemu, "job-cancel", json!({ "id": "m" }));
        let over = |e: &crate::qmp::Event| {
            e.name == "JOB_STATUS_CHANGE" && e.data["id"] == "m" && e.data["status"] == "null"
        };
        qemu.qmp.wait_event(deadline, over).unwrap();
        check(&mut qemu.qmp, deadline).unwrap();

        let directory = tempfile::tempdir().unwrap();
        let address = json!({ "type": "unix", "data": { "path": directory.path().join("nbd") } });
        run(&mut qemu, "nbd-server-start", json!({ "addr": address }));
        check(&mut qemu.qmp, deadline).unwrap();
        for writable in [true, false] {
            let export =
                json!({ "type": "nbd", "id": "e", "node-name": "a", "writable": writable });
            run(&mut qemu, "block-export-add", export);
            let text = check(&mut qemu.qmp, deadline).unwrap_err().to_string();
            assert!(
                text.contains("the disk a is exported by nbd") && text.contains("(id e)"),
                "{text}"
            );
            run(&mut qemu, "block-export-del", json!({ "id": "e" }));
            qemu.qmp.wait_event(deadline, |e| e.name == "BLOCK_EXPORT_DELETED").unwrap();
        }
        check(&mut qemu.qmp, deadline).unwrap();
    }
}
