//! What a page holds: every word is a function of (page, generation, index), and can be read
//! backwards.
//!
//! For one index, different (page, generation) pairs never give the same word: each step is a
//! bijection of 64 bits. So one wrong word is always seen, and [`Origin`] says where it came from.
//! The words look random, so nothing on the way can compress them.

use crate::pages::{PAGE_WORDS, Page};
use std::fmt;
use std::sync::atomic::Ordering::Relaxed;

/// Steps the index; odd, so that the step is a bijection (the golden ratio, as in splitmix64).
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
/// Spreads the bits; odd, so invertible.
const SPREAD: u64 = 0xD6E8_FEB8_6659_FD93;
const SPREAD_INVERSE: u64 = inverse(SPREAD);

/// The inverse of an odd number modulo 2^64: Newton's iteration doubles the right bits each time,
/// from three to more than 64.
const fn inverse(odd: u64) -> u64 {
    let mut x = odd;
    let mut round = 0;
    while round < 5 {
        x = x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x)));
        round += 1;
    }
    x
}

/// A bijection of 64 bits. Shifting by half the width makes the shift its own inverse.
#[must_use]
pub const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 32)).wrapping_mul(SPREAD);
    x ^ (x >> 32)
}

const fn unmix(x: u64) -> u64 {
    let x = (x ^ (x >> 32)).wrapping_mul(SPREAD_INVERSE);
    x ^ (x >> 32)
}

/// Which page, and which generation of it, a word was written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Number of the page.
    pub page: u32,
    /// How often it had been written.
    pub generation: u32,
}

impl Origin {
    /// What all words of the page are made from.
    #[must_use]
    pub const fn seed(self) -> u64 {
        mix(((self.page as u64) << 32) | self.generation as u64)
    }

    /// Reads a word backwards. Any word has an origin; only a plausible one means anything.
    #[must_use]
    pub const fn of_word(word: u64, index: usize) -> Self {
        let spread = word.wrapping_mul(SPREAD_INVERSE);
        let seed = (spread ^ (spread >> 32)).wrapping_sub(step(index));
        let pair = unmix(seed);
        Self { page: (pair >> 32) as u32, generation: pair as u32 }
    }
}

const fn step(index: usize) -> u64 {
    (index as u64 + 1).wrapping_mul(STEP)
}

/// The word at `index` of a page with this seed.
#[must_use]
pub const fn word(seed: u64, index: usize) -> u64 {
    let x = seed.wrapping_add(step(index));
    (x ^ (x >> 32)).wrapping_mul(SPREAD)
}

/// Writes a whole page.
pub fn write(page: &Page, origin: Origin) {
    let seed = origin.seed();
    for (index, cell) in page.0.iter().enumerate() {
        cell.store(word(seed, index), Relaxed);
    }
}

/// A page that does not hold what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadPage {
    /// What it should hold.
    pub expected: Origin,
    /// Index of the first wrong word.
    pub index: usize,
    /// The right word.
    pub want: u64,
    /// The word that was there.
    pub got: u64,
    /// How many words are wrong.
    pub bad_words: usize,
    /// Pages that exist: tells a plausible origin from noise.
    pub pages: u32,
}

/// Checks a whole page. `pages` is the number of pages that exist, for the diagnosis.
pub fn check(page: &Page, expected: Origin, pages: u32) -> Result<(), BadPage> {
    let seed = expected.seed();
    // One pass without a branch a word: nearly always all is well.
    let difference = page
        .0
        .iter()
        .enumerate()
        .fold(0, |acc, (i, cell)| acc | (cell.load(Relaxed) ^ word(seed, i)));
    if difference == 0 {
        return Ok(());
    }
    let mut bad = BadPage { expected, index: PAGE_WORDS, want: 0, got: 0, bad_words: 0, pages };
    for (index, cell) in page.0.iter().enumerate() {
        let (want, got) = (word(seed, index), cell.load(Relaxed));
        if want != got {
            if bad.bad_words == 0 {
                (bad.index, bad.want, bad.got) = (index, want, got);
            }
            bad.bad_words += 1;
        }
    }
    Err(bad)
}

impl fmt::Display for BadPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { expected, index, want, got, bad_words, pages } = self;
        write!(
            f,
            "page={} generation={} word={index} want={want:016x} got={got:016x} bad_words={bad_words} looks=",
            expected.page, expected.generation
        )?;
        let origin = Origin::of_word(*got, *index);
        if *got == 0 {
            f.write_str("zero")
        } else if origin.page == expected.page {
            write!(f, "generation-{}-of-this-page", origin.generation)
        } else if origin.page < *pages {
            write!(f, "generation-{}-of-page-{}", origin.generation, origin.page)
        } else {
            f.write_str("foreign")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::PageMemory;

    fn origin(page: u32, generation: u32) -> Origin {
        Origin { page, generation }
    }

    #[test]
    fn a_word_tells_its_origin() {
        for page in [0, 1, 77, 1 << 20, u32::MAX] {
            for generation in [0, 1, 2, 1 << 31, u32::MAX] {
                for index in [0, 1, 255, 511] {
                    let o = origin(page, generation);
                    assert_eq!(Origin::of_word(word(o.seed(), index), index), o);
                }
            }
        }
    }

    #[test]
    fn one_flipped_bit_anywhere_is_found_and_named() {
        let memory = PageMemory::new(1).unwrap();
        for index in [0, 1, 300, 511] {
            for bit in [0, 31, 63] {
                write(&memory[0], origin(5, 9));
                check(&memory[0], origin(5, 9), 10).unwrap();
                memory[0].0[index].fetch_xor(1 << bit, Relaxed);
                let bad = check(&memory[0], origin(5, 9), 10).unwrap_err();
                assert_eq!((bad.index, bad.bad_words, bad.want ^ bad.got), (index, 1, 1 << bit));
            }
        }
    }

    #[test]
    fn a_torn_page_is_found_with_both_generations() {
        let memory = PageMemory::new(1).unwrap();
        write(&memory[0], origin(5, 9));
        for (index, cell) in memory[0].0.iter().enumerate().skip(200) {
            cell.store(word(origin(5, 8).seed(), index), Relaxed);
        }
        let bad = check(&memory[0], origin(5, 9), 10).unwrap_err();
        assert_eq!((bad.index, bad.bad_words), (200, 312));
        assert!(bad.to_string().ends_with("looks=generation-8-of-this-page"), "{bad}");
    }

    #[test]
    fn a_zero_page_is_found() {
        let memory = PageMemory::new(1).unwrap();
        let bad = check(&memory[0], origin(0, 0), 10).unwrap_err();
        assert!(bad.bad_words >= PAGE_WORDS - 1);
        assert!(bad.to_string().ends_with("looks=zero"), "{bad}");
    }
}
