//! `sweep` as it stands on the command line.

use super::{GBIT, MOVES, RATES_MB, RATES_MB_QUICK, SweepOptions};
use pageferry::cli::units::downtime_max;
use std::path::PathBuf;
use std::time::Duration;

/// Options of `sweep`. Root only: it makes network namespaces.
#[derive(Debug, clap::Args)]
pub struct SweepArgs {
    /// A look within two minutes: fewer dirty rates, one move each.
    #[arg(long)]
    quick: bool,
    /// Cables, in Gb/s.
    #[arg(long, value_delimiter = ',', default_values_t = GBIT)]
    gbit: Vec<f64>,
    /// Dirty rates, in MB/s. [default: 20 to 800]
    #[arg(long, value_delimiter = ',')]
    rates: Vec<u32>,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    memory: u32,
    /// Memory written over and over, in MiB.
    #[arg(long, default_value_t = 64)]
    working: u32,
    /// Longest downtime that the engine is allowed.
    #[arg(long, default_value = "30ms", value_parser = downtime_max)]
    downtime_max: Duration,
    /// Moves at each place. [default: 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    moves: Option<u32>,
    /// QEMU's own ways as well, with a Linux guest. Some minutes more.
    #[arg(long, conflicts_with = "quick")]
    qemu: bool,
    /// Take the model's costs, and how far it was off, from a record of `simulate --check`.
    #[arg(long, value_name = "RECORD.json")]
    from: Option<PathBuf>,
    /// Directory for the record and its page.
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

impl SweepArgs {
    /// What is to be done, and the directory for what comes of it.
    #[must_use]
    pub fn options(self) -> (SweepOptions, PathBuf) {
        let rates: &[u32] = if self.quick { &RATES_MB_QUICK } else { &RATES_MB };
        let options = SweepOptions {
            gbit: self.gbit,
            rates_mb: if self.rates.is_empty() { rates.to_vec() } else { self.rates },
            memory_mib: self.memory,
            working_mib: self.working,
            downtime_us_max: u64::try_from(self.downtime_max.as_micros()).unwrap_or(u64::MAX),
            moves: self.moves.unwrap_or(MOVES[usize::from(self.quick)]),
            quick: self.quick,
            qemu: self.qemu,
            from: self.from,
        };
        (options, self.out)
    }
}
