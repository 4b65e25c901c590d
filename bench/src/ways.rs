//! The ways to move a guest that are compared: pageferry, and QEMU's own.

use crate::cpu::Meter;
use crate::machine::{Begin, GUEST_MAX, Machine, START_MAX, Yard};
use anyhow::{Context, Result, anyhow, bail};
use pageferry::guest::qemu::qmp::Event;
use pageferry::report::MigrationReport;
use serde::Serialize;
use serde_json::json;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// One way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// pageferry, as an operator uses it: `receive`, `attach`, `migrate`.
    Pageferry,
    /// QEMU, one connection, no bound on bandwidth, downtime-limit as it comes (300 ms).
    QemuPlain,
    /// The same with a downtime-limit of 5 ms.
    QemuLowDowntime,
    /// QEMU multifd with two channels.
    QemuMultifd,
    /// QEMU multifd with two channels and zero-copy send.
    QemuMultifdZeroCopy,
}

/// What one migration took.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sample {
    /// From the request until the guest runs at the destination, in seconds.
    pub total_s: f64,
    /// From QEMU's STOP event at the source to its RESUME event at the destination, in milliseconds.
    pub blackout_ms: f64,
    /// Longest time between two heartbeats of the guest (one a millisecond) as the host saw them.
    pub gap_ms: f64,
    /// CPU seconds of both QEMUs and of pageferry, without the threads that run the guest.
    pub cpu_s: f64,
    /// Bytes sent, in MiB, as the mover itself counts them.
    pub sent_mib: f64,
}

/// The blackout that pageferry is allowed beside QEMU's ways.
const DOWNTIME_MAX: Duration = Duration::from_millis(30);

/// How long heartbeats are counted after a migration: a burst of late work belongs to it.
const AFTERMATH: Duration = Duration::from_millis(1500);

/// Lets the guest reach its steady state, moves it, and returns it where it is now.
pub fn migrate(yard: &mut Yard, source: Machine, way: Way, prealloc: bool) -> Result<(Machine, Sample)> {
    let (machine, sample, _) = moved(yard, source, way, prealloc, DOWNTIME_MAX)?;
    Ok((machine, sample))
}

/// The same by pageferry, which is allowed this blackout, with the engine's report.
pub fn ferry(
    yard: &mut Yard,
    source: Machine,
    downtime_max: Duration,
) -> Result<(Machine, Sample, MigrationReport)> {
    let (machine, sample, report) = moved(yard, source, Way::Pageferry, false, downtime_max)?;
    Ok((machine, sample, report.context("pageferry gave no report")?))
}

fn moved(
    yard: &mut Yard,
    mut source: Machine,
    way: Way,
    prealloc: bool,
    downtime_max: Duration,
) -> Result<(Machine, Sample, Option<MigrationReport>)> {
    let begin = if way == Way::Pageferry { Begin::Receive } else { Begin::Incoming };
    let mut destination = yard.start(begin, None, prealloc)?;
    for _ in 0..2 {
        source.wait_line("WORKLOAD t=", START_MAX)?;
    }
    let begun = Instant::now();
    let done = match way {
        Way::Pageferry => {
            by_pageferry(yard, &mut source, &mut destination, downtime_max).map(|(s, r)| (s, Some(r)))
        }
        _ => by_qemu(yard, &mut source, &mut destination, way).map(|s| (s, None)),
    };
    let (mut sample, report) = done.with_context(|| format!("moving by {way:?}"))?;
    std::thread::sleep(AFTERMATH);
    sample.gap_ms = yard.gap_ms();
    if std::env::var_os("PAGEFERRY_BENCH_VERBOSE").is_some() {
        let beats = yard.beats.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let from = beats.largest().map(|gap| gap.from.saturating_duration_since(begun));
        eprintln!("largest gap began {from:?} after the request");
    }
    let memory = source.memory.clone();
    drop(source);
    let _ = std::fs::remove_file(memory);
    destination.wait_line("WORKLOAD t=", START_MAX)?;
    Ok((destination, sample, report))
}

fn by_pageferry(
    yard: &Yard,
    source: &mut Machine,
    destination: &mut Machine,
    downtime_max: Duration,
) -> Result<(Sample, MigrationReport)> {
    let to = destination.listens.clone().ok_or_else(|| anyhow!("the destination does not listen"))?;
    let supervisor = if source.listens.is_some() { None } else { Some(attach(yard, source)?) };
    let mut pids = [source.pids(), destination.pids()].concat();
    pids.extend(supervisor.as_ref().map(|s| s.0.id()));
    source.qmp.drain_events()?;
    destination.qmp.drain_events()?;
    yard.reset_beats();
    let meter = Meter::start(pids);
    let output = Command::new(&yard.options.pageferry)
        .env("PAGEFERRY_RUNTIME_DIR", &yard.directory)
        .args([
            "migrate",
            &source.name,
            "--to",
            &to,
            "--json",
            "--downtime-max",
            &format!("{}us", downtime_max.as_micros()),
            "--when-stuck",
            "switchover",
        ])
        .args(["--lanes", &yard.options.lanes.to_string()])
        // Ctrl-C is for the bench alone: it lets the move that goes on end.
        .process_group(0)
        .stderr(Stdio::piped())
        .output()?;
    let cpu_s = meter.stop();
    if !output.status.success() {
        bail!("pageferry migrate: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    let report: MigrationReport = serde_json::from_slice(&output.stdout).context("the report")?;
    if std::env::var_os("PAGEFERRY_BENCH_VERBOSE").is_some() {
        eprintln!("{:?} {:?}", report.blackout_us, report.rounds);
    }
    let sample = Sample {
        total_s: report.total_us as f64 / 1e6,
        blackout_ms: blackout_ms(source, destination)?,
        gap_ms: f64::NAN,
        cpu_s,
        sent_mib: report.bytes_written as f64 / f64::from(1 << 20),
    };
    Ok((sample, report))
}

/// A supervisor that ends with the guest it held.
struct Supervisor(Child);

impl Drop for Supervisor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn attach(yard: &Yard, machine: &Machine) -> Result<Supervisor> {
    let mut child = Command::new(&yard.options.pageferry)
        .env("PAGEFERRY_RUNTIME_DIR", &yard.directory)
        .args(["attach", &machine.name, "--pid", &machine.pid.to_string(), "--qmp"])
        .arg(&machine.spare_qmp)
        .process_group(0)
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + START_MAX;
    loop {
        let status = Command::new(&yard.options.pageferry)
            .env("PAGEFERRY_RUNTIME_DIR", &yard.directory)
            .args(["status", &machine.name])
            .stderr(Stdio::null())
            .output()?;
        if String::from_utf8_lossy(&status.stdout).contains(": here") {
            return Ok(Supervisor(child));
        }
        if let Some(status) = child.try_wait()? {
            bail!("pageferry attach ended ({status})");
        }
        if Instant::now() > deadline {
            bail!("pageferry attach did not take up the guest");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn by_qemu(yard: &Yard, source: &mut Machine, destination: &mut Machine, way: Way) -> Result<Sample> {
    let deadline = Instant::now() + GUEST_MAX;
    let multifd = matches!(way, Way::QemuMultifd | Way::QemuMultifdZeroCopy);
    let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
    for (machine, sends) in [(&mut *source, true), (&mut *destination, false)] {
        let wanted = [
            capability("events", true),
            capability("x-ignore-shared", false),
            capability("multifd", multifd),
            capability("zero-copy-send", sends && way == Way::QemuMultifdZeroCopy),
        ];
        machine.qmp.execute("migrate-set-capabilities", json!({ "capabilities": wanted }), deadline)?;
        let mut parameters = json!({ "multifd-channels": 2 });
        if sends {
            parameters["max-bandwidth"] = json!(1u64 << 40);
            parameters["downtime-limit"] = json!(if way == Way::QemuLowDowntime { 5 } else { 300 });
        }
        machine.qmp.execute("migrate-set-parameters", parameters, deadline)?;
    }
    let uri = format!("tcp:127.0.0.1:{}", free_port()?);
    destination.qmp.execute("migrate-incoming", json!({ "uri": uri }), deadline)?;
    source.qmp.drain_events()?;
    destination.qmp.drain_events()?;
    yard.reset_beats();
    let meter = Meter::start([source.pids(), destination.pids()].concat());
    let begun = Instant::now();
    source.qmp.execute("migrate", json!({ "uri": uri }), deadline)?;
    let end = source
        .qmp
        .wait_event(deadline, |e| status_of(e).is_some_and(|s| matches!(s, "completed" | "failed")));
    if status_of(&end?) != Some("completed") {
        bail!("QEMU's migration failed");
    }
    let resumed = destination.qmp.wait_event(deadline, |e| e.name == "RESUME")?;
    let total_s = begun.elapsed().as_secs_f64();
    let cpu_s = meter.stop();
    let stopped = source.qmp.wait_event(deadline, |e| e.name == "STOP")?;
    let info = source.qmp.execute("query-migrate", json!({}), deadline)?;
    Ok(Sample {
        total_s,
        blackout_ms: (resumed.at_us.saturating_sub(stopped.at_us)) as f64 / 1e3,
        gap_ms: f64::NAN,
        cpu_s,
        sent_mib: info["ram"]["transferred"].as_f64().unwrap_or(f64::NAN) / f64::from(1 << 20),
    })
}

/// The event's migration status, if it is such an event.
#[must_use]
pub fn status_of(event: &Event) -> Option<&str> {
    (event.name == "MIGRATION").then(|| event.data.get("status")?.as_str())?
}

/// STOP at one end to RESUME at the other, by QEMU's own time stamps on this one host.
pub fn blackout_ms(source: &mut Machine, destination: &mut Machine) -> Result<f64> {
    let deadline = Instant::now() + START_MAX;
    let stopped = source.qmp.wait_event(deadline, |e| e.name == "STOP").context("STOP of the source")?;
    let resumed =
        destination.qmp.wait_event(deadline, |e| e.name == "RESUME").context("RESUME of the destination")?;
    Ok(resumed.at_us.saturating_sub(stopped.at_us) as f64 / 1e3)
}

/// A port that is free now.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
