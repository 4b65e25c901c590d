//! The synthetic guest with a clock at each of its doors: what a host needs for a sync, and when
//! the engine asked for what. The engine's report has no place for these.

use pageferry_engine::dirty::{DirtySource, Synced};
use pageferry_engine::memory::bitmap::DirtyBitmap;
use pageferry_synthetic::SyntheticSource;
use pageferry_synthetic::wrapped::{Hooks, Wrapped};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One sync.
#[derive(Debug, Clone, Copy)]
pub struct Harvested {
    /// When it began.
    pub begun: Instant,
    /// How long it took.
    pub took: Duration,
    /// Pages that it found.
    pub pages: u64,
}

/// What was noted of one migration.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// In their order; the last two are in the downtime.
    pub syncs: Vec<Harvested>,
    /// When the vCPUs were told to stop.
    pub paused: Option<Instant>,
}

/// A guest at the source.
pub type Traced = Wrapped<SyntheticSource, Clocks>;

/// What notes it.
#[derive(Default)]
pub struct Clocks(Arc<Mutex<Trace>>);

impl Clocks {
    /// What was noted so far.
    #[must_use]
    pub fn trace(&self) -> Trace {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Its dirty source.
struct TracedDirty {
    inner: Box<dyn DirtySource>,
    trace: Arc<Mutex<Trace>>,
}

impl DirtySource for TracedDirty {
    fn sync(&mut self, into: &mut DirtyBitmap) -> pageferry_engine::Result<Synced> {
        let begun = Instant::now();
        let sync = self.inner.sync(into)?;
        let synced = Harvested { begun, took: begun.elapsed(), pages: sync.pages };
        self.trace.lock().unwrap_or_else(PoisonError::into_inner).syncs.push(synced);
        Ok(sync)
    }
    fn drain_early(&mut self) -> pageferry_engine::Result<()> {
        self.inner.drain_early()
    }
}

impl Hooks for Clocks {
    fn tracking(&mut self, inner: Box<dyn DirtySource>) -> Box<dyn DirtySource> {
        Box::new(TracedDirty { inner, trace: Arc::clone(&self.0) })
    }
    fn before_pause(&mut self) -> pageferry_engine::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).paused = Some(Instant::now());
        Ok(())
    }
}
