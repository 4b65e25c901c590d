//! How long a guest is paused *outside* the switchover: when a migration begins, in its rounds,
//! when it is cancelled, when it is aborted, when the supervisor is killed.
//!
//! ```text
//!   a turn:  idle | start, rounds, cancel | start, the receiver is killed | start, the supervisor is killed
//! ```
//!
//! A Linux guest in QEMU sends a heartbeat a millisecond; each figure is the longest time between
//! two. The migration never switches over: its round 0 is held to a rate at which it lasts longer
//! than the turn.

use crate::progress::Progress;
use crate::record::{Record, Spec};
use crate::testbed::images::{self, Images};
use crate::testbed::machine::{
    Accel, BEAT, Begin, GUEST_MAX, GuestOptions, Machine, START_MAX, TestBed,
};
use crate::testbed::process::Process;
use crate::ways::{STEADY, attach};
use anyhow::{Context, Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;
use std::process::Command;
use std::time::{Duration, Instant};

const GAP: Spec = Spec::headline("longest gap", "ms");

/// How long heartbeats are counted where nothing ends by itself.
const WINDOW: Duration = Duration::from_secs(2);
/// What comes after an end belongs to it: memory is disarmed beside the guest.
const AFTERMATH: Duration = Duration::from_secs(3);
/// Round 0 of the default guest lasts half a minute at this rate.
const RATE: &str = "200MB";

/// What is measured.
#[derive(Debug, Clone, Serialize, clap::Args)]
pub struct GapsArgs {
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(256..=1 << 20))]
    memory: u32,
    /// Filled once, in MiB. The rest stays untouched.
    #[arg(long, default_value_t = 6144)]
    touched: u32,
    /// Written over and over, in MiB.
    #[arg(long, default_value_t = 64)]
    working: u32,
    /// Writes in MB a second.
    #[arg(long, default_value_t = 20)]
    rate: u32,
    /// Turns.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    turns: u32,
    /// Processor that the guest has for itself; pageferry and the heartbeats' reader have the
    /// others.
    #[arg(long, value_name = "CPU")]
    guest_cpu: Option<usize>,
    /// Directory for the record and its page.
    #[arg(long, value_name = "DIR", default_value = ".")]
    #[serde(skip)]
    pub out: std::path::PathBuf,
}

/// Boots the guest once and takes it through all turns.
pub fn run(args: &GapsArgs, progress: &Progress) -> Result<Record> {
    if args.touched + args.working + 128 > args.memory {
        bail!(
            "--touched and --working do not fit --memory {} beside the guest's kernel",
            args.memory
        );
    }
    let title = format!(
        "gaps of a guest of {} MiB, {} of them touched, outside the switchover",
        args.memory, args.touched
    );
    let mut record = Record::begin("gaps", title, args)?;
    let bed = TestBed::new(guest(args)?)?;
    let cpus = args.guest_cpu.map(Cpus::new).transpose()?;
    // Whoever is started inherits it: QEMU, and the thread that reads heartbeats beside it.
    cpus.iter().try_for_each(|cpus| go_to(&cpus.guest))?;
    let mut machine = bed
        .start(Begin::Boot, None, false)
        .context("starting QEMU; scripts/setup --bench installs what is missing")?;
    cpus.iter().try_for_each(|cpus| go_to(&cpus.others))?;
    progress.say("the guest boots and fills its memory");
    machine.wait_booted(|| Ok(())).context("the guest did not boot")?;
    progress.expect(u64::from(args.turns));
    for turn in 0..args.turns {
        if progress.is_interrupted() {
            record.interrupted = true;
            break;
        }
        progress.say(&format!("turn {}", turn + 1));
        if let Err(e) = one_turn(&bed, &mut machine, turn, &mut record) {
            record.fail("turn", turn, format!("{e:#}"));
        }
        progress.step();
    }
    machine.console.verdict(GUEST_MAX).context("the guest's own verdict")?;
    record.elapsed_s = progress.elapsed_s();
    Ok(record)
}

/// Who runs where.
struct Cpus {
    guest: CpuSet,
    others: CpuSet,
}

impl Cpus {
    fn new(guest_cpu: usize) -> Result<Self> {
        let mut others = sched_getaffinity(None).context("asking for this process' processors")?;
        if guest_cpu >= CpuSet::MAX_CPU || !others.is_set(guest_cpu) || others.count() < 2 {
            bail!(
                "--guest-cpu {guest_cpu}: this process may not use that processor and another one"
            );
        }
        others.unset(guest_cpu);
        let mut guest = CpuSet::new();
        guest.set(guest_cpu);
        Ok(Self { guest, others })
    }
}

/// This thread, and what it starts from now on.
fn go_to(cpus: &CpuSet) -> Result<()> {
    sched_setaffinity(None, cpus).context("choosing processors")
}

fn guest(args: &GapsArgs) -> Result<GuestOptions> {
    let Images { kernel, initrd } = images::guest()?;
    Ok(GuestOptions {
        accel: Accel::Tcg,
        beat: BEAT,
        kernel,
        initrd,
        pageferry: images::pageferry()?,
        lanes: 1,
        memory_mib: args.memory,
        working_mib: args.working,
        touched_mib: args.touched,
        rate_mb: args.rate,
    })
}

fn one_turn(bed: &TestBed, machine: &mut Machine, turn: u32, record: &mut Record) -> Result<()> {
    machine.console.settle(STEADY, START_MAX)?;
    let mut gap = |phase: &str| record.sample(phase, GAP, turn, bed.gap_ms());
    let supervisor = attach(bed, machine)?;
    bed.reset_beats();
    std::thread::sleep(WINDOW);
    gap("idle");

    let receiver = bed.start(Begin::RECEIVE, None, false)?;
    bed.reset_beats();
    let moving = Moving::start(bed, machine, &receiver)?;
    gap("start");
    bed.reset_beats();
    std::thread::sleep(WINDOW);
    gap("rounds");
    bed.reset_beats();
    command(bed, &["cancel", &machine.name])?;
    moving.end()?;
    std::thread::sleep(AFTERMATH);
    gap("cancel");
    drop(receiver);

    let receiver = bed.start(Begin::RECEIVE, None, false)?;
    let moving = Moving::start(bed, machine, &receiver)?;
    bed.reset_beats();
    drop(receiver);
    moving.end()?;
    std::thread::sleep(AFTERMATH);
    gap("abort");

    let receiver = bed.start(Begin::RECEIVE, None, false)?;
    let moving = Moving::start(bed, machine, &receiver)?;
    bed.reset_beats();
    // By SIGKILL.
    drop(supervisor);
    moving.end()?;
    std::thread::sleep(AFTERMATH);
    gap("killed supervisor");
    Ok(())
}

/// `pageferry migrate` in its round 0.
struct Moving(Process);

impl Moving {
    fn start(bed: &TestBed, machine: &Machine, receiver: &Machine) -> Result<Self> {
        let to = receiver.listens.as_deref().context("the destination does not listen")?;
        let mut migrate = Command::new(&bed.options.pageferry);
        migrate.env("PAGEFERRY_RUNTIME_DIR", &bed.directory).args([
            "migrate",
            &machine.name,
            "--to",
            to,
            "--transport",
            "tcp",
            "--bandwidth-max",
            RATE,
        ]);
        let process = Process::spawn("pageferry migrate", &mut migrate)?;
        let deadline = Instant::now() + START_MAX;
        while !command(bed, &["status", &machine.name, "--json"])?.contains("\"rounds\"") {
            if Instant::now() > deadline {
                bail!("the migration did not come to its rounds");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // The first pages are on their way, and the memory is armed.
        std::thread::sleep(Duration::from_millis(300));
        Ok(Self(process))
    }

    /// It ends, and does not complete.
    fn end(self) -> Result<()> {
        let ended = self.0.end(GUEST_MAX)?;
        if ended.status.success() {
            bail!(
                "the guest was moved, so round 0 was over before the turn: less --rate or more --touched"
            );
        }
        Ok(())
    }
}

/// Runs `pageferry` to its end and returns what it printed.
fn command(bed: &TestBed, arguments: &[&str]) -> Result<String> {
    let output = Command::new(&bed.options.pageferry)
        .env("PAGEFERRY_RUNTIME_DIR", &bed.directory)
        .args(arguments)
        .output()
        .with_context(|| format!("pageferry {}", arguments.join(" ")))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
