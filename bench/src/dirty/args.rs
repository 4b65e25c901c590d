//! What `pageferry-bench dirty` takes.

use super::DirtyOptions;
use super::subject::Tracker;
use anyhow::Result;
use clap::ValueEnum;
use pageferry::cli::units::duration;
use std::path::PathBuf;
use std::time::Duration;

/// Of a run that is not quick, and of one that is.
const REPETITIONS: [u32; 2] = [11, 3];
const MEMORIES_MIB: [&[u32]; 2] = [&[256, 1024], &[64, 512]];
const RATES_MB: [&[u32]; 2] = [&[10, 100, 0], &[20, 0]];

/// Options as they are typed.
#[derive(Debug, clap::Args)]
pub struct DirtyArgs {
    /// A look within two minutes: smaller guests, three repetitions. The other options change it.
    #[arg(long)]
    quick: bool,
    /// How writes are followed. [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    trackers: Vec<Tracker>,
    /// Guest memory in MiB. [default: 256,1024]
    #[arg(long, value_name = "MIB", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    memories: Vec<u32>,
    /// Writes in MB a second; 0 is as fast as the guest can. [default: 10,100,0]
    #[arg(long, value_name = "MB", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(..=100_000))]
    rates: Vec<u32>,
    /// The share of its memory that a guest writes, in percent.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=90))]
    working: u32,
    /// Turns of each guest. [default: 11]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    repetitions: Option<u32>,
    /// How long writes are counted in a turn, followed and not.
    #[arg(long, default_value = "500ms", value_parser = duration)]
    window: Duration,
    /// Between two syncs.
    #[arg(long, default_value = "50ms", value_parser = duration)]
    every: Duration,
    /// Directory for the record and its page.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub out: PathBuf,
}

impl DirtyArgs {
    /// What is to be done. Fails on what cannot be.
    pub fn options(self) -> Result<DirtyOptions> {
        let quick = usize::from(self.quick);
        let or = |given: Vec<u32>, preset: [&[u32]; 2]| {
            if given.is_empty() { preset[quick].to_vec() } else { given }
        };
        let options = DirtyOptions {
            trackers: if self.trackers.is_empty() {
                Tracker::value_variants().to_vec()
            } else {
                self.trackers
            },
            memories_mib: or(self.memories, MEMORIES_MIB),
            rates_mb: or(self.rates, RATES_MB),
            working_percent: self.working,
            repetitions: self.repetitions.unwrap_or(REPETITIONS[quick]),
            window: self.window,
            every: self.every,
        };
        options.check()?;
        Ok(options)
    }
}
