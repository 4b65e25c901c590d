//! What broke a lane, kept so that every later call can say it again: [`Error`] holds an
//! `io::Error` and cannot be cloned.

use crate::error::Error;
use std::io;

/// The first thing that went wrong on a link.
#[derive(Debug, Clone)]
pub(crate) enum LaneFailure {
    /// The kernel refused an operation.
    Os { lane: usize, operation: &'static str, errno: i32 },
    /// The peer closed the connection.
    Closed { lane: usize },
    /// The peer sent what the protocol does not allow.
    Protocol { lane: usize, what: String },
    /// A work request completed in error.
    Work { lane: usize, operation: &'static str, addr: u64, len: u32, status: String, vendor: u32 },
    /// A queue pair's work was flushed and nothing said why: somebody else knows, and may tell
    /// later.
    Flushed { lane: usize },
    /// The device or the connection manager reported an end.
    Device { device: String, event: String },
    /// Memory could not be made ready.
    Memory { what: String, errno: i32 },
}

impl LaneFailure {
    /// A failed system call on `lane`. A connection that the peer reset or closed while we were
    /// writing is reported as what it is.
    pub(crate) fn os(lane: usize, operation: &'static str, error: &io::Error) -> Self {
        Self::Os { lane, operation, errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }
}

impl From<&LaneFailure> for Error {
    fn from(failure: &LaneFailure) -> Self {
        match failure {
            LaneFailure::Os { lane, operation, errno } => {
                Self::Lane { lane: *lane, operation, source: io::Error::from_raw_os_error(*errno) }
            }
            LaneFailure::Closed { lane } => Self::Closed { lane: *lane },
            LaneFailure::Protocol { lane, what } => {
                Self::Protocol { lane: *lane, what: what.clone() }
            }
            LaneFailure::Work { lane, operation, addr, len, status, vendor } => Self::Work {
                lane: *lane,
                operation,
                addr: *addr,
                len: *len,
                status: status.clone(),
                vendor: *vendor,
            },
            LaneFailure::Flushed { lane } => Self::Lane {
                lane: *lane,
                operation: "working on a queue pair that the device has given up",
                source: io::Error::from_raw_os_error(libc::ECONNABORTED),
            },
            LaneFailure::Device { device, event } => {
                Self::Device { device: device.clone(), event: event.clone() }
            }
            LaneFailure::Memory { what, errno } => {
                Self::os(what.clone(), io::Error::from_raw_os_error(*errno))
            }
        }
    }
}
