//! The command line: what each command takes, and its way into the library.

pub mod client;
pub mod demo;
mod display;
pub mod doctor;
pub mod microvm;
pub mod units;

use crate::destination::Reception;
use crate::doorway::Doorway;
use crate::error::{Error, Result};
use crate::guest::Vouched;
use crate::guest::qemu::command::Role;
use crate::guest::qemu::guardian::{self, GuardianArgs};
use crate::guest::qemu::ownership::Ownership;
use crate::guest::qemu::process::Qemu;
use crate::guest::qemu::source::QemuSource;
use crate::link::{LinkChoice, check_receiver};
use crate::memory::lost::Poisoned;
use crate::net::Address;
use crate::output;
use crate::policy::WhenStuck;
use crate::session;
use crate::source::{MigrateOptions, default_lanes};
use crate::supervisor::hosting::Hosting;
use crate::supervisor::launch::launch;
use crate::supervisor::qemu::{QemuHosted, QemuNursery};
use crate::supervisor::receiving::receive;
use crate::supervisor::runtime::{Claim, RuntimeDir};
use crate::supervisor::{Inbox, Shared, api, say};
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use pageferry_transport::Access;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// For a QEMU that is taken up to answer.
const ATTACH_MAX: Duration = Duration::from_secs(10);

/// Moves running virtual machines between hosts.
///
/// A guest is started under `pageferry run` (or taken up with `attach`), a place is made for it with
/// `pageferry receive` on the other host, and `pageferry migrate` moves it while it runs.
///
/// Exit status: 0 done; 1 the migration was aborted and the guest runs on at the source; 2 bad usage or
/// refused, nothing was touched; 3 the outcome is not known here: the guest is stopped at the source, or
/// its supervisor died.
#[derive(Debug, Parser)]
#[command(name = "pageferry", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a guest that can be moved, and stay in front of it.
    Run(RunArgs),
    /// Take up a QEMU that already runs.
    Attach(AttachArgs),
    /// Wait for a guest, with a QEMU command that matches the source's.
    Receive(ReceiveArgs),
    /// Start a guest in pageferry's own monitor, which needs no QEMU, or wait for one.
    Microvm(microvm::MicrovmArgs),
    /// Move a guest of this host to a waiting receiver.
    Migrate(MigrateArgs),
    /// Show the guests of this host.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show one guest.
    Status {
        /// Its name.
        name: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// End the migration of a guest that is under way; the guest runs on here.
    Cancel {
        /// Its name.
        name: String,
    },
    /// Decide what becomes of a guest whose migration ended in doubt (exit status 3).
    Settle {
        /// Its name.
        name: String,
        #[command(flatten)]
        choice: SettleChoice,
    },
    /// Show what this host can do, one line a finding, with the mend.
    Doctor(doctor::DoctorArgs),
    /// Move a small Linux guest on this host and check every page of it.
    Demo(demo::DemoArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Write man pages into a directory.
    Man {
        /// The directory; made if it is not there.
        directory: PathBuf,
    },
    /// Waits for the death of a supervisor; started by it.
    #[command(hide = true)]
    Guardian(GuardianArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// A name for the guest on this host.
    name: String,
    /// The QEMU command, as you would type it. Where it has no shared memory backend, one is added.
    #[arg(last = true, required = true, value_name = "QEMU-COMMAND")]
    qemu: Vec<OsString>,
}

#[derive(Debug, Args)]
struct AttachArgs {
    /// A name for the guest on this host. That of a guest whose supervisor has ended is enough to
    /// find it again.
    name: String,
    /// QEMU's process id.
    #[arg(long, requires = "qmp")]
    pid: Option<u32>,
    /// QEMU's QMP socket. pageferry keeps it to itself while it is attached.
    #[arg(long, value_name = "SOCKET", requires = "pid")]
    qmp: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ReceiveArgs {
    /// A name for the guest on this host.
    name: String,
    /// Where to listen, such as 10.0.0.2:7600; port 0 takes a free one and says which. Or unix:PATH, a socket for this
    /// user alone.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: String,
    #[command(flatten)]
    link: LinkChoice,
    /// Listen off loopback although the connection is neither encrypted nor authenticated yet.
    #[arg(long)]
    insecure: bool,
    /// Take a guest although what it sees of its machine differs here in this, as the refusal named it
    /// (cpu.smap, or cpu for all of them). May be given more than once.
    #[arg(long, value_name = "NAME")]
    allow_difference: Vec<String>,
    /// The QEMU command: the same machine, memory and devices as at the source.
    #[arg(last = true, required = true, value_name = "QEMU-COMMAND")]
    qemu: Vec<OsString>,
}

#[derive(Debug, Args)]
struct MigrateArgs {
    /// The guest's name on this host.
    name: String,
    /// Where a `pageferry receive` waits: HOST:PORT, [fe80::1%eth0]:PORT or unix:PATH.
    #[arg(long, value_name = "ADDR:PORT")]
    to: String,
    #[command(flatten)]
    link: LinkChoice,
    /// Queue pairs or TCP connections to spread the data over; the latter take a thread each at both ends. [default: half of the cores, 2 to 4; 1 on one core]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    lanes: Option<u8>,
    /// Longest time in which the guest may stand still, such as 10ms or 1s.
    #[arg(long, default_value = "10ms", value_parser = units::downtime_max, value_name = "TIME")]
    downtime_max: Duration,
    /// Bound on the rate while the guest runs, such as 10Gbit or 500MB (a second). The last
    /// pages, with the guest stopped, go as fast as they can.
    #[arg(long, value_parser = units::rate, value_name = "RATE")]
    bandwidth_max: Option<u64>,
    /// What to do if the guest writes faster than the link carries: leave it here, or switch over with
    /// a longer downtime than asked for.
    #[arg(long, value_enum, default_value_t)]
    when_stuck: WhenStuck,
    /// Most rounds over memory before that is decided.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    rounds_max: u32,
    /// Digest all memory on both sides before the guest runs; the guest stands still meanwhile.
    #[arg(long)]
    verify: bool,
    /// What to do if the hardware of this host lost pages of the guest: leave the guest here, or move it with zeros in
    /// their place. Either way what they held is lost, unless it was sent before.
    #[arg(long, value_enum, default_value_t)]
    poisoned: Poisoned,
    /// Print the report as JSON on stdout.
    #[arg(long)]
    json: bool,
    /// Connect off loopback although the connection is neither encrypted nor authenticated yet.
    #[arg(long)]
    insecure: bool,
    #[command(flatten)]
    vouched: Vouched,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct SettleChoice {
    /// Let the guest run here. Only if it certainly does not run at the destination.
    #[arg(long)]
    run: bool,
    /// End the guest here: it runs at the destination.
    #[arg(long)]
    end: bool,
}

/// Runs the command; returns the exit status.
pub fn main() -> u8 {
    output::say_panics();
    let status = run_command();
    output::flush();
    status
}

fn run_command() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return show_usage(&e),
    };
    tracing_subscriber::fmt()
        .with_writer(|| output::TracingLog)
        // A terminal's colours would be escaped with everything else that it obeys.
        .with_ansi(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("PAGEFERRY_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .init();
    match dispatch(cli.command) {
        Ok(status) => status,
        Err(error) => {
            say(&error.chain());
            match error {
                Error::Refused(_) | Error::Busy(_) => 2,
                Error::Unknown(_) => 3,
                _ => 1,
            }
        }
    }
}

/// Help, the version or what is wrong with the arguments, as the parser words and colours it.
fn show_usage(error: &clap::Error) -> u8 {
    // To stderr, or to stdout, whose reader may have gone.
    if let Err(e) = error.print()
        && e.kind() != std::io::ErrorKind::BrokenPipe
    {
        say(&format!("the usage could not be printed: {e}"));
        return u8::try_from(error.exit_code()).unwrap_or(2).max(1);
    }
    u8::try_from(error.exit_code()).unwrap_or(2)
}

fn dispatch(command: Command) -> Result<u8> {
    match command {
        Command::Run(args) => run(&args),
        Command::Attach(args) => attach(args),
        Command::Receive(args) => receive_guest(&args),
        Command::Microvm(args) => microvm::main(&args),
        Command::Migrate(args) => client::migrate(&args.name, migrate_options(&args)?, args.json),
        Command::List { json } => client::list(json),
        Command::Status { name, json } => client::status(&name, json),
        Command::Cancel { name } => client::simple(&name, &api::Request::Cancel),
        Command::Settle { name, choice } => client::simple(&name, &api::Request::Settle { run: choice.run }),
        Command::Doctor(args) => doctor::main(&args),
        Command::Demo(args) => demo::main(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "pageferry", &mut script);
            output::print(&String::from_utf8_lossy(&script)).map(|()| 0)
        }
        Command::Man { directory } => {
            std::fs::create_dir_all(&directory)
                .and_then(|()| clap_mangen::generate_to(Cli::command(), &directory))
                .map_err(|e| {
                    Error::refused(format!("cannot write man pages into {}: {e}", directory.display()))
                })?;
            Ok(0)
        }
        Command::Guardian(args) => guardian::main(&args).map(|()| 0),
    }
}

/// What every supervisor begins with: its name, its socket, its signals.
fn supervise(name: &str) -> Result<(Claim, Shared, Inbox)> {
    let claim = RuntimeDir::open()?.claim(name)?;
    let shared = Shared::new(name);
    let inbox = Inbox::open(api::serve(&claim.path("sock"), shared.clone())?)?;
    Ok((claim, shared, inbox))
}

fn run(args: &RunArgs) -> Result<u8> {
    let runtime = RuntimeDir::open()?;
    let (mut claim, shared, inbox) = supervise(&args.name)?;
    refuse_left_behind(&runtime, &args.name)?;
    claim.forget_guest();
    let (child, qemu) = launch(&args.qemu, Role::Source, &claim.path("qmp"))?;
    claim.keep_guest();
    let pid = qemu.pid();
    let hosting = Hosting::new(claim, shared, inbox, QemuHosted::new(QemuSource::new(qemu), Some(child)))?;
    say(&format!(
        "{} runs (QEMU pid {}); move it with `pageferry migrate {} --to ADDR:PORT`",
        args.name, pid, args.name
    ));
    hosting.run()
}

/// A guest of this name that lost its supervisor must not lose its record too.
fn refuse_left_behind(runtime: &RuntimeDir, name: &str) -> Result<()> {
    match runtime.record(name).filter(crate::supervisor::runtime::Record::alive) {
        Some(record) => Err(Error::refused(format!(
            "a guest named {name} runs without a supervisor (QEMU pid {}): take it up with `pageferry attach {name}`, or choose another name",
            record.pid
        ))),
        None => Ok(()),
    }
}

/// A guest that was left in doubt under one name is taken up under that name, where the question about it lies: it must
/// not lie there any more when the guest is moved the next time.
fn refuse_in_doubt_elsewhere(runtime: &RuntimeDir, name: &str, pid: u32) -> Result<()> {
    let in_doubt = |other: &String| {
        other.as_str() != name && runtime.record(other).and_then(|r| r.doubt_about(pid)).is_some()
    };
    match runtime.names()?.into_iter().find(in_doubt) {
        Some(other) => Err(Error::refused(format!(
            "QEMU (pid {pid}) is the guest {other}, which was left in doubt: `pageferry attach {other}`"
        ))),
        None => Ok(()),
    }
}

fn attach(args: AttachArgs) -> Result<u8> {
    let runtime = RuntimeDir::open()?;
    let (claim, shared, inbox) = supervise(&args.name)?;
    let record = runtime.record(&args.name);
    let found = match (args.pid, args.qmp) {
        (Some(pid), Some(qmp)) => Some((pid, qmp)),
        _ => record.as_ref().filter(|record| record.alive()).map(|r| (r.pid, r.qmp.clone())),
    };
    let Some((pid, qmp)) = found else {
        return Err(Error::refused(format!(
            "no running guest named {} is known here: give its QEMU with --pid and --qmp",
            args.name
        )));
    };
    refuse_in_doubt_elsewhere(&runtime, &args.name, pid)?;
    let mut qemu = Qemu::attach(pid, &qmp, Access::Read, Ownership::default(), Instant::now() + ATTACH_MAX)?;
    let state = qemu.status()?;
    let doubt = record.and_then(|record| record.doubt_about(pid));
    // In these two states QEMU is as the migration has left it, or as it was parked where a stray `cont` was undone.
    let untouched = matches!(state.as_str(), "postmigrate" | "finish-migrate");
    if doubt.is_some() && !untouched {
        say(&format!(
            "{} was left in doubt by a migration, and somebody has started it since (QEMU says {state}): the destination is not \
             asked about it any more. Make sure that it does not run there",
            args.name
        ));
    }
    let doubt = doubt.filter(|_| untouched);
    match state.as_str() {
        "running" => say(&format!("attached to {} (QEMU pid {pid})", args.name)),
        _ if doubt.is_some() => say(&format!(
            "attached to {} (QEMU pid {pid}), which is stopped here in doubt: the destination was told to run it, and its answer \
             is not known",
            args.name
        )),
        "postmigrate" => say(&format!(
            "attached to {} (QEMU pid {pid}), which was stopped for a migration. Make sure that it does not run at the destination \
             before you let it run here with `pageferry settle {} --run`; if it does, `--end` it here. QEMU says the same of a \
             guest that was paused when a migration of it was aborted: that one is nowhere else",
            args.name, args.name
        )),
        state => {
            say(&format!("attached to {} (QEMU pid {pid}), which does not run: QEMU says {state}", args.name))
        }
    }
    let mut guest = QemuSource::new(qemu);
    if let Some(doubt) = doubt {
        let hosted = QemuHosted::in_doubt(guest, &doubt)?;
        return Hosting::in_doubt(claim, shared, inbox, hosted, &doubt)?.run();
    }
    if state == "postmigrate" {
        guest.take_up_in_doubt()?;
    }
    Hosting::new(claim, shared, inbox, QemuHosted::new(guest, None))?.run()
}

fn receive_guest(args: &ReceiveArgs) -> Result<u8> {
    let address = Address::resolve(&args.listen)?;
    session::check_exposure(&address, args.insecure)?;
    check_receiver(&args.link)?;
    let runtime = RuntimeDir::open()?;
    let (claim, shared, inbox) = supervise(&args.name)?;
    refuse_left_behind(&runtime, &args.name)?;
    let reception = Reception::new(Doorway::open(address)?, args.link.clone());
    receive(
        claim,
        shared,
        inbox,
        &mut QemuNursery::new(&args.qemu).allowing(&args.allow_difference),
        reception,
    )
}

fn migrate_options(args: &MigrateArgs) -> Result<MigrateOptions> {
    Ok(MigrateOptions {
        link: args.link.clone(),
        to: args.to.clone(),
        lanes: args.lanes.unwrap_or_else(default_lanes),
        downtime_us_max: u64::try_from(args.downtime_max.as_micros()).unwrap_or(u64::MAX),
        bytes_per_second_max: args.bandwidth_max,
        when_stuck: args.when_stuck,
        rounds_max: args.rounds_max,
        verify: args.verify,
        poisoned: args.poisoned,
        insecure: args.insecure,
        vouched: args.vouched.clone(),
    })
}
