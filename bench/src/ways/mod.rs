//! The ways to move a guest that are compared: pageferry's, and QEMU's own.

mod floor;
mod microvm;
mod pageferry;
mod qemu;
mod sample;

use crate::testbed::machine::{Begin, Machine, START_MAX, TestBed};
use anyhow::{Context, Result, anyhow};
use pageferry_engine::report::MigrationReport;
use serde::Serialize;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

pub use microvm::move_microvm;
pub(crate) use pageferry::attach;
pub use sample::{AFTERMATH, Moved, STEADY, Sample, Terms};

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
            pageferry::move_guest(bed, source, &mut destination, way, terms.downtime_max)?;
        (sample, Some(report))
    } else {
        (qemu::move_guest(bed, source, &mut destination, way, address)?, None)
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
