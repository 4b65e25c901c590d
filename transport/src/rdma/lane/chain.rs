//! Work requests that are posted in one call, chained as the device takes them.

use rdma_sys::{IBV_SEND_SIGNALED, IBV_WR_RDMA_WRITE, IBV_WR_SEND, ibv_send_wr, ibv_sge};

/// Work requests of one chain, which costs one doorbell: a whole batch of the engine's pump.
pub(crate) const CHAIN_MAX: usize = 256;

/// Memory of this side, as a work request names it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Local {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) key: u32,
}

/// What a work request does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operation {
    Write { local: Local, addr: u64, key: u32 },
    Send { local: Local },
}

/// Work requests that are about to be posted together, built in place.
pub(crate) struct Chain {
    requests: Box<[ibv_send_wr]>,
    pieces: Box<[ibv_sge]>,
    len: usize,
}

// SAFETY: the pointers in it are set by `linked` for the call that follows and point to its own
// memory; nothing reads them at another time.
unsafe impl Send for Chain {}

impl Chain {
    pub(crate) fn new() -> Self {
        let piece = ibv_sge { addr: 0, length: 0, lkey: 0 };
        Self { requests: [BLANK; CHAIN_MAX].into(), pieces: [piece; CHAIN_MAX].into(), len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Adds one; the lane flushes before there are more than [`CHAIN_MAX`].
    #[inline]
    pub(crate) fn push(&mut self, id: u64, operation: Operation, signalled: bool) {
        let (request, piece) = (&mut self.requests[self.len], &mut self.pieces[self.len]);
        self.len += 1;
        // Fields that an opcode does not use keep what an earlier request had there.
        request.wr_id = id;
        request.send_flags = if signalled { IBV_SEND_SIGNALED } else { 0 };
        let mut take = |local: Local| {
            *piece = ibv_sge { addr: local.addr, length: local.len, lkey: local.key };
            1
        };
        match operation {
            Operation::Write { local, addr, key } => {
                request.opcode = IBV_WR_RDMA_WRITE;
                request.num_sge = take(local);
                request.wr.rdma.remote_addr = addr;
                request.wr.rdma.rkey = key;
            }
            Operation::Send { local } => {
                request.opcode = IBV_WR_SEND;
                request.num_sge = take(local);
            }
        }
    }

    /// Has the last of the chain make a completion.
    pub(crate) fn signal_last(&mut self) {
        if let Some(last) = self.requests[..self.len].last_mut() {
            last.send_flags |= IBV_SEND_SIGNALED;
        }
    }

    /// Its work requests in the order of their execution. Their pointers mean nothing.
    pub(crate) fn requests(&self) -> &[ibv_send_wr] {
        &self.requests[..self.len]
    }

    /// The first of the chain, for the call that posts it. Null if there is none.
    pub(crate) fn linked(&mut self) -> *mut ibv_send_wr {
        let count = self.len();
        if count == 0 {
            return std::ptr::null_mut();
        }
        let (first, pieces) = (self.requests.as_mut_ptr(), self.pieces.as_mut_ptr());
        for index in 0..count {
            let next = if index + 1 < count {
                first.wrapping_add(index + 1)
            } else {
                std::ptr::null_mut()
            };
            // SAFETY: both have `count` elements or more, and nothing else touches them meanwhile.
            unsafe {
                let request = first.add(index);
                (*request).next = next;
                (*request).sg_list = pieces.add(index);
            }
        }
        first
    }
}

/// A work request that does nothing yet.
// SAFETY: integers, null pointers and unions of such: zero is a value of each.
const BLANK: ibv_send_wr = unsafe { std::mem::zeroed() };
