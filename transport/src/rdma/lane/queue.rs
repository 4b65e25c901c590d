//! The seam between a lane and the device: a chain of work requests goes in, completions come out.
//!
//! [`VerbsQueue`](crate::rdma::verbs::queue_pair::VerbsQueue) is the device's queue pair; [`Null`] completes whatever it
//! is given at once, to measure what a page costs on our own side of the seam.

use super::message::MESSAGE_BYTES;
use crate::rdma::lane::chain::{Chain, Local};

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
    /// Ends it: nothing is read or written through it after this, in either direction. Of a link
    /// that is `healthy` the port need not be looked at, which may cost a command to the device:
    /// this is the downtime.
    fn close(&mut self, _healthy: bool) {}
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
