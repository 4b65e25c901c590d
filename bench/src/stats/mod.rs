//! What a run's samples say: medians and ranges, intervals ([`bootstrap`]), percentiles
//! ([`histogram`]), lines ([`least_squares`]), and whether two sets of them differ
//! ([`permutation`]).

pub mod bootstrap;
pub mod histogram;
pub mod least_squares;
pub mod permutation;
pub mod random;

use serde::{Deserialize, Serialize};

/// Samples of one figure.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Samples(pub Vec<f64>);

impl Samples {
    /// One more.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The middle one, or the mean of the two in the middle; NaN without samples.
    #[must_use]
    pub fn median(&self) -> f64 {
        median_of(&mut self.0.clone())
    }

    /// Smallest.
    #[must_use]
    pub fn min(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// Largest.
    #[must_use]
    pub fn max(&self) -> f64 {
        self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// `median [min..max]` with so many digits.
    #[must_use]
    pub fn show(&self, digits: usize) -> String {
        if self.0.is_empty() {
            return "-".into();
        }
        format!("{:.digits$} [{:.digits$}..{:.digits$}]", self.median(), self.min(), self.max())
    }
}

/// The median of these, which are put in another order.
pub(crate) fn median_of(samples: &mut [f64]) -> f64 {
    let n = samples.len();
    if n == 0 {
        return f64::NAN;
    }
    let (below, middle, _) = samples.select_nth_unstable_by(n / 2, f64::total_cmp);
    let middle = *middle;
    if n % 2 == 1 {
        return middle;
    }
    let below = below.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    f64::midpoint(below, middle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(Samples(vec![3.0, 1.0, 2.0]).median(), 2.0);
        assert_eq!(Samples(vec![4.0, 1.0, 2.0, 3.0]).median(), 2.5);
        assert!(Samples::default().median().is_nan());
    }
}
