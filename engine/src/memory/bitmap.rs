//! Which pages must be sent: one bit a page, one owner, no syscalls.
//!
//! A [`crate::dirty::DirtySource`] sets bits, the pump of a round takes them out as runs. After a
//! failure nothing is given back: the next attempt follows writes anew and begins with every
//! touched page.

use crate::memory::page::PageRun;

/// A set of pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyBitmap {
    words: Vec<u64>,
    pages: u64,
    set: u64,
}

impl DirtyBitmap {
    /// An empty set over `pages` pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).expect("a bitmap fits the address space");
        Self { words: vec![0; words], pages, set: 0 }
    }

    /// How many pages it ranges over.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.set
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.set == 0
    }

    /// Whether a page is in the set.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn contains(&self, pfn: u64) -> bool {
        assert!(pfn < self.pages, "page {pfn} of {}", self.pages);
        self.words[(pfn / 64) as usize] >> (pfn % 64) & 1 == 1
    }

    /// Adds a run; pages already in the set stay in it.
    ///
    /// # Panics
    /// If the run reaches beyond the last page.
    pub fn insert(&mut self, run: PageRun) {
        self.set += self.change(run, |word, mask| {
            let added = mask & !*word;
            // Often nothing is new, and counting bits takes a dozen instructions on the plainest
            // x86-64.
            if added == 0 {
                return 0;
            }
            *word |= added;
            added.count_ones()
        });
    }

    /// Adds pages of the 64 that begin at `first`: those whose bit is set in `mask`.
    ///
    /// # Panics
    /// If one of them lies beyond the last page.
    #[inline]
    pub fn insert_mask(&mut self, first: u64, mask: u64) {
        if mask == 0 {
            return;
        }
        let last = first + 63 - u64::from(mask.leading_zeros());
        assert!(last < self.pages, "page {last} of {}", self.pages);
        let (index, shift) = ((first / 64) as usize, first % 64);
        let mut add = |index: usize, mask: u64| {
            let added = mask & !self.words[index];
            if added != 0 {
                self.words[index] |= added;
                self.set += u64::from(added.count_ones());
            }
        };
        add(index, mask << shift);
        // What does not fit into the first word, if it begins in the midst of one.
        if shift > 0 && mask >> (64 - shift) != 0 {
            add(index + 1, mask >> (64 - shift));
        }
    }

    /// Takes a run out; pages not in the set are passed over.
    ///
    /// # Panics
    /// If the run reaches beyond the last page.
    pub fn remove(&mut self, run: PageRun) {
        self.set -= self.change(run, |word, mask| {
            let removed = (mask & *word).count_ones();
            *word &= !mask;
            removed
        });
    }

    /// The first run of the set at or after `from`, at most `pages_max` long.
    ///
    /// # Panics
    /// If `pages_max` is zero.
    #[must_use]
    pub fn next_run(&self, from: u64, pages_max: u64) -> Option<PageRun> {
        assert!(pages_max > 0, "a run has at least one page");
        let first = self.next_bit(from, self.pages, false)?;
        let end = first.saturating_add(pages_max).min(self.pages);
        Some(PageRun::between(first, self.next_bit(first, end, true).unwrap_or(end)))
    }

    /// The first run of pages in `[from, end)` that are not in the set.
    #[must_use]
    pub fn next_gap(&self, from: u64, end: u64) -> Option<PageRun> {
        let first = self.next_bit(from, end, true)?;
        Some(PageRun::between(
            first,
            self.next_bit(first, end, false).unwrap_or(end.min(self.pages)),
        ))
    }

    /// The first run of the set in `[from, end)`.
    #[must_use]
    pub fn next_run_within(&self, from: u64, end: u64) -> Option<PageRun> {
        let first = self.next_bit(from, end, false)?;
        Some(PageRun::between(
            first,
            self.next_bit(first, end, true).unwrap_or(end.min(self.pages)),
        ))
    }

    /// Whether a page is in both sets, which range over the same pages.
    ///
    /// # Panics
    /// If they do not.
    #[must_use]
    pub fn intersects(&self, other: &Self) -> bool {
        assert_eq!(self.pages, other.pages, "sets of pages of one guest");
        !self.is_empty()
            && !other.is_empty()
            && self.words.iter().zip(&other.words).any(|(a, b)| a & b != 0)
    }

    /// All runs in rising order, each at most `pages_max` long.
    pub fn runs(&self, pages_max: u64) -> impl Iterator<Item = PageRun> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(from, pages_max)?;
            from = run.end();
            Some(run)
        })
    }

    /// The first page in `[from, end)` that is in the set (or, `inverted`, is not).
    fn next_bit(&self, from: u64, end: u64, inverted: bool) -> Option<u64> {
        let end = end.min(self.pages);
        if from >= end {
            return None;
        }
        let flip = if inverted { u64::MAX } else { 0 };
        let (mut index, last) = ((from / 64) as usize, ((end - 1) / 64) as usize);
        let mut word = (self.words[index] ^ flip) & (u64::MAX << (from % 64));
        while word == 0 && index < last {
            index += 1;
            word = self.words[index] ^ flip;
        }
        let bit = index as u64 * 64 + u64::from(word.trailing_zeros());
        (word != 0 && bit < end).then_some(bit)
    }

    /// Calls `change` for each word that the run touches with the mask of its bits there. Returns
    /// how many pages it says have changed.
    #[inline]
    fn change(&mut self, run: PageRun, change: impl Fn(&mut u64, u64) -> u32) -> u64 {
        let (first, end) = (run.first.0, run.end());
        assert!(end <= self.pages, "pages {first}..{end} of {}", self.pages);
        let (mut at, mut changed) = (first, 0);
        while at < end {
            let stop = end.min((at / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
            changed += u64::from(change(&mut self.words[(at / 64) as usize], mask));
            at = stop;
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn run_in(pages: u64) -> impl Strategy<Value = PageRun> {
        (0..pages)
            .prop_flat_map(move |first| (Just(first), first + 1..=pages))
            .prop_map(|(a, b)| PageRun::between(a, b))
    }

    /// A memory size and operations on it: true inserts, false removes.
    fn script() -> impl Strategy<Value = (u64, Vec<(bool, PageRun)>)> {
        (1u64..400).prop_flat_map(|pages| {
            (Just(pages), prop::collection::vec((any::<bool>(), run_in(pages)), 0..40))
        })
    }

    proptest! {
        #[test]
        fn a_mask_adds_the_pages_of_its_bits(masks in prop::collection::vec((0u64..300, any::<u64>()), 0..20)) {
            let (mut bitmap, mut model) = (DirtyBitmap::new(400), BTreeSet::new());
            for (first, mask) in masks {
                bitmap.insert_mask(first, mask);
                model.extend((0..64).filter(|bit| mask >> bit & 1 == 1).map(|bit| first + bit));
                prop_assert_eq!(bitmap.count(), model.len() as u64);
            }
            prop_assert!((0..400).all(|p| bitmap.contains(p) == model.contains(&p)));
        }

        #[test]
        fn sets_intersect_if_they_have_a_page_in_common(a in run_in(300), b in run_in(300)) {
            let set = |run| {
                let mut set = DirtyBitmap::new(300);
                set.insert(run);
                set
            };
            let common = a.first.0 < b.end() && b.first.0 < a.end();
            prop_assert_eq!(set(a).intersects(&set(b)), common);
            prop_assert!(!set(a).intersects(&DirtyBitmap::new(300)));
        }

        #[test]
        fn it_is_the_set_it_says((pages, script) in script(), longest in 1u64..100, from in 0u64..450, end in 0u64..450) {
            let mut bitmap = DirtyBitmap::new(pages);
            let mut model = BTreeSet::new();
            for (insert, run) in script {
                if insert {
                    bitmap.insert(run);
                    model.extend(run.first.0..run.end());
                } else {
                    bitmap.remove(run);
                    model.retain(|p| !(run.first.0..run.end()).contains(p));
                }
                prop_assert_eq!(bitmap.count(), model.len() as u64);
            }
            prop_assert!((0..pages).all(|p| bitmap.contains(p) == model.contains(&p)));
            let runs: Vec<_> = bitmap.runs(longest).collect();
            prop_assert!(runs.iter().all(|r| r.count <= longest));
            prop_assert!(runs.windows(2).all(|w| w[0].end() <= w[1].first.0));
            let flat: Vec<_> = runs.iter().flat_map(|r| r.first.0..r.end()).collect();
            prop_assert_eq!(flat, model.iter().copied().collect::<Vec<_>>());
            // The first run of a kind is as long as the kind goes on.
            let first = |of_the_set: bool| {
                let is = |p: &u64| model.contains(p) == of_the_set;
                let first = (from..end.min(pages)).find(is)?;
                let count = (first..end.min(pages)).take_while(is).count() as u64;
                Some(PageRun::between(first, first + count))
            };
            prop_assert_eq!(bitmap.next_run_within(from, end), first(true));
            prop_assert_eq!(bitmap.next_gap(from, end), first(false));
        }
    }
}
