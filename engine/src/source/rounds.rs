//! The pre-copy rounds: send, sync, decide.

use crate::clock;
use crate::dirty::DirtySource;
use crate::error::{Error, Result};
use crate::guest::{Facts, FixedCosts, SourceGuest};
use crate::memory::bitmap::DirtyBitmap;
use crate::memory::page::PAGE_BYTES;
use crate::policy::{Decision, Estimator, Expected, Finished, Limits, Policy, predict_downtime_us};
use crate::report::progress::Monitor;
use crate::report::{MigrationReport, Round};
use crate::source::MigrateOptions;
use crate::source::pump::Pump;
use pageferry_transport::MemoryRegion;
use std::sync::Arc;

/// The pre-copy rounds.
pub(crate) struct Rounds<'r> {
    pub(super) monitor: &'r Monitor,
    pub(super) report: &'r mut MigrationReport,
    pub(super) facts: &'r Facts,
    pub(super) round_trip_us: u64,
    pub(super) options: &'r MigrateOptions,
    /// If memory may be taken away from the guest: what is written over it.
    pub(super) zeros: Option<&'r Arc<MemoryRegion>>,
    /// The shortest look for what was taken away so far, in microseconds.
    pub(super) holes_us: u64,
}

impl Rounds<'_> {
    /// What the downtime costs beside pages, states and syncs.
    fn fixed_costs(&mut self, pump: &Pump<'_>) -> Result<FixedCosts> {
        let fixed = self.facts.fixed_costs;
        if self.zeros.is_none() {
            return Ok(fixed);
        }
        let look = pump.time_a_look_for_holes()?;
        self.holes_us = self.holes_us.min(look.as_micros() as u64);
        Ok(FixedCosts { sync_us: fixed.sync_us + self.holes_us, ..fixed })
    }

    /// Sends `dirty`, syncs, and decides, until the policy says to switch over.
    pub(crate) fn run(
        &mut self,
        guest: &mut dyn SourceGuest,
        pump: &mut Pump<'_>,
        tracking: &mut dyn DirtySource,
        dirty: &mut DirtyBitmap,
        watch: &mut crate::watch::Watch<'_>,
    ) -> Result<()> {
        let mut policy = Policy::new(Limits {
            downtime_us_max: self.options.downtime_us_max,
            when_stuck: self.options.when_stuck,
            rounds_max: self.options.rounds_max,
        });
        let mut estimator = Estimator::default();
        for index in 0.. {
            let begun = clock::now();
            let monitor = self.monitor;
            monitor.update(|p| {
                (p.round, p.round_pages, p.round_pages_sent) = (index, dirty.count(), 0)
            });
            let mut draining = || watch().and_then(|()| tracking.drain_early());
            let looked_before = pump.looked();
            let mut pages = 0;
            // In each round, so that the downtime finds little. Nothing was sent before the first.
            if let Some(zeros) = self.zeros.filter(|_| index > 0) {
                pages += pump.push_freed(dirty, zeros, &mut draining)?;
            }
            pages += pump.push(dirty, &mut draining, &mut |sent| {
                monitor.update(|p| p.round_pages_sent += sent)
            })?;
            let tag = pump.fence()?;
            pump.wait_fence(tag, &mut draining)?;
            let elapsed = clock::elapsed(begun);

            let syncing = clock::now();
            tracking.sync(dirty)?;
            let sync = clock::elapsed(syncing);
            guest.drain_io()?;
            let looking = pump.looked() - looked_before;
            let remaining_pages = dirty.count();
            let finished =
                Finished { round: index, pages, elapsed, looking, sync, remaining_pages };
            let expected = Expected {
                state_bytes: self.facts.state_bytes_expected,
                round_trip_us: self.round_trip_us,
                fixed: self.fixed_costs(pump)?,
            };
            let bytes = pages * PAGE_BYTES;
            let seen = estimator.observe(&finished, &expected);
            let predicted_downtime_us = predict_downtime_us(&seen);
            let dirty_rate = (dirty.count() * PAGE_BYTES) as f64 / elapsed.as_secs_f64().max(1e-6);
            self.report.predicted_downtime_us = predicted_downtime_us;
            self.report.rounds.push(Round {
                index,
                pages,
                bytes,
                elapsed_us: elapsed.as_micros() as u64,
                dirtied_pages: dirty.count(),
                predicted_downtime_us,
            });
            self.report.bytes_written = pump.bytes_written();
            monitor.update(|p| {
                p.bytes_per_second = seen.bytes_per_second as u64;
                p.dirty_bytes_per_second = dirty_rate as u64;
                p.predicted_downtime_us = predicted_downtime_us;
            });
            tracing::debug!(
                index,
                pages,
                remaining = dirty.count(),
                predicted_downtime_us,
                "round"
            );
            match policy.decide(&seen) {
                Decision::Iterate => {}
                Decision::SwitchOver => return Ok(()),
                Decision::GiveUp(reason) => return Err(Error::NotConverging(reason)),
            }
        }
        unreachable!("the policy ends the rounds at rounds_max")
    }
}
