//! The way from a caller to a lane's thread: whole batches under one lock, and a wake-up only for a
//! thread that sleeps.
//!
//! The thread waits in its ring, so the bell is an eventfd that the ring reads. While a message is
//! being sent nobody rings: the thread looks into its inbox when that message is gone.

use super::outgoing::Item;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct State {
    items: Vec<Item>,
    asleep: bool,
    stop: bool,
}

/// Items on their way to one thread.
#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    bell: OwnedFd,
}

impl Inbox {
    pub(super) fn new() -> rustix::io::Result<Self> {
        Ok(Self { state: Mutex::default(), bell: eventfd(0, EventfdFlags::CLOEXEC)? })
    }

    /// What the thread reads while it sleeps.
    pub(super) fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// Hands over `items`, leaving it empty.
    pub(super) fn put(&self, items: &mut Vec<Item>) {
        let mut state = self.lock();
        state.items.append(items);
        self.wake(state);
    }

    /// Tells the thread to end.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.stop = true;
        self.wake(state);
    }

    /// Appends what has come to `into`. An idle thread that gets nothing will sleep, and is noted
    /// as one to be woken. False if it must end.
    #[must_use]
    pub(super) fn take(&self, into: &mut VecDeque<Item>, idle: bool) -> bool {
        let mut state = self.lock();
        into.extend(state.items.drain(..));
        state.asleep = idle && into.is_empty();
        !state.stop
    }

    /// Rings whether or not somebody sleeps.
    pub(super) fn ring(&self) {
        // Cannot fail but by a counter at its limit, and then the bell rings already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    fn wake(&self, mut state: MutexGuard<'_, State>) {
        if std::mem::take(&mut state.asleep) {
            drop(state);
            self.ring();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain data, whole at every moment: a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
