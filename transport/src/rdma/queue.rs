//! The seam between a lane and the device: a chain of work requests goes in, completions come out.
//!
//! [`VerbsQueue`](super::verbs_queue::VerbsQueue) is the device's queue pair; [`Null`] completes whatever it
//! is given at once, to measure what a page costs on our own side of the seam.

use super::message::{MESSAGE_BYTES, Message};
use crate::work::FenceTag;
use rdma_sys::{IBV_SEND_SIGNALED, IBV_WR_RDMA_WRITE, IBV_WR_SEND, ibv_send_wr, ibv_sge};
use std::collections::VecDeque;

/// Work requests of one chain, which costs one doorbell: a whole batch of the engine's pump.
pub(crate) const CHAIN_MAX: usize = 256;

/// Completions taken at one look.
pub(crate) const DONE_MAX: usize = 32;

/// Set in the identifier of a receive, whose other bits are its slot. The rest are sends.
pub(crate) const RECEIVE: u64 = 1 << 63;

/// What a lane needs of a queue pair and its completion queue. Errors are error numbers.
pub(crate) trait Queue: Send {
    /// Posts the chain, with one doorbell.
    fn post(&mut self, chain: &mut Chain) -> Result<(), i32>;
    /// Takes completions, oldest first.
    fn poll(&mut self, done: &mut [Done; DONE_MAX]) -> Result<usize, i32>;
    /// Posts the receive of this slot again.
    fn replenish(&mut self, slot: usize) -> Result<(), i32>;
    /// Copies out what came into the slot of a receive.
    fn received(&self, slot: usize) -> Result<[u8; MESSAGE_BYTES], i32>;
    /// Puts a message where the device can read it.
    fn put(&mut self, slot: usize, bytes: &[u8]) -> Result<Local, i32>;
    /// Asks for an event on the completion channel when the next completion comes.
    fn arm(&mut self) -> Result<(), i32>;
    /// Ends it: nothing is read or written through it after this, in either direction. Of a link that is
    /// `healthy` the port need not be looked at, which may cost a command to the device: this is the blackout.
    fn close(&mut self, _healthy: bool) {}
}

/// Memory of this side, as a work request names it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Local {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) key: u32,
}

/// What a work request does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operation {
    Write { local: Local, addr: u64, key: u32 },
    Send { local: Local },
}

/// A completion.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Done {
    pub(crate) id: u64,
    pub(crate) status: u32,
    pub(crate) vendor: u32,
    /// Of a receive: how many bytes came.
    pub(crate) len: u32,
    /// Of a receive: it was taken by a write with an immediate value, which nobody here sends.
    pub(crate) with_value: bool,
}

/// Work requests that are about to be posted together, built in place.
pub(crate) struct Chain {
    requests: Box<[ibv_send_wr]>,
    pieces: Box<[ibv_sge]>,
    len: usize,
}

// SAFETY: the pointers in it are set by `linked` for the call that follows and point to its own
// memory; nothing reads them at another time.
unsafe impl Send for Chain {}

impl Chain {
    pub(crate) fn new() -> Self {
        let piece = ibv_sge { addr: 0, length: 0, lkey: 0 };
        Self { requests: [BLANK; CHAIN_MAX].into(), pieces: [piece; CHAIN_MAX].into(), len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Adds one; the lane flushes before there are more than [`CHAIN_MAX`].
    #[inline]
    pub(crate) fn push(&mut self, id: u64, operation: Operation, signalled: bool) {
        let (request, piece) = (&mut self.requests[self.len], &mut self.pieces[self.len]);
        self.len += 1;
        // Fields that an opcode does not use keep what an earlier request had there.
        request.wr_id = id;
        request.send_flags = if signalled { IBV_SEND_SIGNALED } else { 0 };
        let mut take = |local: Local| {
            *piece = ibv_sge { addr: local.addr, length: local.len, lkey: local.key };
            1
        };
        match operation {
            Operation::Write { local, addr, key } => {
                request.opcode = IBV_WR_RDMA_WRITE;
                request.num_sge = take(local);
                request.wr.rdma.remote_addr = addr;
                request.wr.rdma.rkey = key;
            }
            Operation::Send { local } => {
                request.opcode = IBV_WR_SEND;
                request.num_sge = take(local);
            }
        }
    }

    /// Has the last of the chain make a completion.
    pub(crate) fn signal_last(&mut self) {
        if let Some(last) = self.requests[..self.len].last_mut() {
            last.send_flags |= IBV_SEND_SIGNALED;
        }
    }

    /// Its work requests in the order of their execution. Their pointers mean nothing.
    pub(crate) fn requests(&self) -> &[ibv_send_wr] {
        &self.requests[..self.len]
    }

    /// The first of the chain, for the call that posts it. Null if there is none.
    pub(crate) fn linked(&mut self) -> *mut ibv_send_wr {
        let count = self.len();
        if count == 0 {
            return std::ptr::null_mut();
        }
        let (first, pieces) = (self.requests.as_mut_ptr(), self.pieces.as_mut_ptr());
        for index in 0..count {
            let next = if index + 1 < count { first.wrapping_add(index + 1) } else { std::ptr::null_mut() };
            // SAFETY: both have `count` elements or more, and nothing else touches them meanwhile.
            unsafe {
                let request = first.add(index);
                (*request).next = next;
                (*request).sg_list = pieces.add(index);
            }
        }
        first
    }
}

/// A work request that does nothing yet.
// SAFETY: integers, null pointers and unions of such: zero is a value of each.
const BLANK: ibv_send_wr = unsafe { std::mem::zeroed() };

/// A device that has done everything as soon as it is told, and a peer that answers fences.
#[derive(Debug, Default)]
pub(crate) struct Null {
    done: VecDeque<u64>,
    /// The fences that were put and have no answer yet.
    fences: VecDeque<FenceTag>,
}

impl Queue for Null {
    fn post(&mut self, chain: &mut Chain) -> Result<(), i32> {
        // What a real device's library would be handed, and the cost of making it.
        std::hint::black_box(chain.linked());
        let signalled = chain.requests().iter().filter(|request| request.send_flags & IBV_SEND_SIGNALED != 0);
        self.done.extend(signalled.map(|request| request.wr_id));
        Ok(())
    }

    fn poll(&mut self, done: &mut [Done; DONE_MAX]) -> Result<usize, i32> {
        let count = self.done.len().min(DONE_MAX);
        for (done, id) in done.iter_mut().zip(self.done.drain(..count)) {
            *done = Done { id, ..Done::default() };
        }
        let answers = usize::from(count < DONE_MAX && !self.fences.is_empty());
        if answers > 0 {
            let len = self.answer()?.1 as u32;
            done[count] = Done { id: RECEIVE, len, ..Done::default() };
        }
        Ok(count + answers)
    }

    fn replenish(&mut self, _slot: usize) -> Result<(), i32> {
        self.fences.pop_front();
        Ok(())
    }

    fn received(&self, _slot: usize) -> Result<[u8; MESSAGE_BYTES], i32> {
        Ok(self.answer()?.0)
    }

    fn put(&mut self, _slot: usize, bytes: &[u8]) -> Result<Local, i32> {
        if let Ok((Message::Fence { tag, .. }, _)) = Message::decode(bytes) {
            self.fences.push_back(tag);
        }
        Ok(Local { addr: 0, len: bytes.len() as u32, key: 0 })
    }

    fn arm(&mut self) -> Result<(), i32> {
        Ok(())
    }
}

impl Null {
    /// The answer to the oldest fence, and its length.
    fn answer(&self) -> Result<([u8; MESSAGE_BYTES], usize), i32> {
        let tag = *self.fences.front().ok_or(libc::EINVAL)?;
        let mut bytes = [0; MESSAGE_BYTES];
        let len = Message::Reached(tag).encode(0, &mut bytes);
        Ok((bytes, len))
    }
}
