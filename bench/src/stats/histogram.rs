//! Distributions as HDR histograms: any percentile to three digits, from a microsecond to an hour.
//!
//! # Coordinated omission
//!
//! A client that waits for each answer before it asks again asks only once during a downtime, and
//! so sees one slow answer where a thousand users would have seen one each. Here clients ask on a
//! fixed schedule, answered or not, and what counts is the time from the scheduled moment
//! ([`crate::downtime::client`]); nothing is left out, so nothing has to be put back.
//! [`Histogram::filled`] puts back what is missing where a series has one sample a *gap*: for each
//! gap it counts what users would have waited that came in the middle of it.

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

/// The largest time that is told apart, in microseconds: an hour.
const US_MAX: u64 = 3_600_000_000;

/// Significant digits.
const DIGITS: u8 = 3;

/// The percentiles that are shown.
pub const PERCENTILES: [f64; 4] = [50.0, 90.0, 99.0, 99.9];

/// A histogram of times.
#[derive(Debug, Clone)]
pub struct Histogram(hdrhistogram::Histogram<u64>);

/// A histogram as it is kept in a record: the counts of its values, and its percentiles for those
/// who only look.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// What moved the guest, or what else the samples have in common.
    pub group: String,
    /// What was timed.
    pub name: String,
    /// How many times were recorded.
    pub count: u64,
    /// Values of [`PERCENTILES`], in milliseconds.
    pub percentiles_ms: Vec<f64>,
    /// The longest.
    pub max_ms: f64,
    /// Every value with its count, in microseconds, rising.
    pub counts_us: Vec<(u64, u64)>,
}

impl Histogram {
    /// An empty one.
    pub fn new() -> Result<Self> {
        hdrhistogram::Histogram::new_with_bounds(1, US_MAX, DIGITS)
            .map(Self)
            .map_err(|e| anyhow!("{e}"))
    }

    /// One of these times in milliseconds.
    pub fn of_ms(times: &[f64]) -> Result<Self> {
        let mut histogram = Self::new()?;
        times
            .iter()
            .filter(|ms| ms.is_finite())
            .for_each(|ms| histogram.record_us((ms * 1e3).round() as u64));
        Ok(histogram)
    }

    /// One of these gaps in milliseconds, and of what was waited within them by users `every_us`
    /// apart.
    pub fn filled(gaps_ms: &[f64], every_us: u64) -> Result<Self> {
        let mut histogram = Self::new()?;
        for ms in gaps_ms.iter().filter(|ms| ms.is_finite()) {
            let us = ((ms * 1e3).round() as u64).clamp(1, US_MAX);
            histogram.0.saturating_record(us);
            let mut rest = us.saturating_sub(every_us);
            while every_us > 0 && rest >= every_us {
                histogram.0.saturating_record(rest);
                rest -= every_us;
            }
        }
        Ok(histogram)
    }

    /// One more. What lies outside of the bounds counts as the bound.
    pub fn record_us(&mut self, us: u64) {
        self.0.saturating_record(us.clamp(1, US_MAX));
    }

    /// Both together.
    pub fn add(&mut self, other: &Self) -> Result<()> {
        self.0.add(&other.0).map_err(|e| anyhow!("{e}"))
    }

    /// How many times were recorded.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The value below which so many percent lie, in milliseconds.
    #[must_use]
    pub fn percentile_ms(&self, percent: f64) -> f64 {
        self.0.value_at_percentile(percent) as f64 / 1e3
    }

    /// The longest, in milliseconds.
    #[must_use]
    pub fn max_ms(&self) -> f64 {
        self.0.max() as f64 / 1e3
    }

    /// As it is kept in a record.
    #[must_use]
    pub fn keep(&self, group: impl Into<String>, name: impl Into<String>) -> Distribution {
        Distribution {
            group: group.into(),
            name: name.into(),
            count: self.count(),
            percentiles_ms: PERCENTILES.iter().map(|p| self.percentile_ms(*p)).collect(),
            max_ms: self.max_ms(),
            counts_us: self
                .0
                .iter_recorded()
                .map(|v| (v.value_iterated_to(), v.count_at_value()))
                .collect(),
        }
    }
}

impl Distribution {
    /// Whether enough was recorded that this percentile is more than another word for the longest.
    #[must_use]
    pub fn can_tell(&self, percent: f64) -> bool {
        // Less than the whole one that rounding may take.
        self.count as f64 * (100.0 - percent) / 100.0 > 0.999
    }

    /// Points of the curve of percentiles: (percent, milliseconds), rising.
    #[must_use]
    pub fn curve(&self) -> Vec<(f64, f64)> {
        let mut below = 0;
        let point = |(us, count): &(u64, u64)| {
            below += count;
            (below as f64 * 100.0 / self.count.max(1) as f64, *us as f64 / 1e3)
        };
        self.counts_us.iter().map(point).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_samples_to_three_digits() {
        let times: Vec<f64> = (1..=1000).map(f64::from).collect();
        let kept = Histogram::of_ms(&times).unwrap().keep("", "");
        for (found, truth) in kept.percentiles_ms.iter().zip([500.0, 900.0, 990.0, 999.0]) {
            assert!((found / truth - 1.0).abs() < 0.002, "{found} {truth}");
        }
        assert!((kept.max_ms / 1000.0 - 1.0).abs() < 0.002);
        assert!(
            kept.can_tell(99.9)
                && !Histogram::of_ms(&times[..50]).unwrap().keep("", "").can_tell(99.0)
        );
    }

    #[test]
    fn a_gap_counts_once_for_each_user_who_came_within_it() {
        let filled = Histogram::filled(&[10.0, 1.0], 1000).unwrap();
        // 10, 9, ... 1 and the gap that was as long as their distance.
        assert_eq!(filled.count(), 11);
        assert!((filled.percentile_ms(50.0) - 5.0).abs() < 0.01);
        assert_eq!(Histogram::filled(&[10.0], 0).unwrap().count(), 1);
    }
}
