//! What the switchover would cost now: measured in the rounds so far. Pure.

use crate::guest::FixedCosts;
use crate::memory::page::PAGE_BYTES;
use std::time::Duration;

/// What the link is taken for until a round has measured it.
const BYTES_PER_SECOND_GUESS: f64 = 500e6;

/// A round below this size measures latency, not bandwidth.
const BANDWIDTH_SAMPLE_BYTES_MIN: u64 = 4 << 20;

/// A message and its answer on the control connection take no longer than this many of the shortest
/// round. More than one, as the control connection may be slower to answer than the lanes.
const ROUNDS_OF_A_ROUND_TRIP: u64 = 4;

/// Harvests in a downtime: before and after the save.
const SYNCS_IN_DOWNTIME: u64 = 2;

/// What one finished round showed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Observation {
    /// Index of the round, from zero.
    pub round: u32,
    /// Pages that are dirty now.
    pub remaining_pages: u64,
    /// What the link carried, in bytes a second, measured to the fence's completion.
    pub bytes_per_second: f64,
    /// Expected device state in bytes.
    pub state_bytes: u64,
    /// Round trip of the control connection, in microseconds.
    pub round_trip_us: u64,
    /// See [`FixedCosts`].
    pub fixed: FixedCosts,
}

/// What one finished round took, and what it left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// Index of the round, from zero.
    pub round: u32,
    /// Pages that it sent.
    pub pages: u64,
    /// From the first post to the fence's completion.
    pub elapsed: Duration,
    /// Of that, how long the link waited while memory was looked through that holds little to be
    /// sent: memory that was set aside, and never written.
    pub looking: Duration,
    /// The sync after it.
    pub sync: Duration,
    /// Pages that this sync found.
    pub remaining_pages: u64,
}

/// What is expected of guest and link beside what rounds measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Device state in bytes.
    pub state_bytes: u64,
    /// Round trip of the control connection, in microseconds.
    pub round_trip_us: u64,
    /// As the guest's monitor knows them. The syncs are measured here; `sync_us` is what comes
    /// beside them: the look for holes.
    pub fixed: FixedCosts,
}

/// Makes an [`Observation`] of each round, and remembers what the rounds before have measured.
#[derive(Debug, Clone)]
pub struct Estimator {
    bytes_per_second: f64,
    sync_us: u64,
    round_us_min: u64,
}

impl Default for Estimator {
    fn default() -> Self {
        Self { bytes_per_second: BYTES_PER_SECOND_GUESS, sync_us: u64::MAX, round_us_min: u64::MAX }
    }
}

impl Estimator {
    /// What the policy is to know after this round.
    pub fn observe(&mut self, finished: &Finished, expected: &Expected) -> Observation {
        // The shortest so far: a sync costs what scanning all memory costs, and longer only where
        // this thread had to wait for a core.
        self.sync_us = self.sync_us.min(finished.sync.as_micros() as u64);
        // A round has a round trip in it: a connection that lost its first packet, or a thread that
        // waited for a core while it connected, is forgotten.
        self.round_us_min = self.round_us_min.min(finished.elapsed.as_micros() as u64);
        let bytes = finished.pages * PAGE_BYTES;
        if bytes >= BANDWIDTH_SAMPLE_BYTES_MIN {
            let sending = finished.elapsed.saturating_sub(finished.looking);
            self.bytes_per_second = bytes as f64 / sending.as_secs_f64().max(1e-6);
        }
        Observation {
            round: finished.round,
            remaining_pages: finished.remaining_pages,
            bytes_per_second: self.bytes_per_second,
            state_bytes: expected.state_bytes,
            round_trip_us: expected
                .round_trip_us
                .min(self.round_us_min.saturating_mul(ROUNDS_OF_A_ROUND_TRIP)),
            fixed: FixedCosts {
                sync_us: SYNCS_IN_DOWNTIME * self.sync_us + expected.fixed.sync_us,
                ..expected.fixed
            },
        }
    }
}

/// The downtime if the guest were paused now, in microseconds: pause + sync + max(remaining dirty
/// pages / bandwidth, save) + state / bandwidth + round trips + load + resume.
#[must_use]
pub fn predict_downtime_us(seen: &Observation) -> u64 {
    // Two and a half: the fence with Prepare out and Ready back, Commit out and Running back, and
    // the lanes' own acknowledgement under way.
    const ROUND_TRIPS: f64 = 2.5;
    let per_byte_us = 1e6 / seen.bytes_per_second.max(1.0);
    let push_us = (seen.remaining_pages * PAGE_BYTES) as f64 * per_byte_us;
    let state_us = seen.state_bytes as f64 * per_byte_us;
    let fixed = &seen.fixed;
    let total = push_us.max(fixed.save_us as f64)
        + state_us
        + ROUND_TRIPS * seen.round_trip_us as f64
        + (fixed.pause_us + fixed.sync_us + fixed.load_us + fixed.resume_us) as f64;
    total.ceil().min(u64::MAX as f64) as u64
}
