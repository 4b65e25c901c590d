//! The host's side of the heartbeat: arrivals of COM2's bytes, timed by the host's clock.
//!
//! The guest sends one byte a beat (every millisecond by default), numbered modulo 256. The longest
//! time between two arrivals is the longest time in which the guest did nothing, the downtime and
//! everything around it included: no clock of the guest's is involved. Bytes of the source's and
//! then of the destination's QEMU go into the same meter, in the order of their arrival.

use std::time::{Duration, Instant};

/// The bit that tells a beat from a letter, where both come from one port. The other seven count
/// the beats.
pub const SHARED_BEAT: u8 = 0x80;

/// Finds the largest gap between heartbeats.
#[derive(Debug)]
pub struct GapMeter {
    /// The bits that count.
    counter: u8,
    last: Option<(Instant, u8)>,
    largest: Option<Gap>,
    beats: u64,
    lost: u64,
}

/// Two heartbeats, and how far they are apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// When the last beat before it arrived.
    pub from: Instant,
    /// Until the next one.
    pub length: Duration,
}

impl Default for GapMeter {
    fn default() -> Self {
        Self::new()
    }
}

impl GapMeter {
    /// A meter that has seen nothing, for beats that have a port to themselves.
    #[must_use]
    pub fn new() -> Self {
        Self { counter: u8::MAX, last: None, largest: None, beats: 0, lost: 0 }
    }

    /// The same for beats on the console, which come between letters.
    #[must_use]
    pub fn shared() -> Self {
        Self { counter: !SHARED_BEAT, ..Self::new() }
    }

    /// Bytes of COM2 that arrived together at `now`, in order.
    pub fn observe(&mut self, now: Instant, bytes: &[u8]) {
        for &byte in bytes {
            if let Some((from, before)) = self.last {
                let length = now.saturating_duration_since(from);
                if self.largest.is_none_or(|gap| length > gap.length) {
                    self.largest = Some(Gap { from, length });
                }
                self.lost += u64::from(byte.wrapping_sub(before).wrapping_sub(1) & self.counter);
            }
            self.beats += 1;
            self.last = Some((now, byte));
        }
    }

    /// The largest gap since the beginning or the last [`GapMeter::reset`]; none before two beats.
    #[must_use]
    pub fn largest(&self) -> Option<Gap> {
        self.largest
    }

    /// The time since the last beat: how long a gap that still lasts is by now.
    #[must_use]
    pub fn open_gap(&self, now: Instant) -> Option<Duration> {
        self.last.map(|(from, _)| now.saturating_duration_since(from))
    }

    /// Beats that arrived.
    #[must_use]
    pub fn beats(&self) -> u64 {
        self.beats
    }

    /// Beats that were sent and did not arrive, modulo 256 at each gap. More than a few mean that
    /// the bytes were not read fast enough, and that gaps are not to be trusted.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Forgets the largest gap and the counts, but not the last beat.
    pub fn reset(&mut self) {
        (self.largest, self.beats, self.lost) = (None, 0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_gap_and_lost_beats_are_found() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut meter = GapMeter::new();
        assert_eq!(meter.largest(), None);
        meter.observe(at(0), &[254]);
        meter.observe(at(1), &[255, 0]);
        meter.observe(at(13), &[1]);
        meter.observe(at(15), &[4]);
        assert_eq!(meter.largest(), Some(Gap { from: at(1), length: Duration::from_millis(12) }));
        assert_eq!((meter.beats(), meter.lost()), (5, 2));
        assert_eq!(meter.open_gap(at(20)), Some(Duration::from_millis(5)));
        meter.reset();
        meter.observe(at(16), &[5]);
        assert_eq!(meter.largest().unwrap().length, Duration::from_millis(1));
    }

    #[test]
    fn beats_between_letters_count_with_seven_bits() {
        let mut meter = GapMeter::shared();
        meter.observe(Instant::now(), &[0xfe, 0xff, 0x80, 0x83]);
        assert_eq!((meter.beats(), meter.lost()), (4, 2));
    }
}
