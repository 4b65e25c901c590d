//! What became of the sessions of a receiver, and what is said to who asks.

use crate::clock;
use crate::destination::listener::Incoming;
use crate::destination::{Receiver, Served};
use crate::error::Error;
use crate::guest::DestinationGuest;
use crate::limits::SETUP_MAX;
use crate::notice::say;
use crate::protocol::{Cause, Control, Features, Message, Running, refusal};
use pageferry_transport::preamble::Token;
use std::time::{Duration, Instant};

/// For a few words to a connection that has no place: they fit into its socket, or its peer reads
/// none.
const ANSWER_MAX: Duration = Duration::from_millis(100);

/// Tokens of discarded sessions that are remembered, to answer a source that asks.
const DISCARDED_MAX: usize = 64;

/// A guest that was taken in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Completed {
    pub(super) token: Token,
    /// When Commit was here.
    pub(super) resuming: Instant,
    /// Since when all of its vCPUs run, if they did when that was asked.
    pub(super) since: Option<Instant>,
}

impl Completed {
    /// The word to the source, whenever it asks. What is not known makes the downtime longer, not
    /// shorter.
    pub(crate) fn word(&self) -> Message {
        let now = clock::now();
        let since = self.since.unwrap_or(now);
        let us = |from: Instant, to: Instant| to.saturating_duration_since(from).as_micros() as u64;
        Message::Running(Running {
            resume_us: us(self.resuming, since),
            running_us: us(since, now),
            features: Features::default(),
        })
    }
}

impl Receiver {
    /// Throws the copy away, and only then says so: Abort is a promise.
    pub(super) fn discard(
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
                let cause = match refusal::cause(&error) {
                    Cause::Refused | Cause::Busy => Cause::Failed,
                    cause => cause,
                };
                control.abort(&error.chain(), cause, clock::now() + SETUP_MAX);
            }
            Err(e) => {
                say(&format!("the unfinished copy of the guest could not be ended: {}", e.chain()))
            }
        }
        Served::Discarded(error)
    }

    /// Answers a connection that has no place now.
    pub(super) fn turn_away(&self, incoming: Incoming) {
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
            control.abort(
                "the destination discarded its copy of this guest",
                Cause::Failed,
                deadline,
            );
        } else {
            // No answer: its session may have been another receiver's, whose guest runs.
            tracing::warn!(%peer, "a connection of a session that is not known here");
        }
    }

    /// For as long as this process lives: tells a source that asks again how its session ended.
    /// Strangers are told some minutes long that there is nothing for them; after that they are not
    /// heard any more.
    pub fn answer_afterwards(self) {
        let answering = clock::spawn("afterwards", move || {
            let closing = clock::now() + self.patience.open_afterwards;
            while clock::now() < closing {
                if let Some(incoming) = self.listener.next(closing) {
                    self.turn_away(incoming);
                }
            }
            self.listener.close_to_strangers();
            while let Some(incoming) = self.listener.wait() {
                self.turn_away(incoming);
            }
        });
        if let Err(e) = answering {
            tracing::warn!(error = %e, "no thread to answer a source that asks again");
        }
    }
}
