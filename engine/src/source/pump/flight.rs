//! Work under way: posts it, waits for completions and fences, and notices a peer that is gone.

use super::Pump;
use crate::clock;
use crate::error::Result;
use crate::memory::bitmap::DirtyBitmap;
use crate::source::pump::{STALL_MAX, WATCH_EVERY};
use crate::watch::Watch;
use pageferry_transport::{Completion, FenceTag, WorkRequest};

impl Pump<'_> {
    /// Sends a fence behind everything; its tag goes to [`Self::wait_fence`].
    pub fn fence(&mut self) -> Result<FenceTag> {
        let tag = self.next_tag();
        self.link.fence(tag)?;
        Ok(tag)
    }

    /// Sends the fence behind which nothing comes; its tag goes to the peer.
    pub fn last_fence(&mut self) -> Result<FenceTag> {
        let tag = self.next_tag();
        self.link.last_fence(tag)?;
        Ok(tag)
    }

    pub(super) fn next_tag(&mut self) -> FenceTag {
        self.last_tag += 1;
        self.last_fence_received = false;
        self.fenced = true;
        FenceTag(self.last_tag)
    }

    /// Waits until the peer's link has received the fence.
    pub fn wait_fence(&mut self, tag: FenceTag, watch: &mut Watch<'_>) -> Result<()> {
        self.last_completion = clock::now();
        loop {
            self.poll(watch)?;
            let reached =
                self.completions.iter().any(|c| matches!(c, Completion::Fence(t) if *t >= tag));
            if reached {
                if self.fenced && tag.0 == self.last_tag && !self.unfenced.is_empty() {
                    self.unfenced = DirtyBitmap::new(self.memory.pages());
                }
                return Ok(());
            }
        }
    }

    pub(super) fn post_all(&mut self, batch: &[WorkRequest], watch: &mut Watch<'_>) -> Result<u64> {
        let mut posted = 0;
        while posted < batch.len() {
            let accepted = self.link.post(&batch[posted..])?;
            posted += accepted;
            self.fenced &= accepted == 0;
            self.in_flight += accepted as u64;
            if posted < batch.len() {
                self.poll(watch)?;
            }
        }
        let bytes = batch.iter().map(|w| w.local.len() as u64).sum();
        self.bytes_written += bytes;
        Ok(bytes)
    }

    /// One wait for completions, watched; they are left in `self.completions`.
    pub(super) fn poll(&mut self, watch: &mut Watch<'_>) -> Result<()> {
        self.completions.clear();
        let count = self.link.poll(&mut self.completions, clock::now() + WATCH_EVERY)?;
        if count > 0 {
            self.last_completion = clock::now();
            self.in_flight -=
                self.completions.iter().filter(|c| matches!(c, Completion::Write(_))).count()
                    as u64;
            return Ok(());
        }
        watch()?;
        if clock::elapsed(self.last_completion) > STALL_MAX {
            tracing::warn!("{} writes are under way, none was completed", self.in_flight);
            return Err(
                pageferry_transport::Error::Timeout { what: "the peer to take data" }.into()
            );
        }
        Ok(())
    }

    /// Fails if the lanes broke before the last fence was received; after that the peer ends them.
    pub fn look(&mut self) -> Result<()> {
        if self.last_fence_received {
            return Ok(());
        }
        self.completions.clear();
        match self.link.poll(&mut self.completions, clock::now()) {
            Ok(_) => {
                let last = Completion::Fence(FenceTag(self.last_tag));
                self.last_fence_received = self.completions.contains(&last);
                Ok(())
            }
            // The peer ends them as soon as it has the fence, perhaps before all of it was told
            // here.
            Err(pageferry_transport::Error::Closed { .. }) => {
                self.last_fence_received = true;
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }
}
