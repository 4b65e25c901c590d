//! What the threads of the listener and the receiver share: who is being heard, which tokens are
//! known, and two queues of those that were heard. Who bears a known token goes before everybody
//! else.

use super::Incoming;
use super::visitors::{Bounds, Hurried, Origin, Visitors};
use crate::clock;
use crate::error::Error;
use crate::net::Address;
use crate::notice::say;
use crossbeam_channel::{Receiver, Sender, bounded};
use pageferry_transport::preamble::{LANES_MAX, Token};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Connections that may be saying their first words at once. A peer's share holds a source's lanes,
/// which come together.
const BOUNDS: Bounds = Bounds { each: 80, all: 160 };

/// Connections of known sessions that wait to be taken: all lanes and some that ask again.
const KNOWN_MAX: usize = LANES_MAX + 16;

/// Strangers that wait to be answered: from one peer, and from all.
const STRANGERS: Bounds = Bounds { each: 16, all: 64 };

/// Tokens that are known at once: one session that runs, one that has succeeded, and those that
/// were discarded ([`crate::destination`] remembers 64).
const TOKENS_MAX: usize = 66;

/// Lines about connections that were ignored, in [`LINES_EVERY`]; of more only the number is said.
const LINES_MAX: u32 = 10;
const LINES_EVERY: Duration = Duration::from_secs(10);

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Room {
    state: Mutex<State>,
    /// Rung when something was queued.
    ring: Sender<()>,
}

#[derive(Debug)]
struct State {
    visitors: Visitors,
    tokens: VecDeque<Token>,
    /// Whether who bears no token is heard.
    open: bool,
    known: VecDeque<Incoming>,
    strangers: VecDeque<(Origin, Incoming)>,
    ignored: Ignored,
}

/// How much was said of those that were ignored.
#[derive(Debug)]
struct Ignored {
    since: Instant,
    said: u32,
    unsaid: u64,
}

impl Room {
    /// An empty one, and the bell that rings when something comes.
    pub(super) fn new() -> (Self, Receiver<()>) {
        let (ring, bell) = bounded(1);
        let state = State {
            visitors: Visitors::default(),
            tokens: VecDeque::new(),
            open: true,
            known: VecDeque::new(),
            strangers: VecDeque::new(),
            ignored: Ignored { since: clock::now(), said: 0, unsaid: 0 },
        };
        (Self { state: Mutex::new(state), ring }, bell)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whole at every moment, so a panic elsewhere spoils nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection that is to say its first words; none while those who were hurried
    /// have not left.
    pub(super) fn admit(self: &Arc<Self>, origin: Origin) -> Option<Place> {
        let (id, hurried) = self.state().visitors.admit(origin, BOUNDS)?;
        Some(Place { room: Arc::clone(self), id, hurried })
    }

    /// From now on, who bears this token is known.
    pub(super) fn expect(&self, token: Token) {
        let mut state = self.state();
        state.tokens.push_front(token);
        state.tokens.truncate(TOKENS_MAX);
    }

    /// Who bears this token is a stranger again.
    pub(super) fn forget(&self, token: Token) {
        self.state().tokens.retain(|known| *known != token);
    }

    pub(super) fn knows(&self, token: Token) -> bool {
        self.state().tokens.contains(&token)
    }

    /// From now on only who bears a known token is heard.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.open = false;
        state.strangers.clear();
    }

    pub(super) fn is_open(&self) -> bool {
        self.state().open
    }

    /// Queues a connection whose token is known. One too many is closed: its source asks again.
    pub(super) fn queue_known(&self, incoming: Incoming) {
        let mut state = self.state();
        if state.known.len() < KNOWN_MAX {
            state.known.push_back(incoming);
        }
        drop(state);
        self.rings();
    }

    /// Queues a stranger, if there is room for it. One too many is closed.
    pub(super) fn queue_stranger(&self, origin: Origin, incoming: Incoming) {
        let mut state = self.state();
        let of_peer = state.strangers.iter().filter(|(other, _)| *other == origin).count();
        let room = of_peer < STRANGERS.each && state.strangers.len() < STRANGERS.all;
        if room && state.open {
            state.strangers.push_back((origin, incoming));
        }
        drop(state);
        self.rings();
    }

    /// A bell that rings already is enough.
    fn rings(&self) {
        let _ = clock::send(&self.ring, (), Duration::ZERO);
    }

    /// The next that bears a known token.
    pub(super) fn known(&self) -> Option<Incoming> {
        self.state().known.pop_front()
    }

    /// The next stranger.
    pub(super) fn stranger(&self) -> Option<Incoming> {
        self.state().strangers.pop_front().map(|(_, incoming)| incoming)
    }

    #[cfg(test)]
    pub(super) fn known_queued(&self) -> usize {
        self.state().known.len()
    }

    #[cfg(test)]
    pub(super) fn strangers_queued(&self) -> usize {
        self.state().strangers.len()
    }

    /// Says that a connection was ignored.
    pub(super) fn ignored(&self, peer: &Address, why: &Error) {
        if self.is_open() {
            self.say_of_stranger(&format!("ignored a connection from {peer}: {}", why.chain()));
        }
    }

    /// A line about a stranger; of a flood the beginning and then the number.
    pub(super) fn say_of_stranger(&self, line: &str) {
        let (unsaid, spoken_of) = self.state().ignored.count(clock::now());
        if unsaid > 0 {
            say(&format!("ignored or refused {unsaid} more connections"));
        }
        if spoken_of {
            say(line);
        }
    }
}

impl Ignored {
    /// Counts one more: how many were not spoken of until now, if that is to be said, and whether
    /// this one is.
    fn count(&mut self, now: Instant) -> (u64, bool) {
        let mut unsaid = 0;
        if now.saturating_duration_since(self.since) >= LINES_EVERY {
            unsaid = self.unsaid;
            *self = Self { since: now, said: 0, unsaid: 0 };
        }
        if self.said < LINES_MAX {
            self.said += 1;
            (unsaid, true)
        } else {
            self.unsaid += 1;
            (unsaid, false)
        }
    }
}

/// A connection's place while it says its first words.
#[derive(Debug)]
pub(super) struct Place {
    room: Arc<Room>,
    id: u64,
    hurried: Hurried,
}

impl Place {
    /// Whether it has to do with what its peer has sent by now.
    pub(super) fn is_hurried(&self) -> bool {
        self.hurried.load(Ordering::Relaxed)
    }

    /// Its peer has shown a token: it is no stranger any more.
    pub(super) fn leave(&self) {
        self.room.state().visitors.leave(self.id);
        self.hurried.store(false, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_flood_the_beginning_is_said_and_then_the_number() {
        let begun = Instant::now();
        let mut ignored = Ignored { since: begun, said: 0, unsaid: 0 };
        let said = (0..1000).filter(|_| ignored.count(begun) == (0, true)).count();
        assert_eq!(said, LINES_MAX as usize);
        assert_eq!(ignored.count(begun + LINES_EVERY), (1000 - u64::from(LINES_MAX), true));
        assert_eq!(ignored.count(begun + LINES_EVERY), (0, true));
    }
}
