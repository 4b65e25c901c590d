//! One lane: what is posted to a queue pair, which of it asks for a completion, and what a
//! completion settles. Knows no verbs and no region.
//!
//! A completion of a queue pair's send side says that everything before it on that queue pair is
//! done as well, so few work requests ask for one:
//!
//! ```text
//!   one call of post with 150 writes to this lane, SIGNAL_EVERY = 64
//!
//!   write     0 ............. 63 64 ............ 127 128 ...... 149
//!   signalled                 *                   *              *  the last of the call, so that
//!   doorbell                                                     |  nothing waits for a next call
//!
//!   messages, and fences, which are messages too, are always signalled
//! ```
//!
//! Without a completion now and then, the queue would fill with requests that are done and never
//! settled. With [`SIGNAL_EVERY`] well below the queue's depth, room comes back in several steps.

pub(super) mod chain;
pub(super) mod flow;
pub(super) mod message;
pub(super) mod queue;

use crate::credit::{Credits, Window};
use crate::failure::LaneFailure;
use crate::fences::FENCES_MAX;
use crate::rdma::lane::chain::{CHAIN_MAX, Chain, Local, Operation};
use crate::rdma::lane::flow::Flow;
use crate::rdma::lane::message::{MESSAGE_BYTES, Message};
use crate::rdma::lane::queue::{DONE_MAX, Done, Queue, RECEIVE};
use crate::rdma::verbs::words::completion_status;
use crate::work::{Completion, FenceTag, WorkId};
use std::collections::VecDeque;

/// At least one in so many work requests asks for a completion.
pub(crate) const SIGNAL_EVERY: usize = 64;

/// Writes that a queue pair holds at most, if the device lets it: 4 KiB pages for 100 us at 400
/// Gb/s.
pub(crate) const WRITES_MAX: usize = 1024;

/// Messages of our own on their way at most.
pub(crate) const MESSAGES_MAX: usize = 16;

/// What the send queue must hold beside writes, so that a fence never has to wait for room.
pub(crate) const RESERVED: usize = FENCES_MAX + MESSAGES_MAX;

/// Fewer writes than this in a queue are no use.
pub(crate) const WRITES_MIN: usize = 2 * SIGNAL_EVERY;

const _: () = assert!(SIGNAL_EVERY * 4 <= WRITES_MAX, "room must come back in several steps");
const _: () = assert!(SIGNAL_EVERY <= CHAIN_MAX && RESERVED + WRITES_MAX <= 4096);

/// Headers of one packet on the wire (base transport header and invariant checksum), and what a
/// write has beside them (its remote address and key). The link layer's own come on top and are not
/// counted.
const PACKET_HEADER_BYTES: u64 = 12 + 4;
const WRITE_HEADER_BYTES: u64 = 16;

/// Looks at the completion queue in one call at most: a peer must not keep us here with messages.
const LOOKS_MAX: usize = 256;

/// One write, or a part of one that two keys or the device's limit cut.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) id: WorkId,
    pub(crate) local: Local,
    pub(crate) addr: u64,
    pub(crate) key: u32,
    /// Whether the whole write is done when this is.
    pub(crate) last: bool,
}

/// What completions told, beside writes that are done.
#[derive(Debug, Default)]
pub(crate) struct News {
    /// Messages of the peer, as they came, fences among them.
    pub(crate) messages: Vec<Message>,
}

pub(crate) struct Lane {
    index: usize,
    queue: Box<dyn Queue>,
    chain: Chain,
    credits: Credits,
    /// Posted, or in the chain, and not known to be done. The identifier of a work request is the
    /// number of those before it on this lane.
    posted: VecDeque<Posted>,
    next: u64,
    unsignalled: usize,
    /// Pieces of writes in `posted`, and how many may be there.
    writes: usize,
    writes_max: usize,
    /// Buffers of messages that are free, and those of fences behind them.
    slots: Vec<u16>,
    fence_slots: Vec<u16>,
    flow: Flow,
    heard: bool,
    /// Writes that are done and still hold their credits.
    finished: (usize, u64),
    packet_shift: u32,
    wire_bytes: u64,
    written_bytes: u64,
    posted_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Posted {
    id: WorkId,
    addr: u64,
    len: u32,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Part,
    Write,
    Fence(u16),
    Message(u16),
}

impl Lane {
    /// A lane whose queue takes `writes_max` pieces beside what is [`RESERVED`], with packets of
    /// `mtu` bytes.
    pub(crate) fn new(
        index: usize,
        queue: Box<dyn Queue>,
        window: Window,
        writes_max: usize,
        mtu: u32,
    ) -> Self {
        let window = Window { requests: window.requests.min(writes_max), ..window };
        Self {
            index,
            queue,
            chain: Chain::new(),
            credits: Credits::new(window),
            posted: VecDeque::with_capacity(writes_max + RESERVED),
            next: 0,
            unsignalled: 0,
            writes: 0,
            writes_max,
            slots: (0..MESSAGES_MAX as u16).collect(),
            fence_slots: (MESSAGES_MAX as u16..RESERVED as u16).collect(),
            flow: Flow::default(),
            heard: false,
            finished: (0, 0),
            packet_shift: mtu.max(256).ilog2(),
            wire_bytes: 0,
            written_bytes: 0,
            posted_bytes: 0,
        }
    }

    /// Charges a write of `bytes` in so many pieces, or says that there is no credit for it.
    #[inline]
    #[must_use]
    pub(crate) fn admit(&mut self, bytes: u64, pieces: usize) -> bool {
        self.writes + pieces <= self.writes_max && self.credits.take(bytes)
    }

    /// Adds a piece of a write that was admitted to the chain.
    #[inline]
    pub(crate) fn write(&mut self, piece: Piece) -> Result<(), LaneFailure> {
        debug_assert!(self.writes < self.writes_max, "admitted");
        self.writes += 1;
        self.posted_bytes += u64::from(piece.local.len);
        let kind = if piece.last { Kind::Write } else { Kind::Part };
        let Piece { id, local, addr, key, .. } = piece;
        self.push(
            Posted { id, addr, len: local.len, kind },
            Operation::Write { local, addr, key },
            false,
        )
    }

    /// Whether there is room for a fence: fewer than [`FENCES_MAX`] are on their way.
    pub(crate) fn can_fence(&self) -> bool {
        !self.fence_slots.is_empty()
    }

    /// Sends a fence behind everything posted so far, which is `bytes` on all lanes together. The
    /// caller has asked [`Self::can_fence`].
    pub(crate) fn fence(
        &mut self,
        tag: FenceTag,
        bytes: u64,
        is_last: bool,
    ) -> Result<(), LaneFailure> {
        let slot = self.fence_slots.pop().expect("the caller has asked");
        self.put(slot, &Message::Fence { tag, bytes, is_last }, Kind::Fence(slot))
    }

    /// Sends a message; false if too many are on their way, or the peer may have no receive for it.
    pub(crate) fn send(&mut self, message: &Message) -> Result<bool, LaneFailure> {
        if !self.flow.may_send() && message.counts() {
            return Ok(false);
        }
        let Some(slot) = self.slots.pop() else { return Ok(false) };
        if message.counts() {
            self.flow.send();
        }
        self.put(slot, message, Kind::Message(slot))?;
        Ok(true)
    }

    fn put(&mut self, slot: u16, message: &Message, kind: Kind) -> Result<(), LaneFailure> {
        let mut bytes = [0; MESSAGE_BYTES];
        let len = message.encode(self.flow.tell(), &mut bytes);
        let local = self
            .queue
            .put(usize::from(slot), &bytes[..len])
            .map_err(|e| self.os("a message", e))?;
        let posted = Posted { id: WorkId(0), addr: 0, len: local.len, kind };
        self.push(posted, Operation::Send { local }, true)?;
        self.flush()
    }

    /// Whether the peer has said anything yet.
    pub(crate) fn heard(&self) -> bool {
        self.heard
    }

    /// Whether [`Self::send`] would send.
    pub(crate) fn can_send(&self) -> bool {
        !self.slots.is_empty() && self.flow.may_send()
    }

    /// Tells the peer that its messages were taken, if it may have to wait for that.
    pub(crate) fn acknowledge(&mut self) -> Result<(), LaneFailure> {
        if self.flow.owes() {
            self.send(&Message::Taken)?;
        }
        Ok(())
    }

    /// Posts what is in the chain, with one doorbell.
    pub(crate) fn flush(&mut self) -> Result<(), LaneFailure> {
        if self.chain.is_empty() {
            return Ok(());
        }
        self.chain.signal_last();
        self.unsignalled = 0;
        let posted = self.queue.post(&mut self.chain);
        self.chain.clear();
        posted.map_err(|errno| self.os("posting work requests", errno))
    }

    /// Takes in what the queue pair has done. Writes go to `out` and keep their credits until
    /// [`Self::settle`]. What came before a failure is taken in.
    pub(crate) fn collect(
        &mut self,
        out: &mut Vec<Completion>,
        news: &mut News,
    ) -> Result<(), LaneFailure> {
        let mut done = [Done::default(); DONE_MAX];
        for _ in 0..LOOKS_MAX {
            let count =
                self.queue.poll(&mut done).map_err(|e| self.os("polling for completions", e))?;
            for done in &done[..count] {
                if done.id & RECEIVE != 0 {
                    self.receive(done, news)?;
                } else {
                    self.sent(done, out)?;
                }
            }
            if count < DONE_MAX {
                break;
            }
        }
        Ok(())
    }

    /// Gives back the credits of the writes that were handed to the caller.
    pub(crate) fn settle(&mut self) {
        let (requests, bytes) = std::mem::take(&mut self.finished);
        self.credits.give_back(requests, bytes);
    }

    /// Asks for an event when the next completion comes.
    pub(crate) fn arm(&mut self) -> Result<(), LaneFailure> {
        self.queue.arm().map_err(|errno| self.os("asking for completion events", errno))
    }

    /// Whether everything that was posted is done.
    pub(crate) fn is_idle(&self) -> bool {
        self.posted.is_empty()
    }

    /// See [`Queue::close`].
    pub(crate) fn close(&mut self, healthy: bool) {
        self.queue.close(healthy);
    }

    /// Bytes of completed work requests with their headers.
    pub(crate) fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }

    /// Bytes of completed writes.
    pub(crate) fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Bytes of all writes that were ever given to it.
    pub(crate) fn posted_bytes(&self) -> u64 {
        self.posted_bytes
    }

    #[inline]
    fn push(
        &mut self,
        posted: Posted,
        operation: Operation,
        signalled: bool,
    ) -> Result<(), LaneFailure> {
        if self.chain.len() == CHAIN_MAX {
            self.flush()?;
        }
        self.unsignalled += 1;
        let signalled = signalled || self.unsignalled == SIGNAL_EVERY;
        if signalled {
            self.unsignalled = 0;
        }
        self.chain.push(self.next, operation, signalled);
        self.next += 1;
        self.posted.push_back(posted);
        Ok(())
    }

    fn sent(&mut self, done: &Done, out: &mut Vec<Completion>) -> Result<(), LaneFailure> {
        let oldest = self.next - self.posted.len() as u64;
        if done.id < oldest || done.id >= self.next {
            return Err(self.nonsense(format!("a completion of work request {}", done.id)));
        }
        let settled = (done.id - oldest) as usize + 1;
        if done.status != rdma_sys::IBV_WC_SUCCESS {
            let Posted { addr, len, kind, .. } = self.posted[settled - 1];
            return Err(self.failed(done, kind.name(), addr, len));
        }
        for Posted { id, len, kind, .. } in self.posted.drain(..settled) {
            let bytes = u64::from(len);
            // Rounded up without a division, which would cost a page as much as all the rest of
            // this.
            let packets = (bytes.max(1) + (1 << self.packet_shift) - 1) >> self.packet_shift;
            self.wire_bytes += bytes + packets * PACKET_HEADER_BYTES;
            match kind {
                Kind::Part | Kind::Write => {
                    self.writes -= 1;
                    self.wire_bytes += WRITE_HEADER_BYTES;
                    self.written_bytes += bytes;
                    self.finished.1 += bytes;
                    if kind == Kind::Write {
                        self.finished.0 += 1;
                        out.push(Completion::Write(id));
                    }
                }
                Kind::Fence(slot) => self.fence_slots.push(slot),
                Kind::Message(slot) => self.slots.push(slot),
            }
        }
        Ok(())
    }

    fn receive(&mut self, done: &Done, news: &mut News) -> Result<(), LaneFailure> {
        if done.status != rdma_sys::IBV_WC_SUCCESS {
            return Err(self.failed(done, "a receive", 0, done.len));
        }
        if done.with_value {
            return Err(self.nonsense("a write with an immediate value".into()));
        }
        // The slot goes back before anything is done about what came, so that the queue stays full.
        let slot = (done.id & !RECEIVE) as usize;
        let bytes = self.queue.received(slot).map_err(|e| self.os("reading a message", e))?;
        self.queue.replenish(slot).map_err(|e| self.os("posting a receive", e))?;
        let len = (done.len as usize).min(MESSAGE_BYTES);
        let (message, taken) =
            Message::decode(&bytes[..len]).map_err(|what| self.nonsense(what))?;
        self.heard = true;
        if message.counts() {
            self.flow.receive();
        }
        if !self.flow.hear(taken) {
            return Err(self.nonsense(format!("{taken} messages taken, which were not sent")));
        }
        if message != Message::Taken {
            news.messages.push(message);
        }
        Ok(())
    }

    fn failed(&self, done: &Done, operation: &'static str, addr: u64, len: u32) -> LaneFailure {
        if done.status == rdma_sys::IBV_WC_WR_FLUSH_ERR {
            return LaneFailure::Flushed { lane: self.index };
        }
        let status = completion_status(done.status);
        LaneFailure::Work { lane: self.index, operation, addr, len, status, vendor: done.vendor }
    }

    fn os(&self, operation: &'static str, errno: i32) -> LaneFailure {
        LaneFailure::Os { lane: self.index, operation, errno }
    }

    fn nonsense(&self, what: String) -> LaneFailure {
        LaneFailure::Protocol { lane: self.index, what }
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Part | Self::Write => "a write",
            Self::Fence(_) => "a fence",
            Self::Message(_) => "a message",
        }
    }
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane")
            .field("index", &self.index)
            .field("posted", &self.posted.len())
            .finish()
    }
}

#[cfg(test)]
mod tests;
