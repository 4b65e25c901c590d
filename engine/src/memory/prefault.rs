//! Has the kernel allocate and map destination memory ahead of the data.
//!
//! The first touch of a page costs more than the copy into it. So threads walk the pages that will
//! come, in the order in which they will come, and populate them; the lanes find them ready, or
//! fault them in themselves where they are faster. What is populated is then mapped for the guest,
//! where its hypervisor can do that ahead ([`MapAhead`]): else each of its pages costs it a fault
//! after it has come.

use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::memory::page::PageRun;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Pages populated by one call: long enough to be cheap, short enough to end soon when asked.
const PIECE_PAGES: u64 = 1024;

/// Pages mapped for the guest by one call. Whoever loads the guest's state may wait for one: some
/// 50 us on hardware.
const MAPPED_PAGES: u64 = 64;

/// Populating threads; stopped and joined on drop.
pub struct Prefault {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    memory: Arc<GuestMemory>,
    to_populate: Pieces,
    to_map: Pieces,
    map: Option<MapAhead>,
    stop: AtomicBool,
    failure: Mutex<Option<Error>>,
}

/// Pieces of runs, each within a slot, taken by threads one after the other.
#[derive(Debug)]
struct Pieces {
    pieces: Vec<PageRun>,
    next: AtomicUsize,
}

impl Pieces {
    fn of(memory: &GuestMemory, runs: &[PageRun]) -> Self {
        let mut pieces = Vec::with_capacity(runs.len());
        for run in runs {
            let mut at = run.first.0;
            while at < run.end() {
                // Runs of an Offer may span two slots.
                let (slot, _) = memory.locate(at);
                let end = run.end().min(at + PIECE_PAGES).min(memory.slots()[slot].run().end());
                pieces.push(PageRun::between(at, end));
                at = end;
            }
        }
        Self { pieces, next: AtomicUsize::new(0) }
    }

    fn take(&self) -> Option<PageRun> {
        self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)).copied()
    }
}

impl Prefault {
    /// Starts to populate what is not yet there of these runs, in their order, and then to `map`
    /// all of them.
    pub fn start(
        memory: Arc<GuestMemory>,
        runs: &[PageRun],
        map: Option<MapAhead>,
    ) -> Result<Self> {
        let to_map = if map.is_some() { runs } else { &[] };
        let shared = Arc::new(Shared {
            to_populate: Pieces::of(&memory, &memory.unmapped(runs)),
            to_map: Pieces::of(&memory, to_map),
            map,
            memory,
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
        });
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..(cores / 2).clamp(1, 4))
            .map(|_| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name("prefault".into())
                    .spawn(move || shared.work())
                    .map_err(|e| Error::os("starting a thread", e))
            })
            .collect::<Result<_>>()?;
        Ok(Self { shared, threads })
    }

    /// Waits until all is done. Fails if there is no memory for the guest.
    pub fn finish(mut self) -> Result<()> {
        for thread in self.threads.drain(..) {
            // A panic in it has printed itself; what it left undone is done when it is touched.
            let _ = thread.join();
        }
        self.check()
    }

    /// No new piece is begun from here on; what is missing is faulted in by whoever touches it.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    /// Fails if there is no memory for the guest.
    pub fn check(&self) -> Result<()> {
        self.shared
            .failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .map_or(Ok(()), Err)
    }
}

impl Shared {
    fn work(&self) {
        while let Some(piece) = self.next_of(&self.to_populate) {
            let (slot, offset) = self.memory.locate(piece.first.0);
            let region = self.memory.slots()[slot].region();
            if let Err(e) = region.populate(offset as usize, piece.bytes() as usize) {
                tracing::debug!(error = %e, "prefault");
                *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(Error::Guest(
                    format!(
                        "no memory for the guest on this host: its block {} cannot be populated (is the file system behind it, a \
                     pool of huge pages, or a memory cgroup full?): {}",
                        self.memory.slots()[slot].name,
                        Error::from(e).chain()
                    ),
                ));
                return;
            }
        }
        let Some(map) = &self.map else { return };
        while let Some(piece) = self.next_of(&self.to_map) {
            let mut at = piece.first.0;
            while at < piece.end() && !self.stop.load(Ordering::Relaxed) {
                let end = piece.end().min(at + MAPPED_PAGES);
                if let Err(e) = map(PageRun::between(at, end)) {
                    tracing::debug!(error = %e.chain(), "pages are not mapped ahead");
                    return;
                }
                at = end;
            }
        }
    }

    fn next_of(&self, pieces: &Pieces) -> Option<PageRun> {
        if self.stop.load(Ordering::Relaxed) { None } else { pieces.take() }
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        self.stop();
        for thread in self.threads.drain(..) {
            // A panic in it has printed itself; the copy does not depend on it.
            let _ = thread.join();
        }
    }
}

/// Maps a run of pages, within one slot, for a guest that does not run yet. An error means that it
/// need not be tried again.
pub type MapAhead = Arc<dyn Fn(PageRun) -> Result<()> + Send + Sync>;
