//! What must be registered before the guest is paused, and the staging region for what is not.

use super::Pump;
use crate::clock;
use crate::error::Result;
use crate::memory::page::PageRun;
use crate::memory::staging::{STAGING_BYTES, Staging};
use crate::source::pump::BATCH;
use crate::source::pump::pieces::Piece;
use crate::watch::Watch;
use std::sync::Arc;

impl Pump<'_> {
    /// Has the memory that the downtime will need registered at both ends: so much of the device
    /// state, and the staging region. True if it is.
    pub fn expect_downtime(&mut self, state_bytes: usize) -> Result<bool> {
        let (local, remote) = (Arc::clone(&self.state.0), self.state.1);
        let mut writes = self.writes(&local, remote, 0..state_bytes.min(local.len()))?;
        if let Some((local, remote)) = self
            .staging
            .as_ref()
            .map(|staging| (Arc::clone(staging.regions().0), staging.regions().1))
        {
            writes.extend(self.writes(&local, remote, 0..STAGING_BYTES)?);
        }
        Ok(self.link.make_ready(&writes)?)
    }

    /// Waits until that is so.
    pub fn wait_for_downtime(&mut self, state_bytes: usize, watch: &mut Watch<'_>) -> Result<()> {
        self.last_completion = clock::now();
        while !self.expect_downtime(state_bytes)? {
            self.poll(watch)?;
        }
        Ok(())
    }

    /// Waits until the memory of all these pages is registered at both ends. True if it was at
    /// once.
    pub fn make_ready(
        &mut self,
        runs: impl IntoIterator<Item = PageRun>,
        watch: &mut Watch<'_>,
    ) -> Result<bool> {
        let mut writes = Vec::new();
        for run in runs {
            let mut first = run.first.0;
            while first < run.end() {
                let piece = self.first_piece(PageRun::between(first, run.end()));
                first = piece.run.end();
                writes.push(self.request(piece)?);
            }
        }
        // Asked for together first, so that both ends are at work on all of it.
        let mut ready = true;
        for batch in writes.chunks(BATCH) {
            ready &= self.link.make_ready(batch)?;
        }
        for batch in writes.chunks(BATCH) {
            self.last_completion = clock::now();
            while !self.link.make_ready(batch)? {
                self.poll(watch)?;
            }
            watch()?;
        }
        Ok(ready)
    }

    /// Once the guest is paused: sends what would have to be registered first by way of the staging
    /// region. What is left goes the usual way.
    #[inline]
    pub(super) fn staged_first(
        &mut self,
        piece: Piece,
        watch: &mut Watch<'_>,
    ) -> Result<Option<Piece>> {
        if self.registrations_before.is_none() {
            return Ok(Some(piece));
        }
        let Some(mut staging) = self.staging.take() else { return Ok(Some(piece)) };
        let rest = self.stage(piece, &mut staging, watch);
        self.staging = Some(staging);
        rest
    }

    pub(super) fn stage(
        &mut self,
        piece: Piece,
        staging: &mut Staging,
        watch: &mut Watch<'_>,
    ) -> Result<Option<Piece>> {
        let mut first = piece.run.first.0;
        let write = self.request(piece)?;
        if !self.link.is_ready(&write)? {
            let (count, bytes) = staging.take(self.memory, piece.run)?;
            let (local, remote) = staging.regions();
            let writes = self.writes(&Arc::clone(local), remote, bytes)?;
            self.post_all(&writes, watch)?;
            first += count;
        }
        if first == piece.run.end() {
            return Ok(None);
        }
        let rest = piece.part(first, piece.run.end());
        staging.forget(rest.run);
        Ok(Some(rest))
    }
}
