//! Keeps the rate below a bound while the guest runs.

use super::Pump;
use crate::clock;
use crate::error::Result;
use crate::source::pump::{BATCH_BYTES_MAX, WATCH_EVERY};
use crate::watch::Watch;
use std::time::{Duration, Instant};

/// Holds the rate below a bound, over stretches of a round.
#[derive(Debug)]
pub(crate) struct Pace {
    pub(super) bytes_per_second_max: u64,
    pub(super) since: Instant,
    pub(super) bytes: u64,
}

impl Pump<'_> {
    /// Waits and rates count from here. Returns how many bytes a batch may have.
    pub(super) fn begin_to_post(&mut self) -> u64 {
        self.last_completion = clock::now();
        if let Some(pace) = &mut self.pace {
            (pace.since, pace.bytes) = (clock::now(), 0);
        }
        // A bounded rate is kept in bursts of a tenth of a second.
        let burst = self.pace.as_ref().map_or(u64::MAX, |pace| pace.bytes_per_second_max / 10);
        BATCH_BYTES_MAX.min(burst).max(1)
    }

    /// Sleeps as long as the bound on the rate asks for.
    pub(super) fn keep_pace(&mut self, bytes: u64, watch: &mut Watch<'_>) -> Result<()> {
        let Some(pace) = &mut self.pace else { return Ok(()) };
        pace.bytes += bytes;
        let due = pace.since
            + Duration::from_secs_f64(pace.bytes as f64 / pace.bytes_per_second_max as f64);
        loop {
            let left = due.saturating_duration_since(clock::now());
            if left.is_zero() {
                return Ok(());
            }
            clock::sleep(left.min(WATCH_EVERY));
            watch()?;
        }
    }
}
