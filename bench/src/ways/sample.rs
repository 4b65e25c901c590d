//! What is taken down of each move, and on which terms it is made.

use crate::testbed::machine::{Machine, START_MAX};
use anyhow::{Context, Result};
use pageferry_engine::report::MigrationReport;
use pageferry_qemu::qmp::Event;
use serde::Serialize;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// What one migration took.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sample {
    /// From the request until the guest runs at the destination and has all its memory there, in
    /// seconds.
    pub total_s: f64,
    /// From QEMU's STOP event at the source to its RESUME event at the destination, in
    /// milliseconds; for a microvm as the engine has it.
    pub downtime_ms: f64,
    /// Longest time between two heartbeats of the guest (one a millisecond) as the host saw them.
    pub gap_ms: f64,
    /// How long after the request that gap began, in milliseconds.
    pub gap_began_ms: f64,
    /// CPU seconds of both monitors and of pageferry, without the threads that run the guest.
    pub cpu_s: f64,
    /// Bytes sent, in MiB, as the mover itself counts them.
    pub sent_mib: f64,
}

/// A sample, and the engine's report where it was pageferry that moved.
pub type Moved = (Sample, Option<MigrationReport>);

/// How a guest is moved apart from the way.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Terms {
    /// Whether destinations have all their memory before the migration.
    pub preallocated: bool,
    /// The downtime that pageferry is allowed.
    pub downtime_max: Duration,
    /// The address of an RDMA port of this host, at which destinations of the ways by RDMA listen.
    pub rdma_address: Option<IpAddr>,
}

/// How long heartbeats are counted after a migration: a burst of late work belongs to it.
pub const AFTERMATH: Duration = Duration::from_millis(1500);

/// How long a guest that was moved writes on before it is taken to have reached its steady state.
pub const STEADY: Duration = Duration::from_secs(2);

/// The event's migration status, if it is such an event.
#[must_use]
pub fn status_of(event: &Event) -> Option<&str> {
    (event.name == "MIGRATION").then(|| event.data.get("status")?.as_str())?
}

/// STOP at one end to RESUME at the other, by QEMU's own time stamps on this one host.
pub fn downtime_ms(source: &mut Machine, destination: &mut Machine) -> Result<f64> {
    let deadline = Instant::now() + START_MAX;
    let stopped =
        source.qmp.wait_event(deadline, |e| e.name == "STOP").context("STOP of the source")?;
    let resumed = destination
        .qmp
        .wait_event(deadline, |e| e.name == "RESUME")
        .context("RESUME of the destination")?;
    Ok(resumed.at_us.saturating_sub(stopped.at_us) as f64 / 1e3)
}
