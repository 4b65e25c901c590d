//! The pump: takes runs out of a bitmap and keeps the lanes full until it is empty.
//!
//! ```text
//!   DirtyBitmap -> PageRun (within one slot and one stripe) -> WorkRequest -> post / poll -> fence
//! ```

use crate::bitmap::DirtyBitmap;
use crate::clock;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::memory::holes::{Freed, Witness};
use crate::page::{PAGE_BYTES, PageRun};
use crate::staging::{STAGING_BYTES, Staging};
use pageferry_transport::{
    Completion, FenceTag, Initiator, MemoryRegion, RemoteAddr, RemoteRegion, STRIPE_BYTES, WorkId,
    WorkRequest,
};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Work requests handed to the link in one call, and their bytes: enough that the call costs nothing a
/// page, few enough that cancelling, pacing and the peer's words are looked at every few MiB.
const BATCH: usize = 256;
const BATCH_BYTES_MAX: u64 = 8 << 20;
/// Pages looked at for one batch: zeros are passed over at memory speed, but not unwatched.
const BATCH_SCAN_PAGES: u64 = 1 << 15;

/// Where only one page in so many has to be sent, the link waits for the look and not the other way round.
const LOOKED_AT_FOR_ONE_SENT: u64 = 8;

/// How long one wait lasts before the watch is asked again.
const WATCH_EVERY: Duration = Duration::from_millis(50);

/// Without a completion for this long the peer counts as dead. Longer than any hiccup of a live
/// network path (TCP's own first retransmissions), short enough for an operator.
pub const STALL_MAX: Duration = Duration::from_secs(15);

/// Pushes pages and device state of one migration.
pub struct Pump<'a> {
    link: &'a mut dyn Initiator,
    memory: &'a GuestMemory,
    slots: Vec<RemoteRegion>,
    state: (Arc<MemoryRegion>, RemoteRegion),
    /// Every page that was ever pushed.
    sent: DirtyBitmap,
    /// Pages posted since the last fence that was received: none of them may be posted again before one is.
    unfenced: DirtyBitmap,
    /// Whether everything posted lies before the last fence.
    fenced: bool,
    staging: Option<Staging>,
    /// If memory may be taken away from the guest.
    witness: Option<Witness>,
    /// Once the guest stands still: the registrations until then.
    registrations_before: Option<u64>,
    pace: Option<Pace>,
    in_flight: u64,
    next_id: u64,
    last_tag: u32,
    last_fence_received: bool,
    bytes_written: u64,
    looked: Duration,
    completions: Vec<Completion>,
    last_completion: Instant,
}

/// A run of pages within one slot, and where in it.
#[derive(Debug, Clone, Copy)]
struct Piece {
    run: PageRun,
    slot: usize,
    /// Of its first byte in the slot.
    offset: u64,
}

impl Piece {
    /// The pages from `first` to before `end` of it.
    fn part(self, first: u64, end: u64) -> Self {
        let offset = self.offset + (first - self.run.first.0) * PAGE_BYTES;
        Self { run: PageRun::between(first, end), offset, ..self }
    }
}

/// Holds the rate below a bound, over stretches of a round.
#[derive(Debug)]
struct Pace {
    bytes_per_second_max: u64,
    since: Instant,
    bytes: u64,
}

/// Called between batches: fails if the migration should stop (cancelled, the peer aborted).
pub type Watch<'w> = dyn FnMut() -> Result<()> + 'w;

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
            pace: bytes_per_second_max.map(|max| Pace { bytes_per_second_max: max, since: now, bytes: 0 }),
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

    /// Gives it a place for pages whose memory is not registered when the guest stands still.
    #[must_use]
    pub fn with_staging(self, staging: Staging) -> Self {
        Self { staging: Some(staging), ..self }
    }

    /// Has it follow what is taken away from the guest: [`Self::push_freed`] asks this.
    #[must_use]
    pub fn with_witness(self, witness: Option<Witness>) -> Self {
        Self { witness, ..self }
    }

    /// From now on the guest stands still: nobody wants a longer blackout for the sake of bandwidth, and nothing is
    /// registered any more if there is another way.
    pub fn stand_still(&mut self) {
        self.pace = None;
        self.registrations_before = Some(self.link.registrations());
    }

    /// Registrations since the guest stands still: of a device state that is far larger than expected, and of
    /// memory for which the staging region had no room.
    #[must_use]
    pub fn registrations_since(&self) -> u64 {
        self.registrations_before.map_or(0, |before| self.link.registrations() - before)
    }

    /// The pages that went to the staging region, with their slots there.
    #[must_use]
    pub fn staged(&self) -> Vec<(u64, u32)> {
        self.staging.as_ref().map(Staging::staged).unwrap_or_default()
    }

    /// Has the memory that the blackout will need registered at both ends: so much of the device state, and the
    /// staging region. True if it is.
    pub fn expect_blackout(&mut self, state_bytes: usize) -> Result<bool> {
        let (local, remote) = (Arc::clone(&self.state.0), self.state.1);
        let mut writes = self.writes(&local, remote, 0..state_bytes.min(local.len()))?;
        if let Some((local, remote)) =
            self.staging.as_ref().map(|staging| (Arc::clone(staging.regions().0), staging.regions().1))
        {
            writes.extend(self.writes(&local, remote, 0..STAGING_BYTES)?);
        }
        Ok(self.link.make_ready(&writes)?)
    }

    /// Waits until that is so.
    pub fn wait_for_blackout(&mut self, state_bytes: usize, watch: &mut Watch<'_>) -> Result<()> {
        self.last_completion = clock::now();
        while !self.expect_blackout(state_bytes)? {
            self.poll(watch)?;
        }
        Ok(())
    }

    /// Waits until the memory of all these pages is registered at both ends. True if it was at once.
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

    /// Posts every page of `dirty` and takes it out, but for pages that were never sent and are zero: the
    /// destination's memory begins as zeros. Returns the number of pages posted. `done` is told of pages
    /// as they are dealt with.
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
                            debug_assert!(!self.overlaps(rest.run), "no page twice between two fences");
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

    /// Waits and rates count from here. Returns how many bytes a batch may have.
    fn begin_to_post(&mut self) -> u64 {
        self.last_completion = clock::now();
        if let Some(pace) = &mut self.pace {
            (pace.since, pace.bytes) = (clock::now(), 0);
        }
        // A bounded rate is kept in bursts of a tenth of a second.
        let burst = self.pace.as_ref().map_or(u64::MAX, |pace| pace.bytes_per_second_max / 10);
        BATCH_BYTES_MAX.min(burst).max(1)
    }

    /// These pages are about to be read. Once the guest stands still nothing is taken away any
    /// more.
    #[inline]
    fn note(&mut self, run: PageRun) -> Result<()> {
        match &mut self.witness {
            Some(witness) if self.registrations_before.is_none() => witness.note(self.memory, run),
            _ => Ok(()),
        }
    }

    /// Has everything that was posted before received by the peer, if one of these pages was among it.
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

    /// Once the guest stands still: sends what would have to be registered first by way of the staging region. What
    /// is left goes the usual way.
    #[inline]
    fn staged_first(&mut self, piece: Piece, watch: &mut Watch<'_>) -> Result<Option<Piece>> {
        if self.registrations_before.is_none() {
            return Ok(Some(piece));
        }
        let Some(mut staging) = self.staging.take() else { return Ok(Some(piece)) };
        let rest = self.stage(piece, &mut staging, watch);
        self.staging = Some(staging);
        rest
    }

    fn stage(&mut self, piece: Piece, staging: &mut Staging, watch: &mut Watch<'_>) -> Result<Option<Piece>> {
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

    /// The first run of a piece that must be sent: not (never sent, and zero).
    #[inline]
    fn without_zeros(&self, piece: Piece) -> Result<Option<Piece>> {
        let needless = |page: u64| Ok::<_, Error>(!self.sent.contains(page) && self.memory.is_zero(page)?);
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

    /// How long looking for what the guest gave back takes: what [`Self::push_freed`] costs where there is none.
    pub fn time_a_look_for_holes(&self) -> Result<Duration> {
        let begun = Instant::now();
        if let Some(witness) = &self.witness {
            witness.look(self.memory, &self.sent)?;
        }
        Ok(begun.elapsed())
    }

    /// Deals with memory that was taken away from the guest (by a balloon) after it was sent. Taking it away is no write,
    /// so no dirty source reports it. What is a hole now has zeros written over it, and need not be read any more if it is
    /// dirty. What may have been one and is there again becomes dirty. To be called ahead of [`Self::push`]; returns how
    /// many pages of zeros were posted. Without a witness, none.
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
        // What was posted since the last fence was posted in the blackout, when nothing is taken away any more. A lane may
        // only not have read it yet.
        self.unfenced.runs(u64::MAX).for_each(|run| back.remove(run));
        back.runs(u64::MAX).for_each(|run| dirty.insert(run));
        // Never sent: zeros at both ends.
        self.sent.runs(u64::MAX).for_each(|run| asked.remove(run));
        asked.runs(u64::MAX).for_each(|run| holes.remove(run));
        self.push_zeros(&holes, zeros, watch)?;
        Ok(holes.count())
    }

    fn push_zeros(
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

    /// Posts a piece of the device state, which lies at `offset` of the local state region already.
    pub fn push_state(&mut self, offset: usize, len: usize, watch: &mut Watch<'_>) -> Result<()> {
        self.last_completion = clock::now();
        let (local, remote) = (Arc::clone(&self.state.0), self.state.1);
        let writes = self.writes(&local, remote, offset..offset + len)?;
        self.post_all(&writes, watch)?;
        Ok(())
    }

    /// Writes of a part of a region to the same part of another, a stripe each at most.
    fn writes(
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

    fn next_tag(&mut self) -> FenceTag {
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
            let reached = self.completions.iter().any(|c| matches!(c, Completion::Fence(t) if *t >= tag));
            if reached {
                if self.fenced && tag.0 == self.last_tag && !self.unfenced.is_empty() {
                    self.unfenced = DirtyBitmap::new(self.memory.pages());
                }
                return Ok(());
            }
        }
    }

    /// The first run of dirty pages at or after `at` that one work request can carry: within one slot
    /// and one stripe of the remote address.
    #[inline]
    fn next_piece(&self, dirty: &DirtyBitmap, at: u64) -> Option<Piece> {
        Some(self.first_piece(dirty.next_run(at, STRIPE_BYTES / PAGE_BYTES)?))
    }

    /// The first part of a run that one work request can carry.
    #[inline]
    fn first_piece(&self, run: PageRun) -> Piece {
        let first = run.first.0;
        let (slot, offset) = self.memory.locate(first);
        let slot_end = self.memory.slots()[slot].run().end();
        let addr = self.slots[slot].base + offset;
        let stripe_pages = (STRIPE_BYTES - addr % STRIPE_BYTES).div_ceil(PAGE_BYTES);
        let run = PageRun::between(first, run.end().min(slot_end).min(first + stripe_pages));
        Piece { run, slot, offset }
    }

    #[inline]
    fn request(&mut self, Piece { run, slot, offset }: Piece) -> Result<WorkRequest> {
        let remote = self.slots[slot];
        let id = self.id();
        let local = self.memory.slots()[slot].region().slice(offset as usize, run.bytes() as usize)?;
        Ok(WorkRequest { id, local, remote: RemoteAddr { key: remote.key, addr: remote.base + offset } })
    }

    /// Puts the request for a piece at this place of a batch. The one that an earlier batch left there is made over,
    /// because counting references to a mapping up and down costs a page a fifth of its time.
    #[inline]
    fn put(&mut self, piece: Piece, batch: &mut Vec<WorkRequest>, at: usize) -> Result<()> {
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

    fn id(&mut self) -> WorkId {
        self.next_id += 1;
        WorkId(self.next_id)
    }

    fn post_all(&mut self, batch: &[WorkRequest], watch: &mut Watch<'_>) -> Result<u64> {
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
    fn poll(&mut self, watch: &mut Watch<'_>) -> Result<()> {
        self.completions.clear();
        let count = self.link.poll(&mut self.completions, clock::now() + WATCH_EVERY)?;
        if count > 0 {
            self.last_completion = clock::now();
            self.in_flight -=
                self.completions.iter().filter(|c| matches!(c, Completion::Write(_))).count() as u64;
            return Ok(());
        }
        watch()?;
        if clock::elapsed(self.last_completion) > STALL_MAX {
            tracing::warn!("{} writes are under way, none was completed", self.in_flight);
            return Err(pageferry_transport::Error::Timeout { what: "the peer to take data" }.into());
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
            // The peer ends them as soon as it has the fence, perhaps before all of it was told here.
            Err(pageferry_transport::Error::Closed { .. }) => {
                self.last_fence_received = true;
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Sleeps as long as the bound on the rate asks for.
    fn keep_pace(&mut self, bytes: u64, watch: &mut Watch<'_>) -> Result<()> {
        let Some(pace) = &mut self.pace else { return Ok(()) };
        pace.bytes += bytes;
        let due = pace.since + Duration::from_secs_f64(pace.bytes as f64 / pace.bytes_per_second_max as f64);
        loop {
            let left = due.saturating_duration_since(clock::now());
            if left.is_zero() {
                return Ok(());
            }
            clock::sleep(left.min(WATCH_EVERY));
            watch()?;
        }
    }
}

#[cfg(test)]
mod tests;
