//! The source: `migrate` reads as the protocol does.

use crate::bitmap::DirtyBitmap;
use crate::clock;
use crate::dirty::DirtySource;
use crate::error::{Error, Result};
use crate::guest::{SourceGuest, Vouched};
use crate::hold;
use crate::inquiry::{Answer, Inquiry, Question, RUNNING_MAX};
use crate::link::{self, LinkChoice, Transport, Wish};
use crate::memory::GuestMemory;
use crate::memory::holes::Witness;
use crate::memory::lost::{self, LostPage, Poisoned};
use crate::net::{Address, Network, System};
use crate::page::PAGE_BYTES;
use crate::policy::{
    Decision, Estimator, Expected, Finished, FixedCosts, Limits, Policy, WhenStuck, predict_blackout_us,
};
use crate::precopy::Pump;
use crate::progress::{Monitor, Stage};
use crate::protocol::{Accept, Control, Hello, Message, Offer, SourceEvent, SourcePhase};
use crate::report::{Blackout, MigrationReport, Outcome, Round};
use crate::session::{self, Session, aborted};
use crate::staging::{STAGING_BYTES, Staging};
use crate::switchover::{Committed, Paused};
use pageferry_transport::{MemoryRegion, STRIPE_BYTES, TransportKind};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For a destination whose lanes have ended to say why: it ends its copy of the guest first.
const REASON_MAX: Duration = Duration::from_secs(5);
/// For the destination to expose its memory.
const ACCEPT_MAX: Duration = Duration::from_secs(60);
/// How long a source whose Commit got no answer asks again before it says "unknown", and its supervisor goes on
/// asking. Longer than a switch or a route needs to come back.
const ASK_AGAIN_MAX: Duration = Duration::from_secs(60);
/// Pause between two attempts at it.
const ASK_AGAIN_EVERY: Duration = Duration::from_millis(500);
/// The beginning of the state region is populated ahead at both ends: no first touch in the blackout. A
/// QEMU without a video card stays below it.
pub const STATE_WARM_BYTES: usize = 1 << 20;
/// Of the device state, what is registered ahead at both ends beside twice what is expected: more than the states of
/// devices and vCPUs that nobody foresees. Video memory may come twice.
const STATE_BYTES_UNFORESEEN: usize = 8 << 20;
/// How often the source looks for memory that was touched for the first time, right before the pause. Each look takes
/// as long as registering what the one before has found; what the last finds goes by the staging region.
const FRESH_LOOKS_MAX: u32 = 4;
/// How long a guest may stand still at most, beside what was asked for and predicted.
const BLACKOUT_MAX: Duration = Duration::from_secs(20);
/// For a receiver to be ready again after an RDMA path broke: it ends one QEMU and starts another, which may
/// have to allocate its memory.
const SECOND_ATTEMPT_MAX: Duration = Duration::from_secs(30);
/// Pause between two tries to reach it.
const SECOND_ATTEMPT_EVERY: Duration = Duration::from_millis(500);
/// The slowest look through all memory, and the slowest link on which a stuck guest is switched over.
const VERIFY_BYTES_PER_SECOND_MIN: u64 = 500 << 20;
const STUCK_BYTES_PER_SECOND_MIN: u64 = 10 << 20;

/// Why a guest stays that got a balloon or virtio-mem while it moved.
const BALLOON_PLUGGED: &str = "memory may be taken away from the guest since it began to move: a balloon or virtio-mem was plugged \
                               in; move it again";

/// What the user asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrateOptions {
    /// `HOST:PORT` of a waiting `pageferry receive`.
    pub to: String,
    /// Lanes to ask for.
    pub lanes: u8,
    /// What may carry the data.
    pub link: LinkChoice,
    /// Longest blackout, in microseconds.
    pub downtime_us_max: u64,
    /// Bound on the rate while the guest runs, in bytes a second.
    pub bytes_per_second_max: Option<u64>,
    /// What to do if rounds do not shrink.
    pub when_stuck: WhenStuck,
    /// Most rounds.
    pub rounds_max: u32,
    /// Digest all memory on both sides before the guest runs.
    pub verify: bool,
    /// What becomes of the guest if the hardware lost some of its pages.
    #[serde(default)]
    pub poisoned: Poisoned,
    /// Allow an address off loopback.
    pub insecure: bool,
    /// What the operator vouches for.
    #[serde(default)]
    pub vouched: Vouched,
}

impl MigrateOptions {
    /// The defaults, to this address.
    #[must_use]
    pub fn to(address: impl Into<String>) -> Self {
        Self {
            to: address.into(),
            lanes: default_lanes(),
            link: LinkChoice::default(),
            downtime_us_max: 10_000,
            bytes_per_second_max: None,
            when_stuck: WhenStuck::Abort,
            rounds_max: 100,
            verify: false,
            poisoned: Poisoned::Refuse,
            insecure: false,
            vouched: Vouched::default(),
        }
    }
}

/// By TCP a lane is a thread at each end: half of the cores, but two at least, where there are two, and four at most. Two
/// lanes were somewhat faster than one on two cores, in few and noisy runs; no larger machine was measured. On one core a
/// second lane is a thread more to wake at each end.
#[must_use]
pub fn default_lanes() -> u8 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / 2).max(cores.min(2)).min(4) as u8
}

/// Moves a guest. On return it runs at exactly one place: at the destination if the outcome is `completed`
/// (what is left of it here is stopped for good, to be taken away with [`SourceGuest::end`]), here if it is
/// `aborted` (unless its own QEMU ended). If it is `unknown` the guest is stopped here.
///
/// A path by RDMA that breaks before Commit is given up for TCP, if the choice is left to us.
pub fn migrate(guest: &mut dyn SourceGuest, options: &MigrateOptions, monitor: &Monitor) -> MigrationReport {
    migrate_over(&System, guest, options, monitor)
}

/// [`migrate`], over connections of this network.
pub fn migrate_over(
    network: &dyn Network,
    guest: &mut dyn SourceGuest,
    options: &MigrateOptions,
    monitor: &Monitor,
) -> MigrationReport {
    let started = clock::now();
    let (mut report, end) = attempt(network, guest, options, monitor, None);
    if end == End::PathBroke && options.link.transport == Transport::Auto {
        let why = report.reason.take().unwrap_or_default();
        tracing::warn!("the path by RDMA broke, going on by TCP: {why}");
        let until = clock::now() + SECOND_ATTEMPT_MAX;
        loop {
            let end;
            (report, end) = attempt(network, guest, options, monitor, Some(&why));
            // The receiver may still be busy with taking the first attempt's copy away.
            if end != End::Busy || clock::now() >= until || monitor.check().is_err() {
                break;
            }
            clock::sleep(SECOND_ATTEMPT_EVERY);
        }
        // It was under way once, so it is no refusal any more.
        report.refused = false;
        report.fell_back = Some(why);
    }
    report.total_us = clock::elapsed(started).as_micros() as u64;
    monitor.enter(Stage::Done);
    report
}

/// How an attempt ended, as far as another one may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The guest runs here, and it was an RDMA path that broke.
    PathBroke,
    /// Nothing was touched: the receiver serves another source.
    Busy,
    /// For good or ill.
    Final,
}

/// One attempt; by TCP if a first one broke.
fn attempt(
    network: &dyn Network,
    guest: &mut dyn SourceGuest,
    options: &MigrateOptions,
    monitor: &Monitor,
    broken: Option<&str>,
) -> (MigrationReport, End) {
    let mut report = MigrationReport::new(guest.memory().bytes());
    let ready = ready(guest, options, monitor);
    // What stands against a move may be that the guest must not run here: then nothing lets it run.
    let untouched = ready.is_err();
    let result =
        ready.and_then(|addresses| run(network, guest, &addresses, options, monitor, broken, &mut report));
    report.outcome = match &result {
        Ok(()) => Outcome::Completed,
        Err(Error::Unknown(_)) => Outcome::Unknown,
        Err(_) => Outcome::Aborted,
    };
    report.lost_pages = name_lost_pages(guest);
    let mut end = End::Final;
    if let Err(mut error) = result {
        if let Error::Poisoned(pages) = &mut error {
            pages.clone_from(&report.lost_pages);
        }
        report.reason = Some(error.chain());
        report.refused = matches!(error, Error::Refused(_) | Error::Busy(_));
        let lanes_broke = error.cause() == crate::protocol::Cause::Lanes
            || matches!(error, Error::PeerAborted { lanes: true, .. });
        if matches!(error, Error::Busy(_)) {
            end = End::Busy;
        } else if lanes_broke && report.transport == TransportKind::Rdma.name() {
            end = End::PathBroke;
        }
    }
    if report.outcome == Outcome::Aborted
        && !untouched
        && let Err(e) = guest.resume()
    {
        // Also after a refusal by the peer: it costs nothing where nothing was touched.
        let reason = report.reason.take().unwrap_or_default();
        report.reason = Some(format!("{reason}; and the guest does not run here: {}", e.chain()));
        // A guest that is gone with its QEMU is not in doubt.
        if guest.liveness()().is_ok() {
            report.outcome = Outcome::Unknown;
        }
        end = End::Final;
    }
    (report, end)
}

/// The pages that the hardware lost, with the addresses by which the guest knows them.
fn name_lost_pages(guest: &mut dyn SourceGuest) -> Vec<LostPage> {
    let mut pages = guest.memory().lost_pages();
    if !pages.is_empty() {
        guest.name_guest_physical(&mut pages);
        tracing::warn!("the hardware lost pages of the guest: {}", lost::name(&pages));
    }
    pages
}

/// What must hold before anything is touched. Returns the destination's addresses.
fn ready(guest: &mut dyn SourceGuest, options: &MigrateOptions, monitor: &Monitor) -> Result<Vec<Address>> {
    monitor.enter(Stage::Setup);
    let addresses = Address::resolve_all(&options.to)?;
    addresses.iter().try_for_each(|address| session::check_exposure(address, options.insecure))?;
    guest.vouch(&options.vouched);
    guest.preflight()?;
    // The guest may run here, so an earlier question is settled; found after this attempt's death it would be wrong.
    monitor.keeper().map_or(Ok(()), |keeper| keeper.forget()).map_err(refuse_unreachable)?;
    Ok(addresses)
}

fn run(
    network: &dyn Network,
    guest: &mut dyn SourceGuest,
    addresses: &[Address],
    options: &MigrateOptions,
    monitor: &Monitor,
    broken: Option<&str>,
    report: &mut MigrationReport,
) -> Result<()> {
    report.memory_bytes = guest.memory().bytes();
    crate::warm::map_own_code();
    let discards = guest.may_discard()?;
    let wish_for = |to: &Address| -> Result<Wish> {
        let wish = Wish::new(&options.link, to, discards)?;
        Ok(broken.map_or(wish.clone(), |why| wish.by_tcp(&format!("RDMA broke: {why}"))))
    };
    // What is refused wherever it goes, is refused before anybody is troubled.
    addresses.iter().try_for_each(|to| wish_for(to).map(drop))?;
    let witness = discards.then(|| Witness::new(guest.memory())).transpose()?;
    let reached = session::reach(network, addresses).map_err(refuse_unreachable)?;
    let to = &reached.address.clone();
    let wish = wish_for(to)?;
    let hello = Hello {
        software: crate::VERSION.into(),
        lanes: options.lanes,
        guest: guest.describe(),
        state_bytes_max: guest.state_bytes_max(),
        rdma: wish.rdma(),
    };
    let patience = if broken.is_some() { SECOND_ATTEMPT_MAX } else { session::SETUP_MAX };
    let mut session = session::open(network, reached, hello, &wish, patience).map_err(refuse_unreachable)?;
    report.transport = session.opened.link.kind().name().into();
    report.lanes = session.opened.link.lanes() as u32;
    report.link.clone_from(&session.opened.taken);
    monitor.take(&session.opened.taken);

    let mut ferry = Ferry { network, guest, options, monitor, report, phase: SourcePhase::Copying };
    let result = ferry.cross(&mut session, to, witness);
    let phase = ferry.phase;
    // After Commit the connection is the inquiry's, which counts for itself.
    let Some(control) = &mut session.control else { return result };
    let result = result.map_err(|error| with_the_peers_reason(error, phase, control, monitor));
    report.control_messages += control.messages();
    if let Err(error) = &result
        && phase.on(SourceEvent::Failed) == SourcePhase::Resumed
    {
        control.abort(&error.chain(), error.cause(), clock::now() + session::SETUP_MAX);
    }
    result
}

/// A destination that fails ends its lanes at once, and says why when its copy is dead: that reason is the one to be told,
/// not that the lanes were closed. The guest runs here meanwhile.
fn with_the_peers_reason(
    error: Error,
    phase: SourcePhase,
    control: &mut Control,
    monitor: &Monitor,
) -> Error {
    let ended_there = matches!(&error, Error::Transport(e) if e.is_the_peers_end());
    if !ended_there || phase.on(SourceEvent::Failed) != SourcePhase::Resumed {
        return error;
    }
    match control.receive_watched("Abort", clock::now() + REASON_MAX, &mut || monitor.check()) {
        Ok(Message::Abort(abort)) => aborted(abort),
        _ => error,
    }
}

/// Nothing was touched while no session is open: not reaching the peer is a refusal.
fn refuse_unreachable(error: Error) -> Error {
    match error {
        Error::Refused(_) | Error::Busy(_) => error,
        other => Error::Refused(other.chain()),
    }
}

/// One migration over an open session.
struct Ferry<'m> {
    network: &'m dyn Network,
    guest: &'m mut dyn SourceGuest,
    options: &'m MigrateOptions,
    monitor: &'m Monitor,
    report: &'m mut MigrationReport,
    phase: SourcePhase,
}

impl Ferry<'_> {
    /// From the start of tracking to the destination's word that it runs the guest. There is a
    /// witness if memory may be taken away from it.
    fn cross(&mut self, session: &mut Session, to: &Address, witness: Option<Witness>) -> Result<()> {
        let discards = witness.is_some();
        let by_rdma = session.opened.link.kind() == TransportKind::Rdma;
        let (options, monitor, guest) = (self.options, self.monitor, &mut *self.guest);
        let memory = Arc::clone(guest.memory());
        let state = MemoryRegion::anonymous(guest.state_bytes_max() as usize)?;
        state.populate(0, STATE_WARM_BYTES.min(state.len()))?;

        // Tracking first, then the look at what was ever touched: a page touched in between is dirty.
        memory.look_again()?;
        let readable = || memory.check_readable(options.poisoned);
        let alive = guest.liveness();
        let mut tracking = {
            let control = session.control()?;
            guest.start_tracking(&mut || {
                monitor.check().and_then(|()| alive()).and_then(|()| check_peer(control))
            })?
        };
        guest.settle_io()?;
        let touched = memory.touched()?;
        let zeros = MemoryRegion::anonymous(STRIPE_BYTES as usize)?;
        let staging = MemoryRegion::anonymous(STAGING_BYTES)?;
        let link = session.opened.link.as_mut();
        for region in memory.slots().iter().map(|slot| slot.region()).chain([&state, &staging, &zeros]) {
            link.register(region)?;
        }
        // The state first: it is written last, in the blackout, and must not wait behind all of memory then.
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
        let mut pump = Pump::new(session.opened.link.as_mut(), &memory, slots, remote_state, rate_max)
            .with_staging(Staging::new(staging, accept.staging.into()))
            .with_witness(witness);
        let state_ahead = 2 * guest.state_bytes_expected() as usize + STATE_BYTES_UNFORESEEN;
        pump.expect_blackout(state_ahead)?;
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
                round_trip_us: session.round_trip_us,
                options,
                zeros: discards.then_some(&zeros),
                holes_us: u64::MAX,
            };
            rounds.run(guest, &mut pump, tracking.as_mut(), &mut dirty, &mut watch)?;
            // Whatever can be done ahead of the pause; what was written until then goes now.
            guest.arm()?;
            hold::point("armed");
            // Asked again: it may have been plugged in during the rounds, and from `arm` on nothing is.
            // What was sent before was not noted.
            if !discards && guest.may_discard()? {
                return Err(if by_rdma {
                    pageferry_transport::Error::State(link::BALLOONED).into()
                } else {
                    Error::Guest(BALLOON_PLUGGED.into())
                });
            }
            let mut relieving = || watch().and_then(|()| tracking.relieve());
            if discards {
                pump.push_freed(&mut dirty, &zeros, &mut relieving)?;
            }
            pump.push(&mut dirty, &mut relieving, &mut |_| {})?;
            let tag = pump.fence()?;
            pump.wait_fence(tag, &mut relieving)?;
            if by_rdma {
                // Nothing shall be registered once the guest stands still, not even in the background.
                pump.wait_for_blackout(state_ahead, &mut watch)?;
                pump.make_ready(touched.iter().copied(), &mut watch)?;
                for _ in 0..FRESH_LOOKS_MAX {
                    // What is found is sent after the pause, which settles all I/O.
                    tracking.harvest(&mut dirty)?;
                    if pump.make_ready(dirty.runs(u64::MAX), &mut watch)? {
                        break;
                    }
                }
            }
        }

        // The guest stands still.
        pump.stand_still();
        monitor.check()?;
        let blackout_end = clock::now() + blackout_max(options, memory.bytes());
        let mut watch = || {
            monitor
                .check()
                .and_then(|()| readable())
                .and_then(|()| alive())
                .and_then(|()| not_after(blackout_end))
        };
        let (to_ask, token) = (to.clone(), session.token);
        let paused = Paused::enter(guest, |was_running| {
            keep_ahead(monitor, &Question { to: to_ask, token, was_running });
        })?;
        self.phase = self.phase.on(SourceEvent::Pause);
        monitor.enter(Stage::Switchover);
        let tracked = tracking.as_mut();
        let mut drained =
            paused.drain(&mut pump, &mut dirty, tracked, &state, discards.then_some(&zeros), &mut watch)?;
        if options.verify {
            drained.digest()?;
        }
        self.report.bytes_written = pump.bytes_written();
        self.report.bytes_skipped = pump.bytes_skipped();
        self.report.state_bytes = drained.state_bytes();
        self.report.staged_pages = drained.staged_pages();
        self.report.registrations_in_blackout = drained.registrations();
        if drained.registrations() > 0 {
            tracing::warn!("{} registrations of memory in the blackout", drained.registrations());
        }
        // The whole guest is on its way: should its QEMU die here now, it lives on there.
        // A queue pair that breaks is heard of at this end alone.
        let mut watch = || monitor.check().and_then(|()| if by_rdma { pump.look() } else { Ok(()) });
        let prepared = drained.prepare(control, blackout_end, &mut watch)?;
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
        let blackout = match self.settle(committed, sent, inquiry) {
            Ok(blackout) => blackout,
            Err(doubt @ Error::Unknown(_)) => return Err(doubt),
            Err(error) => {
                // It stands still for as long as it takes, so before the tracking is undone, which grows with memory.
                // What fails here is tried once more, and told, by who called.
                if self.guest.resume().is_ok() {
                    hold::point("resumed");
                }
                return Err(error);
            }
        };
        drop(pump);
        self.guest.retire(tracking);
        self.report.blackout_us = blackout;
        // The destination would have aborted before Ready, had its digest been another.
        self.report.verified = options.verify.then_some(true);
        Ok(())
    }

    /// After Commit: acts on the destination's word, and asks again where there is none. Returns the blackout.
    /// A question that is still open in the end is left with the monitor.
    fn settle(&mut self, committed: Committed, sent: Result<()>, mut inquiry: Inquiry) -> Result<Blackout> {
        let ask_again_max = hold::limit("ask-again", ASK_AGAIN_MAX);
        let mut answer = match sent {
            Ok(()) => inquiry.wait(clock::now() + RUNNING_MAX.min(ask_again_max)),
            Err(e) => {
                tracing::warn!(error = %e.chain(), "Commit could not be sent; asking again");
                None
            }
        };
        let give_up = clock::now() + ask_again_max;
        loop {
            self.report.control_messages = inquiry.messages();
            match answer {
                Some(Answer::Running(running)) => {
                    self.phase = self.phase.on(SourceEvent::RunningReceived);
                    return Ok(committed.blackout(&running));
                }
                Some(Answer::Discarded(error)) => {
                    self.phase = self.phase.on(SourceEvent::AbortReceived);
                    return Err(error);
                }
                None if clock::now() >= give_up => {
                    self.phase = self.phase.on(SourceEvent::GivenUp);
                    let unanswered = unanswered(inquiry.to(), ask_again_max);
                    self.monitor.leave_inquiry(inquiry);
                    return Err(Error::Unknown(unanswered));
                }
                None => clock::sleep(ASK_AGAIN_EVERY),
            }
            answer = inquiry.ask(self.network);
        }
    }
}

/// Has the question written down that Commit will be. Without it the guest can be moved all the same.
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

/// The longest that the guest may stand still before the source takes it back, whatever goes on: far
/// beyond what was predicted, so that it ends only what has gone wrong.
fn blackout_max(options: &MigrateOptions, memory_bytes: u64) -> Duration {
    let looks = if options.verify { 2 * memory_bytes / VERIFY_BYTES_PER_SECOND_MIN } else { 0 };
    let stuck = if options.when_stuck == WhenStuck::Switchover {
        memory_bytes / STUCK_BYTES_PER_SECOND_MIN
    } else {
        0
    };
    BLACKOUT_MAX + 10 * Duration::from_micros(options.downtime_us_max) + Duration::from_secs(looks + stuck)
}

fn not_after(end: Instant) -> Result<()> {
    if clock::now() < end {
        Ok(())
    } else {
        Err(Error::Timeout {
            what: "switching over: the guest stood still for far longer than predicted".into(),
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
    let slot_bytes: Vec<u64> = memory.slots().iter().map(|slot| slot.region().len() as u64).collect();
    accept.check(&slot_bytes, state.len() as u64)?;
    Ok(accept)
}

/// The destination speaks during the rounds only to abort, or by closing the connection.
fn check_peer(control: &mut Control) -> Result<()> {
    if !control.readable(Duration::ZERO)? {
        return Ok(());
    }
    match control.receive("nothing", clock::now() + session::SETUP_MAX)? {
        Message::Abort(abort) => Err(aborted(abort)),
        other => Err(Error::Protocol(format!("{} during the rounds", other.name()))),
    }
}

/// The pre-copy rounds.
struct Rounds<'r> {
    monitor: &'r Monitor,
    report: &'r mut MigrationReport,
    round_trip_us: u64,
    options: &'r MigrateOptions,
    /// If memory may be taken away from the guest: what is written over it.
    zeros: Option<&'r Arc<MemoryRegion>>,
    /// The shortest look for what was taken away so far, in microseconds.
    holes_us: u64,
}

impl Rounds<'_> {
    /// What the blackout costs beside pages, states and harvests.
    fn fixed_costs(&mut self, guest: &dyn SourceGuest, pump: &Pump<'_>) -> Result<FixedCosts> {
        let fixed = guest.fixed_costs();
        if self.zeros.is_none() {
            return Ok(fixed);
        }
        let look = pump.time_a_look_for_holes()?;
        self.holes_us = self.holes_us.min(look.as_micros() as u64);
        Ok(FixedCosts { harvest_us: fixed.harvest_us + self.holes_us, ..fixed })
    }

    /// Sends `dirty`, harvests, and decides, until the policy says to switch over.
    fn run(
        &mut self,
        guest: &mut dyn SourceGuest,
        pump: &mut Pump<'_>,
        tracking: &mut dyn DirtySource,
        dirty: &mut DirtyBitmap,
        watch: &mut crate::precopy::Watch<'_>,
    ) -> Result<()> {
        let mut policy = Policy::new(Limits {
            downtime_us_max: self.options.downtime_us_max,
            when_stuck: self.options.when_stuck,
            rounds_max: self.options.rounds_max,
        });
        let mut estimator = Estimator::default();
        for index in 0.. {
            let begun = clock::now();
            let monitor = self.monitor;
            monitor.update(|p| (p.round, p.round_pages, p.round_pages_sent) = (index, dirty.count(), 0));
            let mut relieving = || watch().and_then(|()| tracking.relieve());
            let looked_before = pump.looked();
            let mut pages = 0;
            // In each round, so that the blackout finds little. Nothing was sent before the first.
            if let Some(zeros) = self.zeros.filter(|_| index > 0) {
                pages += pump.push_freed(dirty, zeros, &mut relieving)?;
            }
            pages +=
                pump.push(dirty, &mut relieving, &mut |sent| monitor.update(|p| p.round_pages_sent += sent))?;
            let tag = pump.fence()?;
            pump.wait_fence(tag, &mut relieving)?;
            let elapsed = clock::elapsed(begun);

            let harvesting = clock::now();
            tracking.harvest(dirty)?;
            let harvest = clock::elapsed(harvesting);
            guest.settle_io()?;
            let looking = pump.looked() - looked_before;
            let residue_pages = dirty.count();
            let finished = Finished { round: index, pages, elapsed, looking, harvest, residue_pages };
            let expected = Expected {
                state_bytes: guest.state_bytes_expected(),
                round_trip_us: self.round_trip_us,
                fixed: self.fixed_costs(guest, pump)?,
            };
            let bytes = pages * PAGE_BYTES;
            let seen = estimator.observe(&finished, &expected);
            let predicted_blackout_us = predict_blackout_us(&seen);
            let dirty_rate = (dirty.count() * PAGE_BYTES) as f64 / elapsed.as_secs_f64().max(1e-6);
            self.report.predicted_blackout_us = predicted_blackout_us;
            self.report.rounds.push(Round {
                index,
                pages,
                bytes,
                elapsed_us: elapsed.as_micros() as u64,
                dirtied_pages: dirty.count(),
                predicted_blackout_us,
            });
            self.report.bytes_written = pump.bytes_written();
            monitor.update(|p| {
                p.bytes_per_second = seen.bytes_per_second as u64;
                p.dirty_bytes_per_second = dirty_rate as u64;
                p.predicted_blackout_us = predicted_blackout_us;
            });
            tracing::debug!(index, pages, residue = dirty.count(), predicted_blackout_us, "round");
            match policy.decide(&seen) {
                Decision::Iterate => {}
                Decision::SwitchOver => return Ok(()),
                Decision::GiveUp(reason) => return Err(Error::NotConverging(reason)),
            }
        }
        unreachable!("the policy ends the rounds at rounds_max")
    }
}

/// What the operator is told of a Commit without an answer.
fn unanswered(to: &Address, asked_for: Duration) -> String {
    format!(
        "the destination was told to run the guest and has not answered for {} s. The guest is stopped here and stays so. \
         Its supervisor goes on asking {to} and acts on the answer. If the destination is gone for good, look whether the guest \
         runs there (`pageferry list` on that host): if it does, end this one; if it does not, let it run here again \
         (`pageferry settle NAME --end` or `--run`)",
        asked_for.as_secs()
    )
}
