//! `simulate` as it stands on the command line.

use super::check::GBIT;
use super::scale::{Assumed, Scenario, Tracking};
use super::{MOVES, SimulateOptions};
use pageferry::cli::units::downtime_max;
use std::path::PathBuf;
use std::time::Duration;

/// Round trip that is assumed of a modelled cable, in microseconds: two hosts at one switch.
const ROUND_TRIP_US: f64 = 10.0;

/// Options of `simulate`.
#[derive(Debug, clap::Args)]
pub struct SimulateArgs {
    /// Say by many moves how far the model is off: real migrations over shaped cables, beside what
    /// it says of them, some three minutes. Without this and --from a quick check is made: nothing
    /// is said of other machines unchecked. Root only.
    #[arg(long)]
    check: bool,
    /// A check within two minutes: fewer guests and fewer moves.
    #[arg(long)]
    quick: bool,
    /// Moves of each guest. [default: 5]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    moves: Option<u32>,
    /// Cables of the check, in Gb/s.
    #[arg(long, value_delimiter = ',', default_values_t = GBIT)]
    gbit: Vec<f64>,
    /// Take this host's costs, and how far the model was off, from a record of --check: then
    /// nothing is moved.
    #[arg(long, value_name = "RECORD.json")]
    from: Option<PathBuf>,
    /// Model a guest of so much memory, in GiB. Without it the built-in guests are shown, up to 1
    /// TiB.
    #[arg(long, value_name = "GIB")]
    memory: Option<f64>,
    /// Of the memory, the share that is written over and over.
    #[arg(long, value_name = "SHARE", requires = "memory", default_value_t = 0.25)]
    working: f64,
    /// Of these writes, the share that goes to a sixteenth of that memory.
    #[arg(long, value_name = "SHARE", requires = "memory", default_value_t = 0.9)]
    hot: f64,
    /// Writes in MB a second.
    #[arg(long, value_name = "MB", requires = "memory", default_value_t = 4000.0)]
    rate: f64,
    /// How its writes are followed.
    #[arg(long, value_enum, requires = "memory", default_value = "scan")]
    tracking: Tracking,
    /// vCPUs.
    #[arg(long, requires = "memory", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    vcpus: u32,
    /// The cable, in Gb/s.
    #[arg(long, value_name = "GBIT", requires = "memory", default_value_t = 100.0)]
    bandwidth: f64,
    /// Longest downtime that the engine is allowed.
    #[arg(long, requires = "memory", default_value = "100ms", value_parser = downtime_max)]
    downtime_max: Duration,
    /// Directory for the record and its page.
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

impl SimulateArgs {
    /// What is to be done, and the directory for what comes of it.
    #[must_use]
    pub fn options(self) -> (SimulateOptions, PathBuf) {
        let assumed = Assumed::default();
        let scenario = self.memory.map(|memory_gib| Scenario {
            memory_gib,
            working_share: self.working,
            hot_share: self.hot,
            rate_mb: self.rate,
            tracking: self.tracking,
            vcpus: self.vcpus,
            gbit: self.bandwidth,
            round_trip_us: ROUND_TRIP_US,
            downtime_us_max: u64::try_from(self.downtime_max.as_micros()).unwrap_or(u64::MAX),
            assumed,
        });
        // What was not checked is not extrapolated.
        let check = self.check || self.from.is_none();
        let quick = self.quick || !self.check;
        let options = SimulateOptions {
            check,
            moves: self.moves.unwrap_or(MOVES[usize::from(quick)]),
            quick,
            gbit: self.gbit,
            from: self.from,
            scenario,
            assumed,
        };
        (options, self.out)
    }
}
