//! The destination: `receive` reads as the protocol does.

mod admission;
pub mod lanes;
pub mod listener;
pub(crate) mod outcomes;
mod regions;
pub(crate) mod session;

use crate::clock;
use crate::destination::admission::check_guest;
use crate::destination::listener::{Incoming, SessionListener};
use crate::destination::outcomes::Completed;
use crate::destination::regions::SessionResources;
use crate::destination::session::new_token;
use crate::error::{Error, Result};
use crate::guest::DestinationGuest;
use crate::limits::SETUP_MAX;
use crate::net::choice::{LinkChoice, check_lanes};
use crate::protocol::{Cause, DestinationPhase, Message, refusal};
use crate::watch::Watch;
use pageferry_transport::preamble::{LANES_MAX, Token};
use std::collections::VecDeque;
use std::time::Duration;

/// How long a loaded guest waits for Commit, also across lost connections. The source sends it at
/// once, or asks again within `source::ASK_AGAIN_MAX`.
const COMMIT_MAX: Duration = Duration::from_secs(30);

/// Connections of this session that a look takes; all lanes may come together.
const KNOWN_A_LOOK_MAX: usize = LANES_MAX;

/// How long strangers are still answered once the guest runs here: long enough for a second order
/// to the same address to get a reason, and no longer.
const OPEN_AFTERWARDS: Duration = Duration::from_secs(300);

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
    /// The connection was not the beginning of a session, or was refused; the guest was not
    /// touched.
    Nothing,
    /// The guest is ours and runs.
    Received(Received),
    /// The guest is ours, but whether it runs is not known.
    Doubtful(Error),
    /// It was thrown away; it runs on at the source.
    Discarded(Error),
}

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

/// Receives guests, one at a time, through one listener.
#[derive(Debug)]
pub struct Receiver {
    pub(super) listener: SessionListener,
    pub(super) choice: LinkChoice,
    pub(super) patience: Patience,
    pub(super) discarded: VecDeque<Token>,
    pub(super) completed: Option<Completed>,
    /// Whether a guest was taken in of which is not known whether it runs.
    pub(super) doubtful: bool,
}

impl Receiver {
    /// A receiver behind this listener.
    #[must_use]
    pub fn new(listener: SessionListener, choice: LinkChoice) -> Self {
        let (patience, discarded) = (Patience::default(), VecDeque::new());
        Self { listener, choice, patience, discarded, completed: None, doubtful: false }
    }

    /// The same with other deadlines.
    #[must_use]
    pub fn with_patience(self, patience: Patience) -> Self {
        Self { patience, ..self }
    }

    /// The listener, to wait at.
    #[must_use]
    pub fn listener(&self) -> &SessionListener {
        &self.listener
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
        if let Err(refusal) = hello
            .check()
            .and_then(|()| check_guest(&hello, guest))
            .and_then(|()| check_lanes(hello.lanes))
        {
            self.listener
                .say_of_stranger(&format!("refused the guest of {peer}: {}", refusal.chain()));
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
                // Its source has sent no Commit, and never asks. Those that may ask are not to be
                // forgotten for it.
                self.listener.forget(token);
                self.listener
                    .say_of_stranger(&format!("no session with {peer}: {}", error.chain()));
                // Nothing was touched; but where it was lanes, others may do.
                let cause = if refusal::cause(&error) == Cause::Lanes {
                    Cause::Lanes
                } else {
                    Cause::Refused
                };
                control.abort(&error.chain(), cause, clock::now() + SETUP_MAX);
                return Served::Nothing;
            }
        };
        let mut resources = match SessionResources::new(target, &hello) {
            Ok(resources) => resources,
            Err(error) => return self.discard(token, guest, &mut control, error),
        };
        match self.session(
            &mut control,
            token,
            offer,
            &mut resources,
            guest,
            &mut phase,
            watch,
            begun,
        ) {
            Ok(received) => {
                resources.retire();
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

    /// One look at the listener: takes what bears a session's token, and answers a single stranger,
    /// so that who looks comes back to its deadlines however many there are. `take` gives back what
    /// it has no use for.
    pub(super) fn look_at_listener(
        &self,
        mut take: impl FnMut(Incoming) -> Result<Option<Incoming>>,
    ) -> Result<()> {
        for known in std::iter::from_fn(|| self.listener.known()).take(KNOWN_A_LOOK_MAX) {
            if let Some(other) = take(known)? {
                self.turn_away(other);
            }
        }
        if let Some(stranger) = self.listener.stranger() {
            self.turn_away(stranger);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
