//! The floor under every downtime between two QEMUs: stop, save, load, cont, with no memory to
//! move. The destination has the very same memory file, and QEMU's `x-ignore-shared` leaves it out.

use crate::testbed::machine::{Begin, GUEST_MAX, Machine, START_MAX, TestBed};
use crate::ways::sample::{AFTERMATH, STEADY, Sample, downtime_ms, status_of};
use anyhow::{Result, bail};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Moves the guest to a new QEMU on the same memory, which is put in its place.
pub(super) fn hand_over(bed: &TestBed, source: &mut Machine) -> Result<Sample> {
    let mut destination =
        bed.start(Begin::IncomingStopped, Some(Arc::clone(&source.memory)), false)?;
    source.console.settle(STEADY, START_MAX)?;
    let deadline = Instant::now() + GUEST_MAX;
    let capabilities =
        ["events", "x-ignore-shared"].map(|name| json!({ "capability": name, "state": true }));
    let off = ["multifd", "zero-copy-send", "postcopy-ram"]
        .map(|name| json!({ "capability": name, "state": false }));
    for qmp in [&mut source.qmp, &mut destination.qmp] {
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": off }), deadline)?;
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }), deadline)?;
    }
    source.qmp.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": 300 }),
        deadline,
    )?;
    let uri =
        format!("unix:{}", bed.directory.join(format!("{}.floor", destination.name)).display());
    destination.qmp.execute("migrate-incoming", json!({ "uri": uri }), deadline)?;
    source.qmp.drain_events()?;
    destination.qmp.drain_events()?;
    bed.reset_beats();
    let begun = Instant::now();
    source.qmp.execute("stop", json!({}), deadline)?;
    source.qmp.execute("migrate", json!({ "uri": uri }), deadline)?;
    for qmp in [&mut source.qmp, &mut destination.qmp] {
        let end = qmp.wait_event(deadline, |e| {
            status_of(e).is_some_and(|s| matches!(s, "completed" | "failed"))
        })?;
        if status_of(&end) != Some("completed") {
            bail!("handing over without memory failed");
        }
    }
    destination.qmp.execute("cont", json!({}), deadline)?;
    let total_s = begun.elapsed().as_secs_f64();
    let downtime_ms = downtime_ms(source, &mut destination)?;
    std::thread::sleep(AFTERMATH);
    let (gap_ms, gap_began_ms) = (bed.gap_ms(), bed.gap_began_ms(begun));
    *source = destination;
    source.console.settle(Duration::ZERO, START_MAX)?;
    Ok(Sample { total_s, downtime_ms, gap_ms, gap_began_ms, cpu_s: f64::NAN, sent_mib: 0.0 })
}
