//! One migration over an open session, from the start of tracking to the word that the guest runs
//! there.

use crate::clock;
use crate::error::{Error, Result};
use crate::guest::{Facts, SourceGuest};
use crate::inquiry::{Inquiry, Question, RUNNING_MAX};
use crate::limits::{SETUP_MAX, STATE_WARM_BYTES};
use crate::memory::GuestMemory;
use crate::memory::bitmap::DirtyBitmap;
use crate::memory::holes::Witness;
use crate::memory::staging::{STAGING_BYTES, Staging};
use crate::net::{Address, Network};
use crate::policy::WhenStuck;
use crate::protocol::refusal::aborted;
use crate::protocol::{Accept, Control, Message, Offer, SourceEvent, SourcePhase};
use crate::report::progress::Monitor;
use crate::report::stage::Stage;
use crate::report::{MigrationReport, hold};
use crate::source::pump::Pump;
use crate::source::rounds::Rounds;
use crate::source::session::Session;
use crate::source::switchover::Paused;
use crate::source::{MigrateOptions, lanes, session};
use pageferry_transport::{MemoryRegion, STRIPE_BYTES, TransportKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For the destination to expose its memory.
const ACCEPT_MAX: Duration = Duration::from_secs(60);

/// Of the device state, what is registered ahead at both ends beside twice what is expected: more
/// than the states of devices and vCPUs that nobody foresees. Video memory may come twice.
const STATE_BYTES_UNFORESEEN: usize = 8 << 20;

/// How often the source looks for memory that was touched for the first time, right before the
/// pause. Each look takes as long as registering what the one before has found; what the last finds
/// goes by the staging region.
const FRESH_LOOKS_MAX: u32 = 4;

/// How long a guest may be paused at most, beside what was asked for and predicted.
const DOWNTIME_MAX: Duration = Duration::from_secs(20);

/// The slowest look through all memory, and the slowest link on which a stuck guest is switched
/// over.
const VERIFY_BYTES_PER_SECOND_MIN: u64 = 500 << 20;

const STUCK_BYTES_PER_SECOND_MIN: u64 = 10 << 20;

/// Why a guest stays that got a balloon or virtio-mem while it moved.
const BALLOON_PLUGGED: &str = "memory may be taken away from the guest since it began to move: a balloon or virtio-mem was plugged \
                               in; move it again";

/// One migration over an open session.
pub(crate) struct Ferry<'m> {
    pub(super) network: &'m dyn Network,
    pub(super) guest: &'m mut dyn SourceGuest,
    /// As they were when they were asked last.
    pub(super) facts: Facts,
    pub(super) options: &'m MigrateOptions,
    pub(super) monitor: &'m Monitor,
    pub(super) report: &'m mut MigrationReport,
    pub(super) phase: SourcePhase,
}

impl Ferry<'_> {
    /// From the start of tracking to the destination's word that it runs the guest. There is a
    /// witness if memory may be taken away from it.
    pub(crate) fn cross(
        &mut self,
        session: &mut Session,
        to: &Address,
        witness: Option<Witness>,
    ) -> Result<()> {
        let discards = witness.is_some();
        let by_rdma = session.opened.link.kind() == TransportKind::Rdma;
        let (options, monitor, guest) = (self.options, self.monitor, &mut *self.guest);
        let memory = Arc::clone(guest.memory());
        let state = MemoryRegion::anonymous(self.facts.state_bytes_max as usize)?;
        state.populate(0, STATE_WARM_BYTES.min(state.len()))?;

        // Tracking first, then the look at what was ever touched: a page touched in between is
        // dirty.
        memory.look_again()?;
        let readable = || memory.check_readable(options.poisoned);
        let alive = guest.liveness();
        let mut tracking = {
            let control = session.control()?;
            guest.start_tracking(&mut || {
                monitor.check().and_then(|()| alive()).and_then(|()| check_peer(control))
            })?
        };
        guest.drain_io()?;
        self.facts = guest.facts()?;
        let touched = memory.touched()?;
        let zeros = MemoryRegion::anonymous(STRIPE_BYTES as usize)?;
        let staging = MemoryRegion::anonymous(STAGING_BYTES)?;
        let link = session.opened.link.as_mut();
        for region in
            memory.slots().iter().map(|slot| slot.region()).chain([&state, &staging, &zeros])
        {
            link.register(region)?;
        }
        // The state first: it is written last, in the downtime, and must not wait behind all of
        // memory then.
        let warm = 0..STATE_WARM_BYTES.min(state.len());
        link.expect(&state, std::slice::from_ref(&warm))?;
        for (slot, parts) in memory.slots().iter().zip(memory.parts(&touched)) {
            link.expect(slot.region(), &parts)?;
        }
        let offer = Offer::pack(&touched, options.verify, session.opened.lanes());
        let accept = offer_memory(session.control()?, offer, &memory, &state, monitor)?;

        let mut dirty = DirtyBitmap::new(memory.pages());
        touched.iter().for_each(|run| dirty.insert(*run));
        let slots = accept.slots.iter().map(|slot| (*slot).into()).collect();
        let remote_state = (Arc::clone(&state), accept.state.into());
        let rate_max = options.bytes_per_second_max;
        let mut pump =
            Pump::new(session.opened.link.as_mut(), &memory, slots, remote_state, rate_max)
                .with_staging(Staging::new(staging, accept.staging.into()))
                .with_witness(witness);
        let state_ahead = 2 * self.facts.state_bytes_expected as usize + STATE_BYTES_UNFORESEEN;
        pump.expect_downtime(state_ahead)?;
        let control = session.control.as_mut().ok_or_else(session::over)?;

        // The guest runs, and rounds shrink.
        monitor.enter(Stage::Rounds);
        {
            let mut watch = || {
                monitor
                    .check()
                    .and_then(|()| readable())
                    .and_then(|()| alive())
                    .and_then(|()| check_peer(control))
            };
            let mut rounds = Rounds {
                monitor,
                report: self.report,
                facts: &self.facts,
                round_trip_us: session.round_trip_us,
                options,
                zeros: discards.then_some(&zeros),
                holes_us: u64::MAX,
            };
            rounds.run(guest, &mut pump, tracking.as_mut(), &mut dirty, &mut watch)?;
            // Whatever can be done ahead of the pause; what was written until then goes now.
            guest.arm()?;
            hold::point("armed");
            // Asked again: it may have been plugged in during the rounds, and from `arm` on nothing
            // is. What was sent before was not noted.
            if !discards && guest.facts()?.may_discard {
                return Err(if by_rdma {
                    pageferry_transport::Error::State(lanes::BALLOONED).into()
                } else {
                    Error::Guest(BALLOON_PLUGGED.into())
                });
            }
            let mut draining = || watch().and_then(|()| tracking.drain_early());
            if discards {
                pump.push_freed(&mut dirty, &zeros, &mut draining)?;
            }
            pump.push(&mut dirty, &mut draining, &mut |_| {})?;
            let tag = pump.fence()?;
            pump.wait_fence(tag, &mut draining)?;
            if by_rdma {
                // Nothing shall be registered once the guest is paused, not even in the background.
                pump.wait_for_downtime(state_ahead, &mut watch)?;
                pump.make_ready(touched.iter().copied(), &mut watch)?;
                for _ in 0..FRESH_LOOKS_MAX {
                    // What is found is sent after the pause, which settles all I/O.
                    tracking.sync(&mut dirty)?;
                    if pump.make_ready(dirty.runs(u64::MAX), &mut watch)? {
                        break;
                    }
                }
            }
        }

        // The guest is paused.
        pump.guest_paused();
        monitor.check()?;
        let downtime_end = clock::now() + downtime_max(options, memory.bytes());
        let mut watch = || {
            monitor
                .check()
                .and_then(|()| readable())
                .and_then(|()| alive())
                .and_then(|()| not_after(downtime_end))
        };
        let (to_ask, token) = (to.clone(), session.token);
        let paused = Paused::enter(guest, |was_running| {
            keep_ahead(monitor, &Question { to: to_ask, token, was_running });
        })?;
        self.phase = self.phase.on(SourceEvent::Pause);
        monitor.enter(Stage::Switchover);
        let tracked = tracking.as_mut();
        let mut drained = paused.drain(
            &mut pump,
            &mut dirty,
            tracked,
            &state,
            discards.then_some(&zeros),
            &mut watch,
        )?;
        if options.verify {
            drained.digest()?;
        }
        self.report.bytes_written = pump.bytes_written();
        self.report.bytes_skipped = pump.bytes_skipped();
        self.report.state_bytes = drained.state_bytes();
        self.report.staged_pages = drained.staged_pages();
        self.report.registrations_in_downtime = drained.registrations();
        if drained.registrations() > 0 {
            tracing::warn!("{} registrations of memory in the downtime", drained.registrations());
        }
        // The whole guest is on its way: should its QEMU die here now, it lives on there.
        // A queue pair that breaks is heard of at this end alone.
        let mut watch =
            || monitor.check().and_then(|()| if by_rdma { pump.look() } else { Ok(()) });
        let prepared = drained.prepare(control, downtime_end, &mut watch)?;
        // The lanes have read everything by now.
        readable()?;
        memory.check_sizes()?;
        monitor.check()?;

        // The guest is the destination's.
        self.phase = self.phase.on(SourceEvent::CommitSent);
        let (committed, sent) = prepared
            .commit(control, clock::now() + RUNNING_MAX, || reveal(monitor))
            .inspect_err(|_| self.phase = SourcePhase::Paused)?;
        monitor.enter(Stage::Committed);
        let inquiry = Inquiry::new(to.clone(), session.token, session.control.take());
        let downtime = match self.settle(committed, sent, inquiry) {
            Ok(downtime) => downtime,
            Err(doubt @ Error::Unknown(_)) => return Err(doubt),
            Err(error) => {
                // It is paused for as long as it takes, so before the tracking is undone, which
                // grows with memory. What fails here is tried once more, and told, by who called.
                if self.guest.resume().is_ok() {
                    hold::point("resumed");
                }
                return Err(error);
            }
        };
        drop(pump);
        self.guest.retire(tracking);
        self.report.downtime_us = downtime;
        // The destination would have aborted before Ready, had its digest been another.
        self.report.verified = options.verify.then_some(true);
        Ok(())
    }
}

/// Has the question written down that Commit will be. Without it the guest can be moved all the
/// same.
fn keep_ahead(monitor: &Monitor, question: &Question) {
    if let Some(Err(e)) = monitor.keeper().map(|keeper| keeper.write_ahead(question)) {
        tracing::warn!(error = %e.chain(), "should this process die after Commit, nobody asks on for it");
    }
}

/// Has it found from now on.
fn reveal(monitor: &Monitor) {
    if let Some(Err(e)) = monitor.keeper().map(|keeper| keeper.reveal()) {
        tracing::warn!(error = %e.chain(), "should this process die now, nobody asks on for it");
    }
    hold::point("sealed");
}

/// The longest that the guest may be paused before the source takes it back, whatever goes on: far
/// beyond what was predicted, so that it ends only what has gone wrong.
fn downtime_max(options: &MigrateOptions, memory_bytes: u64) -> Duration {
    let looks = if options.verify { 2 * memory_bytes / VERIFY_BYTES_PER_SECOND_MIN } else { 0 };
    let stuck = if options.when_stuck == WhenStuck::Switchover {
        memory_bytes / STUCK_BYTES_PER_SECOND_MIN
    } else {
        0
    };
    DOWNTIME_MAX
        + 10 * Duration::from_micros(options.downtime_us_max)
        + Duration::from_secs(looks + stuck)
}

fn not_after(end: Instant) -> Result<()> {
    if clock::now() < end {
        Ok(())
    } else {
        Err(Error::Timeout {
            what: "switching over: the guest was paused for far longer than predicted".into(),
        })
    }
}

fn offer_memory(
    control: &mut Control,
    offer: Offer,
    memory: &GuestMemory,
    state: &MemoryRegion,
    monitor: &Monitor,
) -> Result<Accept> {
    let deadline = clock::now() + ACCEPT_MAX;
    control.send(&Message::Offer(offer), deadline)?;
    let accept = match control.receive_watched("Accept", deadline, &mut || monitor.check())? {
        Message::Accept(accept) => accept,
        Message::Abort(abort) => return Err(aborted(abort)),
        other => return Err(Error::Protocol(format!("{} in answer to Offer", other.name()))),
    };
    let slot_bytes: Vec<u64> =
        memory.slots().iter().map(|slot| slot.region().len() as u64).collect();
    accept.check(&slot_bytes, state.len() as u64)?;
    Ok(accept)
}

/// The destination speaks during the rounds only to abort, or by closing the connection.
fn check_peer(control: &mut Control) -> Result<()> {
    if !control.readable(Duration::ZERO)? {
        return Ok(());
    }
    match control.receive("nothing", clock::now() + SETUP_MAX)? {
        Message::Abort(abort) => Err(aborted(abort)),
        other => Err(Error::Protocol(format!("{} during the rounds", other.name()))),
    }
}
