//! The Linux guest in pageferry's own monitor, under this host's KVM, moved as an operator moves
//! it: two `microvm` and `migrate`.

use super::linux::guest;
use super::{Harness, Move, MoveOptions};
use crate::testbed::machine::{Accel, GUEST_MAX, TestBed};
use crate::testbed::microvm::Microvm;
use crate::ways::{Terms, move_microvm};
use anyhow::{Context, Result, bail};
use pageferry_engine::net::choice::Transport;
use pageferry_microvm::config::TrackingChoice;
use std::net::SocketAddr;
use std::time::Duration;

/// Between two heartbeats, which go over the guest's console: in an emulated KVM more of them would
/// be all that the guest does.
pub(super) const BEAT: Duration = Duration::from_millis(10);

/// A guest in a monitor, and what its monitors share.
pub(super) struct LinuxMicrovm {
    // Before the bed: its directory goes last.
    microvm: Microvm,
    bed: TestBed,
    tracking: TrackingChoice,
    terms: Terms,
    gap_ms: f64,
}

impl LinuxMicrovm {
    /// Boots the guest, and waits until its memory is filled.
    pub(super) fn start(options: &MoveOptions, tracking: TrackingChoice) -> Result<Self> {
        if options.transport == Transport::Rdma || !options.address.is_loopback() {
            bail!(
                "--guest microvm moves by TCP on loopback; peers --accel kvm takes --rdma-address"
            );
        }
        if !options.planted_pause.is_zero() || options.threads != 1 {
            bail!("--threads and --plant-pause are not for --guest microvm");
        }
        let bed = TestBed::new(guest(options, Accel::Kvm, BEAT)?)?;
        let mut microvm =
            Microvm::start(&bed, tracking, None, false).context("starting a microvm")?;
        microvm.wait_booted(|| Ok(())).context("the guest did not boot")?;
        let terms =
            Terms { preallocated: true, downtime_max: options.downtime_max, rdma_address: None };
        Ok(Self { microvm, bed, tracking, terms, gap_ms: f64::NAN })
    }
}

impl Harness for LinuxMicrovm {
    fn service(&self) -> Option<SocketAddr> {
        None
    }

    fn move_once(&mut self) -> Result<Move> {
        let (sample, report) =
            move_microvm(&self.bed, &mut self.microvm, self.tracking, &self.terms)?;
        self.gap_ms = sample.gap_ms;
        Ok(Move { report: report.context("pageferry gave no report")? })
    }

    fn guest_gap_ms(&self) -> f64 {
        self.gap_ms
    }

    fn check(&mut self) -> Result<()> {
        self.microvm.console.verdict(GUEST_MAX)
    }
}
