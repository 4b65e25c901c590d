//! When to switch over: a pure function of what was measured.
//!
//! After each round the engine knows how many pages the guest has written meanwhile (the
//! remaining). Either they are few enough that pausing now keeps the downtime below the user's
//! limit, or another round is worth it because rounds still shrink, or they do not shrink any more
//! and somebody has to decide. Nothing here does I/O, so that the same code can be simulated and
//! property-tested.

mod prediction;

pub use prediction::{Estimator, Expected, Finished, Observation, predict_downtime_us};

use crate::memory::page::PAGE_BYTES;

/// A round must leave less than this share of the best remaining dirty pages so far to count as
/// progress.
const PROGRESS_SHARE: f64 = 0.9;

/// Rounds in a row without progress before the policy calls it stuck. Single rounds vary with what
/// the guest happens to do; five in a row do not.
const ROUNDS_WITHOUT_PROGRESS_MAX: u32 = 5;

/// What to do about a guest whose rounds do not shrink.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenStuck {
    /// Say so and leave the guest at the source.
    #[default]
    Abort,
    /// Switch over all the same: the downtime will be longer than asked for.
    Switchover,
}

/// What the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest downtime, in microseconds.
    pub downtime_us_max: u64,
    /// See [`WhenStuck`].
    pub when_stuck: WhenStuck,
    /// Most rounds before the policy calls it stuck.
    pub rounds_max: u32,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Send the remaining dirty pages while the guest runs, and look again.
    Iterate,
    /// Pause the guest.
    SwitchOver,
    /// Rounds do not shrink: stop, and say this.
    GiveUp(String),
}

/// The policy's memory between rounds.
#[derive(Debug, Clone)]
pub struct Policy {
    limits: Limits,
    best_residue_pages: u64,
    rounds_without_progress: u32,
}

impl Policy {
    /// A policy for one migration.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, best_residue_pages: u64::MAX, rounds_without_progress: 0 }
    }

    /// What to do after the round that `seen` describes.
    pub fn decide(&mut self, seen: &Observation) -> Decision {
        let predicted_us = predict_downtime_us(seen);
        if predicted_us <= self.limits.downtime_us_max {
            return Decision::SwitchOver;
        }
        if (seen.remaining_pages as f64) < self.best_residue_pages as f64 * PROGRESS_SHARE {
            self.best_residue_pages = seen.remaining_pages;
            self.rounds_without_progress = 0;
        } else {
            self.rounds_without_progress += 1;
        }
        let stuck = self.rounds_without_progress >= ROUNDS_WITHOUT_PROGRESS_MAX
            || seen.round + 1 >= self.limits.rounds_max;
        if !stuck {
            return Decision::Iterate;
        }
        // With nothing left to send no further round could help: then the limit itself is too low.
        let floor_us = predict_downtime_us(&Observation { remaining_pages: 0, ..*seen });
        let below_the_floor = floor_us > self.limits.downtime_us_max;
        match self.limits.when_stuck {
            WhenStuck::Switchover => Decision::SwitchOver,
            WhenStuck::Abort if below_the_floor => Decision::GiveUp(format!(
                "a downtime of {} cannot be reached: pausing, saving and loading alone take about {}; \
                 allow more with --downtime-max",
                ms(self.limits.downtime_us_max),
                ms(floor_us)
            )),
            WhenStuck::Abort => Decision::GiveUp(format!(
                "the guest writes memory as fast as the link carries it: after {} rounds {:.1} MiB are dirty each \
                 time, which means a downtime of about {} where {} are allowed; allow more with --downtime-max, \
                 or switch over all the same with --when-stuck switchover",
                seen.round + 1,
                (seen.remaining_pages * PAGE_BYTES) as f64 / f64::from(1 << 20),
                ms(predicted_us),
                ms(self.limits.downtime_us_max)
            )),
        }
    }
}

fn ms(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::FixedCosts;
    use proptest::prelude::*;
    use std::time::Duration;

    const FIXED: FixedCosts =
        FixedCosts { pause_us: 400, sync_us: 500, save_us: 1500, load_us: 1600, resume_us: 300 };

    fn seen(round: u32, remaining_pages: u64, bytes_per_second: f64) -> Observation {
        Observation {
            round,
            remaining_pages,
            bytes_per_second,
            state_bytes: 400_000,
            round_trip_us: 100,
            fixed: FIXED,
        }
    }

    fn limits(downtime_us_max: u64, when_stuck: WhenStuck) -> Limits {
        Limits { downtime_us_max, when_stuck, rounds_max: 100 }
    }

    /// A guest that dirties at a steady rate over a working set: the textbook model.
    fn run(
        dirty_bytes_per_second: f64,
        bandwidth: f64,
        working_set_pages: u64,
        policy: &mut Policy,
    ) -> (u32, Decision) {
        let mut remaining = working_set_pages;
        for round in 0.. {
            let seconds = (remaining * PAGE_BYTES) as f64 / bandwidth + 0.001;
            remaining = ((dirty_bytes_per_second * seconds / PAGE_BYTES as f64) as u64)
                .min(working_set_pages);
            match policy.decide(&seen(round, remaining, bandwidth)) {
                Decision::Iterate => {}
                decision => return (round, decision),
            }
        }
        unreachable!()
    }

    #[test]
    fn a_guest_slower_than_the_link_converges() {
        let (rounds, decision) =
            run(1e9, 3e9, 262_144, &mut Policy::new(limits(10_000, WhenStuck::Abort)));
        assert_eq!(decision, Decision::SwitchOver);
        assert!(rounds < 8, "{rounds} rounds");
    }

    #[test]
    fn a_guest_faster_than_the_link_is_given_up_with_the_mend() {
        let (_, decision) =
            run(4e9, 3e9, 262_144, &mut Policy::new(limits(10_000, WhenStuck::Abort)));
        let Decision::GiveUp(reason) = decision else { panic!("{decision:?}") };
        assert!(reason.contains("--downtime-max") && reason.contains("--when-stuck"), "{reason}");
    }

    #[test]
    fn or_switched_over_if_the_user_says_so() {
        let (_, decision) =
            run(4e9, 3e9, 262_144, &mut Policy::new(limits(10_000, WhenStuck::Switchover)));
        assert_eq!(decision, Decision::SwitchOver);
    }

    #[test]
    fn a_limit_below_the_floor_is_named_as_such() {
        let (_, decision) = run(0.0, 3e9, 1000, &mut Policy::new(limits(1_000, WhenStuck::Abort)));
        assert!(
            matches!(decision, Decision::GiveUp(reason) if reason.contains("cannot be reached"))
        );
    }

    #[test]
    fn small_rounds_measure_no_bandwidth_and_slow_syncs_are_forgotten() {
        let mut estimator = Estimator::default();
        let expected = Expected { state_bytes: 1, round_trip_us: 2, fixed: FIXED };
        let ms = Duration::from_millis;
        let finished = |pages, sync| Finished {
            round: 0,
            pages,
            elapsed: ms(100),
            looking: Duration::ZERO,
            sync: ms(sync),
            remaining_pages: 7,
        };
        let large = estimator.observe(&finished(10_000, 3), &expected);
        assert_eq!((large.bytes_per_second, large.fixed.sync_us), (409.6e6, 6500));
        let small = estimator.observe(&finished(1000, 9), &expected);
        assert_eq!((small.bytes_per_second, small.fixed.sync_us), (409.6e6, 6500));
        assert_eq!(
            Estimator::default().observe(&finished(0, 1), &expected).bytes_per_second,
            500e6
        );
    }

    /// A guest of which much was set aside and little is written: its first round is long, and the
    /// later ones are too small to measure anything.
    #[test]
    fn the_look_at_memory_of_zeros_is_not_taken_for_a_slow_link() {
        let mut estimator = Estimator::default();
        let expected = Expected { state_bytes: 0, round_trip_us: 100, fixed: FIXED };
        let ms = Duration::from_millis;
        let mut finished = Finished {
            round: 0,
            pages: 10_000,
            elapsed: ms(4_100),
            looking: ms(4_000),
            sync: Duration::ZERO,
            remaining_pages: 500,
        };
        assert_eq!(estimator.observe(&finished, &expected).bytes_per_second, 409.6e6);
        (finished.round, finished.pages, finished.elapsed, finished.looking) =
            (1, 500, ms(5), ms(1));
        let seen = estimator.observe(&finished, &expected);
        assert!(predict_downtime_us(&seen) <= 10_000, "{}", predict_downtime_us(&seen));
    }

    #[test]
    fn a_round_trip_is_not_much_longer_than_the_shortest_round() {
        let mut estimator = Estimator::default();
        let expected = Expected { state_bytes: 1, round_trip_us: 1_000_000, fixed: FIXED };
        let finished = |ms| Finished {
            round: 0,
            pages: 10,
            elapsed: Duration::from_millis(ms),
            looking: Duration::ZERO,
            sync: Duration::ZERO,
            remaining_pages: 7,
        };
        let round_trips =
            [3000, 40, 7, 90].map(|ms| estimator.observe(&finished(ms), &expected).round_trip_us);
        assert_eq!(round_trips, [1_000_000, 160_000, 28_000, 28_000]);
    }

    proptest! {
        #[test]
        fn it_always_decides_in_the_end(
            residues in prop::collection::vec(any::<u32>(), 100),
            bandwidth in 0f64..1e12,
            downtime_us_max: u64,
            rounds_max in 1u32..100,
        ) {
            let mut policy = Policy::new(Limits { downtime_us_max, when_stuck: WhenStuck::Abort, rounds_max });
            let ended = residues.iter().zip(0..).any(|(remaining, round)| {
                policy.decide(&seen(round, u64::from(*remaining), bandwidth)) != Decision::Iterate
            });
            prop_assert!(ended);
        }

        #[test]
        fn it_never_switches_over_above_the_limit_unless_told(
            remaining: u32, bandwidth in 0f64..1e12, downtime_us_max in 0u64..1_000_000_000, round in 0u32..50,
        ) {
            let seen = seen(round, u64::from(remaining), bandwidth);
            let mut policy = Policy::new(limits(downtime_us_max, WhenStuck::Abort));
            if policy.decide(&seen) == Decision::SwitchOver {
                prop_assert!(predict_downtime_us(&seen) <= downtime_us_max);
            }
        }

        #[test]
        fn more_residue_never_predicts_less(a: u32, b: u32, bandwidth in 1f64..1e12) {
            let (low, high) = (u64::from(a.min(b)), u64::from(a.max(b)));
            prop_assert!(predict_downtime_us(&seen(0, low, bandwidth)) <= predict_downtime_us(&seen(0, high, bandwidth)));
        }
    }
}
