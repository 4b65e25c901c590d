//! A synthetic guest that waits to be filled.

use crate::memory::{Memory, describe};
use crate::source::SyntheticSource;
use crate::writer::State;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::{DestinationGuest, GuestDescription};
use pageferry_engine::memory::GuestMemory;
use pageferry_transport::MemoryRegion;
use std::sync::Arc;

/// A synthetic guest that waits to be filled.
#[derive(Debug)]
pub struct SyntheticDestination {
    memory: Memory,
    state: Option<State>,
    sealed: bool,
    running: Option<SyntheticSource>,
    /// Refuses to run, as a QEMU does whose disk image is locked: for tests.
    pub refuses_to_run: bool,
}

impl SyntheticDestination {
    /// Memory of this many pages.
    pub fn new(pages: u64) -> Result<Self> {
        Ok(Self {
            memory: Memory::new(pages)?,
            state: None,
            sealed: false,
            running: None,
            refuses_to_run: false,
        })
    }

    /// The guest that runs here now, if it does.
    #[must_use]
    pub fn into_source(self) -> Option<SyntheticSource> {
        self.running
    }
}

impl DestinationGuest for SyntheticDestination {
    fn describe(&self) -> GuestDescription {
        describe(&self.memory.engine)
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory.engine
    }

    fn load(&mut self, state: &MemoryRegion, len: usize) -> Result<()> {
        let mut bytes = vec![0; len];
        state.read(0, &mut bytes)?;
        self.state = Some(
            postcard::from_bytes(&bytes)
                .map_err(|e| Error::Guest(format!("the ledger cannot be read: {e}")))?,
        );
        Ok(())
    }

    fn seal(&mut self, _was_running: bool) -> Result<()> {
        self.sealed = true;
        Ok(())
    }

    fn run(&mut self, was_running: bool) -> Result<()> {
        assert!(self.sealed, "a guest runs at the destination only after Commit");
        if self.refuses_to_run {
            return Err(Error::Guest("this guest was told not to run here".into()));
        }
        let State { options, writers } = self
            .state
            .take()
            .ok_or_else(|| Error::Guest("running a guest without state".into()))?;
        let mut guest = SyntheticSource {
            memory: self.memory.clone(),
            options,
            running: None,
            stopped: Some(writers),
            sealed: false,
            poison: None,
        };
        if was_running {
            guest.go();
        }
        self.running = Some(guest);
        Ok(())
    }

    fn discard(&mut self) -> Result<()> {
        (self.state, self.running) = (None, None);
        Ok(())
    }
}
