//! Memory that was taken away from the guest after it was sent.

use super::Pump;
use crate::error::Result;
use crate::memory::bitmap::DirtyBitmap;
use crate::memory::holes::Freed;
use crate::memory::page::PageRun;
use crate::source::pump::BATCH;
use crate::watch::Watch;
use pageferry_transport::MemoryRegion;
use std::sync::Arc;
use std::time::{Duration, Instant};

impl Pump<'_> {
    /// These pages are about to be read. Once the guest is paused nothing is taken away any
    /// more.
    #[inline]
    pub(super) fn note(&mut self, run: PageRun) -> Result<()> {
        match &mut self.witness {
            Some(witness) if self.registrations_before.is_none() => witness.note(self.memory, run),
            _ => Ok(()),
        }
    }

    /// How long looking for what the guest gave back takes: what [`Self::push_freed`] costs where
    /// there is none.
    pub fn time_a_look_for_holes(&self) -> Result<Duration> {
        let begun = Instant::now();
        if let Some(witness) = &self.witness {
            witness.look(self.memory, &self.sent)?;
        }
        Ok(begun.elapsed())
    }

    /// Deals with memory that was taken away from the guest (by a balloon) after it was sent.
    /// Taking it away is no write, so no dirty source reports it. What is a hole now has zeros
    /// written over it, and need not be read any more if it is dirty. What may have been one and is
    /// there again becomes dirty. To be called ahead of [`Self::push`]; returns how many pages of
    /// zeros were posted. Without a witness, none.
    pub fn push_freed(
        &mut self,
        dirty: &mut DirtyBitmap,
        zeros: &Arc<MemoryRegion>,
        watch: &mut Watch<'_>,
    ) -> Result<u64> {
        let Some(mut witness) = self.witness.take() else { return Ok(0) };
        let mut asked = self.sent.clone();
        dirty.runs(u64::MAX).for_each(|run| asked.insert(run));
        let freed = witness.look(self.memory, &asked)?;
        witness.forget(&freed);
        self.witness = Some(witness);
        let Freed { mut holes, mut back, .. } = freed;
        holes.runs(u64::MAX).for_each(|run| dirty.remove(run));
        // What was posted since the last fence was posted in the downtime, when nothing is taken
        // away any more. A lane may only not have read it yet.
        self.unfenced.runs(u64::MAX).for_each(|run| back.remove(run));
        back.runs(u64::MAX).for_each(|run| dirty.insert(run));
        // Never sent: zeros at both ends.
        self.sent.runs(u64::MAX).for_each(|run| asked.remove(run));
        asked.runs(u64::MAX).for_each(|run| holes.remove(run));
        self.push_zeros(&holes, zeros, watch)?;
        Ok(holes.count())
    }

    pub(super) fn push_zeros(
        &mut self,
        holes: &DirtyBitmap,
        zeros: &Arc<MemoryRegion>,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let batch_bytes_max = self.begin_to_post();
        self.separate(holes, watch)?;
        let (mut batch, mut bytes, mut at) = (Vec::with_capacity(BATCH), 0, 0);
        while let Some(piece) = self.next_piece(holes, at) {
            at = piece.run.end();
            let mut request = self.request(piece)?;
            request.local = zeros.slice(0, piece.run.bytes() as usize)?;
            batch.push(request);
            bytes += piece.run.bytes();
            self.unfenced.insert(piece.run);
            if batch.len() == BATCH || bytes >= batch_bytes_max {
                self.post_all(&batch, watch)?;
                watch()?;
                self.keep_pace(bytes, watch)?;
                batch.clear();
                bytes = 0;
            }
        }
        self.post_all(&batch, watch)?;
        // The destination has zeros there again, as if they had never been sent.
        holes.runs(u64::MAX).for_each(|run| self.sent.remove(run));
        Ok(())
    }
}
