//! The destination: `receive` reads as the protocol does.

use crate::bitmap::DirtyBitmap;
use crate::error::{Error, Result};
use crate::guest::DestinationGuest;
use crate::hold;
use crate::memory::GuestMemory;
use crate::page::{PAGE_BYTES, PageRun};
use crate::prefault::Prefault;
use crate::protocol::{
    Abort, Accept, Control, DestinationEvent, DestinationPhase, Hello, Message, Offer, Prepare, Ready,
    Running, Welcome,
};
use crate::session::{Doorway, Incoming, SETUP_MAX, collect_lanes, new_token};
use crate::source::STATE_WARM_BYTES;
use pageferry_transport::preamble::{Role, Token};
use pageferry_transport::tcp::TcpTarget;
use pageferry_transport::{FenceTag, MemoryRegion, Target};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For the source to start its tracking and look at its memory.
const OFFER_MAX: Duration = Duration::from_secs(60);
/// Without a byte for this long the source counts as dead. A source with nothing to send switches
/// over; one that is held back by its pace still sends every second.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// For the last fence, once Prepare is here: all data was sent before it.
const FENCE_MAX: Duration = Duration::from_secs(15);
/// How long a loaded guest waits for Commit, also across lost connections. The source sends it at
/// once, or asks again within `source::ASK_AGAIN_MAX`.
const COMMIT_MAX: Duration = Duration::from_secs(30);
/// How often a wait looks at the guest, the lanes and the doorway.
const LOOK_EVERY: Duration = Duration::from_millis(20);
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

/// Receives guests, one at a time, through one doorway.
#[derive(Debug)]
pub struct Reception {
    doorway: Doorway,
    discarded: VecDeque<Token>,
    completed: Option<(Token, u64)>,
}

impl Reception {
    /// A reception behind this doorway.
    #[must_use]
    pub fn new(doorway: Doorway) -> Self {
        Self { doorway, discarded: VecDeque::new(), completed: None }
    }

    /// The doorway, to wait at.
    #[must_use]
    pub fn doorway(&self) -> &Doorway {
        &self.doorway
    }

    /// Takes a connection that may open a session and, if it does, fills `guest` from it. `None` if it
    /// was not the beginning of a session; then the guest was not touched. After an error the
    /// guest is discarded. After success it runs here.
    pub fn serve(
        &mut self,
        incoming: Incoming,
        guest: &mut dyn DestinationGuest,
    ) -> Option<Result<Received>> {
        let begun = Instant::now();
        let peer = incoming.peer;
        let (mut control, hello) = match self.first_words(incoming) {
            Ok(Some(opened)) => opened,
            Ok(None) => return None,
            Err(e) => {
                eprintln!("pageferry: ignored a connection from {peer}: {}", e.chain());
                return None;
            }
        };
        if let Err(refusal) = check_guest(&hello, guest) {
            eprintln!("pageferry: refused the guest of {peer}: {}", refusal.chain());
            control.abort(&refusal.chain(), true, Instant::now() + SETUP_MAX);
            return None;
        }
        let mut phase = DestinationPhase::Filling;
        let token = match new_token() {
            Ok(token) => token,
            Err(e) => return Some(Err(e)),
        };
        let result = self.session(&mut control, &hello, token, guest, &mut phase, begun);
        if let Err(e) = &result {
            // Whatever it was, the copy is thrown away before anybody is told so.
            guest.discard();
            self.discarded.push_front(token);
            self.discarded.truncate(DISCARDED_MAX);
            // Only a check before the first byte is a refusal: no room, above all.
            control.abort(&e.chain(), matches!(e, Error::Refused(_)), Instant::now() + SETUP_MAX);
        }
        Some(result)
    }

    /// Reads Hello from a control connection; answers everything that is none.
    fn first_words(&self, incoming: Incoming) -> Result<Option<(Control, Hello)>> {
        let fresh = incoming.preamble.role == Role::Control && incoming.preamble.token == Token::default();
        if !fresh {
            self.turn_away(incoming);
            return Ok(None);
        }
        let mut control = Control::new(incoming.stream)?;
        match control.receive("Hello", Instant::now() + SETUP_MAX)? {
            Message::Hello(hello) => hello.check().map(|()| Some((control, hello))),
            other => Err(Error::Protocol(format!("{} instead of Hello", other.name()))),
        }
    }

    /// Answers a connection that has no place now.
    fn turn_away(&self, incoming: Incoming) {
        let Role::Control = incoming.preamble.role else { return };
        let Ok(mut control) = Control::new(incoming.stream) else { return };
        let token = incoming.preamble.token;
        if let Some((_, resume_us)) = self.completed.filter(|(completed, _)| *completed == token) {
            let running = Message::Running(Running { resume_us });
            if let Err(e) = control.send(&running, Instant::now() + SETUP_MAX) {
                tracing::warn!(error = %e.chain(), "the source asked again and could not be answered");
            }
        } else if token == Token::default() {
            let why = if self.completed.is_some() {
                "this receiver has taken in its guest already; start another `pageferry receive`"
            } else {
                "another migration to this receiver is under way; try again when it is over"
            };
            control.abort(why, true, Instant::now() + SETUP_MAX);
        } else if self.discarded.contains(&token) {
            control.abort(
                "the destination discarded its copy of this guest",
                false,
                Instant::now() + SETUP_MAX,
            );
        }
        // An unknown token gets no answer: its session may have been another receiver's, whose guest runs.
    }

    fn session(
        &mut self,
        control: &mut Control,
        hello: &Hello,
        token: Token,
        guest: &mut dyn DestinationGuest,
        phase: &mut DestinationPhase,
        begun: Instant,
    ) -> Result<Received> {
        // Lanes.
        let welcome = Welcome { software: crate::VERSION.into(), token: token.0, lanes: hello.lanes };
        control.send(&Message::Welcome(welcome.clone()), Instant::now() + SETUP_MAX)?;
        let lanes = collect_lanes(
            &self.doorway,
            &welcome,
            |other| self.turn_away(other),
            Instant::now() + 2 * SETUP_MAX,
        )?;
        let mut target = TcpTarget::new(lanes)?;

        // Memory.
        let memory = Arc::clone(guest.memory());
        let offer = match control.receive("Offer", Instant::now() + OFFER_MAX)? {
            Message::Offer(offer) => offer,
            other => return Err(unexpected(other, "Offer")),
        };
        let touched = offer.runs(memory.pages())?;
        let state = MemoryRegion::anonymous(hello.state_bytes_max.max(PAGE_BYTES) as usize)?;
        state.populate(0, STATE_WARM_BYTES.min(state.len()))?;
        let accept = expose(&memory, &touched, &state, &mut target)?;
        let prefault = Prefault::start(Arc::clone(&memory), touched)?;
        control.send(&Message::Accept(accept), Instant::now() + SETUP_MAX)?;
        hold::point("filling");

        // Rounds.
        let prepare = self.wait_for_prepare(control, &mut target, &prefault, guest)?;
        let waiting = Instant::now();
        target.wait_fence(FenceTag(prepare.fence), waiting + FENCE_MAX)?;
        let fence_us = waiting.elapsed().as_micros() as u64;
        let bytes_placed = target.bytes_placed()?;

        // The whole guest. Taking back the lanes costs as much as a tenth of loading, so it goes on beside it;
        // both are over before Ready is said.
        let (revoked, taken) = std::thread::scope(|scope| {
            let revoking = scope.spawn(|| {
                let revoked = target.revoke();
                drop(prefault);
                revoked
            });
            let taken = take_in(&prepare, &offer, &state, guest);
            (revoking.join(), taken)
        });
        let (verify_us, load_us) = taken?;
        revoked.map_err(|_| Error::Guest("taking back the lanes panicked".into()))??;
        *phase = phase.on(DestinationEvent::Loaded);
        hold::point("loaded");
        // A connection that breaks now changes nothing: Commit may come on another.
        let ready =
            control.send(&Message::Ready(Ready { load_us, fence_us, verify_us }), Instant::now() + SETUP_MAX);
        if let Err(e) = ready {
            tracing::warn!(error = %e.chain(), "Ready could not be sent");
        }
        let mut answer_to = self.wait_for_commit(control, token, guest, phase)?;

        // Ours.
        let resuming = Instant::now();
        guest.seal()?;
        hold::point("owner");
        if let Err(e) = guest.run(prepare.was_running) {
            *phase = phase.on(DestinationEvent::RunFailed);
            return Err(e);
        }
        let resume_us = resuming.elapsed().as_micros() as u64;
        self.completed = Some((token, resume_us));
        let answer_to = answer_to.as_mut().unwrap_or(control);
        if let Err(e) = answer_to.send(&Message::Running(Running { resume_us }), Instant::now() + SETUP_MAX) {
            tracing::warn!(error = %e.chain(), "Running could not be sent; the source will ask again");
        }
        Ok(Received { bytes_placed, load_us, total_us: begun.elapsed().as_micros() as u64 })
    }

    /// Waits for Prepare while lanes write; ends early if the lanes, the guest or the source die.
    fn wait_for_prepare(
        &self,
        control: &mut Control,
        target: &mut TcpTarget,
        prefault: &Prefault,
        guest: &dyn DestinationGuest,
    ) -> Result<Prepare> {
        let alive = guest.liveness();
        let (mut placed, mut moved) = (0, Instant::now());
        loop {
            if readable(control, LOOK_EVERY)? {
                return match control.receive("Prepare", Instant::now() + SETUP_MAX)? {
                    Message::Prepare(prepare) => Ok(prepare),
                    other => Err(unexpected(other, "Prepare")),
                };
            }
            alive()?;
            prefault.check()?;
            let now_placed = target.bytes_placed()?;
            if now_placed != placed {
                (placed, moved) = (now_placed, Instant::now());
            } else if moved.elapsed() > IDLE_MAX {
                return Err(Error::Timeout {
                    what: format!(
                        "waiting for the source, which has sent nothing for {} s",
                        IDLE_MAX.as_secs()
                    ),
                });
            }
            while let Some(other) = self.doorway.next(Instant::now()) {
                self.turn_away(other);
            }
        }
    }

    /// Waits for Commit, on this connection or on a new one of the same session. Returns the new one.
    fn wait_for_commit(
        &self,
        control: &mut Control,
        token: Token,
        guest: &dyn DestinationGuest,
        phase: &mut DestinationPhase,
    ) -> Result<Option<Control>> {
        let deadline = Instant::now() + COMMIT_MAX;
        let alive = guest.liveness();
        let mut connected = true;
        let mut event = |event| {
            *phase = phase.on(event);
            *phase
        };
        loop {
            alive()?;
            if connected {
                if readable(control, LOOK_EVERY)? {
                    match control.receive("Commit", Instant::now() + SETUP_MAX) {
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
                            eprintln!(
                                "pageferry: the source is gone ({}); waiting for it to come back with Commit",
                                e.chain()
                            );
                            connected = false;
                        }
                    }
                }
            } else {
                std::thread::sleep(LOOK_EVERY);
            }
            while let Some(incoming) = self.doorway.next(Instant::now()) {
                if incoming.preamble.role != Role::Control || incoming.preamble.token != token {
                    self.turn_away(incoming);
                    continue;
                }
                let mut again = Control::new(incoming.stream)?;
                if matches!(again.receive("Commit", Instant::now() + SETUP_MAX), Ok(Message::Commit)) {
                    event(DestinationEvent::CommitReceived);
                    return Ok(Some(again));
                }
            }
            if Instant::now() >= deadline {
                event(DestinationEvent::Deadline);
                return Err(Error::Timeout { what: "waiting for the source's Commit".into() });
            }
        }
    }

    /// For as long as this process lives: tells a source that asks again how its session ended.
    pub fn answer_afterwards(self) {
        let answering = std::thread::Builder::new().name("afterwards".into()).spawn(move || {
            while let Ok(incoming) = self.doorway.incoming().recv() {
                self.turn_away(incoming);
            }
        });
        if let Err(e) = answering {
            tracing::warn!(error = %e, "no thread to answer a source that asks again");
        }
    }
}

/// What must hold before anything is touched.
fn check_guest(hello: &Hello, guest: &dyn DestinationGuest) -> Result<()> {
    let (theirs, ours) = (&hello.guest, guest.describe());
    let differ = |what: &str, theirs: &dyn std::fmt::Display, ours: &dyn std::fmt::Display, mend: &str| {
        Err(Error::Refused(format!("the guest has {what} {theirs}, this receiver {ours}: {mend}")))
    };
    let mend = "start `pageferry receive` with the same QEMU options as the source";
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
            let list: Vec<_> =
                blocks.iter().map(|b| format!("{} of {} MiB", b.name, b.bytes >> 20)).collect();
            list.join(", ")
        };
        return differ("the memory", &show(&theirs.blocks), &show(&ours.blocks), mend);
    }
    Ok(())
}

/// Makes room: holes where the source has holes, and every slot and the state exposed.
fn expose(
    memory: &Arc<GuestMemory>,
    touched: &[PageRun],
    state: &Arc<MemoryRegion>,
    target: &mut dyn Target,
) -> Result<Accept> {
    let mut keep = DirtyBitmap::new(memory.pages());
    touched.iter().for_each(|run| keep.insert(*run));
    memory.punch_outside(&keep)?;
    check_room(memory, keep.count() * PAGE_BYTES)?;
    let mut slots = Vec::with_capacity(memory.slots().len());
    for slot in memory.slots() {
        slots.push(target.expose(slot.region())?.into());
    }
    let state = target.expose(state)?.into();
    Ok(Accept { slots, state })
}

/// Fails if the host has less memory free than the guest will take. Huge pages were set aside when
/// QEMU started, or it would not have.
fn check_room(memory: &GuestMemory, touched_bytes: u64) -> Result<()> {
    if memory.slots().iter().any(|slot| slot.backing_page_bytes != PAGE_BYTES) {
        return Ok(());
    }
    let held: u64 = memory.touched()?.iter().map(PageRun::bytes).sum();
    let needed = touched_bytes.saturating_sub(held);
    let Some(available) = mem_available() else { return Ok(()) };
    if needed > available {
        return Err(Error::Refused(format!(
            "no room for the guest: it has touched {} MiB of its memory and this host has {} MiB available",
            touched_bytes >> 20,
            (available + held) >> 20
        )));
    }
    Ok(())
}

/// MemAvailable of /proc/meminfo, in bytes.
fn mem_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// Loads the device state and, if asked, compares digests. Returns the microseconds of both.
fn take_in(
    prepare: &Prepare,
    offer: &Offer,
    state: &MemoryRegion,
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
    let begun = Instant::now();
    if let Some(digest) = prepare.digest
        && crate::verify::digest(guest.memory())? != digest
    {
        return Err(Error::Guest(
            "the memory that arrived is not the memory that was sent: digests differ (--verify)".into(),
        ));
    }
    let verified = Instant::now();
    guest.load(state, prepare.state_bytes as usize)?;
    Ok(((verified - begun).as_micros() as u64, verified.elapsed().as_micros() as u64))
}

/// Waits until the connection has something to say, or has ended.
fn readable(control: &Control, wait: Duration) -> Result<bool> {
    let mut fds = [PollFd::new(control.stream(), PollFlags::IN)];
    let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
    match poll(&mut fds, Some(&wait)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(e) => Err(Error::os("waiting at the control connection", e)),
    }
}

fn unexpected(message: Message, expected: &str) -> Error {
    match message {
        Message::Abort(Abort { reason, .. }) => Error::PeerAborted { side: "source", reason },
        other => Error::Protocol(format!("{} where {expected} was expected", other.name())),
    }
}
