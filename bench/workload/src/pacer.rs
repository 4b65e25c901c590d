//! How much is due by now: a rate without catching up after a long gap.

use std::time::Duration;

/// At most this much is made up for after a gap: a guest that was paused must not burst afterwards.
const ARREARS_MAX: Duration = Duration::from_millis(50);

/// Hands out units at a steady rate. Time is what the caller says it is.
pub struct Pacer {
    /// Units a second; infinite means always due.
    rate: f64,
    /// Up to when everything is paid.
    paid_until: Duration,
}

impl Pacer {
    /// A pacer that begins at time zero.
    #[must_use]
    pub fn new(units_per_second: f64) -> Self {
        Self { rate: units_per_second, paid_until: Duration::ZERO }
    }

    /// Takes up to `max` units that are due at `now`.
    pub fn take(&mut self, now: Duration, max: usize) -> usize {
        if self.rate.is_infinite() {
            return max;
        }
        if self.rate <= 0.0 {
            return 0;
        }
        self.paid_until = self.paid_until.max(now.saturating_sub(ARREARS_MAX));
        let due = now.saturating_sub(self.paid_until).as_secs_f64() * self.rate;
        let taken = (due as usize).min(max);
        self.paid_until += Duration::from_secs_f64(taken as f64 / self.rate);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_in_small_steps() {
        let mut pacer = Pacer::new(20_000.0);
        let taken: usize =
            (1..=10_000).map(|i| pacer.take(Duration::from_micros(100 * i), 64)).sum();
        assert!((19_990..=20_000).contains(&taken), "{taken}");
    }

    #[test]
    fn a_long_gap_is_not_made_up_for() {
        let mut pacer = Pacer::new(1000.0);
        assert_eq!(pacer.take(Duration::from_secs(60), usize::MAX), 50);
        assert_eq!(pacer.take(Duration::from_secs(60), usize::MAX), 0);
    }

    #[test]
    fn infinite_is_always_due_and_zero_never() {
        assert_eq!(Pacer::new(f64::INFINITY).take(Duration::ZERO, 7), 7);
        assert_eq!(Pacer::new(0.0).take(Duration::from_secs(9), 7), 0);
    }
}
