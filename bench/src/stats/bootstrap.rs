//! How sure a median and a ratio of medians are: percentile bootstrap (Efron 1979).
//!
//! The samples are drawn again, with replacement, and the figure is computed anew each time; the
//! middle 95 % of what comes out are the interval. It says how far the median of *this* stretch of
//! time may be off. What no resampling can see is that the machine was another one an hour later:
//! only ratios within one run, taken in turns, are safe from that.

use super::random::Random;
use super::{Samples, median_of};
use serde::{Deserialize, Serialize};

/// Resamples. The ends of a 95 % interval are then good to some 2 % of its own width.
const RESAMPLES: usize = 4000;

/// Fewer samples than this say nothing about their own spread.
pub const SAMPLES_MIN: usize = 3;

/// The level of an interval if nobody asks for another.
pub const LEVEL: f64 = 0.95;

/// So that an interval is the same whenever it is computed.
const SEED: u64 = 0x7061_6765_6665_7272;

/// Where a figure lies, with the level that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

impl Interval {
    /// Whether the interval lies wholly outside of `low..=high`.
    #[must_use]
    pub fn is_outside(&self, low: f64, high: f64) -> bool {
        self.low > high || self.high < low
    }
}

/// Of the median. None with too few samples.
#[must_use]
pub fn median(samples: &Samples, level: f64) -> Option<Interval> {
    let all = &samples.0;
    (all.len() >= SAMPLES_MIN).then(|| {
        let mut random = Random::new(SEED);
        let mut drawn = vec![0.0; all.len()];
        interval(level, || {
            drawn.fill_with(|| all[random.below(all.len())]);
            median_of(&mut drawn)
        })
    })
}

/// Of `median(a) / median(b)`, whose samples have nothing to do with one another.
#[must_use]
pub fn ratio(a: &Samples, b: &Samples, level: f64) -> Option<Interval> {
    let (a, b) = (&a.0, &b.0);
    (a.len().min(b.len()) >= SAMPLES_MIN).then(|| {
        let mut random = Random::new(SEED);
        let (mut from_a, mut from_b) = (vec![0.0; a.len()], vec![0.0; b.len()]);
        interval(level, || {
            from_a.fill_with(|| a[random.below(a.len())]);
            from_b.fill_with(|| b[random.below(b.len())]);
            median_of(&mut from_a) / median_of(&mut from_b)
        })
    })
}

/// Of `median(a) / median(b)`, where the samples with one index were taken in one turn: turns are
/// drawn, so that what slowed both down together does not widen the interval. Samples without a
/// partner are left out.
#[must_use]
pub fn ratio_in_turns(a: &Samples, b: &Samples, level: f64) -> Option<Interval> {
    ratio_to_best(a, std::slice::from_ref(b), f64::min, level)
}

/// The same of `median(a)` to the best of the medians of `others`, which is found anew for each
/// drawing: which of them is the best is not certain either. `best` is the better of two.
#[must_use]
pub fn ratio_to_best(
    a: &Samples,
    others: &[Samples],
    best: fn(f64, f64) -> f64,
    level: f64,
) -> Option<Interval> {
    let turns = others.iter().map(|b| b.0.len()).min()?.min(a.0.len());
    (turns >= SAMPLES_MIN).then(|| {
        let mut random = Random::new(SEED);
        let (mut drawn, mut from) = (vec![0; turns], vec![0.0; turns]);
        interval(level, || {
            drawn.fill_with(|| random.below(turns));
            let mut median = |samples: &Samples| {
                from.iter_mut().zip(&drawn).for_each(|(place, turn)| *place = samples.0[*turn]);
                median_of(&mut from)
            };
            // The better of a number and none is the number.
            let found = others.iter().map(&mut median).fold(f64::NAN, best);
            median(a) / found
        })
    })
}

fn interval(level: f64, mut figure: impl FnMut() -> f64) -> Interval {
    let mut figures: Vec<f64> = (0..RESAMPLES).map(|_| figure()).collect();
    figures.sort_by(f64::total_cmp);
    let outside = (1.0 - level.clamp(0.0, 1.0)) / 2.0;
    let low = (outside * RESAMPLES as f64) as usize;
    Interval {
        low: figures[low.min(RESAMPLES - 1)],
        high: figures[RESAMPLES - 1 - low.min(RESAMPLES - 1)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `n` samples around `middle` with a spread of `share` of it, skewed as times are.
    fn noisy(random: &mut Random, n: usize, middle: f64, share: f64) -> Samples {
        Samples((0..n).map(|_| middle * (1.0 + share * -(1.0 - random.unit()).ln())).collect())
    }

    #[test]
    fn the_interval_of_a_median_covers_it_about_as_often_as_it_says() {
        let (mut random, share) = (Random::new(1), 0.2);
        let truth = 100.0 * (1.0 + share * std::f64::consts::LN_2);
        let covered = (0..200)
            .filter(|_| {
                let found = median(&noisy(&mut random, 25, 100.0, share), 0.95).unwrap();
                !found.is_outside(truth, truth)
            })
            .count();
        assert!((180..=200).contains(&covered), "{covered} of 200");
    }

    #[test]
    fn turns_that_were_slow_for_both_do_not_widen_a_ratio() {
        let mut random = Random::new(2);
        let b = noisy(&mut random, 15, 100.0, 1.0);
        let a = Samples(b.0.iter().map(|b| b * 1.5).collect());
        let paired = ratio_in_turns(&a, &b, 0.95).unwrap();
        let apart = ratio(&a, &b, 0.95).unwrap();
        assert!((paired.low - 1.5).abs() < 1e-9 && (paired.high - 1.5).abs() < 1e-9, "{paired:?}");
        assert!(apart.low < 1.4 && apart.high > 1.6, "{apart:?}");
    }

    #[test]
    fn two_samples_have_no_interval_and_equal_ones_a_narrow_one() {
        assert_eq!(median(&Samples(vec![1.0, 2.0]), LEVEL), None);
        assert_eq!(median(&Samples(vec![7.0; 5]), LEVEL), Some(Interval { low: 7.0, high: 7.0 }));
    }
}
