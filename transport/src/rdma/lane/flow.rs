//! Which messages the peer has certainly taken out of its receive queue. Pure code, no I/O.
//!
//! A message needs a receive at the other end. InfiniBand and RoCE try again where there is none;
//! iWARP ends the connection, and there the completion of a message says no more than that it has
//! left. So nobody sends more than the other end has receives for: every message says how many its
//! sender has taken so far.
//!
//! ```text
//!   may_send: sent - taken by the peer < UNTAKEN_MAX
//!   owes:     received - told >= TELL_EVERY         then a message that says just that, which nobody counts
//! ```
//!
//! Fences are not counted here: the peer answers each, and the initiator bounds those without an
//! answer.

/// Messages that the peer may not have taken yet.
pub(crate) const UNTAKEN_MAX: u16 = 64;

/// After so many messages the peer is told that they were taken, if nothing else is said to it.
pub(crate) const TELL_EVERY: u16 = 16;

/// Receives that messages may need at one time. While this side is silent the peer can owe it only
/// so many words about what it has taken.
pub(crate) const RECEIVES: usize = UNTAKEN_MAX as usize + (UNTAKEN_MAX / TELL_EVERY) as usize + 1;

const _: () = assert!(
    TELL_EVERY > 0 && 2 * TELL_EVERY <= UNTAKEN_MAX,
    "told long before the sender has to wait"
);

/// The messages of one queue pair. Counters wrap round.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    sent: u16,
    taken: u16,
    received: u16,
    told: u16,
}

impl Flow {
    /// Whether the peer has a receive for one more.
    pub(crate) fn may_send(&self) -> bool {
        self.sent.wrapping_sub(self.taken) < UNTAKEN_MAX
    }

    /// Notes a message that was sent.
    pub(crate) fn send(&mut self) {
        self.sent = self.sent.wrapping_add(1);
    }

    /// Notes a message that came, whose receive is posted again.
    pub(crate) fn receive(&mut self) {
        self.received = self.received.wrapping_add(1);
    }

    /// Takes in how many messages the peer has taken. False if that is more than were sent.
    #[must_use]
    pub(crate) fn hear(&mut self, taken: u16) -> bool {
        let possible = taken.wrapping_sub(self.taken) <= self.sent.wrapping_sub(self.taken);
        if possible {
            self.taken = taken;
        }
        possible
    }

    /// What the next message says of those that were taken here.
    pub(crate) fn tell(&mut self) -> u16 {
        self.told = self.received;
        self.received
    }

    /// Whether the peer should be told even if there is nothing else to say.
    pub(crate) fn owes(&self) -> bool {
        self.received.wrapping_sub(self.told) >= TELL_EVERY
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// One end, with what is on its way to it.
    #[derive(Default)]
    struct End {
        flow: Flow,
        /// What a message says was taken, and whether it counts.
        inbox: VecDeque<(u16, bool)>,
    }

    fn send(ends: &mut [End; 2], from: usize, counts: bool) {
        let taken = ends[from].flow.tell();
        if counts {
            ends[from].flow.send();
        }
        ends[1 - from].inbox.push_back((taken, counts));
    }

    proptest! {
        #[test]
        fn no_message_meets_an_empty_receive_queue_and_nobody_waits_for_ever(
            steps in prop::collection::vec((any::<bool>(), any::<bool>(), 1usize..100), 1..400),
        ) {
            let mut ends: [End; 2] = Default::default();
            for (right, sends, count) in steps {
                let this = usize::from(right);
                for _ in 0..count {
                    if sends {
                        if ends[this].flow.may_send() {
                            send(&mut ends, this, true);
                        }
                    } else if let Some((taken, counts)) = ends[this].inbox.pop_front() {
                        if counts {
                            ends[this].flow.receive();
                        }
                        prop_assert!(ends[this].flow.hear(taken));
                        if ends[this].flow.owes() {
                            send(&mut ends, this, false);
                        }
                    }
                    prop_assert!(ends.iter().all(|end| end.inbox.len() <= RECEIVES));
                }
            }
            // Once everything was read at both ends, both may send.
            while let Some(this) = (0..2).find(|&this| !ends[this].inbox.is_empty()) {
                let (taken, counts) = ends[this].inbox.pop_front().unwrap();
                if counts {
                    ends[this].flow.receive();
                }
                prop_assert!(ends[this].flow.hear(taken));
                if ends[this].flow.owes() {
                    send(&mut ends, this, false);
                }
            }
            prop_assert!(ends.iter().all(|end| end.flow.may_send()));
        }

        #[test]
        fn a_peer_cannot_have_taken_what_was_not_sent(sent in 0u16..=UNTAKEN_MAX, taken: u16) {
            let mut flow = Flow { sent: 65_530, taken: 65_530, ..Flow::default() };
            (0..sent).for_each(|_| flow.send());
            let taken_since = taken.wrapping_sub(65_530);
            prop_assert_eq!(flow.hear(taken), taken_since <= sent);
        }
    }
}
