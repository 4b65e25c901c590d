//! Whether two sets of samples differ at all: a permutation test on the sum of ranks (Wilcoxon,
//! Mann and Whitney).
//!
//! If they came from one source, it would not matter which sample bears which name. So the names
//! are dealt anew many times; the share of dealings with a difference as large as the real one is
//! the probability that chance alone made it. Ranks, so that one outlier is worth no more than any
//! other sample, and no shape of distribution is assumed.

use super::Samples;
use super::random::Random;

/// Dealings: the smallest probability that can be told is one in so many.
const DEALINGS: usize = 10_000;

/// So that a comparison says the same whenever it is made.
const SEED: u64 = 0x6665_7272_7970_6167;

/// The probability that chance alone would make a difference as large as this one. 1 if either is
/// empty.
#[must_use]
pub fn probability(a: &Samples, b: &Samples) -> f64 {
    let (n, m) = (a.0.len(), b.0.len());
    if n == 0 || m == 0 {
        return 1.0;
    }
    let mut ranks = ranks(&[a.0.as_slice(), b.0.as_slice()].concat());
    let expected = n as f64 * (n + m + 1) as f64 / 2.0;
    let off = |ranks: &[f64]| (ranks[..n].iter().sum::<f64>() - expected).abs();
    let seen = off(&ranks);
    let mut random = Random::new(SEED);
    let as_large = (0..DEALINGS)
        .filter(|_| {
            // The first n of a shuffle; the rest may lie as it comes.
            for place in 0..n {
                ranks.swap(place, place + random.below(n + m - place));
            }
            off(&ranks) >= seen - 1e-9
        })
        .count();
    // The dealing that was seen is one of them.
    (as_large + 1) as f64 / (DEALINGS + 1) as f64
}

/// Ranks from 1; equal samples share the middle of theirs.
fn ranks(all: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by(|x, y| all[*x].total_cmp(&all[*y]));
    let mut ranks = vec![0.0; all.len()];
    let mut first = 0;
    while first < order.len() {
        let same = order[first..].iter().take_while(|i| all[**i] == all[order[first]]).count();
        let rank = first as f64 + (same as f64 + 1.0) / 2.0;
        order[first..first + same].iter().for_each(|i| ranks[*i] = rank);
        first += same;
    }
    ranks
}

/// Holm's correction: of so many probabilities, those that are small enough that no false alarm
/// among all of them is likelier than `alarm`.
#[must_use]
pub fn holm(probabilities: &[f64], alarm: f64) -> Vec<bool> {
    let mut order: Vec<usize> = (0..probabilities.len()).collect();
    order.sort_by(|x, y| probabilities[*x].total_cmp(&probabilities[*y]));
    let mut real = vec![false; probabilities.len()];
    for (place, index) in order.iter().enumerate() {
        if probabilities[*index] > alarm / (probabilities.len() - place) as f64 {
            break;
        }
        real[*index] = true;
    }
    real
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_ties() {
        assert_eq!(ranks(&[10.0, 5.0, 10.0, 1.0]), [3.5, 2.0, 3.5, 1.0]);
    }

    #[test]
    fn samples_apart_are_told_and_mixed_ones_are_not() {
        let low = Samples((0..10).map(f64::from).collect());
        let high = Samples((10..20).map(f64::from).collect());
        assert!(probability(&low, &high) < 0.001);
        let even = Samples((0..10).map(|i| f64::from(2 * i)).collect());
        let odd = Samples((0..10).map(|i| f64::from(2 * i + 1)).collect());
        assert!(probability(&even, &odd) > 0.3);
        assert_eq!(probability(&low, &Samples::default()), 1.0);
    }

    #[test]
    fn one_small_probability_among_many_is_not_enough() {
        assert_eq!(holm(&[0.04], 0.05), [true]);
        assert_eq!(holm(&[0.04, 0.9, 0.5], 0.05), [false; 3]);
        assert_eq!(holm(&[0.02, 0.001, 0.9], 0.05), [true, true, false]);
    }
}
