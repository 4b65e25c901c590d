//! A machine that waits for a guest.

use super::config::MachineConfig;
use super::machine::Machine;
use super::payload::PayloadPlan;
use super::source::KvmSource;
use super::state::MachineState;
use crate::console::serial::Console;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::{DestinationGuest, GuestDescription, Liveness};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::memory::prefault::MapAhead;
use pageferry_transport::MemoryRegion;
use std::sync::Arc;
use std::time::Instant;

/// A machine that waits to be filled.
pub struct KvmDestination {
    machine: Option<Machine>,
    memory: Arc<GuestMemory>,
    description: GuestDescription,
    liveness: Liveness,
    /// The guest, once its state is here.
    loaded: Option<KvmSource>,
    sealed: bool,
}

impl KvmDestination {
    /// Makes the machine.
    pub fn new(config: &MachineConfig, console: Console) -> Result<Self> {
        let machine = Machine::new(config, console)?;
        Ok(Self {
            memory: Arc::clone(machine.memory()),
            description: machine.describe(None),
            liveness: machine.vcpus().liveness(),
            machine: Some(machine),
            loaded: None,
            sealed: false,
        })
    }

    /// The guest that is here now, if Commit has come for it.
    #[must_use]
    pub fn into_source(self) -> Option<KvmSource> {
        self.loaded.filter(|_| self.sealed)
    }
}

impl DestinationGuest for KvmDestination {
    fn describe(&self) -> GuestDescription {
        self.description.clone()
    }

    fn admit(&mut self, theirs: &GuestDescription) -> Result<()> {
        match &self.machine {
            Some(machine) => machine.admit(theirs),
            None => Err(Error::refused("this machine has been used already")),
        }
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn liveness(&self) -> Liveness {
        Arc::clone(&self.liveness)
    }

    fn map_ahead(&self) -> Option<MapAhead> {
        self.machine.as_ref().and_then(Machine::map_ahead)
    }

    fn load(&mut self, state: &MemoryRegion, len: usize) -> Result<()> {
        let mut blob = vec![0; len];
        state.read(0, &mut blob)?;
        let state = Arc::new(MachineState::decode(&blob)?);
        let machine = self
            .machine
            .take()
            .ok_or_else(|| Error::Guest("a state for a machine that has one".into()))?;
        let (bytes, vcpus) = (machine.config().memory_bytes, machine.config().vcpus);
        let payload =
            state.payload.map(|options| PayloadPlan::new(options, bytes, vcpus)).transpose()?;
        machine.restore(&state)?;
        let profile = Machine::profile_of(&state);
        self.loaded = Some(KvmSource::of(machine, profile, payload));
        Ok(())
    }

    fn seal(&mut self, _was_running: bool) -> Result<()> {
        self.sealed = true;
        Ok(())
    }

    fn run(&mut self, was_running: bool) -> Result<()> {
        assert!(self.sealed, "a guest runs at the destination only after Commit");
        let guest = self
            .loaded
            .as_mut()
            .ok_or_else(|| Error::Guest("running a guest without state".into()))?;
        if was_running { guest.go(true) } else { Ok(()) }
    }

    fn running_since(&self) -> Option<Instant> {
        self.loaded.as_ref()?.machine().vcpus().running_since()
    }

    fn discard(&mut self) -> Result<()> {
        // Its threads end with it.
        (self.machine, self.loaded) = (None, None);
        Ok(())
    }
}
