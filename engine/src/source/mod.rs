//! The source: `migrate` reads as the protocol does.

mod attempt;
mod crossing;
mod flow;
pub mod lanes;
mod options;
pub mod pump;
mod rounds;
pub mod session;
mod settle;
pub mod switchover;

pub use options::{MigrateOptions, default_lanes};

use crate::clock;
use crate::guest::SourceGuest;
use crate::net::choice::Transport;
use crate::net::{Network, System};
use crate::report::MigrationReport;
use crate::report::progress::Monitor;
use crate::report::stage::Stage;
use crate::source::attempt::{End, SECOND_ATTEMPT_MAX};
use std::time::Duration;

/// Pause between two tries to reach it.
const SECOND_ATTEMPT_EVERY: Duration = Duration::from_millis(500);

/// Moves a guest. On return it runs at exactly one place: at the destination if the outcome is
/// `completed` (what is left of it here is stopped for good, and the caller's to take away), here
/// if it is `aborted` (unless its own process ended). If it is `unknown` the guest is stopped here.
///
/// A path by RDMA that breaks before Commit is given up for TCP, if the choice is left to us.
pub fn migrate(
    guest: &mut dyn SourceGuest,
    options: &MigrateOptions,
    monitor: &Monitor,
) -> MigrationReport {
    migrate_over(&System, guest, options, monitor)
}

/// [`migrate`], over connections of this network.
pub fn migrate_over(
    network: &dyn Network,
    guest: &mut dyn SourceGuest,
    options: &MigrateOptions,
    monitor: &Monitor,
) -> MigrationReport {
    let started = clock::now();
    let (mut report, end) = attempt::attempt(network, guest, options, monitor, None);
    if end == End::PathBroke && options.link.transport == Transport::Auto {
        let why = report.reason.take().unwrap_or_default();
        tracing::warn!("the path by RDMA broke, going on by TCP: {why}");
        let until = clock::now() + SECOND_ATTEMPT_MAX;
        loop {
            let end;
            (report, end) = attempt::attempt(network, guest, options, monitor, Some(&why));
            // The receiver may still be busy with taking the first attempt's copy away.
            if end != End::Busy || clock::now() >= until || monitor.check().is_err() {
                break;
            }
            clock::sleep(SECOND_ATTEMPT_EVERY);
        }
        // It was under way once, so it is no refusal any more.
        report.refused = false;
        report.fell_back = Some(why);
    }
    report.total_us = clock::elapsed(started).as_micros() as u64;
    monitor.enter(Stage::Done);
    report
}
