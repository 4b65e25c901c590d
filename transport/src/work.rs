//! Work requests and completions: what is posted to a link, and what comes back.

use crate::error::{Error, Result};
use crate::region::{LocalSlice, RemoteKey};
use crate::stripe::STRIPE_BYTES;

/// The caller's name for a write; comes back unchanged in its completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkId(pub u64);

/// The caller's name for a fence. Tags of one link must be used in rising order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FenceTag(pub u32);

/// A place in memory that the target exposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteAddr {
    /// Key of the exposed region.
    pub key: RemoteKey,
    /// Address in the target's terms, within `[base, base + len)` of that region.
    pub addr: u64,
}

/// One one-sided write: `local` is placed at `remote`. It must not cross a stripe boundary
/// ([`crate::STRIPE_BYTES`]) of the remote address.
#[derive(Debug, Clone)]
pub struct WorkRequest {
    /// Comes back in [`Completion::Write`].
    pub id: WorkId,
    /// Where the bytes are; keeps their mapping alive until the completion.
    pub local: LocalSlice,
    /// Where they go.
    pub remote: RemoteAddr,
}

impl WorkRequest {
    /// The rules that every link holds a request to, whatever carries it.
    pub(crate) fn check(&self) -> Result<()> {
        let (addr, len) = (self.remote.addr, self.local.len() as u64);
        if len == 0 {
            return Err(Error::Bounds { what: format!("a write of zero bytes to {addr:#x}") });
        }
        match addr.checked_add(len - 1) {
            Some(last) if last / STRIPE_BYTES == addr / STRIPE_BYTES => Ok(()),
            _ => Err(Error::Bounds {
                what: format!(
                    "a write of {len} bytes to {addr:#x} crosses a stripe of {STRIPE_BYTES:#x} bytes: split it there"
                ),
            }),
        }
    }
}

/// What [`crate::Initiator::poll`] hands back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// The link is done with the local memory of this write.
    Write(WorkId),
    /// The target's link has received this fence on every lane.
    Fence(FenceTag),
}
