//! By QEMU's own migration.

use super::Way;
use crate::testbed::cpu::Meter;
use crate::testbed::machine::{GUEST_MAX, Machine, TestBed};
use crate::ways::sample::{Sample, status_of};
use anyhow::{Context, Result, bail};
use pageferry_qemu::qmp::Event;
use serde_json::json;
use std::net::{IpAddr, TcpListener};
use std::time::Instant;

/// Passes over memory before QEMU's post-copy begins.
const PASSES_BEFORE_POSTCOPY: u64 = 1;

/// Moves the guest, which is then at `destination`.
pub(super) fn move_guest(
    bed: &TestBed,
    source: &mut Machine,
    destination: &mut Machine,
    way: Way,
    address: IpAddr,
) -> Result<Sample> {
    let deadline = Instant::now() + GUEST_MAX;
    let multifd = matches!(way, Way::QemuMultifd | Way::QemuMultifdZeroCopy);
    let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
    for (machine, sends) in [(&mut *source, true), (&mut *destination, false)] {
        let wanted = [
            capability("events", true),
            capability("x-ignore-shared", false),
            capability("multifd", multifd),
            capability("zero-copy-send", sends && way == Way::QemuMultifdZeroCopy),
            capability("postcopy-ram", way == Way::QemuPostcopy),
        ];
        machine.qmp.execute(
            "migrate-set-capabilities",
            json!({ "capabilities": wanted }),
            deadline,
        )?;
        let mut parameters = json!({ "multifd-channels": 2 });
        if sends {
            parameters["max-bandwidth"] = json!(1u64 << 40);
            parameters["downtime-limit"] = json!(if way == Way::QemuLowDowntime { 5 } else { 300 });
        }
        machine.qmp.execute("migrate-set-parameters", parameters, deadline)?;
    }
    let scheme = if way == Way::QemuRdma { "rdma" } else { "tcp" };
    let uri = format!("{scheme}:{address}:{}", free_port(address)?);
    destination.qmp.execute("migrate-incoming", json!({ "uri": uri }), deadline)?;
    source.qmp.drain_events()?;
    destination.qmp.drain_events()?;
    bed.reset_beats();
    let meter = Meter::start([source.pids(), destination.pids()].concat());
    let begun = Instant::now();
    source.qmp.execute("migrate", json!({ "uri": uri }), deadline)?;
    if way == Way::QemuPostcopy {
        let passed = |e: &Event| {
            let pass = (e.name == "MIGRATION_PASS").then(|| e.data["pass"].as_u64()).flatten();
            pass.is_some_and(|pass| pass > PASSES_BEFORE_POSTCOPY)
        };
        let next = source.qmp.wait_event(deadline, |e| passed(e) || is_end(e))?;
        if is_end(&next) {
            bail!("it ended before post-copy began: {}", why_failed(source, deadline));
        }
        source.qmp.execute("migrate-start-postcopy", json!({}), deadline)?;
    }
    let end = source.qmp.wait_event(deadline, is_end)?;
    if status_of(&end) != Some("completed") {
        bail!("QEMU's migration failed: {}", why_failed(source, deadline));
    }
    let resumed = destination.qmp.wait_event(deadline, |e| e.name == "RESUME")?;
    let total_s = begun.elapsed().as_secs_f64();
    let cpu_s = meter.stop();
    let stopped = source.qmp.wait_event(deadline, |e| e.name == "STOP")?;
    let info = source.qmp.execute("query-migrate", json!({}), deadline)?;
    Ok(Sample {
        total_s,
        downtime_ms: (resumed.at_us.saturating_sub(stopped.at_us)) as f64 / 1e3,
        gap_ms: f64::NAN,
        gap_began_ms: f64::NAN,
        cpu_s,
        sent_mib: info["ram"]["transferred"].as_f64().unwrap_or(f64::NAN) / f64::from(1 << 20),
    })
}

/// In QEMU's words, in one line.
fn why_failed(source: &mut Machine, deadline: Instant) -> String {
    let info = source.qmp.execute("query-migrate", json!({}), deadline).unwrap_or_default();
    let why = info["error-desc"].as_str().unwrap_or("it gives no reason");
    why.lines().collect::<Vec<_>>().join(" ")
}

/// Whether a migration is over, well or not.
fn is_end(event: &Event) -> bool {
    status_of(event).is_some_and(|status| matches!(status, "completed" | "failed"))
}

/// A port that is free now.
fn free_port(address: IpAddr) -> Result<u16> {
    let listener = TcpListener::bind((address, 0))
        .with_context(|| format!("--rdma-address {address} is no address of this host"))?;
    Ok(listener.local_addr()?.port())
}
