//! The one error type of this crate: what failed, on what, and what to do about it.

use std::io;

/// What can go wrong between two registered regions.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A lane is gone or refused an operation; the whole link is unusable from here on.
    #[error("lane {lane}: {operation} failed")]
    Lane {
        /// Index of the lane, from zero.
        lane: usize,
        /// What was being done.
        operation: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The peer closed a lane in an orderly way before it was asked to.
    #[error("lane {lane}: the peer closed the connection")]
    Closed {
        /// Index of the lane, from zero.
        lane: usize,
    },
    /// The peer sent something that the protocol does not allow.
    #[error("lane {lane}: the peer broke the lane protocol: {what}")]
    Protocol {
        /// Index of the lane, from zero.
        lane: usize,
        /// What was wrong with it.
        what: String,
    },
    /// A work request of a lane completed in error; the whole link is unusable from here on.
    #[error(
        "lane {lane}: {operation} of {len} bytes at remote address {addr:#x} failed: {status} (vendor code {vendor:#x})"
    )]
    Work {
        /// Index of the lane, from zero.
        lane: usize,
        /// What the work request was.
        operation: &'static str,
        /// Where it went, in the target's terms; zero if it has no such address.
        addr: u64,
        /// Its length in bytes.
        len: u32,
        /// What the device says.
        status: String,
        /// What the device says in its vendor's own numbers.
        vendor: u32,
    },
    /// The device that carries the link, or the connection manager, reported an end to it.
    #[error("{device}: {event}")]
    Device {
        /// Name of the device.
        device: String,
        /// What happened.
        event: String,
    },
    /// There is no way of this kind from here to there; another transport may have one.
    #[error("no RDMA path: {what}")]
    NoPath {
        /// Which address or device, why, and the fix where there is one.
        what: String,
    },
    /// A wait ended at its deadline.
    #[error("timed out while waiting for {what}")]
    Timeout {
        /// What did not come.
        what: &'static str,
    },
    /// A region, slice or address that does not fit what was registered.
    #[error("{what}")]
    Bounds {
        /// Which check failed, with the numbers.
        what: String,
    },
    /// A system call on local memory or local set-up failed.
    #[error("{what}")]
    Os {
        /// What was being done, and the fix where there is one.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A step of the link's life was asked for in the wrong order.
    #[error("{0}")]
    State(&'static str),
}

/// Result of every fallible call in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failed system call, with what was being done.
    pub fn os(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Os { what: what.into(), source: source.into() }
    }

    /// Whether it was the peer that ended a lane: it knows why, and may say so elsewhere.
    #[must_use]
    pub fn is_the_peers_end(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
        match self {
            Self::Closed { .. } => true,
            Self::Lane { source, .. } => {
                matches!(source.kind(), BrokenPipe | ConnectionAborted | ConnectionReset)
            }
            _ => false,
        }
    }
}
