//! `pageferry-bench`: measures, in turns within one run, and prints medians and ranges.

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use pageferry::cli::choices::{Pattern, Tracking, TransportArg};
use pageferry::cli::units::{downtime_max, duration};
use pageferry_bench::bulk::{self, args::BulkArgs};
use pageferry_bench::collect::{CollectOptions, collect};
use pageferry_bench::compare::compare;
use pageferry_bench::cost::{self, CostOptions, Row};
use pageferry_bench::dirty::{self, args::DirtyArgs};
use pageferry_bench::downtime::{self, Guest, MoveOptions};
use pageferry_bench::gaps::{self, GapsArgs};
use pageferry_bench::peers::{self, args::PeersArgs};
use pageferry_bench::progress::Progress;
use pageferry_bench::rdma::{self, RdmaBenchOptions};
use pageferry_bench::record::{Record, save};
use pageferry_bench::simulate::{self, SimulateArgs};
use pageferry_bench::summary::summary;
use pageferry_bench::sweep::{self, SweepArgs};
use pageferry_bench::sweeper;
use pageferry_bench::told::tell;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// The downtime harness.
#[derive(Debug, Parser)]
#[command(name = "pageferry-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The same guest moved by pageferry and by QEMU's own migration, in turns.
    Peers(PeersArgs),
    /// Bulk goodput over loopback: the TCP link, a raw pump and iperf3, in turns.
    Bulk(BulkArgs),
    /// Page-write goodput over RDMA, beside perftest's ib_write_bw, in turns.
    Rdma(RdmaArgs),
    /// What a page costs on its way from the dirty set to the RDMA device, which is none here.
    Cost(CostArgs),
    /// One guest moved back and forth: the downtime, its slices, and what guest and client saw of
    /// it.
    Downtime(DowntimeArgs),
    /// The engine's policy against modelled guests, hosts and cables; with --check beside real
    /// migrations.
    Simulate(SimulateArgs),
    /// Dirty rate against bandwidth: where a guest stops converging, over shaped cables and by the
    /// model.
    Sweep(SweepArgs),
    /// What following a guest's writes costs, for the migration and for the guest.
    Dirty(DirtyArgs),
    /// How long a guest is paused outside the switchover: start, rounds, cancel, abort, a killed
    /// supervisor.
    Gaps(GapsArgs),
    /// What changed between two records beyond noise.
    Compare(CompareArgs),
    /// A record of reports of `pageferry migrate --json`, such as those of moves between two hosts.
    Collect(CollectArgs),
    /// Records as tables in Markdown.
    Summary(SummaryArgs),
    /// Waits for the death of a run; started by it.
    #[command(hide = true)]
    Sweeper {
        /// Its process id.
        run: u32,
    },
}

#[derive(Debug, clap::Args)]
struct CompareArgs {
    /// The record of before, as a run wrote it.
    #[arg(value_name = "A.json")]
    before: PathBuf,
    /// That of after.
    #[arg(value_name = "B.json")]
    after: PathBuf,
}

#[derive(Debug, clap::Args)]
struct CollectArgs {
    /// What was moved, in one line.
    #[arg(long, default_value = "moves made elsewhere")]
    title: String,
    /// Files with a report each, in the order of their turns.
    #[arg(value_name = "REPORT.json", required = true)]
    reports: Vec<PathBuf>,
    /// Directory for the record and its page.
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
struct SummaryArgs {
    /// Records, as runs wrote them.
    #[arg(value_name = "RECORD.json", required = true)]
    records: Vec<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct DowntimeArgs {
    /// A look within two minutes: 20 moves, or 10 of the Linux guest. The other options change it.
    #[arg(long)]
    quick: bool,
    /// What is moved.
    #[arg(long, value_enum, default_value = "synthetic")]
    guest: Guest,
    /// How often. [default: 200]
    #[arg(long)]
    moves: Option<u32>,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    memory: u32,
    /// Memory written over and over, in MiB.
    #[arg(long, default_value_t = 64)]
    working: u32,
    /// Writes in MB a second; 0 is as fast as the guest can.
    #[arg(long, default_value_t = 40)]
    rate: u32,
    /// Where the payload guest writes.
    #[arg(long, value_enum, default_value = "random")]
    pattern: Pattern,
    /// How writes of the payload guest are followed; for more than one, each has a guest of its
    /// own, in turns.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "auto")]
    tracking: Vec<Tracking>,
    /// Threads that write; vCPUs of the payload guest.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    /// What carries the data.
    #[arg(long, value_enum, default_value = "tcp")]
    transport: TransportArg,
    /// Address of this host where the receiver listens; for RDMA that of a port.
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    address: IpAddr,
    /// Lanes. [default: as `pageferry migrate`]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    lanes: Option<u8>,
    /// Longest downtime that the engine is allowed.
    #[arg(long, default_value = "30ms", value_parser = downtime_max)]
    downtime_max: Duration,
    /// Plant a pause of this length into each downtime, to see that it is found.
    #[arg(long, hide = true, default_value = "0ms", value_parser = duration)]
    plant_pause: Duration,
    /// Directory for the record and its page.
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
struct RdmaArgs {
    /// Address of this host that the writes come from. The default is the lab machine's, as is
    /// --to.
    #[arg(long, value_name = "IP", default_value = "10.77.0.1")]
    from: IpAddr,
    /// Address of this host that is written to.
    #[arg(long, value_name = "IP", default_value = "10.77.0.2")]
    to: IpAddr,
    /// Queue pairs.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    lanes: u8,
    /// Bytes of a write, whole pages.
    #[arg(long, value_delimiter = ',', default_values_t = rdma::SIZES)]
    sizes: Vec<u64>,
    /// Repetitions of each way with each size.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// MiB of each repetition.
    #[arg(long, default_value_t = 64)]
    total: u32,
    /// MiB of memory at each end of the link.
    #[arg(long, default_value_t = 64)]
    memory: u32,
    /// A way to run ib_write_bw, as on its command line; may be given more than once, and the best
    /// counts.
    #[arg(long, value_name = "FLAGS", allow_hyphen_values = true, default_values = ["", "-Q 16", "-l 16 -Q 16"])]
    perftest: Vec<String>,
    /// Directory for the record and its page.
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
struct CostArgs {
    /// Repetitions of each row, in turns.
    #[arg(long, default_value_t = 31, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(4..))]
    memory: u32,
    /// Count instructions under valgrind as well.
    #[arg(long)]
    instructions: bool,
    /// One repetition of one row, for a tool that counts what it does.
    #[arg(long, hide = true, value_name = "ROW")]
    once: Option<Row>,
    /// Directory for the record and its page.
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    if let Command::Sweeper { run } = command {
        return exit(sweeper::main(run));
    }
    exit(if command.measures() { sweeper::mark() } else { Ok(()) }.and_then(|()| run(command)))
}

impl Command {
    /// Whether it may start processes that must not outlive it. One repetition for a tool that
    /// counts does not, and would be lost to that tool if it were executed anew.
    fn measures(&self) -> bool {
        match self {
            Self::Compare(_) | Self::Collect(_) | Self::Summary(_) | Self::Sweeper { .. } => false,
            Self::Cost(args) => args.once.is_none(),
            _ => true,
        }
    }
}

fn exit(done: Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pageferry-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Peers(args) => run_peers(args),
        Command::Bulk(args) => run_bulk(args),
        Command::Rdma(args) => run_rdma(args),
        Command::Cost(args) => run_cost(&args),
        Command::Downtime(args) => run_downtime(&args),
        Command::Simulate(args) => run_simulate(args),
        Command::Sweep(args) => run_sweep(args),
        Command::Dirty(args) => run_dirty(args),
        Command::Gaps(args) => {
            measure("gaps", &args.out.clone(), |progress| gaps::run(&args, progress))
        }
        Command::Compare(args) => run_compare(&args),
        Command::Collect(args) => run_collect(args),
        Command::Summary(args) => run_summary(&args),
        Command::Sweeper { run } => sweeper::main(run),
    }
}

/// Moves of a run that is not quick, and of one that is. The Linux guest is left alone for some
/// seconds between two.
const MOVES: [u32; 2] = [200, 20];
const MOVES_LINUX: [u32; 2] = [100, 10];

fn run_downtime(args: &DowntimeArgs) -> Result<()> {
    let is_linux = matches!(args.guest, Guest::Linux | Guest::Microvm);
    let moves = if is_linux { MOVES_LINUX } else { MOVES };
    let options = MoveOptions {
        guest: args.guest,
        moves: args.moves.unwrap_or(moves[usize::from(args.quick)]),
        memory_mib: args.memory,
        working_mib: args.working,
        rate_mb: args.rate,
        pattern: args.pattern.into(),
        threads: args.threads,
        tracking: args.tracking.iter().copied().map(Into::into).collect(),
        transport: args.transport.into(),
        address: args.address,
        lanes: args.lanes.unwrap_or_else(pageferry_engine::source::default_lanes),
        downtime_max: args.downtime_max,
        planted_pause: args.plant_pause,
    };
    measure("downtime", &args.out, |progress| downtime::run(&options, progress))
}

fn run_dirty(args: DirtyArgs) -> Result<()> {
    let out = args.out.clone();
    let options = args.options()?;
    measure("dirty", &out, |progress| dirty::run(&options, progress))
}

fn run_simulate(args: SimulateArgs) -> Result<()> {
    let (options, out) = args.options();
    options.prepare()?;
    measure("simulate", &out, |progress| simulate::run(&options, progress))
}

fn run_sweep(args: SweepArgs) -> Result<()> {
    let (options, out) = args.options();
    options.prepare()?;
    measure("sweep", &out, |progress| sweep::run(&options, progress))
}

fn run_compare(args: &CompareArgs) -> Result<()> {
    let (before, after) = (Record::read(&args.before)?, Record::read(&args.after)?);
    tell(&compare(&before, &after)?.show())
}

fn run_collect(args: CollectArgs) -> Result<()> {
    save::prepare(&args.out)?;
    let record = collect(&CollectOptions { title: args.title, reports: args.reports })?;
    finish(&record, &args.out)
}

fn run_summary(args: &SummaryArgs) -> Result<()> {
    let records = args.records.iter().map(|path| Record::read(path)).collect::<Result<Vec<_>>>()?;
    tell(&summary(&records))
}

/// Runs a command that leaves a record.
fn measure(what: &str, out: &Path, run: impl FnOnce(&Progress) -> Result<Record>) -> Result<()> {
    save::prepare(out)?;
    sweeper::start()?;
    let progress = Progress::begin(what)?;
    let record = run(&progress)?;
    progress.end();
    finish(&record, out)
}

/// Shows a record and writes it. A run of which nothing succeeded, or that was interrupted, is a
/// failure, with its record kept all the same.
fn finish(record: &Record, out: &Path) -> Result<()> {
    // Kept first, whoever reads: it may have taken an hour.
    let json = save::save(record, out)?;
    let page = json.with_extension("html");
    tell(&format!("{}{} and, to look at, {}\n", record.show(), json.display(), page.display()))?;
    match record.failures.first() {
        Some(failure) if record.figures.is_empty() => {
            bail!("nothing could be measured: {}", failure.why)
        }
        _ if record.interrupted => {
            bail!("it was interrupted; what was measured until then is kept")
        }
        _ => Ok(()),
    }
}

fn run_bulk(args: BulkArgs) -> Result<()> {
    let out = args.out.clone();
    let options = args.options()?;
    measure("bulk", &out, |progress| bulk::run(&options, progress))
}

fn run_rdma(args: RdmaArgs) -> Result<()> {
    let options = RdmaBenchOptions {
        from: args.from,
        to: args.to,
        lanes: args.lanes,
        sizes: args.sizes,
        repeat: args.repeat,
        total_mib: args.total,
        memory_mib: args.memory,
        perftest: args.perftest,
    };
    measure("rdma", &args.out, |progress| rdma::run(&options, progress))
}

fn run_cost(args: &CostArgs) -> Result<()> {
    if let Some(row) = args.once {
        return tell(&format!("{} pages\n", cost::once(row, args.memory)?));
    }
    let options = CostOptions {
        repeat: args.repeat,
        memory_mib: args.memory,
        instructions: args.instructions,
    };
    measure("cost", &args.out, |progress| cost::run(options, progress))
}

fn run_peers(args: PeersArgs) -> Result<()> {
    let out = args.out.clone();
    let options = args.options()?;
    measure("peers", &out, |progress| peers::run(&options, progress))
}
