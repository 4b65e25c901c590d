//! How long the guest was stopped, seen from inside: how far the CMOS clock ran ahead.
//!
//! While QEMU holds the guest, `CLOCK_MONOTONIC` is paused and the CMOS clock follows the host's
//! (`-rtc clock=host`, QEMU's default). The CMOS clock only tells whole seconds, but the moment at
//! which its second changes can be caught to a few microseconds. So: catch every change, and see
//! whether it comes early. A steady deviation is the drift between the two clocks and taken off.
//!
//! A change that comes early is caught roughly only (nobody was watching closely yet); the one
//! after it gives the exact figure, so a stop is known one to two seconds later. Several stops
//! within that time are one. A step of the host's clock looks like a stop when it goes forward.

use std::time::Duration;

/// A change of the second is exact when it was caught between two reads at most this far apart.
const EXACT_WITHIN: Duration = Duration::from_micros(150);
/// Deviations up to this are noise of the two clocks and of the reading.
const NOISE_MICROS: i64 = 250;
/// The drift is the median over this many changes, so that a few stops do not disturb it.
const DRIFT_WINDOW: usize = 9;
/// No two clocks drift apart faster than this (parts per million); what looks faster is a stop or a
/// step.
const DRIFT_MAX: i64 = 800;
/// The clock is read as a second within the hour.
const SECONDS_PER_HOUR: i64 = 3600;

/// What a reading showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// The same second as before.
    Same,
    /// The second has changed, but nobody knows exactly when.
    Rough,
    /// The second has changed, and the guest was stopped for this long since the last exact change.
    Exact(Duration),
}

#[derive(Debug, Clone, Copy)]
struct Reading {
    asked: Duration,
    second: u32,
}

#[derive(Debug, Clone, Copy)]
struct Change {
    at: Duration,
    second: u32,
}

/// Compares the two clocks.
#[derive(Debug, Default)]
pub struct StopMeter {
    last: Option<Reading>,
    /// The last change caught exactly.
    exact: Option<Change>,
    /// When the next change is to be expected, if nothing happens.
    expected: Option<Duration>,
    /// Microseconds that the CMOS clock gains a second, for the last changes.
    gains: Vec<i64>,
}

impl StopMeter {
    /// When the CMOS clock will next change its second: read it closely around that time.
    #[must_use]
    pub fn expected_change(&self) -> Option<Duration> {
        self.expected
    }

    /// A reading: `second` within the hour, asked for and answered at these times of
    /// `CLOCK_MONOTONIC`.
    pub fn observe(&mut self, asked: Duration, answered: Duration, second: u32) -> Seen {
        let before = self.last.replace(Reading { asked, second });
        let Some(before) = before.filter(|before| before.second != second) else {
            return Seen::Same;
        };
        let width = answered.saturating_sub(before.asked);
        let change = Change { at: before.asked + width / 2, second };
        self.expected = Some(change.at + Duration::from_micros((1_000_000 - self.drift()) as u64));
        if width > EXACT_WITHIN {
            return Seen::Rough;
        }
        let start = self.exact.replace(change);
        Seen::Exact(start.map_or(Duration::ZERO, |start| self.stopped_between(start, change)))
    }

    fn stopped_between(&mut self, start: Change, end: Change) -> Duration {
        let mut seconds = i64::from(end.second) - i64::from(start.second);
        if seconds < -SECONDS_PER_HOUR / 2 {
            seconds += SECONDS_PER_HOUR;
        }
        let elapsed = (end.at - start.at).as_micros() as i64;
        let ahead = seconds * 1_000_000 - elapsed;
        let (drift, drift_is_known) = (self.drift(), !self.gains.is_empty());
        let gain = ahead / seconds.max(1);
        if gain.abs() <= DRIFT_MAX {
            if !drift_is_known {
                self.gains.push(gain);
                return Duration::ZERO;
            }
            if self.gains.len() == DRIFT_WINDOW {
                self.gains.remove(0);
            }
            self.gains.push(gain);
        }
        let length = ahead - drift * elapsed / 1_000_000;
        if length > NOISE_MICROS { Duration::from_micros(length as u64) } else { Duration::ZERO }
    }

    /// The median of what was seen; nothing seen is no drift.
    fn drift(&self) -> i64 {
        let mut sorted = self.gains.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a clock that gains `drift_ppm` as the pulse would (every 500 us, closely around an
    /// expected change), with the guest stopped at the given times; returns what the meter reports.
    fn run(seconds: u64, drift_ppm: i64, stops: &[(u64, u64)]) -> Vec<u64> {
        let (mut meter, mut found) = (StopMeter::default(), Vec::new());
        let mut now = 0u64;
        while now < seconds * 1_000_000 {
            let stopped: u64 =
                stops.iter().filter(|(at, _)| *at <= now).map(|(_, length)| length).sum();
            let cmos =
                3_590_400_000 + now as i64 + now as i64 * drift_ppm / 1_000_000 + stopped as i64;
            let second = (cmos / 1_000_000 % 3600) as u32;
            let t = Duration::from_micros(now);
            if let Seen::Exact(stopped) = meter.observe(t, t + Duration::from_micros(4), second) {
                found.extend((stopped > Duration::ZERO).then_some(stopped.as_micros() as u64));
            }
            let close = meter
                .expected_change()
                .is_some_and(|at| (at.as_micros() as u64).abs_diff(now + 250) < 600);
            now += if close { 10 } else { 500 };
        }
        found
    }

    #[test]
    fn a_steady_drift_is_no_stop() {
        for drift in [-400, -30, 0, 30, 400] {
            assert_eq!(run(30, drift, &[]), [0u64; 0], "{drift} ppm");
        }
    }

    #[test]
    fn a_stop_of_milliseconds_is_measured() {
        for drift in [-300, 0, 300] {
            for length in [1_000, 6_900, 35_000, 700_000, 2_300_000] {
                let found = run(30, drift, &[(10_345_000, length)]);
                let [one] = found[..] else { panic!("{length} us, {drift} ppm: {found:?}") };
                assert!(one.abs_diff(length) < 150, "{length} us, {drift} ppm: {one}");
            }
        }
    }

    #[test]
    fn two_stops_apart_are_two() {
        let found = run(30, 50, &[(10_345_000, 9_000), (20_100_000, 4_000)]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].abs_diff(9_000) < 150 && found[1].abs_diff(4_000) < 150, "{found:?}");
    }

    #[test]
    fn a_clock_set_back_is_no_stop() {
        let mut meter = StopMeter::default();
        let tick = Duration::from_micros(5);
        for (at, second) in (1..).zip([9, 10, 11, 12, 13, 14, 3, 4, 5, 6]) {
            let change = Duration::from_secs(at);
            meter.observe(change - tick, change, second - 1);
            let seen = meter.observe(change, change + tick, second);
            assert_eq!(seen, Seen::Exact(Duration::ZERO), "second {second}");
        }
    }
}
