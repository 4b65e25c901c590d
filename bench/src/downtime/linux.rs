//! A Linux guest in QEMU, moved as an operator moves it: `receive`, `attach`, `migrate`. Its
//! heartbeats come from within; a client asks it over a bridge ([`super::network`]), where this
//! user may make one.

use super::network::Network;
use super::{Harness, Move, MoveOptions};
use crate::testbed::images::{self, Images};
use crate::testbed::machine::{Accel, BEAT, Begin, GUEST_MAX, GuestOptions, Machine, TestBed};
use crate::ways::ferry;
use anyhow::{Context, Result, bail};
use pageferry_engine::net::choice::Transport;
use std::net::SocketAddr;
use std::time::Duration;

/// A guest in a QEMU, and all that its QEMUs share.
pub struct Linux {
    // Before the bed: its directory goes last.
    machine: Machine,
    bed: TestBed,
    downtime_max: Duration,
    no_network: Option<String>,
}

impl Linux {
    /// Boots the guest, and waits until its memory is filled.
    pub fn start(options: &MoveOptions) -> Result<Self> {
        if options.transport == Transport::Rdma || !options.address.is_loopback() {
            bail!(
                "--guest linux moves by TCP on loopback; --guest synthetic takes --transport and --address"
            );
        }
        if !options.planted_pause.is_zero() || options.threads != 1 {
            bail!("--threads and --plant-pause need --guest synthetic");
        }
        let mut bed = TestBed::new(guest(options, Accel::Tcg, BEAT)?)?;
        let no_network = match Network::up() {
            Ok(network) => {
                bed.network = Some(network);
                None
            }
            Err(e) => Some(format!("No client asks the guest over a network: {e:#}.")),
        };
        let mut machine = bed
            .start(Begin::Boot, None, false)
            .context("starting QEMU; scripts/setup --bench installs what is missing")?;
        machine.wait_booted(|| Ok(())).context("the guest did not boot")?;
        Ok(Self { machine, bed, downtime_max: options.downtime_max, no_network })
    }
}

/// What a Linux guest of these options is.
pub(super) fn guest(options: &MoveOptions, accel: Accel, beat: Duration) -> Result<GuestOptions> {
    let Images { kernel, initrd } = images::guest()?;
    Ok(GuestOptions {
        accel,
        beat,
        kernel,
        initrd,
        pageferry: images::pageferry()?,
        lanes: options.lanes,
        memory_mib: options.memory_mib,
        working_mib: options.working_mib,
        touched_mib: 0,
        rate_mb: options.rate_mb,
    })
}

impl Harness for Linux {
    fn service(&self) -> Option<SocketAddr> {
        self.bed.network.as_ref().map(|_| Network::service())
    }

    fn remark(&self) -> Option<String> {
        self.no_network.clone()
    }

    fn move_once(&mut self) -> Result<Move> {
        let (_, report) = ferry(&self.bed, &mut self.machine, self.downtime_max)?;
        Ok(Move { report })
    }

    fn guest_gap_ms(&self) -> f64 {
        self.bed.gap_ms()
    }

    fn check(&mut self) -> Result<()> {
        self.machine.console.verdict(GUEST_MAX)
    }
}
