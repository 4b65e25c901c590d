//! The link over RDMA verbs: a reliable connected queue pair a lane, one-sided writes straight into
//! the destination's memory.
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
//! Memory is pinned chunk by chunk ahead of the data, at both ends at once; a write to memory that
//! is not ready at both ends is not accepted yet. The target's addresses are those of `exposed.rs`,
//! which the device is given as the registrations' own (`ibv_reg_mr_iova`), so chunks do not show
//! in them.
//!
//! Registrations are made with relaxed ordering where the device takes it: `docs/decisions/0017`
//! says why that is right.

mod admission;
mod depths;
mod health;
pub mod host;
mod initiator;
mod lane;
mod memory;
mod null;
mod setup;
mod target;
mod verbs;

#[cfg(test)]
mod tests;

pub use initiator::RdmaInitiator;
pub use setup::listen::RdmaListener;
pub use setup::path::{Path, RdmaOptions};
pub use target::RdmaTarget;
