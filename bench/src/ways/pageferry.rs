//! By pageferry, as an operator uses it: `receive`, `attach`, `migrate`.

use super::Way;
use crate::testbed::cpu::Meter;
use crate::testbed::machine::{GUEST_MAX, Machine, START_MAX, TestBed};
use crate::testbed::process::Process;
use crate::ways::sample::{Sample, downtime_ms};
use anyhow::{Context, Result, anyhow, bail};
use pageferry_engine::report::MigrationReport;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn is_verbose() -> bool {
    std::env::var_os("PAGEFERRY_BENCH_VERBOSE").is_some()
}

/// Moves the guest, which is then at `destination`.
pub(super) fn move_guest(
    bed: &TestBed,
    source: &mut Machine,
    destination: &mut Machine,
    way: Way,
    downtime_max: Duration,
) -> Result<(Sample, MigrationReport)> {
    let to =
        destination.listens.clone().ok_or_else(|| anyhow!("the destination does not listen"))?;
    let supervisor = if source.listens.is_some() { None } else { Some(attach(bed, source)?) };
    let mut pids = [source.pids(), destination.pids()].concat();
    pids.extend(supervisor.as_ref().map(|s| s.0.id()));
    source.qmp.drain_events()?;
    destination.qmp.drain_events()?;
    bed.reset_beats();
    let meter = Meter::start(pids);
    let report = request(bed, &source.name, &to, way == Way::PageferryRdma, downtime_max)?;
    let cpu_s = meter.stop();
    let sample =
        Sample { downtime_ms: downtime_ms(source, destination)?, ..of_report(&report, cpu_s) };
    Ok((sample, report))
}

/// Runs `pageferry migrate` to its end.
pub(super) fn request(
    bed: &TestBed,
    name: &str,
    to: &str,
    by_rdma: bool,
    downtime_max: Duration,
) -> Result<MigrationReport> {
    let mut command = Command::new(&bed.options.pageferry);
    command
        .env("PAGEFERRY_RUNTIME_DIR", &bed.directory)
        .args(["migrate", name, "--to", to, "--json", "--insecure", "--when-stuck", "switchover"])
        .args(["--downtime-max", &format!("{}us", downtime_max.as_micros())])
        .args(["--lanes", &bed.options.lanes.to_string()])
        .args(["--transport", if by_rdma { "rdma" } else { "tcp" }])
        // Ctrl-C is for the bench alone: it lets the move that goes on end.
        .process_group(0);
    // Beyond that the destination is ended, and the source with it or not: it is looked at.
    let ended = Process::spawn("pageferry migrate", &mut command)?.end(GUEST_MAX)?;
    if !ended.status.success() {
        // Before it are the lines of its progress.
        let why = ended.stderr.trim().lines().last().unwrap_or_default();
        bail!("pageferry migrate: {}: {why}", ended.status);
    }
    let report: MigrationReport = serde_json::from_str(&ended.stdout).context("the report")?;
    if is_verbose() {
        eprintln!("{:?} {:?}", report.downtime_us, report.rounds);
    }
    Ok(report)
}

/// What the report says; the rest is for others to measure.
pub(super) fn of_report(report: &MigrationReport, cpu_s: f64) -> Sample {
    Sample {
        total_s: report.total_us as f64 / 1e6,
        downtime_ms: report.downtime_us.total as f64 / 1e3,
        gap_ms: f64::NAN,
        gap_began_ms: f64::NAN,
        cpu_s,
        sent_mib: report.bytes_written as f64 / f64::from(1 << 20),
    }
}

/// A supervisor that ends with the guest it held.
pub(crate) struct Supervisor(Child);

impl Drop for Supervisor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn attach(bed: &TestBed, machine: &Machine) -> Result<Supervisor> {
    let child = Command::new(&bed.options.pageferry)
        .env("PAGEFERRY_RUNTIME_DIR", &bed.directory)
        .args(["attach", &machine.name, "--pid", &machine.pid.to_string(), "--qmp"])
        .arg(&machine.spare_qmp)
        .process_group(0)
        .stderr(Stdio::null())
        .spawn()?;
    let mut supervisor = Supervisor(child);
    let deadline = Instant::now() + START_MAX;
    loop {
        let status = Command::new(&bed.options.pageferry)
            .env("PAGEFERRY_RUNTIME_DIR", &bed.directory)
            .args(["status", &machine.name])
            .stderr(Stdio::null())
            .output()?;
        if String::from_utf8_lossy(&status.stdout).contains(": here") {
            return Ok(supervisor);
        }
        if let Some(status) = supervisor.0.try_wait()? {
            bail!("pageferry attach ended ({status})");
        }
        if Instant::now() > deadline {
            bail!("pageferry attach did not attach the guest");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
