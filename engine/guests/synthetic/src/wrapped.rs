//! A guest at the source with something added to its steps: a clock, a gate, more state. The one
//! place that hands every call on; what is added is a [`Hooks`].

use pageferry_engine::dirty::DirtySource;
use pageferry_engine::error::Result;
use pageferry_engine::guest::{Facts, Liveness, SourceGuest, Vouched};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::memory::lost_page::LostPage;
use pageferry_engine::watch::Watch;
use std::sync::Arc;

/// What is added. Each default adds nothing.
pub trait Hooks: Send {
    /// What the engine is told instead.
    fn facts(&mut self, facts: Facts) -> Facts {
        facts
    }

    /// What the engine asks for dirty pages instead.
    fn tracking(&mut self, tracking: Box<dyn DirtySource>) -> Box<dyn DirtySource> {
        tracking
    }

    /// The vCPUs are about to be stopped.
    fn before_pause(&mut self) -> Result<()> {
        Ok(())
    }

    /// The device state was saved; more may follow.
    fn after_save(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let _ = sink;
        Ok(())
    }

    /// The guest runs here again.
    fn after_resume(&mut self) {}
}

/// A guest with hooks.
pub struct Wrapped<G, H> {
    /// The guest.
    pub guest: G,
    /// What is added to it.
    pub hooks: H,
}

impl<G: SourceGuest, H: Hooks> SourceGuest for Wrapped<G, H> {
    fn facts(&mut self) -> Result<Facts> {
        self.guest.facts().map(|facts| self.hooks.facts(facts))
    }
    fn start_tracking(&mut self, watch: &mut Watch<'_>) -> Result<Box<dyn DirtySource>> {
        self.guest.start_tracking(watch).map(|tracking| self.hooks.tracking(tracking))
    }
    fn pause(&mut self) -> Result<()> {
        self.hooks.before_pause()?;
        self.guest.pause()
    }
    fn save(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.guest.save(sink)?;
        self.hooks.after_save(sink)
    }
    fn resume(&mut self) -> Result<()> {
        self.guest.resume()?;
        self.hooks.after_resume();
        Ok(())
    }

    // Handed on as they are.
    fn vouch(&mut self, vouched: &Vouched) {
        self.guest.vouch(vouched);
    }
    fn preflight(&mut self) -> Result<()> {
        self.guest.preflight()
    }
    fn memory(&self) -> &Arc<GuestMemory> {
        self.guest.memory()
    }
    fn liveness(&self) -> Liveness {
        self.guest.liveness()
    }
    fn is_running(&mut self) -> Result<bool> {
        self.guest.is_running()
    }
    fn drain_io(&mut self) -> Result<()> {
        self.guest.drain_io()
    }
    fn arm(&mut self) -> Result<()> {
        self.guest.arm()
    }
    fn begin_save(&mut self) -> Result<()> {
        self.guest.begin_save()
    }
    fn seal(&mut self) -> Result<()> {
        self.guest.seal()
    }
    fn check_memory(&mut self) -> Result<()> {
        self.guest.check_memory()
    }
    fn name_guest_physical(&mut self, pages: &mut [LostPage]) {
        self.guest.name_guest_physical(pages);
    }
    fn retire(&mut self, tracking: Box<dyn DirtySource>) {
        self.guest.retire(tracking);
    }
}
