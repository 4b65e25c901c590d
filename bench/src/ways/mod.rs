//! The ways to move a guest that are compared: pageferry's, and QEMU's own.

use crate::cpu::Meter;
use crate::floor;
use crate::machine::{Begin, GUEST_MAX, Machine, START_MAX, TestBed};
use crate::microvm::Microvm;
use crate::process::Process;
use anyhow::{Context, Result, anyhow, bail};
use pageferry_engine::report::MigrationReport;
use pageferry_microvm::config::TrackingChoice;
use pageferry_qemu::qmp::Event;
use serde::Serialize;
use serde_json::json;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// One way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// pageferry, as an operator uses it: `receive`, `attach`, `migrate`.
    Pageferry,
    /// The same by RDMA.
    PageferryRdma,
    /// A guest of pageferry's own monitor, moved to another one; under KVM only.
    Microvm,
    /// QEMU, one connection, no bound on bandwidth, downtime-limit as it comes (300 ms).
    QemuPlain,
    /// The same with a downtime-limit of 5 ms.
    QemuLowDowntime,
    /// QEMU multifd with two channels.
    QemuMultifd,
    /// QEMU multifd with two channels and zero-copy send.
    QemuMultifdZeroCopy,
    /// QEMU, switched to post-copy when it has gone over memory once.
    QemuPostcopy,
    /// QEMU by RDMA, one queue pair, no bound on bandwidth.
    QemuRdma,
    /// QEMU's stop, save, load and cont between two that have the same memory: what is under every
    /// way of a QEMU.
    Floor,
}

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

/// Passes over memory before QEMU's post-copy begins.
const PASSES_BEFORE_POSTCOPY: u64 = 1;

impl Way {
    /// Its name on the command line and in records.
    #[must_use]
    pub fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self)
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether pageferry is what moves.
    #[must_use]
    pub fn is_ours(self) -> bool {
        matches!(self, Self::Pageferry | Self::PageferryRdma | Self::Microvm)
    }

    /// Where a destination listens for it.
    fn address(self, terms: &Terms) -> Result<IpAddr> {
        match self {
            Self::PageferryRdma | Self::QemuRdma => terms.rdma_address.ok_or_else(|| {
                anyhow!(
                    "it needs --rdma-address with that of an RDMA port of this host; scripts/lab has some"
                )
            }),
            _ => Ok(Ipv4Addr::LOCALHOST.into()),
        }
    }
}

/// Lets the guest reach its steady state and moves it. `source` is then the one that has it; after
/// an error, whatever is left of it.
pub fn migrate(bed: &TestBed, source: &mut Machine, way: Way, terms: &Terms) -> Result<Moved> {
    if way == Way::Floor {
        return Ok((floor::hand_over(bed, source)?, None));
    }
    let address = way.address(terms)?;
    let begin = if way.is_ours() { Begin::Receive(address) } else { Begin::Incoming };
    let mut destination = bed.start(begin, None, terms.preallocated)?;
    source.console.settle(STEADY, START_MAX)?;
    let begun = Instant::now();
    let (mut sample, report) = if way.is_ours() {
        let (sample, report) =
            by_pageferry(bed, source, &mut destination, way, terms.downtime_max)?;
        (sample, Some(report))
    } else {
        (by_qemu(bed, source, &mut destination, way, address)?, None)
    };
    std::thread::sleep(AFTERMATH);
    sample.gap_ms = bed.gap_ms();
    sample.gap_began_ms = bed.gap_began_ms(begun);
    *source = destination;
    source.console.settle(Duration::ZERO, START_MAX)?;
    Ok((sample, report))
}

/// Moves the guest by pageferry over loopback, which is allowed this downtime; with the engine's
/// report.
pub fn ferry(
    bed: &TestBed,
    source: &mut Machine,
    downtime_max: Duration,
) -> Result<(Sample, MigrationReport)> {
    let terms = Terms { preallocated: false, downtime_max, rdma_address: None };
    let (sample, report) = migrate(bed, source, Way::Pageferry, &terms)?;
    Ok((sample, report.context("pageferry gave no report")?))
}

fn is_verbose() -> bool {
    std::env::var_os("PAGEFERRY_BENCH_VERBOSE").is_some()
}

fn by_pageferry(
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
fn request(
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

fn of_report(report: &MigrationReport, cpu_s: f64) -> Sample {
    Sample {
        total_s: report.total_us as f64 / 1e6,
        downtime_ms: report.downtime_us.total as f64 / 1e3,
        gap_ms: f64::NAN,
        gap_began_ms: f64::NAN,
        cpu_s,
        sent_mib: report.bytes_written as f64 / f64::from(1 << 20),
    }
}

/// Moves a guest of pageferry's own monitor to another one, over loopback. `source` is then the one
/// that has it.
pub fn move_microvm(
    bed: &TestBed,
    source: &mut Microvm,
    tracking: TrackingChoice,
    terms: &Terms,
) -> Result<Moved> {
    let address = SocketAddr::new(Way::Microvm.address(terms)?, 0);
    let destination = Microvm::start(bed, tracking, Some(address), terms.preallocated)?;
    source.console.settle(STEADY, START_MAX)?;
    bed.reset_beats();
    let begun = Instant::now();
    let meter = Meter::start(vec![source.pid(), destination.pid()]);
    let to = destination.listens.clone().context("the destination does not listen")?;
    let report = request(bed, &source.name, &to, false, terms.downtime_max)?;
    let mut sample = of_report(&report, meter.stop());
    std::thread::sleep(AFTERMATH);
    sample.gap_ms = bed.gap_ms();
    sample.gap_began_ms = bed.gap_began_ms(begun);
    *source = destination;
    source.console.settle(Duration::ZERO, START_MAX)?;
    Ok((sample, Some(report)))
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

fn by_qemu(
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

/// A port that is free now.
fn free_port(address: IpAddr) -> Result<u16> {
    let listener = TcpListener::bind((address, 0))
        .with_context(|| format!("--rdma-address {address} is no address of this host"))?;
    Ok(listener.local_addr()?.port())
}
