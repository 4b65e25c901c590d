//! Numbers by seed: xorshift64*, which is enough to choose what to break and when.

use std::time::Duration;

/// See the [module](self).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The same seed gives the same numbers.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        // Neighbouring seeds begin far apart; zero is no state.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A seed of its own for each run, printed so that the run can be told again.
    ///
    /// # Panics
    /// Before 1970.
    #[must_use]
    pub fn by_the_clock() -> Self {
        let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("a clock").as_nanos() as u64;
        println!("seed {seed}");
        Self::of(seed)
    }

    /// Any number below this one.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound.max(1)
    }

    /// One of them.
    pub fn one_of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    /// Any time up to this one.
    pub fn within(&mut self, most: Duration) -> Duration {
        Duration::from_micros(self.below(most.as_micros() as u64))
    }
}
