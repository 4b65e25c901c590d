//! The loopback link against the contract, calm and rough, and each of its faults.

use super::*;
use crate::contract::{
    Pair, Random, contents, poll_until, post_all, regions, request, scattered, soon,
};
use std::time::Duration;

fn pair_with(lanes: usize, faults: Faults) -> Pair {
    let (initiator, target) = pair(lanes, faults);
    Pair { initiator: Box::new(initiator), target: Box::new(target) }
}

mod calm {
    crate::contract::contract_tests!(|lanes| super::pair_with(lanes, super::Faults::default()));
}

mod rough {
    use super::{Delay, Faults, LateFence};
    /// Everything goes badly that a correct caller must bear.
    fn faults(seed: u64) -> Faults {
        Faults {
            seed,
            delay: Some(Delay { one_in: 3, turns_max: 20 }),
            speeds: vec![1, 9, 3],
            late_fence: Some(LateFence { lane: 0, turns: 50 }),
            ..Faults::default()
        }
    }
    crate::contract::contract_tests!(|lanes| super::pair_with(lanes, faults(lanes as u64)));
}

mod relaxed {
    use super::Faults;
    crate::contract::contract_tests!(|lanes| super::pair_with(
        lanes,
        Faults { seed: 7, relaxed: true, ..Faults::default() }
    ));
}

const MIB: usize = 1 << 20;

#[test]
fn without_a_fence_between_them_the_last_of_two_writes_need_not_win() {
    let lost = (0..50).any(|seed| {
        let mut pair = pair_with(1, Faults { seed, relaxed: true, ..Faults::default() });
        let (source, destination, remote) = regions(&mut pair, 8192, &mut Random(2));
        source.write(0, &[1; 4096]).unwrap();
        source.write(4096, &[2; 4096]).unwrap();
        let both =
            [request(0, &source, 0, 4096, remote, 0), request(1, &source, 4096, 4096, remote, 0)];
        post_all(&mut *pair.initiator, &both, &mut Vec::new()).unwrap();
        pair.initiator.fence(FenceTag(1)).unwrap();
        pair.target.wait_fence(FenceTag(1), soon()).unwrap();
        contents(&destination)[0] == 1
    });
    assert!(lost);
}

#[test]
fn the_same_seed_makes_the_same_world() {
    let run = |seed| {
        let delay = Some(Delay { one_in: 2, turns_max: 9 });
        let mut pair =
            pair_with(3, Faults { seed, delay, speeds: vec![5, 1], ..Faults::default() });
        let (source, _destination, remote) = regions(&mut pair, 12 * MIB, &mut Random(1));
        let batch: Vec<_> = (scattered(12 * MIB, &mut Random(2)).into_iter().enumerate())
            .map(|(id, (at, len))| request(id as u64, &source, at, len, remote, at))
            .collect();
        let (mut out, mut placed) = (Vec::new(), Vec::new());
        post_all(&mut *pair.initiator, &batch, &mut out).unwrap();
        while out.len() < batch.len() {
            pair.initiator.poll(&mut out, soon()).unwrap();
            placed.push(pair.target.bytes_placed().unwrap());
        }
        (out, placed)
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn a_completed_write_has_not_arrived_yet() {
    let stall = Some(LaneFault { lane: 0, after_bytes: 0 });
    let mut pair = pair_with(1, Faults { stall, ..Faults::default() });
    let (source, _destination, remote) = regions(&mut pair, MIB, &mut Random(1));
    pair.initiator.post(&[request(0, &source, 0, MIB, remote, 0)]).unwrap();
    let mut out = Vec::new();
    poll_until(&mut *pair.initiator, &mut out, |out| out.len() == 1).unwrap();
    assert_eq!(pair.target.bytes_placed().unwrap(), 0);
}

#[test]
fn a_lane_dies_in_the_middle_of_a_write_and_both_ends_name_it() {
    let death = Some(LaneFault { lane: 1, after_bytes: 3 * MIB as u64 / 2 });
    let mut pair = pair_with(2, Faults { death, ..Faults::default() });
    let (source, destination, remote) = regions(&mut pair, 4 * MIB, &mut Random(1));
    let batch: Vec<_> =
        (0..4).map(|at| request(at as u64, &source, at * MIB, MIB, remote, at * MIB)).collect();
    post_all(&mut *pair.initiator, &batch, &mut Vec::new()).unwrap();
    pair.initiator.fence(FenceTag(1)).unwrap();
    let lane_1 = |error| matches!(error, Error::Lane { lane: 1, .. });
    assert!(lane_1(pair.target.wait_fence(FenceTag(1), soon()).unwrap_err()));
    assert!(lane_1(pair.target.bytes_placed().unwrap_err()));
    assert!(lane_1(pair.initiator.post(&batch).unwrap_err()));
    assert!(lane_1(pair.initiator.fence(FenceTag(2)).unwrap_err()));
    let (sent, got) = (contents(&source), contents(&destination));
    let start = if lane_of(remote.base, 2) == 1 { 0 } else { 2 * MIB };
    let cut = start + 3 * MIB / 2;
    assert!(got[start..cut] == sent[start..cut]);
    assert!(got[cut..start + 2 * MIB].iter().all(|&byte| byte == 0));
}

#[test]
fn a_silent_lane_costs_a_deadline_and_bounded_memory() {
    let stall = Some(LaneFault { lane: 0, after_bytes: 5000 });
    let mut pair = pair_with(1, Faults { stall, ..Faults::default() });
    let (source, _destination, remote) = regions(&mut pair, MIB, &mut Random(1));
    let write = request(0, &source, 0, MIB, remote, 0);
    let (mut posted, mut out) = (0, Vec::new());
    let asked = loop {
        let accepted = pair.initiator.post(std::slice::from_ref(&write)).unwrap();
        posted += accepted;
        assert!(posted < 20);
        let asked = Instant::now();
        if accepted == 0
            && pair.initiator.poll(&mut out, asked + Duration::from_millis(20)).unwrap() == 0
        {
            break asked;
        }
    };
    assert!(asked.elapsed() >= Duration::from_millis(20));
    assert_eq!(pair.target.bytes_placed().unwrap(), 5000);
    let asked = Instant::now();
    let wait = pair.target.wait_fence(FenceTag(1), asked + Duration::from_millis(20));
    assert!(
        matches!(wait, Err(Error::Timeout { .. })) && asked.elapsed() >= Duration::from_millis(20)
    );
}

#[test]
fn a_late_fence_comes_last_and_a_fast_lane_does_not_hide_it() {
    let late_fence = Some(LateFence { lane: 1, turns: 1000 });
    let mut pair = pair_with(2, Faults { late_fence, speeds: vec![1000, 1], ..Faults::default() });
    pair.initiator.fence(FenceTag(1)).unwrap();
    let mut looks = 0;
    let past = Instant::now();
    while pair.target.wait_fence(FenceTag(1), past).is_err() {
        looks += 1;
    }
    assert!(looks > 1000 / (STEPS_OF_A_LOOK_MAX + 1), "{looks}");
}

#[test]
fn an_address_that_is_not_exposed_breaks_the_link() {
    let mut pair = pair_with(1, Faults::default());
    let (source, _destination, remote) = regions(&mut pair, 8192, &mut Random(1));
    pair.initiator.post(&[request(0, &source, 0, 8192, remote, 4096)]).unwrap();
    let error = pair.target.wait_fence(FenceTag(1), soon()).unwrap_err();
    assert!(matches!(error, Error::Protocol { lane: 0, .. }), "{error:?}");
}
