//! A link inside one process, with seeded faults: for tests that must meet bad luck on purpose and
//! meet it again.
//!
//! There are no threads. The link is one world behind a lock that moves in small steps, and whoever
//! calls [`Initiator::poll`], [`Target::wait_fence`] or [`Target::bytes_placed`] moves it. The seed
//! decides which lane moves next, so one thread that makes the same calls sees the same world.
//!
//! ```text
//!   post --> posted --(step: copied out, completion)--> wire --(step: copied in)--> exposed region
//! ```
//!
//! As on a real link, a completed write has not arrived yet: only a fence proves that.

use crate::clock;
use crate::credit::{Credits, Window};
use crate::error::{Error, Result};
use crate::exposed::Exposed;
use crate::failure::LaneFailure;
use crate::fences::{Acks, Arrivals};
use crate::link::{Initiator, Target, TransportKind};
use crate::preamble::LANES_MAX;
use crate::region::{MemoryRegion, RemoteRegion};
use crate::stripe::lane_of;
use crate::work::{Completion, FenceTag, RemoteAddr, WorkRequest};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What one lane may hold: small, so that tests meet its end.
const WINDOW: Window = Window { bytes: 4 << 20, requests: 256 };

/// Packets that have left the source's memory and not reached the destination's.
const WIRE_PACKETS_MAX: usize = 4;

/// Counted as on the wire with every packet, as a real link has headers too.
const PACKET_HEADER_BYTES: u64 = 16;

/// Steps of one look that does not wait.
const STEPS_OF_A_LOOK_MAX: u64 = 8;

/// What goes wrong, and the seed of everything left to chance.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// Decides which lane moves when, and which writes are delayed.
    pub seed: u64,
    /// A lane that breaks.
    pub death: Option<LaneFault>,
    /// A lane that goes silent: nothing moves on it any more, and no error comes.
    pub stall: Option<LaneFault>,
    /// Writes held back on their way, and their lane behind them.
    pub delay: Option<Delay>,
    /// How often each lane moves, relative to the others. A lane beyond the end counts as one; zero
    /// counts as one too.
    pub speeds: Vec<u64>,
    /// A lane on which every fence comes late.
    pub late_fence: Option<LateFence>,
    /// Writes between two fences of a lane arrive in any order, as they may on every link.
    pub relaxed: bool,
}

/// A lane, and the number of bytes that arrive on it before it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneFault {
    /// Index of the lane.
    pub lane: usize,
    /// Payload bytes that it still delivers; a write may be cut in its middle.
    pub after_bytes: u64,
}

/// One write in so many is held back for some steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Delay {
    /// One in this many; zero is none.
    pub one_in: u64,
    /// Turns of its lane that pass before it moves, at most.
    pub turns_max: u64,
}

/// Every fence of one lane is held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LateFence {
    /// Index of the lane.
    pub lane: usize,
    /// Turns of that lane that pass before the fence comes.
    pub turns: u64,
}

/// Makes the two ends of a link.
///
/// # Panics
/// If `lanes` is zero or more than [`LANES_MAX`].
#[must_use]
pub fn pair(lanes: usize, faults: Faults) -> (LoopbackInitiator, LoopbackTarget) {
    assert!((1..=LANES_MAX).contains(&lanes), "a link has 1 to {LANES_MAX} lanes");
    let world = World {
        random: faults.seed,
        lanes: (0..lanes).map(|_| Lane::new()).collect(),
        faults,
        exposed: Exposed::new(),
        arrivals: Arrivals::new(lanes),
        acks: Acks::new(lanes),
        registered: Vec::new(),
        written: Vec::new(),
        fenced: Vec::new(),
        failure: None,
        placed_bytes: 0,
        wire_bytes: 0,
        revoked: false,
    };
    let shared = Arc::new(Shared { world: Mutex::new(world), changed: Condvar::new() });
    (LoopbackInitiator(Arc::clone(&shared)), LoopbackTarget(shared))
}

/// The end that pushes.
#[derive(Debug)]
pub struct LoopbackInitiator(Arc<Shared>);

/// The end that is written to.
#[derive(Debug)]
pub struct LoopbackTarget(Arc<Shared>);

#[derive(Debug)]
pub(crate) struct Shared {
    world: Mutex<World>,
    pub(crate) changed: Condvar,
}

#[derive(Debug)]
struct World {
    /// State of a splitmix64 generator.
    random: u64,
    faults: Faults,
    lanes: Vec<Lane>,
    exposed: Exposed,
    arrivals: Arrivals,
    acks: Acks,
    registered: Vec<Arc<MemoryRegion>>,
    /// Completions that were not handed out, with the lane and bytes of their credits.
    written: Vec<(usize, u64, Completion)>,
    fenced: Vec<FenceTag>,
    failure: Option<LaneFailure>,
    placed_bytes: u64,
    wire_bytes: u64,
    revoked: bool,
}

#[derive(Debug)]
pub(crate) struct Lane {
    credits: Credits,
    posted: VecDeque<Item>,
    wire: VecDeque<Packet>,
    /// Turns that pass before the head of `wire` moves.
    held_turns: u64,
    delivered_bytes: u64,
}

#[derive(Debug)]
enum Item {
    Write(WorkRequest),
    Fence(FenceTag),
}

#[derive(Debug)]
enum Packet {
    Write { to: RemoteAddr, bytes: Vec<u8> },
    Fence(FenceTag),
}

impl Lane {
    fn new() -> Self {
        Self {
            credits: Credits::new(WINDOW),
            posted: VecDeque::new(),
            wire: VecDeque::new(),
            held_turns: 0,
            delivered_bytes: 0,
        }
    }

    /// Whether a step would do something.
    fn can_move(&self) -> bool {
        !self.wire.is_empty() || !self.posted.is_empty()
    }
}

impl World {
    fn check(&self) -> Result<()> {
        self.failure.as_ref().map_or(Ok(()), |failure| Err(failure.into()))
    }

    /// A number below `limit`, which is not zero.
    fn below(&mut self, limit: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    /// Moves one lane by one packet. False if nothing can move: until somebody posts, nothing will.
    fn step(&mut self) -> bool {
        if self.failure.is_some() {
            return false;
        }
        let stalled = |index: usize, lane: &Lane| {
            // A silent lane still takes what its wire holds: the source does not notice at once.
            let silent = self.left(index, self.faults.stall) == 0;
            silent && (lane.posted.is_empty() || lane.wire.len() == WIRE_PACKETS_MAX)
        };
        let movable: Vec<(usize, u64)> = (self.lanes.iter().enumerate())
            .filter(|&(index, lane)| lane.can_move() && !stalled(index, lane))
            .map(|(index, _)| {
                (index, self.faults.speeds.get(index).map_or(1, |&speed| speed.max(1)))
            })
            .collect();
        if movable.is_empty() {
            return false;
        }
        let mut ticket = self.below(movable.iter().map(|(_, speed)| speed).sum());
        let winner = movable.iter().find(|(_, speed)| {
            let won = ticket < *speed;
            ticket = ticket.wrapping_sub(*speed);
            won
        });
        let (index, _) = *winner.expect("a ticket is below the sum of all speeds");

        let lane = &self.lanes[index];
        let may_load = !lane.posted.is_empty() && lane.wire.len() < WIRE_PACKETS_MAX;
        let silent = self.left(index, self.faults.stall) == 0;
        if may_load && (silent || self.lanes[index].wire.is_empty() || self.below(2) == 0) {
            self.load(index);
        } else {
            self.deliver(index);
        }
        true
    }

    /// Takes a posted item out of the source's memory.
    fn load(&mut self, index: usize) {
        let item = self.lanes[index].posted.pop_front().expect("checked by the caller");
        let packet = match item {
            Item::Fence(tag) => Packet::Fence(tag),
            Item::Write(request) => {
                let mut bytes = vec![0; request.local.len()];
                // A slice is checked when it is made, so this cannot fail.
                if let Err(e) = request.local.region().read(request.local.offset(), &mut bytes) {
                    let what = format!("a slice outside its region: {e}");
                    self.failure.get_or_insert(LaneFailure::Protocol { lane: index, what });
                    return;
                }
                self.written.push((index, bytes.len() as u64, Completion::Write(request.id)));
                Packet::Write { to: request.remote, bytes }
            }
        };
        self.wire_bytes += PACKET_HEADER_BYTES;
        if let Packet::Write { bytes, .. } = &packet {
            self.wire_bytes += bytes.len() as u64;
        }
        if self.lanes[index].wire.is_empty() {
            self.hold(index, &packet);
        }
        self.lanes[index].wire.push_back(packet);
    }

    /// Decides how long a packet that has become the head of its lane waits there.
    fn hold(&mut self, index: usize, packet: &Packet) {
        let turns = match packet {
            Packet::Write { .. } => {
                let Delay { one_in, turns_max } = self.faults.delay.unwrap_or_default();
                let unlucky = one_in > 0 && self.below(one_in) == 0;
                if unlucky { self.below(turns_max.saturating_add(1)) } else { 0 }
            }
            Packet::Fence(_) => self
                .faults
                .late_fence
                .filter(|late| late.lane == index)
                .map_or(0, |late| late.turns),
        };
        self.lanes[index].held_turns = turns;
    }

    /// Brings the first packet of a lane to the destination, or lets it wait another turn.
    fn deliver(&mut self, index: usize) {
        let lane = &mut self.lanes[index];
        if lane.held_turns > 0 {
            lane.held_turns -= 1;
            return;
        }
        let writes =
            lane.wire.iter().take_while(|packet| matches!(packet, Packet::Write { .. })).count();
        if self.faults.relaxed && writes > 1 {
            let chosen = self.below(writes as u64) as usize;
            self.lanes[index].wire.swap(0, chosen);
        }
        match self.lanes[index].wire.pop_front() {
            None => {}
            Some(Packet::Fence(_)) if self.left(index, self.faults.death) == 0 => {
                self.failure.get_or_insert(dead(index));
            }
            Some(Packet::Fence(tag)) => {
                assert!(self.arrivals.arrive(index, tag), "the initiator lets no tag fall");
                assert!(self.acks.acknowledge(index, &mut self.fenced), "a fence that was sent");
            }
            Some(Packet::Write { to, bytes }) => {
                if let Err(failure) = self.place(index, to, bytes) {
                    self.failure.get_or_insert(failure);
                }
            }
        }
        if let Some(next) = self.lanes[index].wire.pop_front() {
            self.hold(index, &next);
            self.lanes[index].wire.push_front(next);
        }
    }

    /// Payload bytes that a lane still delivers before `fault` strikes it.
    fn left(&self, index: usize, fault: Option<LaneFault>) -> u64 {
        match fault {
            Some(fault) if fault.lane == index => {
                fault.after_bytes.saturating_sub(self.lanes[index].delivered_bytes)
            }
            _ => u64::MAX,
        }
    }

    /// Writes to the destination's memory. A lane that fails does so in the middle of a write, as a
    /// cable would.
    fn place(
        &mut self,
        index: usize,
        to: RemoteAddr,
        mut bytes: Vec<u8>,
    ) -> Result<(), LaneFailure> {
        let protocol = |what| LaneFailure::Protocol { lane: index, what };
        let len = bytes.len() as u64;
        let wire_len = u32::try_from(len).expect("a write is no longer than a stripe");
        let (region, offset) = self.exposed.place(to.key.0, to.addr, wire_len).map_err(protocol)?;
        let (dies, stalls) =
            (self.left(index, self.faults.death), self.left(index, self.faults.stall));
        bytes.truncate(usize::try_from(dies.min(stalls)).unwrap_or(usize::MAX));
        region.write(offset, &bytes).map_err(|e| protocol(e.to_string()))?;
        self.placed_bytes += bytes.len() as u64;
        self.lanes[index].delivered_bytes += bytes.len() as u64;
        if dies < len { Err(dead(index)) } else { Ok(()) }
    }

    /// Moves on a little, for a caller that does not wait.
    fn look(&mut self) {
        for _ in 0..=self.below(STEPS_OF_A_LOOK_MAX) {
            self.step();
        }
    }
}

/// What a lane says that died of [`Faults::death`].
fn dead(lane: usize) -> LaneFailure {
    LaneFailure::Os { lane, operation: "sending", errno: libc::ECONNRESET }
}

impl Shared {
    fn world(&self) -> MutexGuard<'_, World> {
        // A panic while the world moved is a bug of ours that the panicking test reports.
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the world until `done` has an answer, or nothing can move until `deadline`.
    fn advance<T>(
        &self,
        deadline: Instant,
        mut done: impl FnMut(&mut World) -> Option<T>,
    ) -> Option<T> {
        let mut world = self.world();
        world.look();
        loop {
            clock::notify_all(&self.changed);
            if let Some(answer) = done(&mut world) {
                return Some(answer);
            }
            let left = deadline.saturating_duration_since(clock::now());
            if left.is_zero() {
                return None;
            }
            if !world.step() {
                world = clock::wait_timeout(&self.changed, &self.world, world, left);
            }
        }
    }

    /// One end is gone: the other finds every lane closed, the first of them first.
    fn close(&self) {
        self.world().failure.get_or_insert(LaneFailure::Closed { lane: 0 });
        clock::notify_all(&self.changed);
    }
}

impl Initiator for LoopbackInitiator {
    fn kind(&self) -> TransportKind {
        TransportKind::Loopback
    }

    fn lanes(&self) -> usize {
        self.0.world().lanes.len()
    }

    fn register(&mut self, region: &Arc<MemoryRegion>) -> Result<()> {
        self.0.world().registered.push(Arc::clone(region));
        Ok(())
    }

    fn post(&mut self, batch: &[WorkRequest]) -> Result<usize> {
        let mut world = self.0.world();
        world.check()?;
        world.acks.check_open()?;
        let lanes = world.lanes.len();
        let mut accepted = 0;
        for request in batch {
            let admitted = request.check().and_then(|()| {
                let known = world
                    .registered
                    .iter()
                    .any(|region| Arc::ptr_eq(region, request.local.region()));
                if known {
                    Ok(())
                } else {
                    Err(Error::State("posting memory of a region that was not registered"))
                }
            });
            match admitted {
                Err(e) if accepted == 0 => return Err(e),
                Err(_) => break,
                Ok(()) => {}
            }
            let lane = &mut world.lanes[lane_of(request.remote.addr, lanes)];
            if !lane.credits.take(request.local.len() as u64) {
                break;
            }
            lane.posted.push_back(Item::Write(request.clone()));
            accepted += 1;
        }
        drop(world);
        clock::notify_all(&self.0.changed);
        Ok(accepted)
    }

    fn poll(&mut self, out: &mut Vec<Completion>, deadline: Instant) -> Result<usize> {
        let before = out.len();
        let answer = self.0.advance(deadline, |world| {
            for (lane, bytes, completion) in std::mem::take(&mut world.written) {
                world.lanes[lane].credits.give_back(1, bytes);
                out.push(completion);
            }
            out.extend(world.fenced.drain(..).map(Completion::Fence));
            if out.len() > before { Some(Ok(())) } else { world.check().err().map(Err) }
        });
        answer.unwrap_or(Ok(()))?;
        Ok(out.len() - before)
    }

    fn fence(&mut self, tag: FenceTag) -> Result<()> {
        let mut world = self.0.world();
        world.check()?;
        world.acks.send(tag)?;
        world.lanes.iter_mut().for_each(|lane| lane.posted.push_back(Item::Fence(tag)));
        drop(world);
        clock::notify_all(&self.0.changed);
        Ok(())
    }

    fn last_fence(&mut self, tag: FenceTag) -> Result<()> {
        self.fence(tag)?;
        self.0.world().acks.end();
        Ok(())
    }

    fn bytes_on_wire(&self) -> u64 {
        self.0.world().wire_bytes
    }
}

impl Target for LoopbackTarget {
    fn expose(&mut self, region: &Arc<MemoryRegion>) -> Result<RemoteRegion> {
        self.0.world().exposed.expose(region)
    }

    fn wait_fence(&mut self, tag: FenceTag, deadline: Instant) -> Result<()> {
        let answer = self.0.advance(deadline, |world| {
            if world.arrivals.reached(tag) { Some(Ok(())) } else { world.check().err().map(Err) }
        });
        answer.unwrap_or(Err(Error::Timeout { what: "a fence on every lane" }))
    }

    fn bytes_placed(&mut self) -> Result<u64> {
        let mut world = self.0.world();
        if !world.revoked {
            world.look();
            clock::notify_all(&self.0.changed);
            world.check()?;
        }
        Ok(world.placed_bytes)
    }

    fn revoke(&mut self) -> Result<()> {
        let mut world = self.0.world();
        world.exposed.revoke();
        world.revoked = true;
        drop(world);
        self.0.close();
        Ok(())
    }
}

impl Drop for LoopbackInitiator {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Drop for LoopbackTarget {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests;
