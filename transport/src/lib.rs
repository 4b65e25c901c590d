//! Moves bytes between registered memory regions. Knows no VM and no page.
//!
//! ```text
//!   initiator (source host)                     target (destination host)
//!   ----------------------                      -------------------------
//!   register(region)                            expose(region) -> RemoteRegion
//!   expect(region, parts)                       expect(region, parts)
//!   post([WorkRequest]) --- lane 0 ===========> bytes appear in the exposed region
//!                       --- lane 1 ===========>
//!   poll() -> Completion::Write
//!   fence(tag)          --- on every lane ====> wait_fence(tag)
//!   poll() -> Completion::Fence
//!   last_fence(tag)     --- on every lane ====> wait_fence(tag), the lanes end; revoke()
//! ```
//!
//! # The contract, the same for every link
//!
//! - **Lane.** One queue pair or one TCP connection. A remote address belongs to one lane for the
//!   life of the link ([`lane_of`]: stripes of [`STRIPE_BYTES`] go round the lanes).
//! - **One write between two fences.** Writes between two fences come in any order, those to one
//!   lane too: memory may take them as it likes. So of two writes to one address, the second may be
//!   posted only when a fence behind the first has been polled ([`Completion::Fence`]). Otherwise
//!   any mix of both may be what is left.
//! - **Post.** [`Initiator::post`] accepts a prefix of the batch and says how long it is; zero
//!   means that there is no credit, or that memory is still being made ready, and the caller should
//!   [`Initiator::poll`]. The local memory may go on
//!   changing while a write is in flight: what arrives is then any mix of old and new bytes, and it
//!   is the caller's duty to write that memory again.
//! - **Expect.** A link that pins memory needs to know ahead what will be written: both ends say so
//!   with `expect`, and pin beside the data. [`Initiator::make_ready`] waits for that, so that
//!   nothing is pinned in the downtime. On other links both do nothing.
//! - **Completion of a write.** The link is done with the local memory. It says nothing about the
//!   remote side.
//! - **Fence.** [`Initiator::fence`] is ordered behind every write posted before it, on every lane.
//!   When [`Target::wait_fence`] returns, the destination's CPU sees all of those writes. When the
//!   initiator polls [`Completion::Fence`], the target's host has said so: it has the fence on
//!   every lane. A fence is the only proof that bytes have arrived.
//! - **Last fence.** [`Initiator::last_fence`]: a fence behind which nothing is posted. The
//!   target's lanes end with it, by themselves and beside whatever the target's caller does
//!   meanwhile, so that little is left to do for `revoke`. Nobody waits for its completion: on some
//!   links there is none.
//! - **Credits.** Each lane holds a bounded number of bytes and work requests in flight
//!   ([`credit`]); memory use does not grow with what is posted.
//! - **Deadlines.** Every wait takes an [`std::time::Instant`] and returns [`Error::Timeout`] or
//!   zero completions when it passes. Nothing blocks without one.
//! - **Failure.** One broken lane breaks the link: every later call returns an error that names the
//!   lane. What was in flight is then in an unknown state at the destination.
//! - **Peers are not trusted.** Every address, length and key from the wire is checked against the
//!   exposed regions before a byte is placed. Nothing that a peer sends can panic.
//! - **Revoke.** After [`Target::revoke`] returns, no byte of the exposed regions changes any more
//!   through this link. The destination revokes before its guest's first instruction.

// Failures go to the caller as errors, never to the terminal.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod clock;
pub mod credit;
pub mod error;
mod exposed;
mod failure;
mod fences;
pub mod link;
pub mod loopback;
pub mod preamble;
pub mod rdma;
pub mod region;
pub mod stripe;
pub mod tcp;
pub mod work;

#[cfg(test)]
mod contract;

pub use error::{Error, Result};
pub use link::{Initiator, Target, TransportKind};
pub use region::{
    Access, LOST_MAX, LocalSlice, Loss, Lost, MemoryRegion, RemoteKey, RemoteRegion, sealed_memfd,
};
pub use stripe::{STRIPE_BYTES, lane_of};
pub use work::{Completion, FenceTag, RemoteAddr, WorkId, WorkRequest};
