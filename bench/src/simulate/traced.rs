//! The synthetic guest with a clock at each of its doors: what a host needs for a sync, and when
//! the engine asked for what. The engine's report has no place for these.

use pageferry_engine::dirty::{DirtySource, Synced};
use pageferry_engine::guest::{FixedCosts, GuestDescription, Liveness, SourceGuest};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::memory::bitmap::DirtyBitmap;
use pageferry_engine::watch::Watch;
use pageferry_synthetic::SyntheticSource;
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
pub struct Traced {
    /// The guest.
    pub inner: SyntheticSource,
    trace: Arc<Mutex<Trace>>,
}

impl Traced {
    /// This guest.
    #[must_use]
    pub fn new(inner: SyntheticSource) -> Self {
        Self { inner, trace: Arc::default() }
    }

    /// What was noted so far.
    #[must_use]
    pub fn trace(&self) -> Trace {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

impl SourceGuest for Traced {
    fn start_tracking(
        &mut self,
        watch: &mut Watch<'_>,
    ) -> pageferry_engine::Result<Box<dyn DirtySource>> {
        let inner = self.inner.start_tracking(watch)?;
        Ok(Box::new(TracedDirty { inner, trace: Arc::clone(&self.trace) }))
    }
    fn pause(&mut self) -> pageferry_engine::Result<()> {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner).paused = Some(Instant::now());
        self.inner.pause()
    }
    fn resume(&mut self) -> pageferry_engine::Result<()> {
        self.inner.resume()
    }
    fn describe(&self) -> GuestDescription {
        self.inner.describe()
    }
    fn preflight(&mut self) -> pageferry_engine::Result<()> {
        self.inner.preflight()
    }
    fn memory(&self) -> &Arc<GuestMemory> {
        self.inner.memory()
    }
    fn state_bytes_max(&self) -> u64 {
        self.inner.state_bytes_max()
    }
    fn state_bytes_expected(&self) -> u64 {
        self.inner.state_bytes_expected()
    }
    fn fixed_costs(&self) -> FixedCosts {
        self.inner.fixed_costs()
    }
    fn liveness(&self) -> Liveness {
        self.inner.liveness()
    }
    fn may_discard(&mut self) -> pageferry_engine::Result<bool> {
        self.inner.may_discard()
    }
    fn is_running(&mut self) -> pageferry_engine::Result<bool> {
        self.inner.is_running()
    }
    fn drain_io(&mut self) -> pageferry_engine::Result<()> {
        self.inner.drain_io()
    }
    fn arm(&mut self) -> pageferry_engine::Result<()> {
        self.inner.arm()
    }
    fn begin_save(&mut self) -> pageferry_engine::Result<()> {
        self.inner.begin_save()
    }
    fn save(
        &mut self,
        sink: &mut dyn FnMut(&[u8]) -> pageferry_engine::Result<()>,
    ) -> pageferry_engine::Result<()> {
        self.inner.save(sink)
    }
    fn seal(&mut self) -> pageferry_engine::Result<()> {
        self.inner.seal()
    }
    fn retire(&mut self, tracking: Box<dyn DirtySource>) {
        self.inner.retire(tracking);
    }
    fn end(&mut self) -> pageferry_engine::Result<()> {
        self.inner.end()
    }
}
