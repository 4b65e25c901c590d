//! What QEMU says without being asked, in the order of its arrival.
//!
//! The order is the socket's. QEMU's own time stamps are of the wall clock, which may be set back
//! at any moment. Bounded in bytes: a QEMU that the guest has taken over may send whatever it
//! likes.

use serde_json::Value;
use std::collections::VecDeque;

/// Events that are kept until somebody waits for them, in bytes of their lines; beyond that the
/// oldest are dropped. One is some 150 bytes.
const KEPT_BYTES_MAX: usize = 256 << 10;
/// A line longer than this is an event whose data nobody here needs.
pub const DATA_BYTES_MAX: usize = 32 << 10;

/// Something that QEMU said without being asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name: `STOP`, `MIGRATION`, `SHUTDOWN`.
    pub name: String,
    /// Its data; null where it has none.
    pub data: Value,
    /// Its place among all events of this connection, from 1 on.
    pub number: u64,
    /// When QEMU says it happened, since the epoch, in microseconds; zero where it did not say. To
    /// measure with, and for nothing else: the clock may be set back.
    pub at_us: u64,
}

/// When the vCPUs were stopped, let run or reset last, as numbers of events; zero for never.
/// Counted as events arrive, whether they are kept or not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Turns {
    /// The last `STOP`.
    pub stop: u64,
    /// The last `RESUME`. QEMU sends it *before* it lets the vCPUs run.
    pub resume: u64,
    /// The last `RESET`.
    pub reset: u64,
    /// The last event that may come with a stop of the guest's own: QEMU sends it before its
    /// `STOP`.
    pub ceased: u64,
}

/// The events that have arrived.
#[derive(Debug, Default)]
pub struct EventLog {
    kept: VecDeque<(Event, usize)>,
    kept_bytes: usize,
    arrived: u64,
    turns: Turns,
}

impl EventLog {
    /// Numbers an event that came in a line of so many bytes.
    pub fn arrive(&mut self, name: String, data: Value, at_us: u64) -> Event {
        self.arrived += 1;
        let number = self.arrived;
        match name.as_str() {
            "STOP" => self.turns.stop = number,
            "RESUME" => self.turns.resume = number,
            "RESET" => self.turns.reset = number,
            "SHUTDOWN" | "GUEST_PANICKED" | "BLOCK_IO_ERROR" | "WATCHDOG" => {
                self.turns.ceased = number
            }
            _ => {}
        }
        Event { name, data, number, at_us }
    }

    /// Keeps it for somebody who waits for it later.
    pub fn keep(&mut self, event: Event, line_bytes: usize) {
        self.kept.push_back((event, line_bytes));
        self.kept_bytes += line_bytes;
        while self.kept_bytes > KEPT_BYTES_MAX
            && let Some((_, bytes)) = self.kept.pop_front()
        {
            self.kept_bytes -= bytes;
        }
    }

    /// Takes the first kept one that `wanted` accepts.
    pub fn take(&mut self, wanted: impl FnMut(&Event) -> bool) -> Option<Event> {
        let index = self.kept.iter().map(|(event, _)| event).position(wanted)?;
        let (event, bytes) = self.kept.remove(index)?;
        self.kept_bytes -= bytes;
        Some(event)
    }

    /// Takes all that are kept.
    pub fn take_all(&mut self) -> Vec<Event> {
        self.kept_bytes = 0;
        self.kept.drain(..).map(|(event, _)| event).collect()
    }

    /// How many have ever arrived: the number of the last one.
    pub fn arrived(&self) -> u64 {
        self.arrived
    }

    /// See [`Turns`].
    pub fn turns(&self) -> Turns {
        self.turns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_in_bytes_and_no_turn_is_lost() {
        let mut log = EventLog::default();
        let mut say = |name: &str, bytes| {
            let event = log.arrive(name.into(), Value::Null, 0);
            log.keep(event, bytes);
            log.kept_bytes
        };
        say("RESUME", 100);
        for _ in 0..100_000 {
            assert!(say("NOISE", 150) <= KEPT_BYTES_MAX);
        }
        assert!(say("HUGE", KEPT_BYTES_MAX + 1) <= KEPT_BYTES_MAX);
        assert_eq!(log.turns(), Turns { resume: 1, ..Turns::default() });
        assert_eq!(log.arrived(), 100_002);
        assert!(
            log.take_all().is_empty(),
            "the huge one pushed all others out, and then went itself"
        );
    }
}
