//! A queue and a pinner that do nothing: what the code itself costs is measured with them.

use crate::error::Result;
use crate::failure::LaneFailure;
use crate::rdma::lane::chain::{Chain, Local};
use crate::rdma::lane::message::{MESSAGE_BYTES, Message};
use crate::rdma::lane::queue::{DONE_MAX, Done, Queue, RECEIVE};
use crate::rdma::memory::keys::Pins;
use crate::rdma::memory::registrar::{Hold, Pinner};
use crate::work::FenceTag;
use rdma_sys::IBV_SEND_SIGNALED;
use std::collections::VecDeque;
use std::ops::Range;

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
        let signalled =
            chain.requests().iter().filter(|request| request.send_flags & IBV_SEND_SIGNALED != 0);
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

/// Needs no device: everything is ready at once, with key zero.
pub(crate) struct NoPins;

impl Pinner for NoPins {
    fn pin(&self, _pins: &Pins, _bytes: Range<usize>) -> Result<(u32, Hold), LaneFailure> {
        Ok((0, Box::new(())))
    }
}
