//! The modelled guest: how much memory, and which of it is written how fast.

use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_transport::STRIPE_BYTES;
use serde::{Deserialize, Serialize};

/// Pages of one part of the memory that are written alike: each write goes to one of them, by
/// chance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Area {
    /// How many there are.
    pub pages: f64,
    /// Writes a second that make a page dirty, to all of them together.
    pub writes_per_second: f64,
}

/// A guest as far as a migration knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelledGuest {
    /// Memory, in pages.
    pub pages: f64,
    /// Pages that were ever touched.
    pub touched_pages: f64,
    /// Touched pages that are zero: looked at, and not sent.
    pub zero_pages: f64,
    /// What is written; one area, or a hot and a cold one.
    pub areas: Vec<Area>,
    /// vCPUs.
    pub vcpus: u32,
    /// Device state in bytes, whatever the memory.
    pub state_bytes: f64,
}

impl ModelledGuest {
    /// Distinct pages that are written within so many seconds.
    ///
    /// A page of an area is missed by one write with a probability of `1 - 1/n`, so by `k` writes
    /// with nearly `exp(-k/n)`: what is expected is `n (1 - exp(-k/n))`. At first each write finds
    /// a clean page, in the end none does.
    #[must_use]
    pub fn dirtied_pages(&self, seconds: f64) -> f64 {
        self.areas
            .iter()
            .filter(|area| area.pages > 0.0)
            .map(|area| area.pages * -(-area.writes_per_second * seconds / area.pages).exp_m1())
            .sum()
    }

    /// Work requests for so many of the written pages. Neighbours go in one request: of pages that
    /// are dirty by chance with a density of `d`, a run begins at each that has a clean one before
    /// it, which a share of `1 - d` has; and no request is longer than a stripe.
    #[must_use]
    pub fn requests(&self, pages: f64) -> f64 {
        let written: f64 = self.areas.iter().map(|area| area.pages).sum();
        let density = if written > 0.0 { (pages / written).min(1.0) } else { 1.0 };
        let stripe_pages = (STRIPE_BYTES / PAGE_BYTES) as f64;
        (pages * (1.0 - density)).max(pages / stripe_pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(areas: Vec<Area>) -> ModelledGuest {
        ModelledGuest {
            pages: 1e6,
            touched_pages: 1e6,
            zero_pages: 0.0,
            areas,
            vcpus: 1,
            state_bytes: 1e5,
        }
    }

    #[test]
    fn first_writes_find_clean_pages_and_late_ones_none() {
        let one = guest(vec![Area { pages: 1000.0, writes_per_second: 100.0 }]);
        assert!((one.dirtied_pages(0.01) - 1.0).abs() < 0.01);
        assert!((one.dirtied_pages(10.0) - 632.1).abs() < 0.1);
        assert!((one.dirtied_pages(1e4) - 1000.0).abs() < 0.1);
        assert_eq!(guest(Vec::new()).dirtied_pages(1.0), 0.0);
    }

    #[test]
    fn the_expectation_is_that_of_writes_by_chance() {
        let pages = 512;
        let mut seed = 1u64;
        let mut seen = vec![false; pages];
        for _ in 0..700 {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            seen[(seed >> 33) as usize % pages] = true;
        }
        let counted = seen.iter().filter(|page| **page).count() as f64;
        let expected =
            guest(vec![Area { pages: pages as f64, writes_per_second: 700.0 }]).dirtied_pages(1.0);
        assert!((counted / expected - 1.0).abs() < 0.05, "{counted} of {expected}");
    }

    #[test]
    fn a_hot_area_is_full_before_a_cold_one() {
        let both = guest(vec![
            Area { pages: 100.0, writes_per_second: 900.0 },
            Area { pages: 10_000.0, writes_per_second: 100.0 },
        ]);
        let dirty = both.dirtied_pages(1.0);
        assert!((190.0..201.0).contains(&dirty), "{dirty}");
    }

    #[test]
    fn pages_that_are_all_dirty_go_in_stripes_and_rare_ones_alone() {
        let one = guest(vec![Area { pages: 512_000.0, writes_per_second: 1.0 }]);
        assert_eq!(one.requests(512_000.0), 1000.0);
        assert!((one.requests(512.0) - 511.5).abs() < 0.1);
        assert!((one.requests(256_000.0) - 128_000.0).abs() < 1.0);
    }
}
