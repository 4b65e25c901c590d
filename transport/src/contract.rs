//! The contract of lib.rs as tests, run against every link: [`contract_tests`] makes one `#[test]`
//! of each function here.

use crate::*;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Both ends of a link.
pub(crate) struct Pair {
    pub(crate) initiator: Box<dyn Initiator>,
    pub(crate) target: Box<dyn Target>,
}

/// Long enough for a loaded machine; reached only by a failing test.
pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A generator of test data that needs no crate: splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

pub(crate) fn seed() -> u64 {
    // A new one each run; every failure prints it.
    std::collections::hash_map::RandomState::new().hash_one(0)
}

pub(crate) fn contents(region: &MemoryRegion) -> Vec<u8> {
    let mut bytes = vec![0; region.len()];
    region.read(0, &mut bytes).unwrap();
    bytes
}

pub(crate) fn fill(region: &MemoryRegion, random: &mut Random) {
    let bytes: Vec<u8> = std::iter::repeat_with(|| random.next().to_le_bytes())
        .take(region.len().div_ceil(8))
        .flatten()
        .collect();
    region.write(0, &bytes[..region.len()]).unwrap();
}

pub(crate) fn request(
    id: u64,
    region: &Arc<MemoryRegion>,
    offset: usize,
    len: usize,
    remote: RemoteRegion,
    to: usize,
) -> WorkRequest {
    WorkRequest {
        id: WorkId(id),
        local: region.slice(offset, len).unwrap(),
        remote: RemoteAddr { key: remote.key, addr: remote.base + to as u64 },
    }
}

/// Posts all of `requests`, polling whenever there is no credit or memory is being made ready.
pub(crate) fn post_all(
    initiator: &mut dyn Initiator,
    mut requests: &[WorkRequest],
    out: &mut Vec<Completion>,
) -> Result<()> {
    let mut deadline = soon();
    while !requests.is_empty() {
        let accepted = initiator.post(requests)?;
        requests = &requests[accepted..];
        if accepted > 0 || initiator.poll(out, deadline)? > 0 {
            deadline = soon();
        } else if Instant::now() >= deadline {
            return Err(Error::Timeout { what: "credit" });
        }
    }
    Ok(())
}

pub(crate) fn poll_until(
    initiator: &mut dyn Initiator,
    out: &mut Vec<Completion>,
    done: impl Fn(&[Completion]) -> bool,
) -> Result<()> {
    while !done(out) {
        if initiator.poll(out, soon())? == 0 {
            return Err(Error::Timeout { what: "completions" });
        }
    }
    Ok(())
}

/// Source and destination regions of `len` bytes, the first filled and registered, the second
/// exposed.
pub(crate) fn regions(
    pair: &mut Pair,
    len: usize,
    random: &mut Random,
) -> (Arc<MemoryRegion>, Arc<MemoryRegion>, RemoteRegion) {
    let source = MemoryRegion::anonymous(len).unwrap();
    fill(&source, random);
    pair.initiator.register(&source).unwrap();
    let destination = MemoryRegion::anonymous(len).unwrap();
    let remote = pair.target.expose(&destination).unwrap();
    (source, destination, remote)
}

/// Pieces of random lengths that cover some of the region, each within a stripe, in random order.
pub(crate) fn scattered(len: usize, random: &mut Random) -> Vec<(usize, usize)> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < len {
        let longest = (STRIPE_BYTES as usize - at % STRIPE_BYTES as usize).min(len - at);
        let wanted = match random.below(4) {
            0 => 1 + random.below(100),
            1 | 2 => 4096 * (1 + random.below(8)),
            _ => 1 + random.below(STRIPE_BYTES as usize),
        };
        let piece = wanted.min(longest);
        if random.below(4) > 0 {
            pieces.push((at, piece));
        }
        at += piece;
    }
    for index in (1..pieces.len()).rev() {
        if random.below(2) == 0 {
            pieces.swap(index, random.below(index + 1));
        }
    }
    pieces
}

pub(crate) fn what_is_posted_arrives_exactly_and_nothing_else_changes(
    make: &dyn Fn(usize) -> Pair,
) {
    let seed = seed();
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    for lanes in [1, 2, 3, 7] {
        let mut pair = make(lanes);
        assert_eq!(pair.initiator.lanes(), lanes);
        let len = (5 << 20) + random.below(3 << 20);
        let (source, destination, remote) = regions(&mut pair, len, &mut random);
        let mut expected = vec![0; len];
        let mut out = Vec::new();
        let mut posted = 0;
        for tag in 1..4 {
            fill(&source, &mut random);
            let bytes = contents(&source);
            let pieces = scattered(len, &mut random);
            let requests: Vec<_> = pieces
                .iter()
                .enumerate()
                .map(|(index, &(at, piece))| {
                    expected[at..at + piece].copy_from_slice(&bytes[at..at + piece]);
                    request(posted + index as u64, &source, at, piece, remote, at)
                })
                .collect();
            posted += requests.len() as u64;
            post_all(&mut *pair.initiator, &requests, &mut out).unwrap();
            pair.initiator.fence(FenceTag(tag)).unwrap();
            pair.target.wait_fence(FenceTag(tag), soon()).unwrap();
            assert!(
                contents(&destination) == expected,
                "{lanes} lanes, fence {tag}, seed {seed:#x}"
            );
            poll_until(&mut *pair.initiator, &mut out, |out| {
                out.contains(&Completion::Fence(FenceTag(tag)))
            })
            .unwrap();
            poll_until(&mut *pair.initiator, &mut out, |out| {
                out.len() as u64 == posted + u64::from(tag)
            })
            .unwrap();
        }
        let mut ids: Vec<_> = out
            .iter()
            .filter_map(|completion| match completion {
                Completion::Write(id) => Some(id.0),
                Completion::Fence(_) => None,
            })
            .collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..posted), "every write completes once, seed {seed:#x}");
        assert!(pair.target.bytes_placed().unwrap() > 0);
        assert!(pair.initiator.bytes_on_wire() > pair.target.bytes_placed().unwrap());
    }
}

pub(crate) fn data_goes_where_it_is_addressed_across_regions(make: &dyn Fn(usize) -> Pair) {
    let mut random = Random(1);
    let mut pair = make(2);
    let (first, first_copy, first_remote) = regions(&mut pair, 3 << 20, &mut random);
    let (second, second_copy, second_remote) = regions(&mut pair, 64 << 10, &mut random);
    // Contiguous over there and not here, and the other way round: neither may be merged wrongly.
    let requests = [
        request(0, &first, 8192, 4096, second_remote, 0),
        request(1, &second, 4096, 4096, second_remote, 4096),
        request(2, &second, 8192, 4096, first_remote, 1 << 20),
        request(3, &second, 12288, 4096, first_remote, 0),
        request(4, &first, (3 << 20) - 1, 1, first_remote, (3 << 20) - 1),
    ];
    post_all(&mut *pair.initiator, &requests, &mut Vec::new()).unwrap();
    pair.initiator.fence(FenceTag(1)).unwrap();
    pair.target.wait_fence(FenceTag(1), soon()).unwrap();
    // Behind a fence nothing of what was placed is missing in the count.
    assert_eq!(pair.target.bytes_placed().unwrap(), 4 * 4096 + 1);
    let (first, second) = (contents(&first), contents(&second));
    let mut expected = vec![0; 64 << 10];
    expected[..4096].copy_from_slice(&first[8192..12288]);
    expected[4096..8192].copy_from_slice(&second[4096..8192]);
    assert!(contents(&second_copy) == expected);
    let mut expected = vec![0; 3 << 20];
    expected[1 << 20..(1 << 20) + 4096].copy_from_slice(&second[8192..12288]);
    expected[..4096].copy_from_slice(&second[12288..16384]);
    expected[(3 << 20) - 1] = first[(3 << 20) - 1];
    assert!(contents(&first_copy) == expected);
}

pub(crate) fn the_last_of_two_writes_wins_if_a_fence_was_polled_between_them(
    make: &dyn Fn(usize) -> Pair,
) {
    let mut pair = make(3);
    let (source, destination, remote) = regions(&mut pair, 8 << 20, &mut Random(2));
    for version in 0..50u32 {
        let from = version as usize * 4096;
        source.write(from, &[version as u8; 4096]).unwrap();
        let requests: Vec<_> = (0..4)
            .map(|stripe| request(u64::from(version), &source, from, 4096, remote, stripe << 21))
            .collect();
        let mut out = Vec::new();
        post_all(&mut *pair.initiator, &requests, &mut out).unwrap();
        let tag = FenceTag(version + 1);
        pair.initiator.fence(tag).unwrap();
        poll_until(&mut *pair.initiator, &mut out, |out| out.contains(&Completion::Fence(tag)))
            .unwrap();
    }
    pair.target.wait_fence(FenceTag(50), soon()).unwrap();
    for stripe in 0..4 {
        let mut page = [0; 4096];
        destination.read(stripe << 21, &mut page).unwrap();
        assert_eq!(page, [49; 4096]);
    }
}

pub(crate) fn fences_may_be_skipped_and_must_rise(make: &dyn Fn(usize) -> Pair) {
    let mut pair = make(2);
    for tag in [3, 5, 9] {
        pair.initiator.fence(FenceTag(tag)).unwrap();
    }
    assert!(pair.initiator.fence(FenceTag(9)).is_err());
    pair.target.wait_fence(FenceTag(7), soon()).unwrap();
    pair.target.wait_fence(FenceTag(5), soon()).unwrap();
    let mut out = Vec::new();
    poll_until(&mut *pair.initiator, &mut out, |out| out.len() == 3).unwrap();
    assert_eq!(out, [3, 5, 9].map(|tag| Completion::Fence(FenceTag(tag))));
    let asked = Instant::now();
    let wait = pair.target.wait_fence(FenceTag(10), asked + Duration::from_millis(20));
    assert!(matches!(wait, Err(Error::Timeout { .. })));
    assert!(asked.elapsed() >= Duration::from_millis(20));
}

pub(crate) fn a_poll_with_nothing_to_hand_waits_for_its_deadline(make: &dyn Fn(usize) -> Pair) {
    let mut pair = make(2);
    let asked = Instant::now();
    assert_eq!(pair.initiator.poll(&mut Vec::new(), asked + Duration::from_millis(20)).unwrap(), 0);
    assert!(asked.elapsed() >= Duration::from_millis(20));
    assert_eq!(pair.initiator.poll(&mut Vec::new(), asked).unwrap(), 0);
}

pub(crate) fn wrong_requests_are_refused_and_right_ones_before_them_are_not(
    make: &dyn Fn(usize) -> Pair,
) {
    let mut pair = make(2);
    let (source, destination, remote) = regions(&mut pair, 4 << 20, &mut Random(3));
    let stranger = MemoryRegion::anonymous(4096).unwrap();
    let good = request(1, &source, 0, 4096, remote, 0);
    let crossing = request(2, &source, 0, 4096, remote, (2 << 20) - 1);
    let endless = WorkRequest {
        remote: RemoteAddr { key: remote.key, addr: u64::MAX },
        ..request(3, &source, 0, 2, remote, 0)
    };
    let empty = request(4, &source, 0, 0, remote, 0);
    // Its memory is ready from here on, so that nothing but what is wrong can stop a post.
    post_all(&mut *pair.initiator, std::slice::from_ref(&good), &mut Vec::new()).unwrap();
    for wrong in [crossing, endless, empty] {
        assert!(matches!(
            pair.initiator.post(std::slice::from_ref(&wrong)),
            Err(Error::Bounds { .. })
        ));
        assert_eq!(pair.initiator.post(&[good.clone(), wrong]).unwrap(), 1);
    }
    let unregistered = request(5, &stranger, 0, 4096, remote, 0);
    assert!(matches!(pair.initiator.post(&[unregistered]), Err(Error::State(_))));
    pair.initiator.fence(FenceTag(1)).unwrap();
    pair.target.wait_fence(FenceTag(1), soon()).unwrap();
    assert!(contents(&destination)[..4096] == contents(&source)[..4096]);
}

pub(crate) fn unread_completions_hold_their_credits(make: &dyn Fn(usize) -> Pair) {
    let mut pair = make(1);
    let (source, _destination, remote) = regions(&mut pair, 2 << 20, &mut Random(4));
    let batch: Vec<_> =
        (0..512).map(|page| request(page as u64, &source, page * 4096, 4096, remote, 0)).collect();
    // Its memory is ready from here on, so that nothing but credit can stop a post.
    let mut out = Vec::new();
    post_all(&mut *pair.initiator, &batch[..1], &mut out).unwrap();
    poll_until(&mut *pair.initiator, &mut out, |out| out.len() == 1).unwrap();
    let mut accepted = 0;
    // Fences prove that the link has done all there is to do; still nothing comes back unless
    // polled.
    for tag in 1..=100 {
        accepted += pair.initiator.post(&batch).unwrap();
        pair.initiator.fence(FenceTag(tag)).unwrap();
        pair.target.wait_fence(FenceTag(tag), soon()).unwrap();
    }
    assert!(accepted < 100 * batch.len(), "{accepted} requests accepted without a poll");
    assert_eq!(pair.initiator.post(&batch).unwrap(), 0);
    out.clear();
    poll_until(&mut *pair.initiator, &mut out, |out| out.len() == accepted + 100).unwrap();
    assert!(pair.initiator.post(&batch).unwrap() > 0);
}

pub(crate) fn nothing_changes_after_revoke(make: &dyn Fn(usize) -> Pair) {
    let mut pair = make(2);
    let (source, destination, remote) = regions(&mut pair, 8 << 20, &mut Random(5));
    let batch: Vec<_> =
        (0..8).map(|at| request(at as u64, &source, at << 20, 1 << 20, remote, at << 20)).collect();
    let (mut initiator, mut target) = (pair.initiator, pair.target);
    std::thread::scope(|scope| {
        // Pushes until the link breaks under it.
        let pusher = scope.spawn(move || {
            let mut random = Random(6);
            let mut out = Vec::new();
            loop {
                fill(&source, &mut random);
                if let Err(e) = post_all(&mut *initiator, &batch, &mut out) {
                    return e;
                }
            }
        });
        let deadline = soon();
        while target.bytes_placed().unwrap() < 20 << 20 {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        target.revoke().unwrap();
        let before = contents(&destination);
        let error = pusher.join().unwrap();
        assert!(
            matches!(error, Error::Closed { .. } | Error::Lane { .. } | Error::Work { .. }),
            "{error:?}"
        );
        assert!(contents(&destination) == before);
        assert!(target.expose(&destination).is_err());
        assert!(target.wait_fence(FenceTag(1), soon()).is_err());
        target.revoke().unwrap();
    });
}

pub(crate) fn an_end_that_is_dropped_is_noticed_by_the_other(make: &dyn Fn(usize) -> Pair) {
    let mut pair = make(3);
    drop(pair.initiator);
    let waited = Instant::now();
    let error = pair.target.wait_fence(FenceTag(1), soon()).unwrap_err();
    assert!(matches!(error, Error::Closed { .. } | Error::Lane { .. }), "{error:?}");
    assert!(pair.target.bytes_placed().is_err());

    let mut pair = make(3);
    let (source, _destination, remote) = regions(&mut pair, 1 << 20, &mut Random(7));
    drop(pair.target);
    let error = pair.initiator.poll(&mut Vec::new(), soon()).unwrap_err();
    assert!(matches!(error, Error::Closed { .. } | Error::Lane { .. }), "{error:?}");
    assert!(pair.initiator.post(&[request(0, &source, 0, 4096, remote, 0)]).is_err());
    assert!(pair.initiator.fence(FenceTag(1)).is_err());
    drop(pair.initiator);
    assert!(waited.elapsed() < Duration::from_secs(10), "neither wait nor drop may hang");
}

pub(crate) fn behind_a_last_fence_nothing_is_posted_and_nothing_changes(
    make: &dyn Fn(usize) -> Pair,
) {
    for lanes in [1, 3] {
        let mut pair = make(lanes);
        let (source, destination, remote) = regions(&mut pair, 8 << 20, &mut Random(8));
        let batch: Vec<_> = (0..8)
            .map(|at| request(at as u64, &source, at << 20, 1 << 20, remote, at << 20))
            .collect();
        let mut out = Vec::new();
        post_all(&mut *pair.initiator, &batch, &mut out).unwrap();
        pair.initiator.fence(FenceTag(1)).unwrap();
        poll_until(&mut *pair.initiator, &mut out, |out| {
            out.contains(&Completion::Fence(FenceTag(1)))
        })
        .unwrap();
        assert!(
            matches!(pair.initiator.last_fence(FenceTag(1)), Err(Error::State(_))),
            "tags rise"
        );
        fill(&source, &mut Random(9));
        post_all(&mut *pair.initiator, &batch, &mut out).unwrap();
        pair.initiator.last_fence(FenceTag(2)).unwrap();
        assert!(pair.initiator.post(&batch[..1]).is_err());
        assert!(pair.initiator.fence(FenceTag(3)).is_err());
        assert!(pair.initiator.last_fence(FenceTag(3)).is_err());
        // As a caller that waits for the peer's word does, which on some links sends progress
        // meanwhile.
        let until = Instant::now() + Duration::from_millis(150);
        while Instant::now() < until {
            // The target may have ended already, and been heard of.
            if pair.initiator.poll(&mut out, Instant::now() + Duration::from_millis(10)).is_err() {
                break;
            }
        }
        pair.target.wait_fence(FenceTag(2), soon()).unwrap();
        assert!(contents(&destination) == contents(&source), "{lanes} lanes");
        // An end that was asked for is no failure.
        assert_eq!(pair.target.bytes_placed().unwrap(), 16 << 20);
        pair.target.revoke().unwrap();
        pair.target.revoke().unwrap();
        assert!(pair.target.expose(&destination).is_err());
        assert!(contents(&destination) == contents(&source), "{lanes} lanes");
    }
}

/// Makes a `#[test]` of every function above for the link that `$make` builds from a number of
/// lanes. Those that need what few hosts have are ignored unless asked for, and then ask `$can_run`
/// first.
macro_rules! contract_tests {
    (ignore = $why:literal, if $can_run:path, $make:expr) => {
        $crate::contract::contract_tests!(@all [#[ignore = $why]] [$can_run] [$make]);
    };
    ($make:expr) => {
        $crate::contract::contract_tests!(@all [] [$crate::contract::anywhere] [$make]);
    };
    (@all $attributes:tt $can_run:tt $make:tt) => {
        $crate::contract::contract_tests!(@each $attributes $can_run $make
            what_is_posted_arrives_exactly_and_nothing_else_changes
            data_goes_where_it_is_addressed_across_regions
            the_last_of_two_writes_wins_if_a_fence_was_polled_between_them
            fences_may_be_skipped_and_must_rise
            a_poll_with_nothing_to_hand_waits_for_its_deadline
            wrong_requests_are_refused_and_right_ones_before_them_are_not
            unread_completions_hold_their_credits
            nothing_changes_after_revoke
            behind_a_last_fence_nothing_is_posted_and_nothing_changes
            an_end_that_is_dropped_is_noticed_by_the_other
        );
    };
    (@each $attributes:tt $can_run:tt $make:tt $($name:ident)*) => {
        $($crate::contract::contract_tests!(@one $attributes $can_run $make $name);)*
    };
    (@one [$(#[$attribute:meta])*] [$can_run:path] [$make:expr] $name:ident) => {
        #[test]
        $(#[$attribute])*
        fn $name() {
            if $can_run(stringify!($name)) {
                $crate::contract::$name(&$make);
            }
        }
    };
}
pub(crate) use contract_tests;

/// For [`contract_tests`] that need nothing.
pub(crate) fn anywhere(_name: &str) -> bool {
    true
}
