//! One session at the destination, from its token to the word that the guest runs.

use crate::clock;
use crate::destination::lanes::{LaneCollector, Listening};
use crate::destination::listener::Incoming;
use crate::destination::outcomes::Completed;
use crate::destination::regions::SessionResources;
use crate::destination::{Received, Receiver};
use crate::error::{Error, Result};
use crate::guest::DestinationGuest;
use crate::host::room;
use crate::limits::SETUP_MAX;
use crate::memory::lost_page::Poisoned;
use crate::memory::prefault::Prefault;
use crate::memory::staging;
use crate::net::Connection;
use crate::notice::say;
use crate::protocol::features::{VERIFY, agree};
use crate::protocol::refusal::unexpected;
use crate::protocol::{
    Control, DestinationEvent, DestinationPhase, Features, Hello, Message, Offer, Prepare, Ready,
    Welcome,
};
use crate::report::hold;
use crate::watch::Watch;
use pageferry_transport::preamble::Token;
use pageferry_transport::{FenceTag, MemoryRegion, Target};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A new token. Whoever does not know it cannot open a lane of the session.
pub fn new_token() -> Result<Token> {
    let mut token = Token::default();
    getrandom::fill(&mut token.0)
        .map_err(|e| Error::os("drawing a session token", std::io::Error::other(e)))?;
    Ok(token)
}

/// For the source to start its tracking and look at its memory, and longer by the time that such a
/// look may take: memory is protected in short calls with pauses between them.
const OFFER_MAX: Duration = Duration::from_secs(60);

/// Without a byte for this long the source counts as dead, and longer by the time that it may need
/// to look through all of its memory (zero pages, digest). A host that vanished is noticed much
/// earlier, by TCP keep-alive on the control connection.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// The slowest such look.
const LOOK_BYTES_PER_SECOND_MIN: u64 = 500 << 20;

/// For the last fence, once Prepare is here, without a byte placed: all data was sent before it.
const FENCE_MAX: Duration = Duration::from_secs(15);

/// How often that wait looks whether bytes still come.
const FENCE_LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often a wait looks at the guest, the lanes and the listener.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long the source may need to look through all of this guest's memory.
fn longest_look(guest: &dyn DestinationGuest) -> Duration {
    Duration::from_secs(guest.memory().bytes() / LOOK_BYTES_PER_SECOND_MIN)
}

/// Waits for the last fence as long as bytes go on coming: a slow lane still has all of its credit
/// to deliver when Prepare overtakes it.
fn wait_for_fence(target: &mut dyn Target, tag: FenceTag) -> Result<()> {
    let (mut placed, mut moved) = (target.bytes_placed()?, clock::now());
    loop {
        match target.wait_fence(tag, clock::now() + FENCE_LOOK_EVERY) {
            Ok(()) => return Ok(()),
            Err(pageferry_transport::Error::Timeout { .. })
                if clock::elapsed(moved) < FENCE_MAX => {}
            Err(e) => return Err(e.into()),
        }
        let now_placed = target.bytes_placed()?;
        if now_placed != placed {
            (placed, moved) = (now_placed, clock::now());
        }
    }
}

/// Puts staged pages in their places, loads the device state and, if asked, compares digests
/// before. Returns the microseconds of both.
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
        && crate::memory::digest::digest(guest.memory())? != digest
    {
        return Err(Error::Guest(
            "the memory that arrived is not the memory that was sent: digests differ (--verify)"
                .into(),
        ));
    }
    let verified = clock::now();
    // A page of this host that is broken holds nothing of what was written to it.
    guest.memory().check_readable(Poisoned::Refuse)?;
    guest.load(state, prepare.state_bytes as usize)?;
    Ok(((verified - begun).as_micros() as u64, clock::elapsed(verified).as_micros() as u64))
}

impl Receiver {
    /// Welcome, and then the lanes that the Offer names. Fails also where there is no room for what
    /// it offers.
    pub(super) fn open(
        &self,
        control: &mut Control,
        hello: &Hello,
        token: Token,
        guest: &dyn DestinationGuest,
        watch: &mut Watch<'_>,
    ) -> Result<(Offer, Box<dyn Target>)> {
        let (listening, rdma) =
            Listening::start(&self.choice, hello.rdma, control.local_ip()?, token, hello.lanes);
        let welcome = Welcome {
            software: crate::VERSION.into(),
            token: token.0,
            lanes: hello.lanes,
            rdma,
            features: Features::ours(),
        };
        let agreed = agree(&hello.features, &welcome.features);
        tracing::debug!(theirs = hello.features.names(), ?agreed, "features");
        // Known before anybody is told of it.
        self.listener.expect(token);
        control.send(&Message::Welcome(welcome), clock::now() + SETUP_MAX)?;
        let mut lanes = LaneCollector::new(token, hello.lanes);
        let offer = self.wait_for_offer(control, &mut lanes, guest, watch)?;
        if offer.verify && !agreed.has(VERIFY) {
            return Err(Error::Protocol(format!(
                "an Offer with {VERIFY}, which was not agreed on"
            )));
        }
        let target = listening
            .take(&self.choice, offer.lanes, || self.wait_for_lanes(lanes, guest, watch))?;
        let touched = offer.runs(guest.memory().pages())?;
        room::check(guest.memory(), &touched, guest.has_huge_pages_set_aside())?;
        hold::point("room");
        Ok((offer, target))
    }

    /// Waits for the lanes that are still missing.
    pub(super) fn wait_for_lanes(
        &self,
        mut lanes: LaneCollector,
        guest: &dyn DestinationGuest,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<Box<dyn Connection>>> {
        let (alive, deadline) = (guest.liveness(), clock::now() + SETUP_MAX);
        loop {
            self.look_at_listener(|incoming| lanes.take(incoming))?;
            if lanes.is_complete() {
                return Ok(lanes.into_lanes());
            }
            watch()?;
            alive()?;
            if clock::now() >= deadline {
                return Err(Error::Timeout {
                    what: "waiting for the source to open its lanes".into(),
                });
            }
            if let Some(incoming) = self.listener.next(deadline.min(clock::now() + LOOK_EVERY))
                && let Some(other) = lanes.take(incoming)?
            {
                self.turn_away(other);
            }
        }
    }

    /// Waits for Offer, and takes in lanes meanwhile.
    pub(super) fn wait_for_offer(
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
            self.look_at_listener(|incoming| lanes.take(incoming))?;
            if clock::now() >= deadline {
                return Err(Error::Timeout { what: "waiting for the source's Offer".into() });
            }
        }
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "one private call, whose arguments are the session"
    )]
    pub(super) fn session(
        &mut self,
        control: &mut Control,
        token: Token,
        offer: Offer,
        resources: &mut SessionResources,
        guest: &mut dyn DestinationGuest,
        phase: &mut DestinationPhase,
        watch: &mut Watch<'_>,
        begun: Instant,
    ) -> Result<Received> {
        crate::host::own_code::map_own_code();
        // Memory.
        let memory = Arc::clone(guest.memory());
        let touched = offer.runs(memory.pages())?;
        let accept = resources.expose(&memory, &touched)?;
        let SessionResources { target, state, staging } = resources;
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

        // The whole guest. The lanes end by themselves meanwhile, as that was the last fence; that
        // they have is made sure of before Ready is said.
        let taken = take_in(&prepare, &offer, state, staging, guest);
        let revoked = target.revoke();
        drop(prefault);
        let (verify_us, load_us) = taken?;
        revoked?;
        *phase = phase.on(DestinationEvent::Loaded);
        hold::point("loaded");
        // A connection that breaks now changes nothing: Commit may come on another.
        let features = Features::default();
        let ready = Message::Ready(Ready { load_us, fence_us, verify_us, features });
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
        // Unless it may run, it is thrown away, and the source is told so: also where it could not
        // be sealed.
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
    pub(super) fn wait_for_prepare(
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
                let what = format!(
                    "waiting for the source, which has sent nothing for {} s",
                    idle_max.as_secs()
                );
                return Err(Error::Timeout { what });
            }
            self.look_at_listener(|incoming| Ok(Some(incoming)))?;
        }
    }

    /// Waits for Commit, on this connection or on a new one of the same session. Returns the new
    /// one.
    pub(super) fn wait_for_commit(
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
            // A guest that has died, or a receiver that is told to stop, is discarded; until Commit
            // is read, that is this side's to decide.
            alive()?;
            watch()?;
            let readable = connected && control.readable(LOOK_EVERY)?;
            // Before anything is taken: this process may have been frozen, and the operator may
            // have let the guest run at the source when nobody was to be reached here.
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
            if let Some(incoming) = self.listener.next(clock::now() + wait) {
                match incoming {
                    Incoming::Control {
                        token: theirs, control, first: Message::Commit, ..
                    } if theirs == token => {
                        in_time().inspect_err(|_| event(DestinationEvent::Deadline))?;
                        event(DestinationEvent::CommitReceived);
                        return Ok(Some(control));
                    }
                    // The operator lets the guest run at the source: Commit would come too late
                    // now.
                    Incoming::Control {
                        token: theirs, first: first @ Message::Abort(_), ..
                    } if theirs == token => {
                        event(DestinationEvent::AbortReceived);
                        return Err(unexpected(first, "Commit"));
                    }
                    other => self.turn_away(other),
                }
            }
        }
    }
}
