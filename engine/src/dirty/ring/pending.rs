//! Pages that were taken out of rings and not reported yet.
//!
//! Several vCPUs mark at once. One bit a page, and above it one bit a word that says that the word
//! may hold something: draining looks at a bit for 64 pages, and at a word for 16 MiB of guest.

use crate::memory::bitmap::DirtyBitmap;
use std::sync::atomic::{AtomicU64, Ordering};

/// A set of pages that many threads add to and one empties.
///
/// Every mark and every drain happens under the lock of a ring, the drain under the locks of all:
/// these order them, so that no access here has to.
#[derive(Debug)]
pub struct PendingPages {
    words: Vec<AtomicU64>,
    /// A bit for each word.
    summary: Vec<AtomicU64>,
}

impl PendingPages {
    /// An empty set over `pages` pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let zeros = |count: u64| (0..count).map(|_| AtomicU64::new(0)).collect();
        let words = pages.div_ceil(64);
        Self { words: zeros(words), summary: zeros(words.div_ceil(64)) }
    }

    /// Adds pages: `first` is the first of a word, `mask` those in it.
    ///
    /// # Panics
    /// If there are no such pages.
    #[inline]
    pub fn mark(&self, first: u64, mask: u64) {
        let index = (first / 64) as usize;
        let word = &self.words[index];
        let old = word.load(Ordering::Relaxed);
        // A guest writes its hot pages again and again.
        if old & mask == mask {
            return;
        }
        if word.fetch_or(mask, Ordering::Relaxed) == 0 {
            self.summary[index / 64].fetch_or(1 << (index % 64), Ordering::Relaxed);
        }
    }

    /// Moves all pages into `into`; returns how many. The caller sees to it that nobody marks
    /// meanwhile.
    pub fn drain(&self, into: &mut DirtyBitmap) -> u64 {
        self.empty(|first, mask| into.insert_mask(first, mask))
    }

    /// Forgets all pages. The caller sees to it that nobody marks meanwhile.
    pub fn clear(&self) {
        self.empty(|_, _| {});
    }

    fn empty(&self, mut each: impl FnMut(u64, u64)) -> u64 {
        let mut pages = 0;
        for (group, summary) in self.summary.iter().enumerate() {
            let mut left = summary.load(Ordering::Relaxed);
            if left == 0 {
                continue;
            }
            summary.store(0, Ordering::Relaxed);
            while left != 0 {
                let index = group * 64 + left.trailing_zeros() as usize;
                left &= left - 1;
                let word = self.words[index].load(Ordering::Relaxed);
                self.words[index].store(0, Ordering::Relaxed);
                pages += u64::from(word.count_ones());
                each(index as u64 * 64, word);
            }
        }
        pages
    }
}
