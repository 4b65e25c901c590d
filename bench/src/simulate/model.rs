//! A migration as arithmetic: the engine's own policy, fed with what a modelled guest, host and
//! cable would have shown it.
//!
//! ```text
//!   ModelledGuest ----.
//!   Costs (of a host) -+--> round after round --> Estimator --> Policy::decide     (both the engine's, called, not copied)
//!   Cable ------------'            ^                                  |
//!                                  '---------- Iterate ---------------+--> SwitchOver: last push, pause, downtime
//!                                                                     '--> GiveUp
//! ```
//!
//! What it leaves out: chance (it walks with expectations), other load on host and cable, and that
//! a guest is slowed while its pages are protected. How far off that makes it is what `simulate
//! --check` measures.

use super::guest::ModelledGuest;
use pageferry_engine::guest::FixedCosts;
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::policy::{
    Decision, Estimator, Expected, Finished, Limits, Policy, predict_downtime_us,
};
use pageferry_engine::report::Round;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The most rounds that are modelled; the policy ends them earlier.
const ROUNDS_MAX: u32 = 10_000;

/// A cost that has a fixed part and one that grows with something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Whatever the amount.
    pub fixed: f64,
    /// For each of it.
    pub each: f64,
}

impl Line {
    /// Of this amount.
    #[must_use]
    pub fn of(self, amount: f64) -> f64 {
        self.fixed + self.each * amount
    }
}

/// What a sync costs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Synced {
    /// Whatever there is, and for each page of memory: the page tables are read.
    pub memory_us: Line,
    /// For each page that it finds.
    pub dirty_us: f64,
}

/// What carries the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cable {
    /// Payload, in bytes a second.
    pub bytes_per_second: f64,
    /// Round trip beyond what [`Costs`] were measured with, in microseconds.
    pub round_trip_us: f64,
}

/// What the two hosts need for their parts of a migration, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// From the request to the first round, and for each touched page: connections, protection, the
    /// look at what was touched.
    pub setup_us: Line,
    /// A sync between rounds, while the guest competes for cores and page tables.
    pub sync: Synced,
    /// One in the downtime.
    pub last_sync: Synced,
    /// A round, and for each of its work requests, on the engine's one thread: from the first post
    /// to the fence's answer beside what the bytes need.
    pub round_us: Line,
    /// For each page of the first round, on the same thread: whether it is zero.
    pub zero_us: f64,
    /// For a page to be registered with the device at both ends, ahead of the data; nothing by TCP.
    pub register_us: f64,
    /// Bytes a second that the hosts carry at most, into memory that was not allocated yet.
    pub first_bytes_per_second: f64,
    /// The same in later rounds.
    pub bytes_per_second: f64,
    /// Between the decision to switch over and the pause, beside the last push.
    pub arm_us: f64,
    /// Stopping the vCPUs, and for each of them.
    pub pause_us: Line,
    /// Saving the device state, and for each of its bytes.
    pub save_us: Line,
    /// Loading it.
    pub load_us: Line,
    /// Saving and loading the state of each vCPU, where that takes system calls and not only bytes.
    pub vcpu_us: f64,
    /// Prepare, Ready, Commit, Running, beside round trips.
    pub messages_us: f64,
    /// Letting the vCPUs run, and for each of them.
    pub resume_us: Line,
}

/// What the engine is told and believes.
#[derive(Debug, Clone, Copy)]
pub struct Engine {
    /// What the user wants.
    pub limits: Limits,
    /// What the guest's monitor says that its fixed costs are.
    pub fixed: FixedCosts,
    /// What it says that its state has, in bytes.
    pub state_bytes: u64,
}

/// How a modelled migration ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// Rounds shrank until the downtime could be kept below the limit.
    Converged,
    /// They did not, and the guest was switched over all the same.
    Forced,
    /// They did not, and the guest stayed.
    Refused,
}

/// A modelled migration.
#[derive(Debug, Clone, PartialEq)]
pub struct Outlook {
    /// How it ends.
    pub ending: Ending,
    /// The rounds, in the form of the engine's report.
    pub rounds: Vec<Round>,
    /// From the request until the source hears that the guest runs, or gives up, in microseconds.
    pub total_us: f64,
    /// The downtime, in microseconds; of a refused one, what it would have been.
    pub downtime_us: f64,
    /// The downtime that the policy predicted when it decided.
    pub predicted_us: u64,
    /// Pages that are sent in the downtime.
    pub last_pages: f64,
    /// Bytes of memory sent.
    pub sent_bytes: f64,
}

/// Moves the guest.
#[must_use]
pub fn outlook(guest: &ModelledGuest, cable: &Cable, costs: &Costs, engine: &Engine) -> Outlook {
    let (mut policy, mut estimator) = (Policy::new(engine.limits), Estimator::default());
    let expected = Expected {
        state_bytes: engine.state_bytes,
        round_trip_us: cable.round_trip_us as u64,
        fixed: engine.fixed,
    };
    let host = Host { guest, cable, costs };
    let mut total_us = costs.setup_us.of(guest.touched_pages);
    let mut rounds: Vec<Round> = Vec::new();
    let mut sent_bytes = 0.0;
    // What a round begins with. Pages that were written since the tracking began go with the second
    // round.
    let mut dirty = guest.touched_pages - guest.zero_pages;
    let (ending, predicted_us) = loop {
        let index = rounds.len() as u32;
        let round_us = if index == 0 { host.first_round_us(dirty) } else { host.round_us(dirty) };
        let remaining = |sync_us: f64| guest.dirtied_pages((round_us + sync_us) / 1e6);
        let sync_us = host.sync_us(&costs.sync, remaining(0.0));
        let left = remaining(sync_us);
        let finished = Finished {
            round: index,
            pages: dirty.round() as u64,
            elapsed: duration(round_us),
            looking: Duration::ZERO,
            sync: duration(sync_us),
            remaining_pages: left.round() as u64,
        };
        let seen = estimator.observe(&finished, &expected);
        total_us += round_us + sync_us;
        sent_bytes += dirty * PAGE_BYTES as f64;
        rounds.push(Round {
            index,
            pages: finished.pages,
            bytes: finished.pages * PAGE_BYTES,
            elapsed_us: round_us as u64,
            dirtied_pages: finished.remaining_pages,
            predicted_downtime_us: predict_downtime_us(&seen),
        });
        dirty = left;
        let predicted_us = predict_downtime_us(&seen);
        match policy.decide(&seen) {
            Decision::Iterate if index < ROUNDS_MAX => {}
            Decision::SwitchOver if predicted_us <= engine.limits.downtime_us_max => {
                break (Ending::Converged, predicted_us);
            }
            Decision::SwitchOver => break (Ending::Forced, predicted_us),
            Decision::Iterate | Decision::GiveUp(_) => break (Ending::Refused, predicted_us),
        }
    };
    // What the last sync found goes while the guest still runs.
    let last_push_us = costs.arm_us + host.round_us(dirty);
    let last_pages = guest.dirtied_pages(last_push_us / 1e6);
    let downtime_us = host.downtime_us(last_pages);
    if ending != Ending::Refused {
        total_us += last_push_us + downtime_us;
        sent_bytes += (dirty + last_pages) * PAGE_BYTES as f64;
    }
    Outlook { ending, rounds, total_us, downtime_us, predicted_us, last_pages, sent_bytes }
}

/// The downtime of a guest that has so many dirty pages when it is paused, in microseconds.
#[must_use]
pub fn downtime_us(guest: &ModelledGuest, cable: &Cable, costs: &Costs, pages: f64) -> f64 {
    Host { guest, cable, costs }.downtime_us(pages)
}

/// A round of so many pages but the first, in microseconds.
#[must_use]
pub fn round_us(guest: &ModelledGuest, cable: &Cable, costs: &Costs, pages: f64) -> f64 {
    Host { guest, cable, costs }.round_us(pages)
}

/// A host at work.
struct Host<'m> {
    guest: &'m ModelledGuest,
    cable: &'m Cable,
    costs: &'m Costs,
}

impl Host<'_> {
    /// Everything is done at the same time, so the slowest of it counts.
    fn first_round_us(&self, pages: f64) -> f64 {
        let costs = self.costs;
        let rate = self.cable.bytes_per_second.min(costs.first_bytes_per_second);
        let carried_us = pages * PAGE_BYTES as f64 / rate * 1e6;
        // Memory that was touched lies together: its requests are whole stripes, which is next to
        // nothing.
        let thread_us = self.guest.touched_pages * costs.zero_us;
        let registered_us = self.guest.touched_pages * costs.register_us;
        costs.round_us.fixed
            + self.cable.round_trip_us
            + carried_us.max(thread_us).max(registered_us)
    }

    fn round_us(&self, pages: f64) -> f64 {
        let carried_us = self.carried_us(pages);
        let thread_us = self.guest.requests(pages) * self.costs.round_us.each;
        self.costs.round_us.fixed + self.cable.round_trip_us + carried_us.max(thread_us)
    }

    fn carried_us(&self, pages: f64) -> f64 {
        let rate = self.cable.bytes_per_second.min(self.costs.bytes_per_second);
        let bytes = pages * PAGE_BYTES as f64 + self.guest.requests(pages) * DESCRIPTOR_BYTES;
        bytes / rate * 1e6
    }

    fn sync_us(&self, sync: &Synced, dirty: f64) -> f64 {
        sync.memory_us.of(self.guest.pages) + sync.dirty_us * dirty
    }

    /// In the order of `Paused::drain`, `Drained::prepare` and `Prepared::commit`.
    fn downtime_us(&self, pages: f64) -> f64 {
        let (costs, guest) = (self.costs, self.guest);
        let vcpus = f64::from(guest.vcpus);
        let posting = costs.pause_us.of(vcpus) + self.sync_us(&costs.last_sync, pages);
        // The last pages are under way while the state is saved; it goes behind them.
        let posted = posting + guest.requests(pages) * costs.round_us.each;
        let carried = posting + self.carried_us(pages);
        let saved = posted + costs.save_us.of(guest.state_bytes);
        let rate = self.cable.bytes_per_second.min(costs.bytes_per_second);
        let state_carried = carried.max(saved) + guest.state_bytes / rate * 1e6;
        let fenced = state_carried.max(saved + self.sync_us(&costs.last_sync, 0.0));
        fenced
            + 2.0 * self.cable.round_trip_us
            + costs.load_us.of(guest.state_bytes)
            + costs.vcpu_us * vcpus
            + costs.messages_us
            + costs.resume_us.of(vcpus)
    }
}

/// By TCP each request has a descriptor in its frame; by RDMA its headers are of that size.
const DESCRIPTOR_BYTES: f64 = 16.0;

fn duration(us: f64) -> Duration {
    Duration::try_from_secs_f64(us / 1e6).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::guest::Area;
    use super::*;
    use pageferry_engine::policy::WhenStuck;

    const SYNC: Synced = Synced { memory_us: Line { fixed: 50.0, each: 0.001 }, dirty_us: 0.01 };
    const COSTS: Costs = Costs {
        setup_us: Line { fixed: 2000.0, each: 0.05 },
        sync: SYNC,
        last_sync: SYNC,
        round_us: Line { fixed: 100.0, each: 0.2 },
        zero_us: 0.1,
        register_us: 0.0,
        first_bytes_per_second: 3e9,
        bytes_per_second: 3e9,
        arm_us: 10.0,
        pause_us: Line { fixed: 100.0, each: 0.0 },
        save_us: Line { fixed: 100.0, each: 0.001 },
        load_us: Line { fixed: 200.0, each: 0.001 },
        vcpu_us: 0.0,
        messages_us: 200.0,
        resume_us: Line { fixed: 50.0, each: 0.0 },
    };
    const FIXED: FixedCosts =
        FixedCosts { pause_us: 100, sync_us: 0, save_us: 100, load_us: 200, resume_us: 50 };

    fn guest(megabytes_per_second: f64) -> ModelledGuest {
        let pages = 65_536.0;
        let writes_per_second = megabytes_per_second * 1e6 / PAGE_BYTES as f64;
        ModelledGuest {
            pages: 4.0 * pages,
            touched_pages: pages,
            zero_pages: 0.0,
            areas: vec![Area { pages, writes_per_second }],
            vcpus: 1,
            state_bytes: 100_000.0,
        }
    }

    fn engine(downtime_us_max: u64, when_stuck: WhenStuck) -> Engine {
        Engine {
            limits: Limits { downtime_us_max, when_stuck, rounds_max: 100 },
            fixed: FIXED,
            state_bytes: 100_000,
        }
    }

    const CABLE: Cable = Cable { bytes_per_second: 1e9, round_trip_us: 50.0 };

    #[test]
    fn a_guest_that_writes_nothing_takes_one_round_and_its_fixed_costs() {
        let still = outlook(&guest(0.0), &CABLE, &COSTS, &engine(10_000, WhenStuck::Abort));
        assert_eq!((still.ending, still.rounds.len()), (Ending::Converged, 1));
        // Set-up 5277, 256 MiB at 1 GB/s in 268435 and 150; sync 312; last push 160; downtime:
        // pause 100, sync 312, save 200, state 100 (beside the second sync of 312), round trips
        // 100, load 300, messages 200, resume 50.
        assert!((still.downtime_us - 1574.0).abs() < 2.0, "{still:?}");
        assert!(
            (still.total_us - (5277.0 + 268_585.0 + 312.0 + 160.0 + 1574.0)).abs() < 5.0,
            "{still:?}"
        );
    }

    #[test]
    fn a_guest_slower_than_the_cable_converges_and_a_faster_one_ends_as_told() {
        let at = |rate, when_stuck| {
            outlook(&guest(rate), &CABLE, &COSTS, &engine(10_000, when_stuck)).ending
        };
        assert_eq!(at(200.0, WhenStuck::Abort), Ending::Converged);
        assert_eq!(at(4000.0, WhenStuck::Abort), Ending::Refused);
        assert_eq!(at(4000.0, WhenStuck::Switchover), Ending::Forced);
    }

    #[test]
    fn nobody_waits_longer_for_a_faster_cable_or_a_quieter_guest() {
        let downtime = |rate, bytes_per_second| {
            let cable = Cable { bytes_per_second, ..CABLE };
            outlook(&guest(rate), &cable, &COSTS, &engine(1, WhenStuck::Switchover))
        };
        for rate in [50.0, 500.0, 5000.0] {
            let by_cable = [1e8, 3e8, 1e9, 2e9].map(|rate_of_cable| downtime(rate, rate_of_cable));
            assert!(by_cable.windows(2).all(|two| two[0].total_us >= two[1].total_us));
        }
        let by_guest = [0.0, 100.0, 900.0, 9000.0].map(|rate| downtime(rate, 1e9).downtime_us);
        assert!(by_guest.windows(2).all(|two| two[0] <= two[1]), "{by_guest:?}");
    }

    #[test]
    fn registration_is_beside_the_data_and_counts_where_it_is_slower() {
        let slow = Costs { register_us: 10.0, ..COSTS };
        let moved =
            |costs| outlook(&guest(0.0), &CABLE, costs, &engine(10_000, WhenStuck::Abort)).total_us;
        let more = moved(&slow) - moved(&COSTS);
        assert!((more - (655_360.0 - 268_435.0)).abs() < 2.0, "{more}");
        assert_eq!(moved(&Costs { register_us: 1.0, ..COSTS }), moved(&COSTS));
    }
}
