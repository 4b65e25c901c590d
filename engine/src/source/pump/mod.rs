//! The pump: takes runs out of a bitmap and keeps the lanes full until it is empty.
//!
//! ```text
//!   DirtyBitmap -> PageRun (within one slot and one stripe) -> WorkRequest -> post / poll -> fence
//! ```

mod flight;
mod freed;
mod pace;
mod pieces;
mod ready;

use crate::clock;
use crate::error::Result;
use crate::memory::GuestMemory;
use crate::memory::bitmap::DirtyBitmap;
use crate::memory::holes::Witness;
use crate::memory::page::{PAGE_BYTES, PageRun};
use crate::memory::staging::Staging;
use crate::source::pump::pace::Pace;
use crate::watch::Watch;
use pageferry_transport::{Completion, Initiator, MemoryRegion, RemoteRegion};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Work requests handed to the link in one call, and their bytes: enough that the call costs
/// nothing a page, few enough that cancelling, pacing and the peer's words are looked at every few
/// MiB.
const BATCH: usize = 256;

const BATCH_BYTES_MAX: u64 = 8 << 20;

/// Pages looked at for one batch: zeros are passed over at memory speed, but not unwatched.
const BATCH_SCAN_PAGES: u64 = 1 << 15;

/// Where only one page in so many has to be sent, the link waits for the look and not the other way
/// round.
const LOOKED_AT_FOR_ONE_SENT: u64 = 8;

/// How long one wait lasts before the watch is asked again.
const WATCH_EVERY: Duration = Duration::from_millis(50);

/// Without a completion for this long the peer counts as dead. Longer than any hiccup of a live
/// network path (TCP's own first retransmissions), short enough for an operator.
pub const STALL_MAX: Duration = Duration::from_secs(15);

/// Pushes pages and device state of one migration.
pub struct Pump<'a> {
    pub(super) link: &'a mut dyn Initiator,
    pub(super) memory: &'a GuestMemory,
    pub(super) slots: Vec<RemoteRegion>,
    pub(super) state: (Arc<MemoryRegion>, RemoteRegion),
    /// Every page that was ever pushed.
    pub(super) sent: DirtyBitmap,
    /// Pages posted since the last fence that was received: none of them may be posted again before
    /// one is.
    pub(super) unfenced: DirtyBitmap,
    /// Whether everything posted lies before the last fence.
    pub(super) fenced: bool,
    pub(super) staging: Option<Staging>,
    /// If memory may be taken away from the guest.
    pub(super) witness: Option<Witness>,
    /// Once the guest is paused: the registrations until then.
    pub(super) registrations_before: Option<u64>,
    pub(super) pace: Option<Pace>,
    pub(super) in_flight: u64,
    pub(super) next_id: u64,
    pub(super) last_tag: u32,
    pub(super) last_fence_received: bool,
    pub(super) bytes_written: u64,
    pub(super) looked: Duration,
    pub(super) completions: Vec<Completion>,
    pub(super) last_completion: Instant,
}

impl<'a> Pump<'a> {
    /// A pump for `memory`, whose slots go to `slots`, and a device state that goes to `state`.
    pub fn new(
        link: &'a mut dyn Initiator,
        memory: &'a GuestMemory,
        slots: Vec<RemoteRegion>,
        state: (Arc<MemoryRegion>, RemoteRegion),
        bytes_per_second_max: Option<u64>,
    ) -> Self {
        assert_eq!(slots.len(), memory.slots().len(), "one remote region a slot");
        let now = clock::now();
        Self {
            link,
            memory,
            slots,
            state,
            sent: DirtyBitmap::new(memory.pages()),
            unfenced: DirtyBitmap::new(memory.pages()),
            fenced: true,
            staging: None,
            witness: None,
            registrations_before: None,
            pace: bytes_per_second_max.map(|max| Pace {
                bytes_per_second_max: max,
                since: now,
                bytes: 0,
            }),
            in_flight: 0,
            next_id: 0,
            last_tag: 0,
            last_fence_received: false,
            bytes_written: 0,
            looked: Duration::ZERO,
            completions: Vec::with_capacity(2 * BATCH),
            last_completion: now,
        }
    }

    /// Bytes of pages and state posted so far.
    #[must_use]
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written
    }

    /// How long the link waited while this looked through memory that holds little to be sent.
    #[must_use]
    pub fn looked(&self) -> Duration {
        self.looked
    }

    /// Bytes of memory that were never sent: never touched, or zero.
    #[must_use]
    pub fn bytes_skipped(&self) -> u64 {
        (self.sent.pages() - self.sent.count()) * PAGE_BYTES
    }

    /// Gives it a place for pages whose memory is not registered when the guest is paused.
    #[must_use]
    pub fn with_staging(self, staging: Staging) -> Self {
        Self { staging: Some(staging), ..self }
    }

    /// Has it follow what is taken away from the guest: [`Self::push_freed`] asks this.
    #[must_use]
    pub fn with_witness(self, witness: Option<Witness>) -> Self {
        Self { witness, ..self }
    }

    /// From now on the guest is paused: nobody wants a longer downtime for the sake of bandwidth,
    /// and nothing is registered any more if there is another way.
    pub fn guest_paused(&mut self) {
        self.pace = None;
        self.registrations_before = Some(self.link.registrations());
    }

    /// Registrations since the guest is paused: of a device state that is far larger than expected,
    /// and of memory for which the staging region had no room.
    #[must_use]
    pub fn registrations_since(&self) -> u64 {
        self.registrations_before.map_or(0, |before| self.link.registrations() - before)
    }

    /// The pages that went to the staging region, with their slots there.
    #[must_use]
    pub fn staged(&self) -> Vec<(u64, u32)> {
        self.staging.as_ref().map(Staging::staged).unwrap_or_default()
    }

    /// Posts every page of `dirty` and takes it out, but for pages that were never sent and are
    /// zero: the destination's memory begins as zeros. Returns the number of pages posted. `done`
    /// is told of pages as they are dealt with.
    pub fn push(
        &mut self,
        dirty: &mut DirtyBitmap,
        watch: &mut Watch<'_>,
        done: &mut dyn FnMut(u64),
    ) -> Result<u64> {
        self.memory.look_again_at(dirty)?;
        self.separate(dirty, watch)?;
        let batch_bytes_max = self.begin_to_post();
        let (mut pages, mut at) = (0, 0);
        let mut batch = Vec::with_capacity(BATCH);
        while !dirty.is_empty() {
            let mut len = 0;
            let (begin, dirty_before) = (at, dirty.count());
            let (mut bytes, mut looked_at, begun) = (0, 0, clock::now());
            while len < BATCH && bytes < batch_bytes_max && at < begin + BATCH_SCAN_PAGES {
                let Some(piece) = self.next_piece(dirty, at) else {
                    at = dirty.pages();
                    break;
                };
                let first = piece.run.first.0;
                match self.without_zeros(piece)? {
                    Some(piece) => {
                        looked_at += piece.run.end() - first;
                        at = piece.run.end();
                        bytes += piece.run.bytes();
                        self.note(piece.run)?;
                        self.sent.insert(piece.run);
                        // What is left of it, if not all went to the staging region.
                        if let Some(rest) = self.staged_first(piece, watch)? {
                            debug_assert!(
                                !self.overlaps(rest.run),
                                "no page twice between two fences"
                            );
                            self.put(rest, &mut batch, len)?;
                            len += 1;
                            self.unfenced.insert(rest.run);
                        }
                    }
                    None => {
                        looked_at += piece.run.count;
                        at = piece.run.end();
                    }
                }
            }
            if bytes / PAGE_BYTES < looked_at / LOOKED_AT_FOR_ONE_SENT {
                self.looked += clock::elapsed(begun);
            }
            self.post_all(&batch[..len], watch)?;
            pages += bytes / PAGE_BYTES;
            // Everything in between was posted, or is zero at both ends.
            dirty.remove(PageRun::between(begin, at));
            done(dirty_before - dirty.count());
            watch()?;
            self.keep_pace(bytes, watch)?;
        }
        Ok(pages)
    }

    /// Has everything that was posted before received by the peer, if one of these pages was among
    /// it.
    fn separate(&mut self, pages: &DirtyBitmap, watch: &mut Watch<'_>) -> Result<()> {
        if self.unfenced.intersects(pages) {
            let tag = self.fence()?;
            self.wait_fence(tag, watch)?;
        }
        Ok(())
    }

    fn overlaps(&self, run: PageRun) -> bool {
        (run.first.0..run.end()).any(|page| self.unfenced.contains(page))
    }

    /// Posts a piece of the device state, which lies at `offset` of the local state region already.
    pub fn push_state(&mut self, offset: usize, len: usize, watch: &mut Watch<'_>) -> Result<()> {
        self.last_completion = clock::now();
        let (local, remote) = (Arc::clone(&self.state.0), self.state.1);
        let writes = self.writes(&local, remote, offset..offset + len)?;
        self.post_all(&writes, watch)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
