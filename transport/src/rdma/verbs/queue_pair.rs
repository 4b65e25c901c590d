//! A reliable connected queue pair with its completion queue and the buffers of its messages: the
//! device's side of a lane.

use super::cm::{Id, code_to_io};
use crate::error::{Error, Result};
use crate::rdma::lane::chain::{Chain, Local};
use crate::rdma::lane::message::MESSAGE_BYTES;
use crate::rdma::lane::queue::{DONE_MAX, Done, Queue, RECEIVE};
use crate::rdma::verbs::objects::{CompletionQueue, Completions, Domain, Registration};
use crate::region::MemoryRegion;
use rdma_sys::{
    IBV_ACCESS_LOCAL_WRITE, IBV_QPT_RC, IBV_WC_RECV_RDMA_WITH_IMM, IBV_WC_SUCCESS, ibv_qp,
    ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, ibv_recv_wr, ibv_sge, ibv_wc,
};
use std::ffi::c_int;
use std::io;
use std::sync::Arc;

/// What a peer waits before it tries again where the receive queue was empty: 0.64 ms. rdma_cm's
/// own choice is the longest that there is, 655 ms.
const NOT_READY_TIMER: u8 = 12;

/// How many work requests a queue pair holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Depths {
    pub(crate) sends: usize,
    pub(crate) receives: usize,
    /// Messages of this side on their way at most.
    pub(crate) messages: usize,
}

pub(crate) struct VerbsQueue {
    /// Null when it has been destroyed.
    queue_pair: *mut ibv_qp,
    id: Arc<Id>,
    completions: CompletionQueue,
    /// Of receives first, then of messages that are sent.
    buffers: Arc<MemoryRegion>,
    registration: Registration,
    depths: Depths,
    _domain: Arc<Domain>,
}

// SAFETY: used by one thread at a time, which owns it.
unsafe impl Send for VerbsQueue {}

impl VerbsQueue {
    /// Makes the queue pair of `id`, with every receive posted: connect or accept after this.
    pub(crate) fn new(
        domain: &Arc<Domain>,
        id: &Arc<Id>,
        channel: &Arc<Completions>,
        depths: Depths,
    ) -> Result<Self> {
        assert!(id.context() == domain.id().context(), "the caller keeps all lanes on one device");
        // A whole flush: every send and every receive ends in a completion of its own.
        let completions = CompletionQueue::new(channel, depths.sends + depths.receives)?;
        let bytes = (depths.receives + depths.messages) * MESSAGE_BYTES;
        let buffers = MemoryRegion::anonymous(bytes)?;
        let access = IBV_ACCESS_LOCAL_WRITE;
        let registration = Registration::new(domain, &buffers, &(0..bytes), None, access)
            .map_err(|e| crate::rdma::memory::lock_limit::error(bytes as u64, bytes as u64, &e))?;
        let mut attributes = ibv_qp_init_attr {
            send_cq: completions.raw(),
            recv_cq: completions.raw(),
            cap: ibv_qp_cap {
                max_send_wr: count(depths.sends),
                max_recv_wr: count(depths.receives),
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: IBV_QPT_RC,
            ..ibv_qp_init_attr::default()
        };
        // SAFETY: on one device, and this object keeps domain and completion queue longer.
        let queue_pair =
            unsafe { id.create_queue_pair(domain.raw(), &mut attributes) }.map_err(|e| {
                Error::os(format!("creating a queue pair with {} work requests", depths.sends), e)
            })?;
        let id = Arc::clone(id);
        let _domain = Arc::clone(domain);
        let mut this = Self { queue_pair, id, completions, buffers, registration, depths, _domain };
        for slot in 0..depths.receives {
            this.replenish(slot).map_err(|e| {
                Error::os("filling a receive queue", io::Error::from_raw_os_error(e))
            })?;
        }
        Ok(this)
    }

    pub(crate) fn id(&self) -> &Arc<Id> {
        &self.id
    }

    /// Tells queue pairs apart in asynchronous events.
    pub(crate) fn name(&self) -> usize {
        self.queue_pair.addr()
    }

    /// Once connected: what the device chose for the path.
    pub(crate) fn attributes(&self) -> io::Result<ibv_qp_attr> {
        // SAFETY: the queue pair is that of `id`, and alive: only `close` ends it, which takes
        // `&mut`.
        unsafe { self.id.query_queue_pair(self.queue_pair) }
    }

    /// Once connected: shortens what the peer would wait if our receive queue were ever empty.
    pub(crate) fn shorten_not_ready(&self) {
        let mut attributes =
            ibv_qp_attr { min_rnr_timer: NOT_READY_TIMER, ..ibv_qp_attr::default() };
        let mask = rdma_sys::IBV_QP_MIN_RNR_TIMER as c_int;
        let verbs = &self.id.libraries().verbs;
        // SAFETY: the queue pair is alive.
        let code = unsafe { verbs.ibv_modify_qp(self.queue_pair, &raw mut attributes, mask) };
        if let Err(e) = code_to_io(code) {
            tracing::debug!("the receiver-not-ready timer stays as it is: {e}");
        }
    }

    fn buffer(&self, slot: usize, len: usize) -> Local {
        let at = slot * MESSAGE_BYTES;
        debug_assert!(at + len <= self.buffers.len());
        let addr = self.buffers.as_ptr().wrapping_add(at).addr() as u64;
        Local { addr, len: len as u32, key: self.registration.local_key() }
    }
}

impl Queue for VerbsQueue {
    fn post(&mut self, chain: &mut Chain) -> Result<(), i32> {
        if self.queue_pair.is_null() {
            return Err(libc::ENOTCONN);
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: the queue pair is alive; the chain is linked for this call; the memory it names
        // is registered, and stays so until the link has destroyed its queue pairs.
        errno(unsafe { rdma_sys::ibv_post_send(self.queue_pair, chain.linked(), &raw mut bad) })
    }

    fn poll(&mut self, done: &mut [Done; DONE_MAX]) -> Result<usize, i32> {
        let mut raw = [ibv_wc::default(); DONE_MAX];
        // SAFETY: the completion queue lives as long as `self`, and there is room for so many.
        let count = unsafe {
            rdma_sys::ibv_poll_cq(self.completions.raw(), DONE_MAX as c_int, raw.as_mut_ptr())
        };
        let count =
            usize::try_from(count).map_err(|_| if count == -1 { libc::EIO } else { -count })?;
        for (done, raw) in done.iter_mut().zip(&raw[..count.min(DONE_MAX)]) {
            // Nothing but identifier, status and vendor code is valid if it failed.
            let came = raw.status == IBV_WC_SUCCESS && raw.wr_id & RECEIVE != 0;
            let with_value = came && raw.opcode == IBV_WC_RECV_RDMA_WITH_IMM;
            let len = if came { raw.byte_len } else { 0 };
            *done =
                Done { id: raw.wr_id, status: raw.status, vendor: raw.vendor_err, len, with_value };
        }
        Ok(count.min(DONE_MAX))
    }

    fn replenish(&mut self, slot: usize) -> Result<(), i32> {
        if slot >= self.depths.receives || self.queue_pair.is_null() {
            return Err(libc::EINVAL);
        }
        let Local { addr, len, key } = self.buffer(slot, MESSAGE_BYTES);
        let mut piece = ibv_sge { addr, length: len, lkey: key };
        let mut request = ibv_recv_wr {
            wr_id: RECEIVE | slot as u64,
            sg_list: &raw mut piece,
            num_sge: 1,
            ..ibv_recv_wr::default()
        };
        let mut bad = std::ptr::null_mut();
        // SAFETY: the queue pair is alive; the request is read within the call; its buffer is
        // registered as long as the queue pair lives.
        errno(unsafe { rdma_sys::ibv_post_recv(self.queue_pair, &raw mut request, &raw mut bad) })
    }

    fn received(&self, slot: usize) -> Result<[u8; MESSAGE_BYTES], i32> {
        let mut bytes = [0; MESSAGE_BYTES];
        let read = self.buffers.read(slot.saturating_mul(MESSAGE_BYTES), &mut bytes);
        read.map_err(|_| libc::EINVAL)?;
        Ok(bytes)
    }

    fn put(&mut self, slot: usize, bytes: &[u8]) -> Result<Local, i32> {
        let slot = self.depths.receives + slot;
        self.buffers.write(slot * MESSAGE_BYTES, bytes).map_err(|_| libc::EINVAL)?;
        Ok(self.buffer(slot, bytes.len()))
    }

    fn arm(&mut self) -> Result<(), i32> {
        // SAFETY: the completion queue lives as long as `self`.
        errno(unsafe { rdma_sys::ibv_req_notify_cq(self.completions.raw(), 0) })
    }

    fn close(&mut self, healthy: bool) {
        if self.queue_pair.is_null() {
            return;
        }
        // Tells the peer, and moves the queue pair into the error state: it takes nothing any more.
        self.id.disconnect(healthy);
        // SAFETY: made by `new` and destroyed here only; `queue_pair` says so from now on.
        unsafe { self.id.destroy_queue_pair() };
        self.queue_pair = std::ptr::null_mut();
    }
}

impl Drop for VerbsQueue {
    fn drop(&mut self) {
        self.close(false);
    }
}

/// Some providers say minus one and set errno.
fn errno(code: c_int) -> Result<(), i32> {
    code_to_io(code).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
}

fn count(depth: usize) -> u32 {
    u32::try_from(depth).expect("depths are small constants, or limits of a device")
}
