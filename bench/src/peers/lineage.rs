//! A guest that goes on from move to move, with all that is needed to move it once more.

use super::PeersOptions;
use crate::testbed::machine::{Begin, GUEST_MAX, Machine, TestBed};
use crate::testbed::microvm::Microvm;
use crate::ways::{Moved, Terms, Way, migrate, move_microvm};
use anyhow::{Context, Result};
use pageferry_microvm::config::TrackingChoice;

/// One guest. Another kind of monitor is another implementation.
pub(super) trait Lineage {
    /// Starts one that boots.
    fn start(&mut self) -> Result<()>;

    /// Waits until it has booted. One that has not, or for which `sense` fails, is no guest.
    fn wait_booted(&mut self, sense: &dyn Fn() -> Result<()>) -> Result<()>;

    /// Whether there is a guest now.
    fn is_there(&self) -> bool;

    /// Moves it. After an error it may be where it was, or lost.
    fn move_by(&mut self, way: Way) -> Result<Moved>;

    /// Has it be paused, or go on.
    fn hold(&mut self, held: bool) -> Result<()>;

    /// Has it check all of its memory.
    fn check(&mut self) -> Result<()>;

    /// Throws it away unless it runs and writes.
    fn forget_unless_well(&mut self);

    /// Throws it away.
    fn forget(&mut self);
}

/// A guest of QEMU.
pub(super) struct QemuLineage {
    // Before the bed: its directory goes last.
    machine: Option<Machine>,
    bed: TestBed,
    terms: Terms,
}

impl QemuLineage {
    pub(super) fn new(options: &PeersOptions) -> Result<Self> {
        let bed = TestBed::new(options.guest.clone())?;
        Ok(Self { machine: None, bed, terms: options.terms })
    }

    fn machine(&mut self) -> Result<&mut Machine> {
        self.machine.as_mut().context("there is no guest")
    }
}

impl Lineage for QemuLineage {
    fn start(&mut self) -> Result<()> {
        let machine = self.bed.start(Begin::Boot, None, false);
        self.machine =
            Some(machine.context("starting QEMU; scripts/setup --bench installs what is missing")?);
        Ok(())
    }

    fn wait_booted(&mut self, sense: &dyn Fn() -> Result<()>) -> Result<()> {
        let booted = self.machine()?.wait_booted(sense);
        if booted.is_err() {
            self.machine = None;
        }
        booted
    }

    fn is_there(&self) -> bool {
        self.machine.is_some()
    }

    fn move_by(&mut self, way: Way) -> Result<Moved> {
        let machine = self.machine.as_mut().context("there is no guest")?;
        migrate(&self.bed, machine, way, &self.terms)
    }

    fn hold(&mut self, held: bool) -> Result<()> {
        self.machine()?.hold(held)
    }

    fn check(&mut self) -> Result<()> {
        self.machine()?.console.verdict(GUEST_MAX)
    }

    fn forget_unless_well(&mut self) {
        self.machine =
            self.machine.take().and_then(|mut machine| machine.is_well().then_some(machine));
    }

    fn forget(&mut self) {
        self.machine = None;
    }
}

/// A guest of pageferry's own monitor, moved from one to another.
pub(super) struct MicrovmLineage {
    microvm: Option<Microvm>,
    bed: TestBed,
    terms: Terms,
    tracking: TrackingChoice,
}

impl MicrovmLineage {
    pub(super) fn new(options: &PeersOptions, tracking: TrackingChoice) -> Result<Self> {
        let bed = TestBed::new(options.guest.clone())?;
        Ok(Self { microvm: None, bed, terms: options.terms, tracking })
    }

    fn microvm(&mut self) -> Result<&mut Microvm> {
        self.microvm.as_mut().context("there is no guest")
    }
}

impl Lineage for MicrovmLineage {
    fn start(&mut self) -> Result<()> {
        self.microvm = Some(
            Microvm::start(&self.bed, self.tracking, None, false).context("starting a microvm")?,
        );
        Ok(())
    }

    fn wait_booted(&mut self, sense: &dyn Fn() -> Result<()>) -> Result<()> {
        let booted = self.microvm()?.wait_booted(sense);
        if booted.is_err() {
            self.microvm = None;
        }
        booted
    }

    fn is_there(&self) -> bool {
        self.microvm.is_some()
    }

    fn move_by(&mut self, _way: Way) -> Result<Moved> {
        let microvm = self.microvm.as_mut().context("there is no guest")?;
        move_microvm(&self.bed, microvm, self.tracking, &self.terms)
    }

    fn hold(&mut self, held: bool) -> Result<()> {
        self.microvm()?.hold(held)
    }

    fn check(&mut self) -> Result<()> {
        self.microvm()?.console.verdict(GUEST_MAX)
    }

    fn forget_unless_well(&mut self) {
        self.microvm =
            self.microvm.take().and_then(|mut microvm| microvm.is_well().then_some(microvm));
    }

    fn forget(&mut self) {
        self.microvm = None;
    }
}
