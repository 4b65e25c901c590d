//! Who is saying its first words, without having shown a session's token yet: bounded for each peer
//! and for all together. Who comes when a bound is reached is heard all the same; who has been
//! silent the longest is hurried instead, and has to do with what it has sent by then. So silence
//! shuts nobody out, and whoever sends its first words at once, as a pageferry does, loses nothing.
//! Pure.

use crate::net::Address;
use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bounds of those who are heard at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    /// From one peer.
    pub(super) each: usize,
    /// From all.
    pub(super) all: usize,
}

/// A peer, as far as it is bounded: an IPv4 address, the /64 network of an IPv6 address (a host has
/// all of it), or this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Origin {
    Ip(IpAddr),
    Local,
}

impl Origin {
    pub(super) fn of(peer: &Address) -> Self {
        match peer.ip().map(|ip| ip.to_canonical()) {
            None => Self::Local,
            Some(IpAddr::V6(ip)) => {
                let [a, b, c, d, ..] = ip.segments();
                Self::Ip([a, b, c, d, 0, 0, 0, 0].into())
            }
            Some(v4) => Self::Ip(v4),
        }
    }
}

/// Set once a visitor has to come to its end.
pub(super) type Hurried = Arc<AtomicBool>;

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Visitors {
    /// In the order in which they came.
    heard: VecDeque<Visitor>,
    ids: u64,
}

#[derive(Debug)]
struct Visitor {
    id: u64,
    origin: Origin,
    hurried: Hurried,
}

impl Visitors {
    /// Takes one in, if need be by hurrying another. None if even those who were hurried are still
    /// too many.
    pub(super) fn admit(&mut self, origin: Origin, bounds: Bounds) -> Option<(u64, Hurried)> {
        if self.heard.len() >= 2 * bounds.all {
            return None;
        }
        let mut counts = HashMap::<Origin, usize>::new();
        for visitor in self.heard.iter().filter(|visitor| !visitor.is_hurried()) {
            *counts.entry(visitor.origin).or_default() += 1;
        }
        if counts.get(&origin).is_some_and(|count| *count >= bounds.each) {
            self.hurry_oldest(origin);
        } else if counts.values().sum::<usize>() >= bounds.all {
            // Of the peer that has the most: many from one do not push out the only one of another.
            let most = counts.into_iter().max_by_key(|(_, count)| *count).map(|(origin, _)| origin);
            self.hurry_oldest(most.unwrap_or(origin));
        }
        let (id, hurried) = (self.ids, Hurried::default());
        self.ids += 1;
        self.heard.push_back(Visitor { id, origin, hurried: Arc::clone(&hurried) });
        Some((id, hurried))
    }

    /// It has said its words, has shown a token, or is gone.
    pub(super) fn leave(&mut self, id: u64) {
        self.heard.retain(|visitor| visitor.id != id);
    }

    fn hurry_oldest(&mut self, origin: Origin) {
        let oldest =
            self.heard.iter().find(|visitor| visitor.origin == origin && !visitor.is_hurried());
        if let Some(oldest) = oldest {
            oldest.hurried.store(true, Ordering::Relaxed);
        }
    }
}

impl Visitor {
    fn is_hurried(&self) -> bool {
        self.hurried.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { each: 3, all: 5 };

    fn origin(text: &str) -> Origin {
        Origin::of(&text.parse().unwrap())
    }

    #[test]
    fn the_oldest_of_a_peer_with_too_many_is_hurried_and_the_newcomer_is_heard() {
        let (mut visitors, one, other) =
            (Visitors::default(), origin("10.0.0.1:1"), origin("10.0.0.2:1"));
        let mut hurried = Vec::new();
        for from in [one, other, one, one, one] {
            hurried.push(visitors.admit(from, BOUNDS).unwrap().1);
        }
        let hurried: Vec<bool> = hurried.iter().map(|flag| flag.load(Ordering::Relaxed)).collect();
        assert_eq!(hurried, [true, false, false, false, false]);
    }

    #[test]
    fn where_all_are_too_many_the_peer_with_the_most_makes_room() {
        let (mut visitors, many, few) =
            (Visitors::default(), origin("10.0.0.1:1"), origin("10.0.0.2:1"));
        let few_first = visitors.admit(few, BOUNDS).unwrap().1;
        let many_first = visitors.admit(many, BOUNDS).unwrap().1;
        for from in [many, many, origin("10.0.0.3:1"), origin("10.0.0.4:1")] {
            visitors.admit(from, BOUNDS).unwrap();
        }
        assert!(many_first.load(Ordering::Relaxed) && !few_first.load(Ordering::Relaxed));
    }

    #[test]
    fn who_was_hurried_and_stays_counts_until_it_leaves() {
        let (mut visitors, one) = (Visitors::default(), origin("10.0.0.1:1"));
        let ids: Vec<u64> =
            (0..2 * BOUNDS.all).map(|_| visitors.admit(one, BOUNDS).unwrap().0).collect();
        assert!(visitors.admit(one, BOUNDS).is_none());
        visitors.leave(ids[4]);
        assert!(visitors.admit(one, BOUNDS).is_some());
    }

    #[test]
    fn a_peer_is_an_address_or_a_network_of_ipv6() {
        assert_eq!(origin("[2001:db8::1]:1"), origin("[2001:db8::ffff:2]:9"));
        assert_ne!(origin("[2001:db8::1]:1"), origin("[2001:db8:0:1::1]:1"));
        assert_eq!(origin("[::ffff:10.0.0.1]:1"), origin("10.0.0.1:2"));
        assert_ne!(origin("10.0.0.1:1"), origin("10.0.0.2:1"));
    }
}
