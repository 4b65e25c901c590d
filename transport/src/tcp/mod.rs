//! The link over TCP: a connection a lane, a thread and an io_uring a lane at each end.
//!
//! ```text
//!   initiator                                          target
//!   post --> inbox --> sender thread                   receiver thread --> exposed region
//!                       sendmsg: header, descriptors,   recvmsg: header, descriptors; check;
//!                       payload out of the region  ==>  payload into the region
//!   poll <-- events <-- recv fence ack             <--  fence ack  --> wait_fence
//! ```
//!
//! No byte of payload is copied in user space at either end. One message is sent at a time on a
//! lane: io_uring promises no order between two.

mod frame;
mod inbox;
mod initiator;
mod outgoing;
mod placement;
mod receiver;
pub(crate) mod ring;
mod sender;
mod socket;
mod target;
mod vector;
mod zero_copy;

#[cfg(test)]
mod tests;

pub use initiator::TcpInitiator;
pub use socket::Socket;
pub use target::TcpTarget;
pub use zero_copy::ZeroCopy;

use crate::error::{Error, Result};
use crate::preamble::LANES_MAX;
use crate::region::MemoryRegion;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::Duration;

/// How a TCP link is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpOptions {
    /// Whether to send with zero-copy.
    pub zero_copy: ZeroCopy,
    /// Bytes in flight on each lane at most. A few frames: one is being sent while the next gather.
    pub window_bytes: u64,
    /// Work requests in flight on each lane at most.
    pub window_requests: usize,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self { zero_copy: ZeroCopy::default(), window_bytes: 8 << 20, window_requests: 4096 }
    }
}

/// How long a peer may leave sent bytes unacknowledged, or a quiet connection's probes unanswered,
/// before the lane is given up. A migration's own deadlines are longer than this.
const PEER_TIMEOUT: Duration = Duration::from_secs(10);

/// Probes of a quiet connection: the first after this, then one a [`PROBE_INTERVAL`].
const PROBE_AFTER: Duration = Duration::from_secs(4);
const PROBE_INTERVAL: Duration = Duration::from_secs(2);

/// How long a thread that ends waits for the kernel to let go of its buffers. The socket is shut
/// down by then, so this is a matter of microseconds.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);

/// Fails, with the fix, where this host's io_uring cannot carry a lane.
pub fn probe() -> Result<()> {
    ring::Ring::new().map(drop)
}

/// The regions that an initiator sends from: kept mapped for the life of its link, so that a posted
/// piece needs no reference count of its own.
#[derive(Debug, Default)]
struct Regions(RwLock<Vec<Arc<MemoryRegion>>>);

impl Regions {
    fn add(&self, region: &Arc<MemoryRegion>) {
        let mut regions = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if !regions.iter().any(|held| Arc::ptr_eq(held, region)) {
            regions.push(Arc::clone(region));
        }
    }

    fn list(&self) -> RwLockReadGuard<'_, Vec<Arc<MemoryRegion>>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn check_lanes<S>(streams: &[S]) -> Result<()> {
    if streams.is_empty() || streams.len() > LANES_MAX {
        return Err(Error::Bounds {
            what: format!("a link of {} lanes (1 to {LANES_MAX} are possible)", streams.len()),
        });
    }
    Ok(())
}

/// Sets a lane's socket up.
fn prepare(lane: usize, socket: &Socket) -> Result<()> {
    socket.prepare().map_err(|e| Error::Lane {
        lane,
        operation: "setting up its socket",
        source: e,
    })
}

fn spawn<T: Send + 'static>(
    name: String,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    std::thread::Builder::new()
        .name(name)
        .spawn(run)
        .map_err(|e| Error::os("starting the thread of a lane", e))
}
