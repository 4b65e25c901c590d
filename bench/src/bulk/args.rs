//! What `pageferry-bench bulk` takes.

use super::{BulkOptions, Scatter};
use anyhow::Result;
use std::path::PathBuf;

/// Of a run that is not quick, and of one that is.
const REPETITIONS: [u32; 2] = [7, 3];
const TOTAL_BYTES: [u64; 2] = [2 << 30, 256 << 20];

/// Options as they are typed.
#[derive(Debug, clap::Args)]
pub struct BulkArgs {
    /// A look within two minutes: 256 MiB three times. The other options change it.
    #[arg(long)]
    quick: bool,
    /// Connections of the link and of the pump.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2], value_parser = clap::value_parser!(u8).range(1..=64))]
    lanes: Vec<u8>,
    /// Bytes of each write of the link.
    #[arg(long, value_delimiter = ',', default_values_t = [4 << 10, 64 << 10, 1 << 20])]
    sizes: Vec<usize>,
    /// How the link's writes lie in memory.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["none", "gaps"])]
    scatter: Vec<Scatter>,
    /// Repetitions of each way. [default: 7]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: Option<u32>,
    /// Bytes of each repetition. [default: 2 GiB]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    total: Option<u64>,
    /// Bytes of memory at each end of the link and of the pump.
    #[arg(long, default_value_t = 256 << 20)]
    region: usize,
    /// Directory for the record and its page.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub out: PathBuf,
}

impl BulkArgs {
    /// What is to be done. Fails on what cannot be.
    pub fn options(self) -> Result<BulkOptions> {
        let quick = usize::from(self.quick);
        let options = BulkOptions {
            lanes: self.lanes.into_iter().map(usize::from).collect(),
            sizes: self.sizes,
            scatter: self.scatter,
            repeat: self.repeat.unwrap_or(REPETITIONS[quick]),
            total_bytes: self.total.unwrap_or(TOTAL_BYTES[quick]),
            region_bytes: self.region,
        };
        options.check()?;
        Ok(options)
    }
}
