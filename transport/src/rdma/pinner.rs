//! Registers memory with the device, for either end.

use super::keys::Pins;
use super::memory_lock;
use super::registrar::{Hold, Pinner};
use super::verbs::{Domain, Registration};
use crate::failure::LaneFailure;
use rdma_sys::{IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_WRITE};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
}

impl DevicePinner {
    pub(crate) fn new(domain: &Arc<Domain>, side: Side) -> Self {
        Self { domain: Arc::clone(domain), side, pinned_bytes: AtomicU64::new(0) }
    }
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
        let registration =
            Registration::new(&self.domain, pins.region(), &bytes, address, access).map_err(|e| {
                // At least this region, and whatever was pinned of others before.
                let pinned = self.pinned_bytes.load(Ordering::Relaxed);
                memory_lock::failure(len, (pinned + len).max(pins.region().len() as u64), &e)
            })?;
        self.pinned_bytes.fetch_add(len, Ordering::Relaxed);
        let key = match self.side {
            Side::Initiator => registration.local_key(),
            Side::Target => registration.remote_key(),
        };
        Ok((key, Box::new(registration)))
    }
}
