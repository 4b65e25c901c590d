//! Which memory is pinned, stripe by stripe, and under which key. Pure code, no I/O.
//!
//! ```text
//!   Pins         a region of this side:  unclaimed -> claimed -> ready(key)
//!   RemoteKeys   the target's regions, as the initiator knows them: unknown -> asked -> ready(key)
//! ```
//!
//! A stripe is claimed once in its life, so nobody pins the same memory twice.

use crate::rdma::lane::message::{Grant, Stripes};
use crate::region::MemoryRegion;
use crate::stripe::STRIPE_BYTES;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Stripes that a target's addresses may have: 16 TiB. It bounds what a peer can make us remember,
/// to 64 MiB.
pub(crate) const STRIPES_MAX: u64 = 1 << 23;

const STRIPE: usize = STRIPE_BYTES as usize;

/// Regions with addresses of the device's own: it bounds what a peer can make us remember.
const SHIFTS_MAX: usize = 1024;

/// The state of one stripe of a region of this side.
const UNCLAIMED: u64 = 0;
const CLAIMED: u64 = 1;
/// With the key in the lower half.
const READY: u64 = 1 << 32;

/// A region of this side and what of it is pinned. Its stripes are counted from its first byte.
#[derive(Debug)]
pub(crate) struct Pins {
    region: Arc<MemoryRegion>,
    /// Its key in the contract.
    index: u32,
    /// The address by which the NIC knows its first byte, where that is not its own.
    base: Option<u64>,
    stripes: Box<[AtomicU64]>,
}

impl Pins {
    pub(crate) fn new(region: &Arc<MemoryRegion>, index: u32, base: Option<u64>) -> Self {
        let stripes =
            (0..region.len().div_ceil(STRIPE)).map(|_| AtomicU64::new(UNCLAIMED)).collect();
        Self { region: Arc::clone(region), index, base, stripes }
    }

    pub(crate) fn region(&self) -> &Arc<MemoryRegion> {
        &self.region
    }

    pub(crate) fn base(&self) -> Option<u64> {
        self.base
    }

    /// The key under which a stripe is pinned. None as well for one that the region has not.
    #[inline]
    pub(crate) fn key(&self, stripe: usize) -> Option<u32> {
        let state = self.stripes.get(stripe)?.load(Ordering::Acquire);
        // The lower half is the key.
        (state & READY != 0).then_some(state as u32)
    }

    /// Claims what is not claimed yet of the stripes that `bytes` touches. What the caller gets, it
    /// must pin: contiguous, rising, and none across a multiple of `chunk` stripes.
    pub(crate) fn claim(&self, bytes: &Range<usize>, chunk: usize) -> Vec<Range<usize>> {
        assert!(bytes.end <= self.region.len() && chunk > 0, "checked by the caller");
        let mut claimed: Vec<Range<usize>> = Vec::new();
        if bytes.is_empty() {
            return claimed;
        }
        for stripe in Self::stripes(bytes) {
            let state = &self.stripes[stripe];
            if state
                .compare_exchange(UNCLAIMED, CLAIMED, Ordering::Relaxed, Ordering::Relaxed)
                .is_err()
            {
                continue;
            }
            match claimed.last_mut() {
                Some(last) if last.end == stripe && !stripe.is_multiple_of(chunk) => last.end += 1,
                _ => claimed.push(stripe..stripe + 1),
            }
        }
        claimed
    }

    /// The stripes that these bytes touch.
    pub(crate) fn stripes(bytes: &Range<usize>) -> Range<usize> {
        bytes.start / STRIPE..bytes.end.div_ceil(STRIPE)
    }

    /// The bytes of these stripes.
    pub(crate) fn bytes(&self, stripes: &Range<usize>) -> Range<usize> {
        stripes.start * STRIPE..(stripes.end * STRIPE).min(self.region.len())
    }

    /// Notes that claimed stripes are pinned now.
    pub(crate) fn ready(&self, stripes: &Range<usize>, key: u32) {
        for state in &self.stripes[stripes.clone()] {
            state.store(READY | u64::from(key), Ordering::Release);
        }
    }

    /// How the peer is told of stripes that are pinned.
    pub(crate) fn grant(&self, stripes: &Range<usize>, key: u32) -> Grant {
        let first = self.base.unwrap_or(0) / STRIPE_BYTES + stripes.start as u64;
        let count = u32::try_from(stripes.len())
            .expect("a chunk is no longer than a region of STRIPES_MAX");
        Grant { stripes: Stripes { region: self.index, first, count }, key }
    }

    /// The bytes of this region that a peer asks for, or what is wrong with that.
    pub(crate) fn wanted(&self, stripes: Stripes) -> Result<Range<usize>, String> {
        let outside = || {
            let Stripes { region, first, count } = stripes;
            format!(
                "a wish for {count} stripes at {first}, which the region {region} does not have"
            )
        };
        let first =
            stripes.first.checked_sub(self.base.unwrap_or(0) / STRIPE_BYTES).ok_or_else(outside)?;
        let end = first.checked_add(u64::from(stripes.count)).ok_or_else(outside)?;
        if stripes.count == 0 || end > self.stripes.len() as u64 {
            return Err(outside());
        }
        // Below the number of stripes, which is a usize.
        Ok(self.bytes(&(first as usize..end as usize)))
    }
}

/// What the initiator knows of one stripe of the target's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Remote {
    /// May be written with this key.
    Ready(u32),
    /// Was asked for.
    Asked,
    /// Nothing is known.
    Unknown,
    /// Belongs to another region, or to none that could be.
    Foreign,
}

/// The keys that the target has announced, by the stripe of its addresses.
#[derive(Debug, Default)]
pub(crate) struct RemoteKeys {
    stripes: Vec<Entry>,
    /// What must be added to an address of a region for the target's device. Nearly always there is
    /// none.
    shifts: Vec<(u32, u64)>,
    grants: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    region: u32,
    key: u32,
}

/// No region has this index: what it says of a stripe is that there is no key.
const NO_REGION: u32 = u32::MAX;
const UNKNOWN: Entry = Entry { region: NO_REGION, key: 0 };
const ASKED: Entry = Entry { region: NO_REGION, key: 1 };

impl RemoteKeys {
    #[inline]
    pub(crate) fn get(&self, region: u32, stripe: u64) -> Remote {
        let entry = usize::try_from(stripe).ok().and_then(|stripe| self.stripes.get(stripe));
        match entry {
            Some(&ASKED) => Remote::Asked,
            Some(&Entry { region: NO_REGION, .. }) => Remote::Unknown,
            Some(entry) if entry.region == region => Remote::Ready(entry.key),
            None if stripe < STRIPES_MAX => Remote::Unknown,
            _ => Remote::Foreign,
        }
    }

    /// Notes that a stripe, of which nothing was known, was asked for.
    pub(crate) fn asked(&mut self, stripe: u64) {
        assert!(stripe < STRIPES_MAX, "get() says foreign");
        self.reach(stripe + 1);
        self.stripes[stripe as usize] = ASKED;
    }

    /// How often the target has announced a key.
    pub(crate) fn grants(&self) -> u64 {
        self.grants
    }

    /// Takes in what the target announces, or says what is wrong with it.
    pub(crate) fn grant(&mut self, grant: Grant) -> Result<(), String> {
        let Stripes { region, first, count } = grant.stripes;
        let end =
            first.checked_add(u64::from(count)).filter(|&end| count > 0 && end <= STRIPES_MAX);
        let end = end
            .filter(|_| region != NO_REGION)
            .ok_or_else(|| format!("a key for {count} stripes at {first}, which cannot be"))?;
        self.reach(end);
        let entries = &mut self.stripes[first as usize..end as usize];
        if entries.iter().any(|entry| entry.region != NO_REGION) {
            return Err(format!("a second key for some of {count} stripes at {first}"));
        }
        entries.fill(Entry { region, key: grant.key });
        self.grants += 1;
        Ok(())
    }

    /// Takes in by which address the target's device knows the first byte of a region, or says what
    /// is wrong with that. The region begins where `Exposed` of the contract says.
    pub(crate) fn shift(&mut self, region: u32, by: u64) -> Result<(), String> {
        let known = self.stripes.iter().any(|entry| entry.region == region && region != NO_REGION);
        if known || region == NO_REGION || self.shifts.len() == SHIFTS_MAX {
            return Err(format!(
                "an address of the region {region} that comes too late, or one too many"
            ));
        }
        self.shifts.push((region, by));
        Ok(())
    }

    /// The address by which the target's device knows one of the contract's.
    #[inline]
    pub(crate) fn on_device(&self, region: u32, addr: u64) -> u64 {
        if self.shifts.is_empty() {
            return addr;
        }
        let shift = self.shifts.iter().find(|(shifted, _)| *shifted == region);
        addr.wrapping_add(shift.map_or(0, |(_, by)| *by))
    }

    fn reach(&mut self, end: u64) {
        if self.stripes.len() < end as usize {
            self.stripes.resize(end as usize, UNKNOWN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pins(len: usize) -> Pins {
        Pins::new(&MemoryRegion::anonymous(len).unwrap(), 3, Some(8 * STRIPE_BYTES))
    }

    #[test]
    fn holes_that_nobody_expects_are_not_claimed_and_the_end_is_clipped() {
        let pins = pins(7 * STRIPE + 4096);
        assert_eq!(pins.claim(&(10..20), 2), vec![0..1; 1]);
        assert_eq!(pins.claim(&(2 * STRIPE - 1..7 * STRIPE + 4096), 2), [1..2, 2..4, 4..6, 6..8]);
        assert_eq!(pins.claim(&(0..7 * STRIPE), 2), []);
        assert_eq!(pins.claim(&(5..5), 2), []);
        assert_eq!(pins.bytes(&(6..8)), 6 * STRIPE..7 * STRIPE + 4096);
        assert_eq!(pins.key(7), None);
        pins.ready(&(6..8), 0xffff_ffff);
        assert_eq!((pins.key(7), pins.key(8), pins.key(5)), (Some(0xffff_ffff), None, None));
        let stripes = Stripes { region: 3, first: 14, count: 2 };
        assert_eq!(pins.grant(&(6..8), 9), Grant { stripes, key: 9 });
        assert_eq!(pins.wanted(stripes), Ok(6 * STRIPE..7 * STRIPE + 4096));
    }

    #[test]
    fn a_key_of_another_region_opens_nothing() {
        let mut keys = RemoteKeys::default();
        assert_eq!(keys.get(1, 5), Remote::Unknown);
        keys.asked(5);
        assert_eq!(keys.get(1, 5), Remote::Asked);
        let grant = Grant { stripes: Stripes { region: 1, first: 4, count: 3 }, key: 7 };
        keys.grant(grant).unwrap();
        assert_eq!((keys.get(1, 5), keys.get(2, 5)), (Remote::Ready(7), Remote::Foreign));
        assert_eq!((keys.get(1, 3), keys.get(1, 7)), (Remote::Unknown, Remote::Unknown));
        assert!(keys.grant(grant).is_err(), "twice");
        for beyond in [STRIPES_MAX, u64::MAX] {
            assert_eq!(keys.get(1, beyond), Remote::Foreign);
        }
        for (region, first, count) in
            [(1, STRIPES_MAX - 1, 2), (1, 20, 0), (u32::MAX, 20, 1), (1, u64::MAX, 2)]
        {
            assert!(
                keys.grant(Grant { stripes: Stripes { region, first, count }, key: 7 }).is_err()
            );
        }
        keys.grant(Grant {
            stripes: Stripes { region: 1, first: STRIPES_MAX - 1, count: 1 },
            key: 8,
        })
        .unwrap();
        assert_eq!(keys.get(1, STRIPES_MAX - 1), Remote::Ready(8));
    }

    #[test]
    fn a_device_with_addresses_of_its_own_is_written_there() {
        let mut keys = RemoteKeys::default();
        assert_eq!(keys.on_device(3, 77), 77);
        keys.shift(3, 0x1000_0000_0000u64.wrapping_sub(1 << 32)).unwrap();
        assert_eq!((keys.on_device(3, (1 << 32) + 5), keys.on_device(2, 9)), (0x1000_0000_0005, 9));
        keys.grant(Grant { stripes: Stripes { region: 4, first: 4, count: 1 }, key: 7 }).unwrap();
        assert!(keys.shift(4, 0).is_err(), "after its key");
        assert!(keys.shift(NO_REGION, 0).is_err());
        assert!(
            (0..=SHIFTS_MAX as u32).any(|region| keys.shift(100 + region, 0).is_err()),
            "without end"
        );
    }

    proptest! {
        #[test]
        fn every_stripe_is_claimed_once_and_no_chunk_crosses_its_grid(
            len in 1usize..40 * STRIPE, chunk in 1usize..9,
            parts in prop::collection::vec((0.0f64..1.0, 0.0f64..1.0), 1..12),
        ) {
            let pins = pins(len);
            let mut owned = vec![0; len.div_ceil(STRIPE)];
            for (a, b) in parts {
                let (a, b) = ((a * len as f64) as usize, (b * len as f64) as usize);
                let part = a.min(b)..a.max(b);
                for run in pins.claim(&part, chunk) {
                    prop_assert!(!run.is_empty() && run.start / chunk == (run.end - 1) / chunk);
                    run.for_each(|stripe| owned[stripe] += 1);
                }
                for at in [part.start, part.end.saturating_sub(1)] {
                    prop_assert!(part.is_empty() || owned[at / STRIPE] == 1);
                }
            }
            prop_assert!(owned.iter().all(|&times| times <= 1));
        }

        #[test]
        fn what_a_peer_says_never_panics_and_never_leads_outside(
            region: u32, first: u64, near in 0u64..30, count: u32, few in 0u32..9, key: u32,
        ) {
            let pins = pins(5 * STRIPE + 1);
            let mut keys = RemoteKeys::default();
            for (first, count) in [(first, count), (near, few), (near, count), (first, few)] {
                let stripes = Stripes { region, first, count };
                if let Ok(bytes) = pins.wanted(stripes) {
                    prop_assert!(bytes.start < bytes.end && bytes.end <= 5 * STRIPE + 1);
                }
                if keys.grant(Grant { stripes, key }).is_ok() {
                    prop_assert_eq!(keys.get(region, first), Remote::Ready(key));
                }
            }
        }
    }
}
