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
use crate::memory::page::PageRun;
use crate::memory::staging::{STAGING_BYTES, Staging};
use crate::net::Address;
use crate::policy::WhenStuck;
use crate::protocol::refusal::aborted;
use crate::protocol::{Accept, Control, Message, Offer, SourceEvent, SourcePhase};
use crate::report::hold;
use crate::report::progress::Monitor;
use crate::report::stage::Stage;
use crate::source::attempt::Attempt;
use crate::source::flow::Flow;
use crate::source::lanes::Opened;
use crate::source::pump::Pump;
use crate::source::rounds::Rounds;
use crate::source::session::Session;
use crate::source::switchover::{Committed, Drained, Paused, Prepared};
use crate::source::{MigrateOptions, lanes, session};
use pageferry_transport::{Initiator, MemoryRegion, STRIPE_BYTES, TransportKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For the destination to expose its memory.
const ACCEPT_MAX: Duration = Duration::from_secs(60);

/// Of the device state, what is registered ahead at both ends beside twice what is expected: more
/// than the states of devices and vCPUs that nobody foresees. Video memory may come twice.
const STATE_BYTES_UNFORESEEN: usize = 8 << 20;

/// How long a guest may be paused at most, beside what was asked for and predicted.
const DOWNTIME_MAX: Duration = Duration::from_secs(20);

/// The slowest look through all memory, and the slowest link on which a stuck guest is switched
/// over.
const VERIFY_BYTES_PER_SECOND_MIN: u64 = 500 << 20;

const STUCK_BYTES_PER_SECOND_MIN: u64 = 10 << 20;

/// Why a guest stays that got a balloon or virtio-mem while it moved.
const BALLOON_PLUGGED: &str = "memory may be taken away from the guest since it began to move: a balloon or virtio-mem was plugged \
                               in; move it again";

/// What an attempt carries, and the buffers that it needs for it.
struct Cargo {
    memory: Arc<GuestMemory>,
    state: Arc<MemoryRegion>,
    staging: Arc<MemoryRegion>,
    zeros: Arc<MemoryRegion>,
    /// Whether memory may be taken away from the guest: then zeros are written over it.
    discards: bool,
}

impl Attempt<'_> {
    /// From the start of tracking to the destination's word that it runs the guest. There is a
    /// witness if memory may be taken away from it.
    pub(super) fn cross(
        &mut self,
        guest: &mut dyn SourceGuest,
        facts: &Facts,
        session: &mut Session,
        to: &Address,
        witness: Option<Witness>,
    ) -> Result<()> {
        let cargo = Cargo::of(guest.memory(), facts, witness.is_some())?;
        let control = session.control.as_mut().ok_or_else(session::over)?;
        let mut flow = self.begin(guest, &cargo, &mut session.opened, control, witness)?;
        self.send_while_it_runs(guest, &cargo, &mut flow, control, session.round_trip_us)?;
        let question = |was_running| Question { to: to.clone(), token: session.token, was_running };
        let prepared = self.switch_over(guest, &cargo, &mut flow, control, question)?;
        let (committed, sent) = self.commit(prepared, control)?;
        let inquiry = Inquiry::new(to.clone(), session.token, session.control.take());
        self.report.downtime_us = self.settle(committed, sent, inquiry).inspect_err(|error| {
            // It is paused for as long as it takes, so before the tracking is undone, which grows
            // with memory. What fails here is tried once more, and told, by who called.
            if !matches!(error, Error::Unknown(_)) && guest.resume().is_ok() {
                hold::point("resumed");
            }
        })?;
        let Flow { pump, tracking, .. } = flow;
        drop(pump);
        guest.retire(tracking);
        // The destination would have aborted before Ready, had its digest been another.
        self.report.verified = self.options.verify.then_some(true);
        Ok(())
    }

    /// Follows the guest's writes, and tells both ends what will be written, and where it is to go.
    fn begin<'p>(
        &self,
        guest: &mut dyn SourceGuest,
        cargo: &'p Cargo,
        opened: &'p mut Opened,
        control: &mut Control,
        witness: Option<Witness>,
    ) -> Result<Flow<'p>> {
        let (options, monitor, alive) = (self.options, self.monitor, guest.liveness());
        // Tracking first, then the look at what was ever touched: a page touched in between is
        // dirty.
        cargo.memory.look_again()?;
        let tracking = guest.start_tracking(&mut || {
            monitor.check().and_then(|()| alive()).and_then(|()| check_peer(control))
        })?;
        guest.drain_io()?;
        let facts = guest.facts()?;
        let touched = cargo.memory.touched()?;

        cargo.announce(opened.link.as_mut(), &touched)?;
        let offer = Offer::pack(&touched, options.verify, opened.lanes());
        let accept = offer_memory(control, offer, cargo, monitor)?;
        let mut dirty = DirtyBitmap::new(cargo.memory.pages());
        touched.iter().for_each(|run| dirty.insert(*run));
        let by_rdma = opened.link.kind() == TransportKind::Rdma;
        let rate_max = options.bytes_per_second_max;
        let mut pump = cargo.pump(opened.link.as_mut(), &accept, witness, rate_max);
        pump.expect_downtime(state_bytes_ahead(&facts))?;
        Ok(Flow { pump, tracking, dirty, touched, facts, by_rdma })
    }

    /// The guest runs, and rounds shrink. Then what can be done ahead of the pause.
    fn send_while_it_runs(
        &mut self,
        guest: &mut dyn SourceGuest,
        cargo: &Cargo,
        flow: &mut Flow<'_>,
        control: &mut Control,
        round_trip_us: u64,
    ) -> Result<()> {
        let (options, monitor, alive) = (self.options, self.monitor, guest.liveness());
        let mut watch = || {
            monitor
                .check()
                .and_then(|()| cargo.memory.check_readable(options.poisoned))
                .and_then(|()| alive())
                .and_then(|()| check_peer(control))
        };
        monitor.enter(Stage::Rounds);
        Rounds::new(self, round_trip_us, cargo.taken_away()).run(guest, flow, &mut watch)?;
        // What was written until then goes now.
        guest.arm()?;
        hold::point("armed");
        refuse_new_balloon(guest, cargo.discards, flow.by_rdma)?;
        flow.push_ahead(cargo.taken_away(), &mut watch)?;
        if flow.by_rdma {
            flow.register_ahead(state_bytes_ahead(&flow.facts), &mut watch)?;
        }
        Ok(())
    }

    /// The guest is paused, and all of it sent, until the destination holds it.
    fn switch_over<'g>(
        &mut self,
        guest: &'g mut dyn SourceGuest,
        cargo: &Cargo,
        flow: &mut Flow<'_>,
        control: &mut Control,
        question: impl FnOnce(bool) -> Question,
    ) -> Result<Prepared<'g>> {
        let (options, monitor, alive) = (self.options, self.monitor, guest.liveness());
        let readable = || cargo.memory.check_readable(options.poisoned);
        flow.pump.guest_paused();
        monitor.check()?;
        let downtime_end = clock::now() + downtime_max(options, cargo.memory.bytes());
        let mut watch = || {
            monitor
                .check()
                .and_then(|()| readable())
                .and_then(|()| alive())
                .and_then(|()| not_after(downtime_end))
        };
        let paused =
            Paused::enter(guest, |was_running| keep_ahead(monitor, &question(was_running)))?;
        self.phase = self.phase.on(SourceEvent::Pause);
        monitor.enter(Stage::Switchover);
        let mut drained = flow.drain(paused, &cargo.state, cargo.taken_away(), &mut watch)?;
        if options.verify {
            drained.digest()?;
        }
        self.report_drained(&drained, &flow.pump);

        // The whole guest is on its way: should its QEMU die here now, it lives on there.
        // A queue pair that breaks is heard of at this end alone.
        let (by_rdma, pump) = (flow.by_rdma, &mut flow.pump);
        let mut watch =
            || monitor.check().and_then(|()| if by_rdma { pump.look() } else { Ok(()) });
        let prepared = drained.prepare(control, downtime_end, &mut watch)?;
        // The lanes have read everything by now.
        readable()?;
        cargo.memory.check_sizes()?;
        monitor.check()?;
        Ok(prepared)
    }

    fn report_drained(&mut self, drained: &Drained<'_>, pump: &Pump<'_>) {
        self.report.bytes_written = pump.bytes_written();
        self.report.bytes_skipped = pump.bytes_skipped();
        self.report.state_bytes = drained.state_bytes();
        self.report.staged_pages = drained.staged_pages();
        self.report.registrations_in_downtime = drained.registrations();
        if drained.registrations() > 0 {
            tracing::warn!("{} registrations of memory in the downtime", drained.registrations());
        }
    }

    /// Seals the guest and sends Commit; says also whether it could be sent.
    fn commit(
        &mut self,
        prepared: Prepared<'_>,
        control: &mut Control,
    ) -> Result<(Committed, Result<()>)> {
        self.phase = self.phase.on(SourceEvent::CommitSent);
        let committed = prepared
            .commit(control, clock::now() + RUNNING_MAX, || reveal(self.monitor))
            .inspect_err(|_| self.phase = SourcePhase::Paused)?;
        self.monitor.enter(Stage::Committed);
        Ok(committed)
    }
}

impl Cargo {
    fn of(memory: &Arc<GuestMemory>, facts: &Facts, discards: bool) -> Result<Self> {
        let state = MemoryRegion::anonymous(facts.state_region_bytes() as usize)?;
        state.populate(0, STATE_WARM_BYTES.min(state.len()))?;
        Ok(Self {
            memory: Arc::clone(memory),
            state,
            staging: MemoryRegion::anonymous(STAGING_BYTES)?,
            zeros: MemoryRegion::anonymous(STRIPE_BYTES as usize)?,
            discards,
        })
    }

    /// What is written over memory that was taken away from the guest, where that may happen.
    fn taken_away(&self) -> Option<&Arc<MemoryRegion>> {
        self.discards.then_some(&self.zeros)
    }

    /// Tells the link what it will read from.
    fn announce(&self, link: &mut dyn Initiator, touched: &[PageRun]) -> Result<()> {
        let slots = self.memory.slots();
        let regions = slots.iter().map(|slot| slot.region());
        for region in regions.chain([&self.state, &self.staging, &self.zeros]) {
            link.register(region)?;
        }
        // The state first: it is written last, in the downtime, and must not wait behind all of
        // memory then.
        let warm = 0..STATE_WARM_BYTES.min(self.state.len());
        link.expect(&self.state, std::slice::from_ref(&warm))?;
        for (slot, parts) in slots.iter().zip(self.memory.parts(touched)) {
            link.expect(slot.region(), &parts)?;
        }
        Ok(())
    }

    /// What sends it to the regions that the destination has named.
    fn pump<'p>(
        &'p self,
        link: &'p mut dyn Initiator,
        accept: &Accept,
        witness: Option<Witness>,
        bytes_per_second_max: Option<u64>,
    ) -> Pump<'p> {
        let slots = accept.slots.iter().map(|slot| (*slot).into()).collect();
        let state = (Arc::clone(&self.state), accept.state.into());
        Pump::new(link, &self.memory, slots, state, bytes_per_second_max)
            .with_staging(Staging::new(Arc::clone(&self.staging), accept.staging.into()))
            .with_witness(witness)
    }
}

/// Of the device state, what is registered ahead.
fn state_bytes_ahead(facts: &Facts) -> usize {
    2 * facts.state_bytes_expected as usize + STATE_BYTES_UNFORESEEN
}

/// Asked again behind `arm`, from which on nothing is plugged in: a balloon may have been in the
/// rounds. What was sent before was not noted.
fn refuse_new_balloon(
    guest: &mut dyn SourceGuest,
    was_expected: bool,
    by_rdma: bool,
) -> Result<()> {
    if was_expected || !guest.facts()?.may_discard {
        return Ok(());
    }
    Err(if by_rdma {
        pageferry_transport::Error::State(lanes::BALLOONED).into()
    } else {
        Error::Guest(BALLOON_PLUGGED.into())
    })
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
    cargo: &Cargo,
    monitor: &Monitor,
) -> Result<Accept> {
    let deadline = clock::now() + ACCEPT_MAX;
    control.send(&Message::Offer(offer), deadline)?;
    let accept = match control.receive_watched("Accept", deadline, &mut || monitor.check())? {
        Message::Accept(accept) => accept,
        Message::Abort(abort) => return Err(aborted(abort)),
        other => return Err(Error::Protocol(format!("{} in answer to Offer", other.name()))),
    };
    let slots = cargo.memory.slots().iter();
    let slot_bytes: Vec<u64> = slots.map(|slot| slot.region().len() as u64).collect();
    accept.check(&slot_bytes, cargo.state.len() as u64)?;
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
