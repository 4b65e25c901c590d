//! The destination: `receive` reads as the protocol does.

use crate::clock;
use crate::doorway::{Doorway, Incoming, LaneCollector};
use crate::error::{Error, Result};
use crate::fittings::Fittings;
use crate::guest::DestinationGuest;
use crate::hold;
use crate::link::{LinkChoice, Listening, check_lanes};
use crate::memory::lost::Poisoned;
use crate::net::Connection;
use crate::output::{say, words};
use crate::prefault::Prefault;
use crate::protocol::{
    Abort, Cause, Control, DestinationEvent, DestinationPhase, Hello, Message, Offer, Prepare, Ready,
    Running, Welcome,
};
use crate::room;
use crate::session::{SETUP_MAX, new_token};
use crate::staging;
use pageferry_transport::preamble::{LANES_MAX, Token};
use pageferry_transport::{FenceTag, MemoryRegion, Target};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For the source to start its tracking and look at its memory, and longer by the time that such a look may
/// take: memory is protected in short calls with pauses between them.
const OFFER_MAX: Duration = Duration::from_secs(60);
/// Without a byte for this long the source counts as dead, and longer by the time that it may need to
/// look through all of its memory (zero pages, digest). A host that vanished is noticed much earlier, by
/// TCP keep-alive on the control connection.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// The slowest such look.
const LOOK_BYTES_PER_SECOND_MIN: u64 = 500 << 20;
/// For the last fence, once Prepare is here, without a byte placed: all data was sent before it.
const FENCE_MAX: Duration = Duration::from_secs(15);
/// How often that wait looks whether bytes still come.
const FENCE_LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a loaded guest waits for Commit, also across lost connections. The source sends it at
/// once, or asks again within `source::ASK_AGAIN_MAX`.
const COMMIT_MAX: Duration = Duration::from_secs(30);
/// How often a wait looks at the guest, the lanes and the doorway.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// For a few words to a connection that has no place: they fit into its socket, or its peer reads none.
const ANSWER_MAX: Duration = Duration::from_millis(100);
/// Connections of this session that a look takes; all lanes may come together.
const KNOWN_A_LOOK_MAX: usize = LANES_MAX;
/// How long strangers are still answered once the guest runs here: long enough for a second order to the
/// same address to get a reason, and no longer.
const OPEN_AFTERWARDS: Duration = Duration::from_secs(300);
/// Memory blocks that a refusal names.
const BLOCKS_SHOWN_MAX: usize = 8;
/// Tokens of discarded sessions that are remembered, to answer a source that asks.
const DISCARDED_MAX: usize = 64;

/// What a finished migration looked like from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Bytes placed by the lanes.
    pub bytes_placed: u64,
    /// Loading the device state, in microseconds.
    pub load_us: u64,
    /// From Hello to running, in microseconds.
    pub total_us: u64,
}

/// How a session ended.
#[derive(Debug)]
pub enum Served {
    /// The connection was not the beginning of a session, or was refused; the guest was not touched.
    Nothing,
    /// The guest is ours and runs.
    Received(Received),
    /// The guest is ours, but whether it runs is not known.
    Doubtful(Error),
    /// It was thrown away; it runs on at the source.
    Discarded(Error),
}

/// Fails when the receiver should stop (asked often, and not any more once Commit is here).
pub type Watch<'w> = dyn FnMut() -> Result<()> + 'w;

/// How long a receiver waits, where a test may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// For Commit, once the guest is loaded.
    pub commit: Duration,
    /// Until strangers are not heard any more, once the guest runs here.
    pub open_afterwards: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { commit: COMMIT_MAX, open_afterwards: OPEN_AFTERWARDS }
    }
}

/// Receives guests, one at a time, through one doorway.
#[derive(Debug)]
pub struct Reception {
    doorway: Doorway,
    choice: LinkChoice,
    patience: Patience,
    discarded: VecDeque<Token>,
    completed: Option<Completed>,
    /// Whether a guest was taken in of which is not known whether it runs.
    doubtful: bool,
}

/// A guest that was taken in.
#[derive(Debug, Clone, Copy)]
struct Completed {
    token: Token,
    /// When Commit was here.
    resuming: Instant,
    /// Since when all of its vCPUs run, if they did when that was asked.
    since: Option<Instant>,
}

impl Completed {
    /// The word to the source, whenever it asks. What is not known makes the blackout longer, not shorter.
    fn word(&self) -> Message {
        let now = clock::now();
        let since = self.since.unwrap_or(now);
        let us = |from: Instant, to: Instant| to.saturating_duration_since(from).as_micros() as u64;
        Message::Running(Running { resume_us: us(self.resuming, since), running_us: us(since, now) })
    }
}

impl Reception {
    /// A reception behind this doorway.
    #[must_use]
    pub fn new(doorway: Doorway, choice: LinkChoice) -> Self {
        let (patience, discarded) = (Patience::default(), VecDeque::new());
        Self { doorway, choice, patience, discarded, completed: None, doubtful: false }
    }

    /// The same with other deadlines.
    #[must_use]
    pub fn with_patience(self, patience: Patience) -> Self {
        Self { patience, ..self }
    }

    /// The doorway, to wait at.
    #[must_use]
    pub fn doorway(&self) -> &Doorway {
        &self.doorway
    }

    /// Takes a connection that may open a session and, if it does, fills `guest` from it.
    pub fn serve(
        &mut self,
        incoming: Incoming,
        guest: &mut dyn DestinationGuest,
        watch: &mut Watch<'_>,
    ) -> Served {
        let begun = clock::now();
        let (mut control, hello, peer) = match incoming {
            Incoming::Control { token, control, first: Message::Hello(hello), peer }
                if token == Token::default() =>
            {
                (*control, hello, peer)
            }
            other => {
                self.turn_away(other);
                return Served::Nothing;
            }
        };
        if let Err(refusal) =
            hello.check().and_then(|()| check_guest(&hello, guest)).and_then(|()| check_lanes(hello.lanes))
        {
            self.doorway.say_of_stranger(&format!("refused the guest of {peer}: {}", refusal.chain()));
            control.abort(&refusal.chain(), Cause::Refused, clock::now() + SETUP_MAX);
            return Served::Nothing;
        }
        let mut phase = DestinationPhase::Filling;
        let token = match new_token() {
            Ok(token) => token,
            Err(e) => return self.discard(Token::default(), guest, &mut control, e),
        };
        // Until here and in here nothing of the guest is touched.
        let (offer, target) = match self.open(&mut control, &hello, token, guest, watch) {
            Ok(opened) => opened,
            Err(error) => {
                // Its source has sent no Commit, and never asks. Those that may ask are not to be forgotten for it.
                self.doorway.forget(token);
                self.doorway.say_of_stranger(&format!("no session with {peer}: {}", error.chain()));
                // Nothing was touched; but where it was lanes, others may do.
                let cause = if error.cause() == Cause::Lanes { Cause::Lanes } else { Cause::Refused };
                control.abort(&error.chain(), cause, clock::now() + SETUP_MAX);
                return Served::Nothing;
            }
        };
        let mut fittings = match Fittings::new(target, &hello) {
            Ok(fittings) => fittings,
            Err(error) => return self.discard(token, guest, &mut control, error),
        };
        match self.session(&mut control, token, offer, &mut fittings, guest, &mut phase, watch, begun) {
            Ok(received) => {
                fittings.retire();
                Served::Received(received)
            }
            // Ours by Commit, and perhaps running: nothing may be promised about it any more.
            Err(error) if phase == DestinationPhase::Owner => {
                self.doubtful = true;
                Served::Doubtful(error)
            }
            Err(error) => self.discard(token, guest, &mut control, error),
        }
    }

    /// Throws the copy away, and only then says so: Abort is a promise.
    fn discard(
        &mut self,
        token: Token,
        guest: &mut dyn DestinationGuest,
        control: &mut Control,
        error: Error,
    ) -> Served {
        match guest.discard() {
            Ok(()) => {
                self.discarded.push_front(token);
                self.discarded.truncate(DISCARDED_MAX);
                // A refusal says that nothing was touched, and here something was.
                let cause = match error.cause() {
                    Cause::Refused | Cause::Busy => Cause::Failed,
                    cause => cause,
                };
                control.abort(&error.chain(), cause, clock::now() + SETUP_MAX);
            }
            Err(e) => say(&format!("the unfinished copy of the guest could not be ended: {}", e.chain())),
        }
        Served::Discarded(error)
    }

    /// Answers a connection that has no place now.
    fn turn_away(&self, incoming: Incoming) {
        let Incoming::Control { token, mut control, peer, first } = incoming else { return };
        let deadline = clock::now() + ANSWER_MAX;
        if let Some(completed) = self.completed.filter(|completed| completed.token == token) {
            if let Err(e) = control.send(&completed.word(), deadline) {
                tracing::warn!(error = %e.chain(), "the source asked again and could not be answered");
            }
        } else if token == Token::default() {
            let (why, cause) = match first {
                Message::Hello(_) if self.completed.is_some() => (
                    "this receiver has taken in its guest already; start another `pageferry receive`",
                    Cause::Refused,
                ),
                Message::Hello(_) if self.doubtful => (
                    "this receiver has taken in a guest of which it is not known whether it runs; start another \
                     `pageferry receive`",
                    Cause::Refused,
                ),
                Message::Hello(_) => (
                    "another migration to this receiver is under way; try again when it is over",
                    Cause::Busy,
                ),
                _ => ("a session begins with Hello", Cause::Refused),
            };
            control.abort(why, cause, deadline);
        } else if self.discarded.contains(&token) {
            control.abort("the destination discarded its copy of this guest", Cause::Failed, deadline);
        } else {
            // No answer: its session may have been another receiver's, whose guest runs.
            tracing::warn!(%peer, "a connection of a session that is not known here");
        }
    }

    /// One look at the doorway: takes what bears a session's token, and answers a single stranger, so that
    /// who looks comes back to its deadlines however many there are. `take` gives back what it has no use for.
    fn look_at_doorway(&self, mut take: impl FnMut(Incoming) -> Result<Option<Incoming>>) -> Result<()> {
        for known in std::iter::from_fn(|| self.doorway.known()).take(KNOWN_A_LOOK_MAX) {
            if let Some(other) = take(known)? {
                self.turn_away(other);
            }
        }
        if let Some(stranger) = self.doorway.stranger() {
            self.turn_away(stranger);
        }
        Ok(())
    }

    /// Welcome, and then the lanes that the Offer names. Fails also where there is no room for what it offers.
    fn open(
        &self,
        control: &mut Control,
        hello: &Hello,
        token: Token,
        guest: &dyn DestinationGuest,
        watch: &mut Watch<'_>,
    ) -> Result<(Offer, Box<dyn Target>)> {
        let (listening, rdma) =
            Listening::start(&self.choice, hello.rdma, control.local_ip()?, token, hello.lanes);
        let welcome = Welcome { software: crate::VERSION.into(), token: token.0, lanes: hello.lanes, rdma };
        // Known before anybody is told of it.
        self.doorway.expect(token);
        control.send(&Message::Welcome(welcome), clock::now() + SETUP_MAX)?;
        let mut lanes = LaneCollector::new(token, hello.lanes);
        let offer = self.wait_for_offer(control, &mut lanes, guest, watch)?;
        let target =
            listening.take(&self.choice, offer.lanes, || self.wait_for_lanes(lanes, guest, watch))?;
        let touched = offer.runs(guest.memory().pages())?;
        room::check(guest.memory(), &touched, guest.has_huge_pages_set_aside())?;
        hold::point("room");
        Ok((offer, target))
    }

    /// Waits for the lanes that are still missing.
    fn wait_for_lanes(
        &self,
        mut lanes: LaneCollector,
        guest: &dyn DestinationGuest,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<Box<dyn Connection>>> {
        let (alive, deadline) = (guest.liveness(), clock::now() + SETUP_MAX);
        loop {
            self.look_at_doorway(|incoming| lanes.take(incoming))?;
            if lanes.is_complete() {
                return Ok(lanes.into_lanes());
            }
            watch()?;
            alive()?;
            if clock::now() >= deadline {
                return Err(Error::Timeout { what: "waiting for the source to open its lanes".into() });
            }
            if let Some(incoming) = self.doorway.next(deadline.min(clock::now() + LOOK_EVERY))
                && let Some(other) = lanes.take(incoming)?
            {
                self.turn_away(other);
            }
        }
    }

    /// Waits for Offer, and takes in lanes meanwhile.
    fn wait_for_offer(
        &self,
        control: &mut Control,
        lanes: &mut LaneCollector,
        guest: &dyn DestinationGuest,
        watch: &mut Watch<'_>,
    ) -> Result<Offer> {
        let (alive, deadline) = (guest.liveness(), clock::now() + OFFER_MAX + longest_look(guest));
        loop {
            if control.readable(LOOK_EVERY)? {
                return match control.receive_offer(clock::now() + SETUP_MAX)? {
                    Message::Offer(offer) => Ok(offer),
                    other => Err(unexpected(other, "Offer")),
                };
            }
            watch()?;
            alive()?;
            self.look_at_doorway(|incoming| lanes.take(incoming))?;
            if clock::now() >= deadline {
                return Err(Error::Timeout { what: "waiting for the source's Offer".into() });
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "one private call, whose arguments are the session")]
    fn session(
        &mut self,
        control: &mut Control,
        token: Token,
        offer: Offer,
        fittings: &mut Fittings,
        guest: &mut dyn DestinationGuest,
        phase: &mut DestinationPhase,
        watch: &mut Watch<'_>,
        begun: Instant,
    ) -> Result<Received> {
        crate::warm::map_own_code();
        // Memory.
        let memory = Arc::clone(guest.memory());
        let touched = offer.runs(memory.pages())?;
        let accept = fittings.expose(&memory, &touched)?;
        let Fittings { target, state, staging } = fittings;
        let target = target.as_mut();
        let prefault = Prefault::start(Arc::clone(&memory), &touched, guest.map_ahead())?;
        control.send(&Message::Accept(accept), clock::now() + SETUP_MAX)?;
        hold::point("filling");

        // Rounds.
        let prepare = self.wait_for_prepare(control, target, &prefault, guest, watch)?;
        prefault.stop();
        let waiting = clock::now();
        wait_for_fence(target, FenceTag(prepare.fence))?;
        let fence_us = clock::elapsed(waiting).as_micros() as u64;
        let bytes_placed = target.bytes_placed()?;

        // The whole guest. The lanes end by themselves meanwhile, as that was the last fence; that they have is made
        // sure of before Ready is said.
        let taken = take_in(&prepare, &offer, state, staging, guest);
        let revoked = target.revoke();
        drop(prefault);
        let (verify_us, load_us) = taken?;
        revoked?;
        *phase = phase.on(DestinationEvent::Loaded);
        hold::point("loaded");
        // A connection that breaks now changes nothing: Commit may come on another.
        let ready = Message::Ready(Ready { load_us, fence_us, verify_us });
        if let Err(e) = control.send(&ready, clock::now() + SETUP_MAX) {
            tracing::warn!(error = %e.chain(), "Ready could not be sent");
        }
        let mut answer_to = self.wait_for_commit(control, token, guest, phase, watch)?;

        // Ours.
        let resuming = clock::now();
        let sealed = guest.seal(prepare.was_running);
        let resumed = sealed.and_then(|()| {
            hold::point("owner");
            guest.run(prepare.was_running)
        });
        // Unless it may run, it is thrown away, and the source is told so: also where it could not be sealed.
        match resumed {
            Ok(()) => {}
            Err(doubt @ Error::Unknown(_)) => return Err(doubt),
            Err(e) => {
                *phase = phase.on(DestinationEvent::RunFailed);
                return Err(e);
            }
        }
        let completed = Completed { token, resuming, since: guest.running_since() };
        self.completed = Some(completed);
        let answer_to = answer_to.as_deref_mut().unwrap_or(control);
        if let Err(e) = answer_to.send(&completed.word(), clock::now() + SETUP_MAX) {
            tracing::warn!(error = %e.chain(), "Running could not be sent; the source will ask again");
        }
        // All vCPUs run by now, most likely; a source that asks again is told since when.
        let since = completed.since.or_else(|| guest.running_since());
        self.completed = Some(Completed { since, ..completed });
        Ok(Received { bytes_placed, load_us, total_us: clock::elapsed(begun).as_micros() as u64 })
    }

    /// Waits for Prepare while lanes write; ends early if the lanes, the guest or the source die.
    fn wait_for_prepare(
        &self,
        control: &mut Control,
        target: &mut dyn Target,
        prefault: &Prefault,
        guest: &dyn DestinationGuest,
        watch: &mut Watch<'_>,
    ) -> Result<Prepare> {
        let alive = guest.liveness();
        let idle_max = IDLE_MAX + longest_look(guest);
        let (mut placed, mut moved) = (0, clock::now());
        loop {
            if control.readable(LOOK_EVERY)? {
                return match control.receive("Prepare", clock::now() + SETUP_MAX)? {
                    Message::Prepare(prepare) => Ok(prepare),
                    other => Err(unexpected(other, "Prepare")),
                };
            }
            watch()?;
            alive()?;
            prefault.check()?;
            let now_placed = target.bytes_placed()?;
            if now_placed != placed {
                (placed, moved) = (now_placed, clock::now());
            } else if clock::elapsed(moved) > idle_max {
                let what =
                    format!("waiting for the source, which has sent nothing for {} s", idle_max.as_secs());
                return Err(Error::Timeout { what });
            }
            self.look_at_doorway(|incoming| Ok(Some(incoming)))?;
        }
    }

    /// Waits for Commit, on this connection or on a new one of the same session. Returns the new one.
    fn wait_for_commit(
        &self,
        control: &mut Control,
        token: Token,
        guest: &dyn DestinationGuest,
        phase: &mut DestinationPhase,
        watch: &mut Watch<'_>,
    ) -> Result<Option<Box<Control>>> {
        let deadline = clock::now() + self.patience.commit;
        let alive = guest.liveness();
        let mut connected = true;
        let mut event = |event| *phase = phase.on(event);
        let in_time = || {
            if clock::now() < deadline {
                return Ok(());
            }
            Err(Error::Timeout { what: "waiting for the source's Commit".into() })
        };
        loop {
            // A guest that has died, or a receiver that is told to stop, is discarded; until Commit is
            // read, that is this side's to decide.
            alive()?;
            watch()?;
            let readable = connected && control.readable(LOOK_EVERY)?;
            // Before anything is taken: this process may have been frozen, and the operator may have let the guest
            // run at the source when nobody was to be reached here.
            in_time().inspect_err(|_| event(DestinationEvent::Deadline))?;
            if readable {
                match control.receive("Commit", deadline.min(clock::now() + SETUP_MAX)) {
                    Ok(Message::Commit) => {
                        event(DestinationEvent::CommitReceived);
                        return Ok(None);
                    }
                    Ok(other) => {
                        event(DestinationEvent::AbortReceived);
                        return Err(unexpected(other, "Commit"));
                    }
                    Err(e) => {
                        event(DestinationEvent::Failed);
                        say(&format!(
                            "the source is gone ({}); waiting for it to come back with Commit",
                            e.chain()
                        ));
                        connected = false;
                    }
                }
            }
            let wait = if connected { Duration::ZERO } else { LOOK_EVERY };
            // A single one a look, those of this session first.
            if let Some(incoming) = self.doorway.next(clock::now() + wait) {
                match incoming {
                    Incoming::Control { token: theirs, control, first: Message::Commit, .. }
                        if theirs == token =>
                    {
                        in_time().inspect_err(|_| event(DestinationEvent::Deadline))?;
                        event(DestinationEvent::CommitReceived);
                        return Ok(Some(control));
                    }
                    // The operator lets the guest run at the source: Commit would come too late now.
                    Incoming::Control { token: theirs, first: first @ Message::Abort(_), .. }
                        if theirs == token =>
                    {
                        event(DestinationEvent::AbortReceived);
                        return Err(unexpected(first, "Commit"));
                    }
                    other => self.turn_away(other),
                }
            }
        }
    }

    /// For as long as this process lives: tells a source that asks again how its session ended. Strangers are
    /// told some minutes long that there is nothing for them; after that they are not heard any more.
    pub fn answer_afterwards(self) {
        let answering = clock::spawn("afterwards", move || {
            let closing = clock::now() + self.patience.open_afterwards;
            while clock::now() < closing {
                if let Some(incoming) = self.doorway.next(closing) {
                    self.turn_away(incoming);
                }
            }
            self.doorway.close_to_strangers();
            while let Some(incoming) = self.doorway.wait() {
                self.turn_away(incoming);
            }
        });
        if let Err(e) = answering {
            tracing::warn!(error = %e, "no thread to answer a source that asks again");
        }
    }
}

/// How long the source may need to look through all of this guest's memory.
fn longest_look(guest: &dyn DestinationGuest) -> Duration {
    Duration::from_secs(guest.memory().bytes() / LOOK_BYTES_PER_SECOND_MIN)
}

/// Waits for the last fence as long as bytes go on coming: a slow lane still has all of its credit to
/// deliver when Prepare overtakes it.
fn wait_for_fence(target: &mut dyn Target, tag: FenceTag) -> Result<()> {
    let (mut placed, mut moved) = (target.bytes_placed()?, clock::now());
    loop {
        match target.wait_fence(tag, clock::now() + FENCE_LOOK_EVERY) {
            Ok(()) => return Ok(()),
            Err(pageferry_transport::Error::Timeout { .. }) if clock::elapsed(moved) < FENCE_MAX => {}
            Err(e) => return Err(e.into()),
        }
        let now_placed = target.bytes_placed()?;
        if now_placed != placed {
            (placed, moved) = (now_placed, clock::now());
        }
    }
}

/// What must hold before anything is touched.
fn check_guest(hello: &Hello, guest: &mut dyn DestinationGuest) -> Result<()> {
    let (theirs, ours) = (&hello.guest, guest.describe());
    let differ = |what: &str, theirs: &dyn std::fmt::Display, ours: &dyn std::fmt::Display, mend: &str| {
        let theirs = words::reason(&theirs.to_string());
        Err(Error::Refused(format!("the guest has {what} {theirs}, this receiver {ours}: {mend}")))
    };
    let mend = match ours.monitor.as_str() {
        "qemu" => "start `pageferry receive` with the same QEMU options as the source",
        _ => "start the receiver with the same memory and vCPUs as the source",
    };
    if theirs.monitor != ours.monitor {
        return differ(
            "the monitor",
            &theirs.monitor,
            &ours.monitor,
            "both sides must run it in the same way",
        );
    }
    if theirs.machine != ours.machine {
        return differ("machine type", &theirs.machine, &ours.machine, mend);
    }
    if theirs.vcpus != ours.vcpus {
        return differ("a vCPU count of", &theirs.vcpus, &ours.vcpus, mend);
    }
    if theirs.blocks != ours.blocks {
        let show = |blocks: &[crate::guest::BlockDescription]| {
            listed(blocks.iter().map(|b| format!("{} of {} MiB", b.name, b.bytes >> 20)))
        };
        return differ("the memory", &show(&theirs.blocks), &show(&ours.blocks), mend);
    }
    if theirs.images != ours.images {
        let show =
            |images: &[crate::guest::ImageDescription]| {
                listed(images.iter().map(|i| {
                    format!("{} of {} MiB with the digest {:032x}", i.name, i.bytes >> 20, i.digest)
                }))
            };
        let mend = "they are not moved, so both hosts must have the same files: copy the source's";
        return differ("the read-only memory", &show(&theirs.images), &show(&ours.images), mend);
    }
    guest.admit(theirs)
}

/// Some of these, for a line that people read, and not all that a stranger says.
fn listed(items: impl ExactSizeIterator<Item = String>) -> String {
    let more = items.len().saturating_sub(BLOCKS_SHOWN_MAX);
    let mut shown: Vec<String> = items.take(BLOCKS_SHOWN_MAX).collect();
    if shown.is_empty() {
        return "none".into();
    }
    if more > 0 {
        shown.push(format!("and {more} more"));
    }
    shown.join(", ")
}

/// Puts staged pages in their places, loads the device state and, if asked, compares digests before. Returns the microseconds of both.
fn take_in(
    prepare: &Prepare,
    offer: &Offer,
    state: &MemoryRegion,
    staging_region: &MemoryRegion,
    guest: &mut dyn DestinationGuest,
) -> Result<(u64, u64)> {
    if prepare.state_bytes > state.len() as u64 {
        return Err(Error::Protocol(format!(
            "a device state of {} bytes where {} were announced",
            prepare.state_bytes,
            state.len()
        )));
    }
    if offer.verify != prepare.digest.is_some() {
        return Err(Error::Protocol("a digest that was not agreed on, or none that was".into()));
    }
    staging::place(&prepare.staged, staging_region, guest.memory())?;
    let begun = clock::now();
    if let Some(digest) = prepare.digest
        && crate::verify::digest(guest.memory())? != digest
    {
        return Err(Error::Guest(
            "the memory that arrived is not the memory that was sent: digests differ (--verify)".into(),
        ));
    }
    let verified = clock::now();
    // A page of this host that is broken holds nothing of what was written to it.
    guest.memory().check_readable(Poisoned::Refuse)?;
    guest.load(state, prepare.state_bytes as usize)?;
    Ok(((verified - begun).as_micros() as u64, clock::elapsed(verified).as_micros() as u64))
}

fn unexpected(message: Message, expected: &str) -> Error {
    match message {
        Message::Abort(Abort { reason, cause }) => {
            Error::PeerAborted { side: "source", reason, lanes: cause == Cause::Lanes }
        }
        other => Error::Protocol(format!("{} where {expected} was expected", other.name())),
    }
}

#[cfg(test)]
mod tests;
