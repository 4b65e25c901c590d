//! A worker's own pages and the ledger of what it wrote there.
//!
//! The ledger has two forms, in different pages of guest memory: the generation of every page, and
//! two running totals over them. See the crate's first page for what that finds.

use crate::content::{self, BadPage, Origin, mix};
use crate::pages::PageMemory;
use std::fmt;
use std::io;

/// Generation of a page that was filled and not yet rewritten. Not zero: a zero ledger is a lost
/// one.
const FIRST_GENERATION: u32 = 1;

/// Pages `[first, first + len)` of the workload, owned by one worker.
pub struct Plot {
    first: u32,
    pages_of_all: u32,
    /// How many of the pages, from the beginning, are written again and again; the rest is only
    /// checked.
    written: usize,
    pages: PageMemory,
    generations: Vec<u32>,
    totals: Totals,
}

/// The second form of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Wrapping sum of a hash of every (page, generation).
    pub checksum: u64,
    /// Sum of all generations: rewrites, plus one a page.
    pub generations: u64,
}

/// The ledger's two forms disagree.
#[derive(Debug, PartialEq, Eq)]
pub struct BadLedger {
    /// As kept while writing.
    pub kept: Totals,
    /// As counted over the generations.
    pub counted: Totals,
}

impl fmt::Display for BadLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ledger kept_checksum={:016x} counted_checksum={:016x} kept_generations={} counted_generations={}",
            self.kept.checksum,
            self.counted.checksum,
            self.kept.generations,
            self.counted.generations
        )
    }
}

impl Plot {
    /// Maps and fills `written + still` pages, numbered from `first` among `pages_of_all`.
    pub fn fill(first: u32, written: u32, still: u32, pages_of_all: u32) -> io::Result<Self> {
        let count = written as usize + still as usize;
        let mut plot = Self {
            first,
            pages_of_all,
            written: written as usize,
            pages: PageMemory::new(count)?,
            generations: vec![FIRST_GENERATION; count],
            totals: Totals::default(),
        };
        for index in 0..count {
            content::write(&plot.pages[index], plot.origin(index));
        }
        plot.totals = plot.count();
        Ok(plot)
    }

    /// Pages that are written again and again.
    #[must_use]
    pub fn written(&self) -> usize {
        self.written
    }

    /// All pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.generations.len()
    }

    /// True without pages.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.generations.is_empty()
    }

    fn origin(&self, index: usize) -> Origin {
        Origin { page: self.first + index as u32, generation: self.generations[index] }
    }

    /// Checks a whole page. A bad page is put right, so that it is counted once.
    pub fn check(&self, index: usize) -> Result<(), BadPage> {
        let expected = self.origin(index);
        content::check(&self.pages[index], expected, self.pages_of_all)
            .inspect_err(|_| content::write(&self.pages[index], expected))
    }

    /// Checks a whole page, then writes its next generation, whatever the check found.
    pub fn rewrite(&mut self, index: usize) -> Result<(), BadPage> {
        let before = self.origin(index);
        let found = content::check(&self.pages[index], before, self.pages_of_all);
        let after = Origin { generation: before.generation.wrapping_add(1), ..before };
        content::write(&self.pages[index], after);
        self.generations[index] = after.generation;
        self.totals.checksum =
            self.totals.checksum.wrapping_sub(mark(before)).wrapping_add(mark(after));
        self.totals.generations += 1;
        found
    }

    /// Compares the two forms of the ledger. A difference is put right, so that it is counted once.
    pub fn audit(&mut self) -> Result<(), BadLedger> {
        let (kept, counted) = (self.totals, self.count());
        self.totals = counted;
        if kept == counted { Ok(()) } else { Err(BadLedger { kept, counted }) }
    }

    fn count(&self) -> Totals {
        (0..self.len()).map(|index| self.origin(index)).fold(Totals::default(), |totals, origin| {
            Totals {
                checksum: totals.checksum.wrapping_add(mark(origin)),
                generations: totals.generations + u64::from(origin.generation),
            }
        })
    }
}

/// The share of one page in the checksum: mixed once more than the seed, so that it is no word's
/// seed.
fn mark(origin: Origin) -> u64 {
    mix(origin.seed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::PAGE_WORDS;
    use std::sync::atomic::Ordering::Relaxed;

    fn plot() -> Plot {
        let mut plot = Plot::fill(100, 8, 4, 200).unwrap();
        for index in [0, 1, 2, 1, 1] {
            plot.rewrite(index).unwrap();
        }
        plot
    }

    fn copy(plot: &Plot, page: usize) -> Vec<u64> {
        plot.pages[page].0.iter().map(|cell| cell.load(Relaxed)).collect()
    }

    fn restore(plot: &Plot, page: usize, words: &[u64]) {
        for (cell, word) in plot.pages[page].0.iter().zip(words) {
            cell.store(*word, Relaxed);
        }
    }

    fn bad_pages(plot: &Plot) -> Vec<u32> {
        (0..plot.len()).filter_map(|i| plot.check(i).err()).map(|bad| bad.expected.page).collect()
    }

    #[test]
    fn an_untouched_plot_is_intact() {
        let mut plot = plot();
        assert_eq!(bad_pages(&plot), [0u32; 0]);
        plot.audit().unwrap();
    }

    #[test]
    fn a_flipped_word_is_found_by_the_sweep_and_counted_once() {
        let plot = plot();
        plot.pages[10].0[511].fetch_xor(1, Relaxed);
        assert_eq!(bad_pages(&plot), [110]);
        assert_eq!(bad_pages(&plot), [0u32; 0]);
    }

    #[test]
    fn a_flipped_word_is_found_before_the_page_is_rewritten() {
        let mut plot = plot();
        plot.pages[3].0[0].fetch_xor(1 << 40, Relaxed);
        assert_eq!(plot.rewrite(3).unwrap_err().bad_words, 1);
        plot.rewrite(3).unwrap();
    }

    #[test]
    fn swapped_pages_are_found() {
        let plot = plot();
        let (a, b) = (copy(&plot, 4), copy(&plot, 5));
        restore(&plot, 4, &b);
        restore(&plot, 5, &a);
        let bad = plot.check(4).unwrap_err();
        assert_eq!(bad.bad_words, PAGE_WORDS);
        assert!(bad.to_string().ends_with("looks=generation-1-of-page-105"), "{bad}");
        assert_eq!(bad_pages(&plot), [105]);
    }

    #[test]
    fn an_old_copy_of_a_page_is_found() {
        let mut plot = plot();
        let old = copy(&plot, 1);
        plot.rewrite(1).unwrap();
        restore(&plot, 1, &old);
        let bad = plot.rewrite(1).unwrap_err();
        assert!(bad.to_string().ends_with("looks=generation-4-of-this-page"), "{bad}");
    }

    #[test]
    fn an_old_copy_of_the_ledger_alone_is_found() {
        let mut plot = plot();
        let old = plot.generations.clone();
        plot.rewrite(6).unwrap();
        plot.generations = old;
        assert_eq!(bad_pages(&plot), [106]);
        plot.audit().unwrap_err();
    }

    #[test]
    fn an_old_copy_of_pages_and_ledger_together_is_found_by_the_totals() {
        let mut plot = plot();
        let (ledger, page) = (plot.generations.clone(), copy(&plot, 6));
        plot.rewrite(6).unwrap();
        plot.generations = ledger;
        restore(&plot, 6, &page);
        assert_eq!(bad_pages(&plot), [0u32; 0], "pages and ledger agree with each other");
        let bad = plot.audit().unwrap_err();
        assert_eq!(bad.kept.generations, bad.counted.generations + 1);
    }

    #[test]
    fn old_totals_alone_are_found() {
        let mut plot = plot();
        let old = plot.totals;
        plot.rewrite(7).unwrap();
        plot.totals = old;
        plot.audit().unwrap_err();
        plot.audit().unwrap();
    }
}
