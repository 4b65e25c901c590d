//! Has the kernel allocate and map destination memory ahead of the data.
//!
//! The first touch of a page costs more than the copy into it. So threads walk the pages that will
//! come, in the order in which they will come, and populate them; the lanes find them ready, or fault
//! them in themselves where they are faster.

use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::page::PageRun;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Pages populated by one call: long enough to be cheap, short enough to end soon when asked.
const PIECE_PAGES: u64 = 1024;

/// Populating threads; stopped and joined on drop.
#[derive(Debug)]
pub struct Prefault {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    memory: Arc<GuestMemory>,
    pieces: Vec<PageRun>,
    next: AtomicUsize,
    stop: AtomicBool,
    failure: Mutex<Option<Error>>,
}

impl Prefault {
    /// Starts to populate these runs, in their order.
    pub fn start(memory: Arc<GuestMemory>, runs: Vec<PageRun>) -> Result<Self> {
        let mut pieces = Vec::with_capacity(runs.len());
        for run in runs {
            let mut at = run.first.0;
            while at < run.end() {
                // Within one slot; runs of an Offer may span two.
                let (slot, _) = memory.locate(at);
                let end = run.end().min(at + PIECE_PAGES).min(memory.slots()[slot].run().end());
                pieces.push(PageRun::between(at, end));
                at = end;
            }
        }
        let shared = Arc::new(Shared {
            memory,
            pieces,
            next: AtomicUsize::new(0),
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

    /// Fails if there is no memory for the guest.
    pub fn check(&self) -> Result<()> {
        self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }
}

impl Shared {
    fn work(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let Some(piece) = self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)) else { return };
            let (slot, offset) = self.memory.locate(piece.first.0);
            let region = self.memory.slots()[slot].region();
            if let Err(e) = region.populate(offset as usize, piece.bytes() as usize) {
                tracing::debug!(error = %e, "prefault");
                *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(Error::Guest(format!(
                    "no memory for the guest on this host: {}",
                    Error::from(e).chain()
                )));
                return;
            }
        }
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic in it has printed itself; the copy does not depend on it.
            let _ = thread.join();
        }
    }
}
