//! The link over RDMA verbs: a reliable connected queue pair a lane, one-sided writes straight into the
//! destination's memory.
//!
//! ```text
//!   initiator                                                 target
//!   expect -> registrar threads (lkeys)                       expect -> registrar threads (rkeys)
//!                                     <-- SEND: ready -------  service thread
//!   post -> lane: chain, doorbell     === RDMA WRITE =======> exposed region (no CPU there)
//!   fence                             --- SEND, each lane --> service thread -> wait_fence
//!   poll <- Completion::Fence         <-- SEND: reached -----
//!           (now and then)            --- SEND: progress ---> bytes_placed
//!   poll <- completions               --- SEND: want -------> registrar (what nobody expected)
//!
//!   monitor thread: port down, device gone, disconnected      the same
//! ```
//!
//! Memory is pinned chunk by chunk ahead of the data, at both ends at once; a write to memory that is
//! not ready at both ends is not accepted yet. The target's addresses are those of `exposed.rs`, which
//! the device is given as the registrations' own (`ibv_reg_mr_iova`), so chunks do not show in them.
//!
//! Registrations are made with relaxed ordering where the device takes it: `docs/decisions/0017` says why that is right.

mod cm;
mod connect;
pub mod device;
mod flow;
mod health;
mod initiator;
mod keys;
mod lane;
mod listen;
mod memory_lock;
mod message;
mod monitor;
mod path;
mod pinner;
mod queue;
mod registrar;
mod status;
mod target;
mod verbs;
mod verbs_queue;

#[cfg(test)]
mod tests;

pub use initiator::RdmaInitiator;
pub use listen::RdmaListener;
pub use path::{Path, RdmaOptions};
pub use target::RdmaTarget;

use crate::error::{Error, Result};
use crate::fences::FENCES_MAX;
use crate::link::STRIPE_BYTES;
use keys::Pins;
use lane::{MESSAGES_MAX, RESERVED, WRITES_MIN};
use registrar::{Job, Registrar};
use std::ops::Range;
use std::sync::Arc;
use verbs_queue::Depths;

/// Receives of the target on each lane, if the device lets it. Each fence and each message takes one; they go back as
/// soon as the service thread sees a completion.
const TARGET_RECEIVES: usize = 1024;
/// What they must be at least: nobody sends more at a time.
const TARGET_RECEIVES_MIN: usize = FENCES_MAX + flow::RECEIVES;
// A device with shallower queues is refused.
const _: () = assert!(TARGET_RECEIVES_MIN <= RESERVED + WRITES_MIN && TARGET_RECEIVES_MIN <= TARGET_RECEIVES);

const TARGET_DEPTHS: Depths =
    Depths { sends: MESSAGES_MAX, receives: TARGET_RECEIVES, messages: MESSAGES_MAX };

fn initiator_depths(writes: usize) -> Depths {
    Depths { sends: writes + RESERVED, receives: flow::RECEIVES, messages: RESERVED }
}

/// Stripes of one registration.
fn chunk_stripes(chunk_bytes: usize) -> usize {
    (chunk_bytes / STRIPE_BYTES as usize).max(1)
}

/// Gives the parts that are not pinned yet to the registrar.
fn expect(
    registrar: Option<&Registrar>,
    pins: &Arc<Pins>,
    parts: &[Range<usize>],
    chunk: usize,
) -> Result<()> {
    let registrar = registrar.ok_or(Error::State("expecting writes after the link has ended"))?;
    for part in parts {
        let len =
            part.end.checked_sub(part.start).ok_or(Error::State("a part that ends before it begins"))?;
        pins.region().check(part.start, len)?;
    }
    for part in parts {
        let claimed = pins.claim(part, chunk);
        registrar.add(claimed.into_iter().map(|stripes| Job { pins: Arc::clone(pins), stripes }));
    }
    Ok(())
}

/// Runs what takes registrations back in a thread of its own: unpinning takes 20 ms a GiB, and nobody
/// should wait for it. See `docs/decisions/0015`.
fn give_up_memory(work: impl FnOnce() + Send + 'static) {
    // If there is no thread to be had, the closure runs no further than to drop what it holds: here.
    if let Err(e) = std::thread::Builder::new().name("ferry-unpin".into()).spawn(work) {
        tracing::debug!("memory is given up at once: {e}");
    }
}
