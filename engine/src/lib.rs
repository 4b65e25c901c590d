//! Live migration of virtual machines over one-sided writes.
//!
//! # The way of the data
//!
//! ```text
//!   source                                                             destination
//!   dirty::DirtySource   which pages were written (re-armed first)
//!      | harvest
//!   bitmap::DirtyBitmap  what must be sent
//!      | runs
//!   precopy::Pump        page::PageRun -> WorkRequest, credits, fences
//!      | post                                                          memory::GuestMemory, all zeros,
//!      +========= pageferry_transport: lanes, one-sided writes =======> mapped and exposed
//!      | what was measured                                             prefault::Prefault ahead of them
//!   policy::Policy       another round, or the switchover, or give up
//!      |
//!   switchover           Paused -> Drained -> Prepared -> Committed    guest::DestinationGuest: load, seal, run
//! ```
//!
//! [`source::migrate`] and [`destination::Reception::serve`] read as the protocol does: eight control
//! messages ([`protocol`]) over one connection ([`net`]), opened by [`session`] and heard by [`doorway`]. [`link`] chooses
//! what the lanes are, RDMA or TCP; both ends tell them ahead what will be written, so that memory is pinned
//! beside the data and not in the blackout. Who may run the guest at each moment is decided by two small state
//! machines without I/O ([`protocol::phase`]); what a Commit without an answer leaves open, [`inquiry`] goes on asking.
//!
//! # Who runs the guest
//!
//! [`guest`] has the two traits that a virtual machine monitor implements: [`guest::SourceGuest`] and
//! [`guest::DestinationGuest`]. [`guest::qemu`] implements them for an unmodified, running QEMU, [`guest::kvm`] for
//! guests under KVM that this process runs itself, [`guest::synthetic`] for threads that write memory and check it.
//!
//! # The command
//!
//! [`supervisor`] holds a guest and takes orders for it, [`cli`] gives them.

// All output goes through `output`, which neither fails nor waits.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod bitmap;
pub mod cli;
mod descriptors;
pub mod destination;
pub mod dirty;
pub mod doorway;
pub mod error;
mod fittings;
pub mod guest;
pub mod hold;
pub mod inquiry;
pub mod link;
pub mod memory;
pub mod net;
pub mod output;
pub mod page;
pub mod policy;
pub mod precopy;
pub mod prefault;
mod private;
mod proc_maps;
pub mod progress;
pub mod protocol;
pub mod report;
mod room;
pub mod session;
pub mod source;
pub mod staging;
pub mod supervisor;
pub mod switchover;
pub mod verify;
mod warm;

pub use error::{Error, Result};
pub use pageferry_transport::clock;

/// This release, as it introduces itself to a peer.
pub const VERSION: &str = concat!("pageferry ", env!("CARGO_PKG_VERSION"));
