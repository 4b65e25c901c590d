//! The pre-copy rounds: send, sync, decide.

use crate::clock;
use crate::error::{Error, Result};
use crate::guest::{FixedCosts, SourceGuest};
use crate::memory::page::PAGE_BYTES;
use crate::policy::{
    Decision, Estimator, Expected, Finished, Limits, Observation, Policy, predict_downtime_us,
};
use crate::report::Round;
use crate::source::attempt::Attempt;
use crate::source::flow::Flow;
use crate::watch::Watch;
use pageferry_transport::MemoryRegion;
use std::sync::Arc;

/// The pre-copy rounds of an attempt.
pub(super) struct Rounds<'r, 'm> {
    attempt: &'r mut Attempt<'m>,
    round_trip_us: u64,
    /// If memory may be taken away from the guest: what is written over it.
    zeros: Option<&'r Arc<MemoryRegion>>,
    /// The shortest look for what was taken away so far, in microseconds.
    holes_us: u64,
}

impl<'r, 'm> Rounds<'r, 'm> {
    pub(super) fn new(
        attempt: &'r mut Attempt<'m>,
        round_trip_us: u64,
        zeros: Option<&'r Arc<MemoryRegion>>,
    ) -> Self {
        Self { attempt, round_trip_us, zeros, holes_us: u64::MAX }
    }

    /// Sends what is dirty, syncs, and decides, until the policy says to switch over.
    pub(super) fn run(
        &mut self,
        guest: &mut dyn SourceGuest,
        flow: &mut Flow<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let options = self.attempt.options;
        let mut policy = Policy::new(Limits {
            downtime_us_max: options.downtime_us_max,
            when_stuck: options.when_stuck,
            rounds_max: options.rounds_max,
        });
        let mut estimator = Estimator::default();
        for index in 0.. {
            let finished = self.round(index, guest, flow, watch)?;
            let expected = Expected {
                state_bytes: flow.facts.state_bytes_expected,
                round_trip_us: self.round_trip_us,
                fixed: self.fixed_costs(flow)?,
            };
            let seen = estimator.observe(&finished, &expected);
            self.report(&finished, &seen, flow.pump.bytes_written());
            match policy.decide(&seen) {
                Decision::Iterate => {}
                Decision::SwitchOver => return Ok(()),
                Decision::GiveUp(reason) => return Err(Error::NotConverging(reason)),
            }
        }
        unreachable!("the policy ends the rounds at rounds_max")
    }

    /// One round: push, fence, sync.
    fn round(
        &self,
        index: u32,
        guest: &mut dyn SourceGuest,
        flow: &mut Flow<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<Finished> {
        let Flow { pump, tracking, dirty, .. } = flow;
        let begun = clock::now();
        let monitor = self.attempt.monitor;
        monitor
            .update(|p| (p.round, p.round_pages, p.round_pages_sent) = (index, dirty.count(), 0));
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
        Ok(Finished { round: index, pages, elapsed, looking, sync, remaining_pages })
    }

    /// What the downtime costs beside pages, states and syncs.
    fn fixed_costs(&mut self, flow: &Flow<'_>) -> Result<FixedCosts> {
        let fixed = flow.facts.fixed_costs;
        if self.zeros.is_none() {
            return Ok(fixed);
        }
        let look = flow.pump.time_a_look_for_holes()?;
        self.holes_us = self.holes_us.min(look.as_micros() as u64);
        Ok(FixedCosts { sync_us: fixed.sync_us + self.holes_us, ..fixed })
    }

    /// Notes a round, for the report and for who looks on.
    fn report(&mut self, finished: &Finished, seen: &Observation, bytes_written: u64) {
        let Finished { round: index, pages, elapsed, remaining_pages, .. } = *finished;
        let predicted_downtime_us = predict_downtime_us(seen);
        let dirty_rate = (remaining_pages * PAGE_BYTES) as f64 / elapsed.as_secs_f64().max(1e-6);
        let report = &mut self.attempt.report;
        report.predicted_downtime_us = predicted_downtime_us;
        report.rounds.push(Round {
            index,
            pages,
            bytes: pages * PAGE_BYTES,
            elapsed_us: elapsed.as_micros() as u64,
            dirtied_pages: remaining_pages,
            predicted_downtime_us,
        });
        report.bytes_written = bytes_written;
        self.attempt.monitor.update(|p| {
            p.bytes_per_second = seen.bytes_per_second as u64;
            p.dirty_bytes_per_second = dirty_rate as u64;
            p.predicted_downtime_us = predicted_downtime_us;
        });
        tracing::debug!(index, pages, remaining = remaining_pages, predicted_downtime_us, "round");
    }
}
