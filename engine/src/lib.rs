//! Live migration of virtual machines over one-sided writes.
//!
//! # The way of the data
//!
//! ```text
//!   source                                            destination
//!   dirty::DirtySource    which pages were written
//!      | sync             (protected again first)
//!   memory::bitmap        what must be sent
//!      | runs
//!   source::pump::Pump    PageRun -> WorkRequest,
//!      | post             credits, fences             memory::GuestMemory, all zeros,
//!      +=== pageferry_transport: one-sided writes ==> mapped and exposed
//!      | what was measured                            memory::prefault ahead of them
//!   policy::Policy        another round, or the
//!      |                  switchover, or give up
//!   source::switchover    Paused -> Drained           guest::DestinationGuest:
//!                         -> Prepared -> Committed    load, seal, run
//! ```
//!
//! [`source::migrate`] and [`destination::Receiver::serve`] read as the protocol does: eight control
//! messages ([`protocol`]) over one connection ([`net`]), opened by the source's
//! [`source::session`] and heard by the destination's [`destination::listener`]. [`net::choice`]
//! says what the lanes may be, RDMA or TCP; both ends tell them ahead what will be written, so that
//! memory is pinned beside the data and not in the downtime. Who may run the guest at each moment
//! is decided by two small state machines without I/O ([`protocol::phase`]); what a Commit without
//! an answer leaves open, [`inquiry`] goes on asking.
//!
//! # Who runs the guest
//!
//! [`guest`] has the two traits that a virtual machine monitor (VMM) implements: [`guest::SourceGuest`]
//! and [`guest::DestinationGuest`]. This crate names no VMM. Beside it stand `pageferry-qemu`, for
//! an unmodified, running QEMU, `pageferry-microvm`, a small VMM of our own, and
//! `pageferry-synthetic`, threads that write memory and check it. The program `pageferry` holds
//! guests of all of them.
//!
//! # What it says
//!
//! By its report ([`report`]) and by `tracing`. What an operator has to hear has a target of its
//! own ([`notice`]). It writes to no terminal.

// Whoever embeds the engine owns stdout and stderr.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod destination;
pub mod dirty;
pub mod embed;
pub mod error;
pub mod guest;
pub mod host;
pub mod inquiry;
pub mod limits;
pub mod memory;
pub mod net;
pub mod notice;
pub mod policy;
pub mod protocol;
pub mod report;
pub mod source;
pub mod text;
pub mod watch;

pub use error::{Error, Result};
pub use pageferry_transport::clock;

/// The example of docs/embedding.md is compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../docs/embedding.md")]
pub struct Embedding;

/// This release, as it introduces itself to a peer.
pub const VERSION: &str = concat!("pageferry ", env!("CARGO_PKG_VERSION"));
