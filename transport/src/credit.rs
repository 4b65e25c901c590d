//! Credits: how many bytes and work requests a lane may hold. Pure code, no I/O.
//!
//! A request is charged when it is accepted and refunded when its completion is handed to the
//! caller, so neither queues nor unread completions can grow with what is posted. One request is
//! always accepted on an idle lane, or a window smaller than the request would stall for ever.

/// The size of a lane's window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Bytes in flight at most, unless a single request is larger.
    pub bytes: u64,
    /// Work requests in flight at most; zero counts as one.
    pub requests: usize,
}

/// What one lane has in flight.
#[derive(Debug, Clone)]
pub struct Credits {
    window: Window,
    bytes: u64,
    requests: usize,
}

impl Credits {
    /// An idle lane.
    #[must_use]
    pub fn new(window: Window) -> Self {
        Self { window, bytes: 0, requests: 0 }
    }

    /// Charges one request of `bytes`, or says that there is no credit for it.
    #[must_use]
    pub fn take(&mut self, bytes: u64) -> bool {
        let fits = self.requests < self.window.requests
            && self.bytes.checked_add(bytes).is_some_and(|total| total <= self.window.bytes);
        if !fits && self.requests > 0 {
            return false;
        }
        self.bytes += bytes;
        self.requests += 1;
        true
    }

    /// Refunds requests that are done.
    ///
    /// # Panics
    /// If more is given back than was taken: then the link has lost count.
    pub fn give_back(&mut self, requests: usize, bytes: u64) {
        assert!(
            requests <= self.requests && bytes <= self.bytes,
            "credits given back that nobody took"
        );
        self.requests -= requests;
        self.bytes -= bytes;
    }

    /// Bytes in flight.
    #[must_use]
    pub fn bytes_in_flight(&self) -> u64 {
        self.bytes
    }

    /// Work requests in flight.
    #[must_use]
    pub fn requests_in_flight(&self) -> usize {
        self.requests
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    #[test]
    fn a_request_larger_than_the_window_passes_alone() {
        let mut credits = Credits::new(Window { bytes: 4096, requests: 8 });
        assert!(credits.take(2 << 20));
        assert!(!credits.take(1));
        credits.give_back(1, 2 << 20);
        assert!(credits.take(4096));
        assert!(!credits.take(1));
    }

    #[test]
    #[should_panic(expected = "nobody took")]
    fn giving_back_too_much_is_our_own_fault() {
        Credits::new(Window { bytes: 1, requests: 1 }).give_back(1, 1);
    }

    proptest! {
        #[test]
        fn the_window_is_never_exceeded_and_an_idle_lane_accepts(
            window_bytes in 0u64..20_000, window_requests in 0usize..6,
            steps in prop::collection::vec((any::<bool>(), 1u64..10_000), 0..200),
        ) {
            let window = Window { bytes: window_bytes, requests: window_requests };
            let mut credits = Credits::new(window);
            let mut model = VecDeque::new();
            for (post, bytes) in steps {
                if post {
                    let idle = model.is_empty();
                    let taken = credits.take(bytes);
                    prop_assert!(taken || !idle);
                    if taken {
                        model.push_back(bytes);
                    }
                } else if let Some(bytes) = model.pop_front() {
                    credits.give_back(1, bytes);
                }
                let total: u64 = model.iter().sum();
                prop_assert_eq!((credits.requests_in_flight(), credits.bytes_in_flight()), (model.len(), total));
                prop_assert!(model.len() <= 1 || (total <= window.bytes && model.len() <= window.requests));
            }
        }
    }
}
