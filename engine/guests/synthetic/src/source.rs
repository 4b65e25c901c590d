//! A synthetic guest that runs, and can be moved away.

use crate::memory::{Memory, describe};
use crate::options::SyntheticOptions;
use crate::writer::{Engine, State, Writer, splitmix};
use pageferry_engine::dirty::DirtySource;
use pageferry_engine::dirty::pagemap::{PagemapSource, Poison, TrackedRange, own_userfaultfd};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::{Facts, FixedCosts, SourceGuest};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::watch::Watch;
use std::sync::Arc;

/// A running synthetic guest.
#[derive(Debug)]
pub struct SyntheticSource {
    pub(super) memory: Memory,
    pub(super) options: SyntheticOptions,
    pub(super) running: Option<Engine>,
    pub(super) stopped: Option<Vec<Writer>>,
    pub(super) sealed: bool,
    /// See [`Self::lose`].
    pub(super) poison: Option<Poison>,
}

impl SyntheticSource {
    /// Starts one on empty memory.
    pub fn start(options: SyntheticOptions) -> Result<Self> {
        let (touched, threads) = (options.touched_pages, u64::from(options.threads));
        if threads == 0 || touched < threads || touched > options.pages {
            return Err(Error::refused(format!(
                "{threads} threads over {touched} of {} pages make no guest",
                options.pages
            )));
        }
        let writers = (0..threads)
            .map(|t| {
                let (first, end) = (touched * t / threads, touched * (t + 1) / threads);
                Writer {
                    first,
                    generations: vec![0; (end - first) as usize],
                    discarded: vec![false; (end - first) as usize],
                    random: splitmix(options.seed ^ t),
                }
            })
            .collect();
        let mut guest = Self {
            memory: Memory::new(options.pages)?,
            options,
            running: None,
            stopped: Some(writers),
            sealed: false,
            poison: None,
        };
        guest.go();
        Ok(guest)
    }

    /// Stops the guest, compares all of its memory with its ledger, and lets it go on.
    pub fn check(&mut self) -> Result<()> {
        self.halt()?;
        let checked = self
            .stopped
            .iter()
            .flatten()
            .try_for_each(|writer| writer.check_all(&self.memory.guest));
        self.go();
        checked
    }

    /// The engine loses a page of it, as to broken hardware, until the next migration begins. The
    /// guest itself does not: its threads have a mapping of their own.
    pub fn lose(&mut self, page: u64) -> Result<()> {
        let poison = match self.poison.take() {
            Some(poison) => poison,
            None => Poison::of(self.memory.engine.slots()[0].region())?,
        };
        self.poison.insert(poison).page(page * PAGE_BYTES)
    }

    /// Pages written since the guest was born.
    pub fn generations(&mut self) -> Result<u64> {
        self.halt()?;
        let sum =
            self.stopped.iter().flatten().flat_map(|w| &w.generations).map(|g| u64::from(*g)).sum();
        self.go();
        Ok(sum)
    }

    /// From now on each thread writes so many pages a second; `None` is as fast as it can.
    pub fn set_rate(&mut self, pages_per_second: Option<u32>) -> Result<()> {
        self.halt()?;
        self.options.pages_per_second = pages_per_second;
        self.go();
        Ok(())
    }

    /// Ends the guest here: it runs at the destination.
    pub fn end(&mut self) {
        assert!(self.sealed, "a guest ends at the source only after Commit");
        self.stopped = None;
    }

    pub(crate) fn go(&mut self) {
        if let Some(writers) = self.stopped.take() {
            self.running = Some(Engine::start(writers, &self.memory, &self.options));
        }
    }

    pub(crate) fn halt(&mut self) -> Result<()> {
        if let Some(engine) = self.running.take() {
            self.stopped = Some(engine.stop()?);
        }
        Ok(())
    }
}

impl Drop for SyntheticSource {
    fn drop(&mut self) {
        let _ = self.halt();
    }
}

impl SourceGuest for SyntheticSource {
    fn preflight(&mut self) -> Result<()> {
        if self.sealed {
            return Err(Error::refused("the guest is stopped after a migration in doubt"));
        }
        pageferry_engine::dirty::pagemap::probe()
    }

    fn facts(&mut self) -> Result<Facts> {
        Ok(Facts {
            description: describe(&self.memory.engine),
            state_bytes_max: 4096 + self.options.pages * 8,
            state_bytes_expected: self.options.touched_pages * 2,
            fixed_costs: FixedCosts {
                pause_us: 200,
                sync_us: 0,
                save_us: 200,
                load_us: 200,
                resume_us: 100,
            },
            may_discard: self.options.discards,
        })
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory.engine
    }

    fn is_running(&mut self) -> Result<bool> {
        Ok(self.running.is_some())
    }

    fn start_tracking(&mut self, watch: &mut Watch<'_>) -> Result<Box<dyn DirtySource>> {
        let range = TrackedRange {
            process_address: self.memory.guest.as_ptr() as u64,
            bytes: self.memory.guest.len() as u64,
            first_page: 0,
            backing_page_bytes: PAGE_BYTES,
        };
        let (uffd, pid) = (own_userfaultfd()?, std::process::id());
        Ok(Box::new(PagemapSource::watched(uffd, pid, vec![range], watch)?))
    }

    fn drain_io(&mut self) -> Result<()> {
        // It has no devices.
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        self.halt()
    }

    fn save(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let writers =
            self.stopped.clone().ok_or_else(|| Error::Guest("saving a guest that runs".into()))?;
        let state = postcard::to_stdvec(&State { options: self.options, writers })
            .map_err(|e| Error::Guest(format!("the ledger cannot be encoded: {e}")))?;
        state.chunks(64 << 10).try_for_each(sink)
    }

    fn seal(&mut self) -> Result<()> {
        self.sealed = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        self.sealed = false;
        self.go();
        Ok(())
    }
}
