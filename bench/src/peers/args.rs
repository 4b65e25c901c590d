//! What `pageferry-bench peers` takes.

use super::PeersOptions;
use crate::testbed::images::{self, made};
use crate::testbed::machine::{Accel, BEAT, GuestOptions};
use crate::ways::{Terms, Way};
use anyhow::Result;
use clap::ValueEnum;
use pageferry::cli::choices::Tracking;
use pageferry::cli::units::{downtime_max, duration};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// A way's repetitions, and of a run that is quick.
const REPETITIONS: [u32; 2] = [7, 3];

/// Options as they are typed.
#[derive(Debug, clap::Args)]
pub struct PeersArgs {
    /// A look within two minutes: a smaller guest, three repetitions. The other options change it.
    #[arg(long)]
    quick: bool,
    /// A preset; the other options change it.
    #[arg(long, value_enum, default_value_t)]
    scenario: Scenario,
    /// What runs the guest's code. Under kvm pageferry's own monitor is one of the ways.
    #[arg(long, value_enum, default_value_t)]
    accel: Accel,
    /// Repetitions of each way. [default: 7]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    repetitions: Option<u32>,
    /// Ways to compare. [default: all that there are under --accel]
    #[arg(long, value_enum, value_delimiter = ',')]
    ways: Vec<Way>,
    /// How the writes of a microvm are followed; for more than one, each has a guest of its own.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "auto")]
    tracking: Vec<Tracking>,
    /// Address of an RDMA port of this host, for the ways by RDMA.
    #[arg(long, value_name = "IP")]
    rdma_address: Option<IpAddr>,
    /// The guest's kernel. [default: the repository's, made where it is missing]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The guest's initramfs. [default: as above]
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Guest memory in MiB.
    #[arg(long)]
    memory: Option<u32>,
    /// Memory written over and over, in MiB.
    #[arg(long)]
    working: Option<u32>,
    /// Memory filled once, in MiB.
    #[arg(long)]
    touched: Option<u32>,
    /// Writes in MB a second; 0 is as fast as the guest can.
    #[arg(long)]
    rate: Option<u32>,
    /// Lanes that pageferry is asked for. [default: its own]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    lanes: Option<u8>,
    /// Longest downtime that pageferry is allowed.
    #[arg(long, default_value = "30ms", value_parser = downtime_max)]
    downtime_max: Duration,
    /// Time between two heartbeats of a guest under kvm; each takes the guest some accesses to
    /// ports. [default: 1ms]
    #[arg(long, value_parser = duration)]
    beat: Option<Duration>,
    /// Directory for the record and its page.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub out: PathBuf,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// Nearly all memory touched, destination preallocated.
    #[default]
    Dense,
    /// Half of the memory touched, destination cold.
    Half,
    /// A guest that writes as fast as it can, destination preallocated.
    Busy,
}

/// A preset.
struct Preset {
    memory_mib: u32,
    touched_mib: u32,
    working_mib: u32,
    rate_mb: u32,
    preallocated: bool,
}

impl Scenario {
    fn preset(self, quick: bool) -> Preset {
        let (touched_mib, rate_mb, preallocated) = match self {
            Self::Dense => (784, 40, true),
            Self::Half => (448, 40, false),
            Self::Busy => (384, 0, true),
        };
        let whole =
            Preset { memory_mib: 1024, touched_mib, working_mib: 64, rate_mb, preallocated };
        // A quarter, so that booting and checking take little of two minutes.
        if quick {
            Preset { memory_mib: 256, touched_mib: touched_mib / 5, working_mib: 16, ..whole }
        } else {
            whole
        }
    }
}

impl PeersArgs {
    /// What is to be done. Fails on what is missing.
    pub fn options(self) -> Result<PeersOptions> {
        let preset = self.scenario.preset(self.quick);
        let (kernel, initrd) = match (self.kernel, self.initrd) {
            (Some(kernel), Some(initrd)) => (kernel, initrd),
            (kernel, initrd) => {
                let guest = images::guest()?;
                (kernel.unwrap_or(guest.kernel), initrd.unwrap_or(guest.initrd))
            }
        };
        let all = Way::value_variants()
            .iter()
            .filter(|way| self.accel == Accel::Kvm || **way != Way::Microvm);
        let ways = if self.ways.is_empty() { all.copied().collect() } else { self.ways };
        let options = PeersOptions {
            guest: GuestOptions {
                accel: self.accel,
                beat: self.beat.unwrap_or(BEAT),
                kernel: made(&kernel, "give another --kernel")?,
                initrd: made(&initrd, "give another --initrd")?,
                pageferry: images::pageferry()?,
                lanes: self.lanes.unwrap_or_else(pageferry_engine::source::default_lanes),
                memory_mib: self.memory.unwrap_or(preset.memory_mib),
                working_mib: self.working.unwrap_or(preset.working_mib),
                touched_mib: self.touched.unwrap_or(preset.touched_mib),
                rate_mb: self.rate.unwrap_or(preset.rate_mb),
            },
            terms: Terms {
                preallocated: preset.preallocated,
                downtime_max: self.downtime_max,
                rdma_address: self.rdma_address,
            },
            ways,
            tracking: self.tracking.into_iter().map(Into::into).collect(),
            repetitions: self.repetitions.unwrap_or(REPETITIONS[usize::from(self.quick)]),
        };
        options.check()?;
        Ok(options)
    }
}
