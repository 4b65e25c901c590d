//! Registers memory with the device, for either end.

use super::keys::Pins;
use super::registrar::{Hold, Pinner};
use crate::failure::LaneFailure;
use crate::rdma::memory::lock_limit;
use crate::rdma::verbs::objects::{Domain, Registration};
use crate::region::MemoryRegion;
use rdma_sys::{IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_RELAXED_ORDERING, IBV_ACCESS_REMOTE_WRITE};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Which keys are handed out, and what they allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The device reads this memory for us, which may be mapped read-only.
    Initiator,
    /// The peer's device writes it.
    Target,
}

pub(crate) struct DevicePinner {
    domain: Arc<Domain>,
    side: Side,
    /// For the error that says what is needed.
    pinned_bytes: AtomicU64,
    /// Whether the device may write memory in an order of its own, which it has not refused so far.
    relaxed: AtomicBool,
}

impl DevicePinner {
    pub(crate) fn new(domain: &Arc<Domain>, side: Side) -> Self {
        Self {
            domain: Arc::clone(domain),
            side,
            pinned_bytes: AtomicU64::new(0),
            relaxed: AtomicBool::new(true),
        }
    }
}

impl DevicePinner {
    /// With relaxed ordering, if the device takes that: no memory is written twice between two
    /// fences.
    fn register(
        &self,
        region: &Arc<MemoryRegion>,
        bytes: &Range<usize>,
        address: Option<u64>,
        access: u32,
    ) -> io::Result<Registration> {
        if self.relaxed.load(Ordering::Relaxed) {
            let access = access | IBV_ACCESS_RELAXED_ORDERING;
            match Registration::new(&self.domain, region, bytes, address, access) {
                Err(e) if refuses_flags(&e) => {
                    tracing::debug!("the device takes no relaxed ordering: {e}");
                    self.relaxed.store(false, Ordering::Relaxed);
                }
                other => return other,
            }
        }
        Registration::new(&self.domain, region, bytes, address, access)
    }
}

/// Whether a registration failed in a way that a flag it does not know may be the reason of.
pub(crate) fn refuses_flags(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

impl Pinner for DevicePinner {
    fn pin(&self, pins: &Pins, bytes: Range<usize>) -> Result<(u32, Hold), LaneFailure> {
        let (access, address) = match self.side {
            Side::Initiator => (0, None),
            Side::Target => (
                IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE,
                pins.base().map(|base| base + bytes.start as u64),
            ),
        };
        let len = bytes.len() as u64;
        let registration = self.register(pins.region(), &bytes, address, access).map_err(|e| {
            // At least this region, and whatever was pinned of others before.
            let pinned = self.pinned_bytes.load(Ordering::Relaxed);
            lock_limit::failure(len, (pinned + len).max(pins.region().len() as u64), &e)
        })?;
        self.pinned_bytes.fetch_add(len, Ordering::Relaxed);
        let key = match self.side {
            Side::Initiator => registration.local_key(),
            Side::Target => registration.remote_key(),
        };
        Ok((key, Box::new(registration)))
    }
}
