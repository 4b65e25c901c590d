//! Parts of a run that one work request can carry: within one slot and one stripe, and not all
//! zeros.

use super::Pump;
use crate::error::{Error, Result};
use crate::memory::bitmap::DirtyBitmap;
use crate::memory::page::{PAGE_BYTES, PageRun};
use pageferry_transport::{
    MemoryRegion, RemoteAddr, RemoteRegion, STRIPE_BYTES, WorkId, WorkRequest,
};
use std::ops::Range;
use std::sync::Arc;

/// A run of pages within one slot, and where in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(super) run: PageRun,
    pub(super) slot: usize,
    /// Of its first byte in the slot.
    pub(super) offset: u64,
}

impl Piece {
    /// The pages from `first` to before `end` of it.
    pub(super) fn part(self, first: u64, end: u64) -> Self {
        let offset = self.offset + (first - self.run.first.0) * PAGE_BYTES;
        Self { run: PageRun::between(first, end), offset, ..self }
    }
}

impl Pump<'_> {
    /// The first run of a piece that must be sent: not (never sent, and zero).
    #[inline]
    pub(super) fn without_zeros(&self, piece: Piece) -> Result<Option<Piece>> {
        let needless =
            |page: u64| Ok::<_, Error>(!self.sent.contains(page) && self.memory.is_zero(page)?);
        let (mut first, last) = (piece.run.first.0, piece.run.end());
        while first < last && needless(first)? {
            first += 1;
        }
        if first == last {
            return Ok(None);
        }
        let mut end = first + 1;
        while end < last && !needless(end)? {
            end += 1;
        }
        Ok(Some(piece.part(first, end)))
    }

    /// Writes of a part of a region to the same part of another, a stripe each at most.
    pub(super) fn writes(
        &mut self,
        local: &Arc<MemoryRegion>,
        remote: RemoteRegion,
        part: Range<usize>,
    ) -> Result<Vec<WorkRequest>> {
        let (mut writes, mut at) = (Vec::new(), part.start);
        while at < part.end {
            let addr = remote.base + at as u64;
            let piece = ((part.end - at) as u64).min(STRIPE_BYTES - addr % STRIPE_BYTES) as usize;
            let remote = RemoteAddr { key: remote.key, addr };
            writes.push(WorkRequest { id: self.id(), local: local.slice(at, piece)?, remote });
            at += piece;
        }
        Ok(writes)
    }

    /// The first run of dirty pages at or after `at` that one work request can carry: within one
    /// slot and one stripe of the remote address.
    #[inline]
    pub(super) fn next_piece(&self, dirty: &DirtyBitmap, at: u64) -> Option<Piece> {
        Some(self.first_piece(dirty.next_run(at, STRIPE_BYTES / PAGE_BYTES)?))
    }

    /// The first part of a run that one work request can carry.
    #[inline]
    pub(super) fn first_piece(&self, run: PageRun) -> Piece {
        let first = run.first.0;
        let (slot, offset) = self.memory.locate(first);
        let slot_end = self.memory.slots()[slot].run().end();
        let addr = self.slots[slot].base + offset;
        let stripe_pages = (STRIPE_BYTES - addr % STRIPE_BYTES).div_ceil(PAGE_BYTES);
        let run = PageRun::between(first, run.end().min(slot_end).min(first + stripe_pages));
        Piece { run, slot, offset }
    }

    #[inline]
    pub(super) fn request(&mut self, Piece { run, slot, offset }: Piece) -> Result<WorkRequest> {
        let remote = self.slots[slot];
        let id = self.id();
        let local =
            self.memory.slots()[slot].region().slice(offset as usize, run.bytes() as usize)?;
        Ok(WorkRequest {
            id,
            local,
            remote: RemoteAddr { key: remote.key, addr: remote.base + offset },
        })
    }

    /// Puts the request for a piece at this place of a batch. The one that an earlier batch left
    /// there is made over, because counting references to a mapping up and down costs a page a
    /// fifth of its time.
    #[inline]
    pub(super) fn put(
        &mut self,
        piece: Piece,
        batch: &mut Vec<WorkRequest>,
        at: usize,
    ) -> Result<()> {
        let Piece { run, slot, offset } = piece;
        match batch.get_mut(at) {
            Some(old) if Arc::ptr_eq(old.local.region(), self.memory.slots()[slot].region()) => {
                let remote = self.slots[slot];
                old.local.set(offset as usize, run.bytes() as usize)?;
                old.remote = RemoteAddr { key: remote.key, addr: remote.base + offset };
                old.id = self.id();
            }
            Some(old) => *old = self.request(piece)?,
            None => batch.push(self.request(piece)?),
        }
        Ok(())
    }

    pub(super) fn id(&mut self) -> WorkId {
        self.next_id += 1;
        WorkId(self.next_id)
    }
}
