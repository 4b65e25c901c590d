//! Objects of libibverbs that clean up after themselves.
//!
//! ```text
//!   Id (holds the device open) <-- Domain <-- Registration --> MemoryRegion
//!                              <-- Completions (channel) <-- CompletionQueue
//! ```
//!
//! Each holds what it stands on, so dropping them in any order is right.

use super::cm::{Id, code_to_io};
use crate::error::{Error, Result};
use crate::region::MemoryRegion;
use rdma_sys::{ibv_comp_channel, ibv_cq, ibv_mr, ibv_pd};
use std::ffi::c_int;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// A protection domain: only queue pairs and registrations of one domain know each other, and every
/// link has one of its own.
pub(crate) struct Domain {
    raw: *mut ibv_pd,
    id: Arc<Id>,
}

// SAFETY: libibverbs' objects may be used by any thread; what is not thread safe is kept behind
// `&mut` by those who hold it.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    /// On the device of `id`, which is known by then.
    pub(crate) fn new(id: &Arc<Id>) -> Result<Arc<Self>> {
        assert!(!id.context().is_null(), "the caller has resolved or accepted the address");
        // SAFETY: the context is open as long as the identifier lives.
        let raw = unsafe { id.libraries().verbs.ibv_alloc_pd(id.context()) };
        if raw.is_null() {
            return Err(last_error("allocating a protection domain"));
        }
        Ok(Arc::new(Self { raw, id: Arc::clone(id) }))
    }

    pub(crate) fn raw(&self) -> *mut ibv_pd {
        self.raw
    }

    pub(crate) fn id(&self) -> &Arc<Id> {
        &self.id
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: registrations hold the domain, and queue pairs are destroyed by those who hold
        // it.
        complain("a protection domain", unsafe {
            self.id.libraries().verbs.ibv_dealloc_pd(self.raw)
        });
    }
}

/// Memory that the device knows.
pub(crate) struct Registration {
    raw: *mut ibv_mr,
    domain: Arc<Domain>,
    /// Mapped as long as the device knows it.
    _region: Arc<MemoryRegion>,
}

// SAFETY: as for the domain.
unsafe impl Send for Registration {}

impl Registration {
    /// Registers these bytes of the region, by the name `address` if there is one and by their own
    /// otherwise. Pins them: it takes as long as faulting them in.
    pub(crate) fn new(
        domain: &Arc<Domain>,
        region: &Arc<MemoryRegion>,
        bytes: &Range<usize>,
        address: Option<u64>,
        access: u32,
    ) -> io::Result<Self> {
        assert!(
            region.check(bytes.start, bytes.len()).is_ok() && !bytes.is_empty(),
            "checked by the caller"
        );
        let libraries = domain.id.libraries();
        let start = region.as_ptr().wrapping_add(bytes.start);
        // SAFETY: the range lies in the region's mapping, which this object keeps.
        let raw = unsafe {
            match (address, &libraries.verbs_1_8) {
                (Some(address), Some(newer)) => newer.ibv_reg_mr_iova(
                    domain.raw,
                    start.cast(),
                    bytes.len(),
                    address,
                    access as c_int,
                ),
                (Some(_), None) => return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
                (None, _) => libraries.verbs.ibv_reg_mr(
                    domain.raw,
                    start.cast(),
                    bytes.len(),
                    access as c_int,
                ),
            }
        };
        if raw.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { raw, domain: Arc::clone(domain), _region: Arc::clone(region) })
    }

    /// For work requests of this side.
    pub(crate) fn local_key(&self) -> u32 {
        // SAFETY: lives as long as `self`.
        unsafe { (*self.raw).lkey }
    }

    /// For work requests of the other side.
    pub(crate) fn remote_key(&self) -> u32 {
        // SAFETY: lives as long as `self`.
        unsafe { (*self.raw).rkey }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: nothing of this process uses the key after this; a peer that does gets an error.
        complain("a registration", unsafe {
            self.domain.id.libraries().verbs.ibv_dereg_mr(self.raw)
        });
    }
}

/// Tells that completion queues have something.
pub(crate) struct Completions {
    raw: *mut ibv_comp_channel,
    id: Arc<Id>,
}

// SAFETY: as for the domain.
unsafe impl Send for Completions {}
// SAFETY: as for the domain.
unsafe impl Sync for Completions {}

impl Completions {
    pub(crate) fn new(id: &Arc<Id>) -> Result<Arc<Self>> {
        // SAFETY: the context is open as long as the identifier lives.
        let raw = unsafe { id.libraries().verbs.ibv_create_comp_channel(id.context()) };
        if raw.is_null() {
            return Err(last_error("creating a completion channel"));
        }
        let this = Self { raw, id: Arc::clone(id) };
        rustix::io::ioctl_fionbio(this.fd(), true)
            .map_err(|e| Error::os("setting up a completion channel", e))?;
        Ok(Arc::new(this))
    }

    /// Readable when an armed queue has got a completion.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel and its descriptor live as long as `self`.
        unsafe { BorrowedFd::borrow_raw((*self.raw).fd) }
    }

    /// Takes every event that there is. The queues must be looked at after this.
    pub(crate) fn silence(&self) {
        loop {
            let (mut cq, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
            let verbs = &self.id.libraries().verbs;
            // SAFETY: the channel lives, and both pointers may be written.
            if unsafe { verbs.ibv_get_cq_event(self.raw, &raw mut cq, &raw mut context) } != 0 {
                return;
            }
            // At once: a queue with events that were not acknowledged cannot be destroyed.
            // SAFETY: the library just handed it out, and queues hold the channel.
            unsafe { verbs.ibv_ack_cq_events(cq, 1) };
        }
    }
}

impl Drop for Completions {
    fn drop(&mut self) {
        // SAFETY: queues hold the channel, so none is left.
        complain("a completion channel", unsafe {
            self.id.libraries().verbs.ibv_destroy_comp_channel(self.raw)
        });
    }
}

/// Where completions arrive.
pub(crate) struct CompletionQueue {
    raw: *mut ibv_cq,
    channel: Arc<Completions>,
}

// SAFETY: as for the domain.
unsafe impl Send for CompletionQueue {}

impl CompletionQueue {
    pub(crate) fn new(channel: &Arc<Completions>, depth: usize) -> Result<Self> {
        let depth =
            c_int::try_from(depth).map_err(|_| Error::State("a completion queue that deep"))?;
        let id = &channel.id;
        // SAFETY: context and channel belong together and live as long as this object.
        let raw = unsafe {
            id.libraries().verbs.ibv_create_cq(
                id.context(),
                depth,
                std::ptr::null_mut(),
                channel.raw,
                0,
            )
        };
        if raw.is_null() {
            return Err(last_error(format!("creating a completion queue of {depth} entries")));
        }
        Ok(Self { raw, channel: Arc::clone(channel) })
    }

    pub(crate) fn raw(&self) -> *mut ibv_cq {
        self.raw
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: whoever made a queue pair with it has destroyed that before, and every event was
        // acknowledged when it was read; one that was not read is thrown away.
        complain("a completion queue", unsafe {
            self.channel.id.libraries().verbs.ibv_destroy_cq(self.raw)
        });
    }
}

fn last_error(what: impl Into<String>) -> Error {
    Error::os(what, io::Error::last_os_error())
}

/// Nobody can do anything about it: usually the device has gone, and its objects with it.
fn complain(what: &str, code: c_int) {
    if let Err(e) = code_to_io(code) {
        tracing::debug!("giving up {what}: {e}");
    }
}
