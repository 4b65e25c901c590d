//! Counting fences, pure code: at the target those that came on each lane, at the initiator those
//! that each lane has acknowledged. A fence is done when its slowest lane is.

use crate::error::{Error, Result};
use crate::work::FenceTag;
use std::collections::VecDeque;

/// Fences that an initiator may have on their way. A round has one, so this is far from any use;
/// it bounds the memory of a caller that never polls.
pub(crate) const FENCES_MAX: usize = 256;

/// The target's view: the last fence of each lane.
#[derive(Debug)]
pub(crate) struct Arrivals {
    last: Vec<Option<FenceTag>>,
}

impl Arrivals {
    pub(crate) fn new(lanes: usize) -> Self {
        Self { last: vec![None; lanes] }
    }

    /// Notes a fence. False if tags did not rise, which no honest peer does.
    #[must_use]
    pub(crate) fn arrive(&mut self, lane: usize, tag: FenceTag) -> bool {
        let rising = self.last[lane].is_none_or(|last| last < tag);
        if rising {
            self.last[lane] = Some(tag);
        }
        rising
    }

    /// The last fence that has come on every lane, or one after it, and a lane that has none after
    /// it.
    pub(crate) fn slowest(&self) -> Option<(usize, FenceTag)> {
        let (lane, last) = self.last.iter().enumerate().min_by_key(|(_, last)| **last)?;
        last.map(|last| (lane, last))
    }

    /// Whether `tag`, or one after it, has come on every lane.
    pub(crate) fn reached(&self, tag: FenceTag) -> bool {
        self.last.iter().all(|last| last.is_some_and(|last| last >= tag))
    }
}

/// The initiator's view: fences sent and not yet acknowledged by every lane.
#[derive(Debug)]
pub(crate) struct Acks {
    waiting: VecDeque<FenceTag>,
    last_sent: Option<FenceTag>,
    /// Nothing may be sent any more.
    ended: bool,
    /// For each lane, how many of `waiting`, from the front, it has acknowledged.
    acknowledged: Vec<usize>,
}

impl Acks {
    pub(crate) fn new(lanes: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            last_sent: None,
            ended: false,
            acknowledged: vec![0; lanes],
        }
    }

    /// Fails behind the last fence.
    pub(crate) fn check_open(&self) -> Result<()> {
        if self.ended { Err(Error::State("posting behind the last fence")) } else { Ok(()) }
    }

    /// Notes a last fence that nobody will acknowledge.
    pub(crate) fn send_last(&mut self, tag: FenceTag) -> Result<()> {
        self.check(tag)?;
        self.end();
        Ok(())
    }

    /// The fence that was sent last is the last.
    pub(crate) fn end(&mut self) {
        self.ended = true;
    }

    fn check(&self, tag: FenceTag) -> Result<()> {
        self.check_open()?;
        if self.last_sent.is_some_and(|last| last >= tag) {
            return Err(Error::State("the tags of a link's fences must rise"));
        }
        Ok(())
    }

    /// Notes a fence that is about to be sent on every lane.
    pub(crate) fn send(&mut self, tag: FenceTag) -> Result<()> {
        self.check(tag)?;
        if self.waiting.len() == FENCES_MAX {
            return Err(Error::State("too many fences are on their way: poll first"));
        }
        self.last_sent = Some(tag);
        self.waiting.push_back(tag);
        Ok(())
    }

    /// Notes that `tag`, and so every fence before it, has come on every lane, for a link on which
    /// the peer says so for all lanes together; appends those that are done by it. False if no such
    /// fence was sent.
    #[must_use]
    pub(crate) fn reach(&mut self, tag: FenceTag, done: &mut impl Extend<FenceTag>) -> bool {
        while self.waiting.front().is_some_and(|&waiting| waiting <= tag) {
            done.extend(self.waiting.pop_front());
        }
        self.last_sent.is_some_and(|last| tag <= last)
    }

    /// Notes the next acknowledgement of a lane and appends the fences that are now done. False if
    /// that lane owes none.
    #[must_use]
    pub(crate) fn acknowledge(&mut self, lane: usize, done: &mut impl Extend<FenceTag>) -> bool {
        if self.acknowledged[lane] == self.waiting.len() {
            return false;
        }
        self.acknowledged[lane] += 1;
        if self.acknowledged.iter().all(|&count| count > 0) {
            self.acknowledged.iter_mut().for_each(|count| *count -= 1);
            done.extend(self.waiting.pop_front());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_fence_is_reached_when_the_slowest_lane_has_it_or_a_later_one() {
        let mut arrivals = Arrivals::new(2);
        assert!(arrivals.arrive(0, FenceTag(1)));
        assert!(arrivals.arrive(0, FenceTag(3)));
        assert!(!arrivals.reached(FenceTag(1)));
        assert_eq!(arrivals.slowest(), None);
        assert!(arrivals.arrive(1, FenceTag(2)));
        assert!(arrivals.reached(FenceTag(2)));
        assert_eq!(arrivals.slowest(), Some((1, FenceTag(2))));
        assert!(!arrivals.reached(FenceTag(3)));
        assert!(!arrivals.arrive(0, FenceTag(3)), "the same tag twice");
    }

    #[test]
    fn fences_that_every_lane_has_are_done_up_to_the_last_that_was_sent() {
        let (mut acks, mut done) = (Acks::new(3), Vec::new());
        assert!(!acks.reach(FenceTag(1), &mut done), "nothing was sent");
        [2, 5, 9].iter().for_each(|&tag| acks.send(FenceTag(tag)).unwrap());
        assert!(acks.reach(FenceTag(5), &mut done) && acks.reach(FenceTag(5), &mut done));
        assert_eq!(done, [FenceTag(2), FenceTag(5)]);
        assert!(!acks.reach(FenceTag(10), &mut done));
    }

    #[test]
    fn tags_must_rise_and_be_polled() {
        let mut acks = Acks::new(1);
        for tag in 1..=FENCES_MAX {
            acks.send(FenceTag(u32::try_from(tag).unwrap())).unwrap();
        }
        assert!(acks.send(FenceTag(7)).is_err());
        assert!(acks.send(FenceTag(u32::MAX)).is_err());
    }

    proptest! {
        #[test]
        fn fences_are_done_in_order_when_every_lane_has_acknowledged(
            lanes in 1usize..5, fences in 1u32..20, order in prop::collection::vec(0usize..5, 0..200),
        ) {
            let mut acks = Acks::new(lanes);
            for tag in 1..=fences {
                acks.send(FenceTag(tag)).unwrap();
            }
            let mut counts = vec![0u32; lanes];
            let mut done = Vec::new();
            for lane in order.into_iter().filter(|&lane| lane < lanes) {
                let owed = counts[lane] < fences;
                prop_assert_eq!(acks.acknowledge(lane, &mut done), owed);
                counts[lane] += u32::from(owed);
                let slowest = *counts.iter().min().unwrap();
                prop_assert_eq!(&done, &(1..=slowest).map(FenceTag).collect::<Vec<_>>());
            }
        }
    }
}
