//! From one microvm to another.

use super::Way;
use super::pageferry::{of_report, request};
use crate::testbed::cpu::Meter;
use crate::testbed::machine::{START_MAX, TestBed};
use crate::testbed::microvm::Microvm;
use crate::ways::sample::{AFTERMATH, Moved, STEADY, Terms};
use anyhow::{Context, Result};
use pageferry_microvm::config::TrackingChoice;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Moves a guest of pageferry's own monitor to another one, over loopback. `source` is then the one
/// that has it.
pub fn move_microvm(
    bed: &TestBed,
    source: &mut Microvm,
    tracking: TrackingChoice,
    terms: &Terms,
) -> Result<Moved> {
    let address = SocketAddr::new(Way::Microvm.address(terms)?, 0);
    let destination = Microvm::start(bed, tracking, Some(address), terms.preallocated)?;
    source.console.settle(STEADY, START_MAX)?;
    bed.reset_beats();
    let begun = Instant::now();
    let meter = Meter::start(vec![source.pid(), destination.pid()]);
    let to = destination.listens.clone().context("the destination does not listen")?;
    let report = request(bed, &source.name, &to, false, terms.downtime_max)?;
    let mut sample = of_report(&report, meter.stop());
    std::thread::sleep(AFTERMATH);
    sample.gap_ms = bed.gap_ms();
    sample.gap_began_ms = bed.gap_began_ms(begun);
    *source = destination;
    source.console.settle(Duration::ZERO, START_MAX)?;
    Ok((sample, Some(report)))
}
