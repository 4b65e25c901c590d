//! Whole migrations in one process, driven by a seed: the real source and destination code, with
//! the time, the network, the lanes and the guest of a simulated world.
//!
//! ```text
//!   world      threads that run one at a time, or wait; when all wait, time jumps to the next deadline
//!   network    connections with delays, cuts and outages; the lanes are the loopback link
//!   guest      a few hundred pages, a ledger of what was written, and who owns them
//!   kept       the question that outlives the source's supervisor
//!   scenario   what a seed draws, the processes, and what must have come of it
//! ```
//!
//! A seed decides which thread runs next, how long each message takes, and what goes wrong when.
//! The same seed makes the same run, so that one that fails can be run again alone.

pub mod chance;
pub mod guest;
pub mod kept;
pub mod network;
pub mod scenario;
pub mod world;
