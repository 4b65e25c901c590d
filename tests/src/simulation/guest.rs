//! A guest of the simulated world: pages, a ledger of what was written to them, a vCPU that writes
//! on, and the one record of who owns it.
//!
//! As in a machine, a write to a protected page is noted first and lets the write through; a page
//! is written in two halves, between which anything may happen; saving the device state may write
//! memory too. The ledger is the device state. The record of truth is nobody's: it knows what was
//! written last, wherever that was.

use super::chance::Chance;
use super::world::{Process, World};
use pageferry_engine::dirty::{DirtySource, Synced};
use pageferry_engine::guest::{
    BlockDescription, DestinationGuest, Facts, FixedCosts, GuestDescription, Liveness, SourceGuest,
};
use pageferry_engine::memory::bitmap::DirtyBitmap;
use pageferry_engine::memory::page::{PAGE_BYTES, PageRun};
use pageferry_engine::memory::{GuestMemory, SlotSource};
use pageferry_engine::watch::Watch;
use pageferry_engine::{Error, Result, clock};
use pageferry_transport::{Access, MemoryRegion};
use rustix::fd::AsFd;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Small, so that a run takes milliseconds, and more than a bitmap's word.
pub const PAGES: usize = 160;
/// Pages that are written at all.
const TOUCHED: u64 = 130;
/// Writes after which the guest slows down: it shall not keep a long silence busy.
const QUICK_WRITES: u64 = 400;
const HALF: usize = PAGE_BYTES as usize / 2;

/// Where a guest may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Where it was born.
    Source,
    /// The so-manyth copy at the destination.
    Copy(usize),
}

/// What is true of the guest, whoever believes what.
#[derive(Debug)]
pub struct Truth {
    world: Arc<World>,
    state: Mutex<True>,
}

#[derive(Debug)]
struct True {
    runs_at: Option<Place>,
    /// It has run at the destination: it may never run at the source again.
    moved: bool,
    ledger: Vec<u32>,
}

impl Truth {
    /// A guest that was just born, at the source.
    #[must_use]
    pub fn new(world: &Arc<World>) -> Arc<Self> {
        let state = True { runs_at: None, moved: false, ledger: vec![0; PAGES] };
        Arc::new(Self { world: Arc::clone(world), state: Mutex::new(state) })
    }

    /// Where it runs.
    #[must_use]
    pub fn runs_at(&self) -> Option<Place> {
        lock(&self.state).runs_at
    }

    /// Whether it has ever run at the destination.
    #[must_use]
    pub fn moved(&self) -> bool {
        lock(&self.state).moved
    }

    fn begins(&self, at: Place, ledger: &[u32]) {
        let mut state = lock(&self.state);
        self.world.tell(&format!("the guest runs at {at:?}"));
        if state.runs_at.is_some_and(|other| other != at) {
            self.world.fail(format!("the guest runs twice: at {:?} and at {at:?}", state.runs_at));
        }
        if at == Place::Source && state.moved {
            self.world.fail(
                "the guest runs at the source again after it has run at the destination".into(),
            );
        }
        if state.ledger != ledger {
            self.world.fail(format!("the guest at {at:?} is not the one that was stopped last"));
        }
        state.moved |= at != Place::Source;
        state.runs_at = Some(at);
    }

    fn stops(&self, at: Place) {
        let mut state = lock(&self.state);
        if state.runs_at == Some(at) {
            self.world.tell(&format!("the guest stops at {at:?}"));
            state.runs_at = None;
        }
    }

    fn wrote(&self, at: Place, page: usize, generation: u32) {
        let mut state = lock(&self.state);
        // A device that is being saved writes while the guest is paused.
        if state.runs_at.is_some_and(|other| other != at) {
            self.world.fail(format!("a guest that does not run writes at {at:?}"));
        }
        state.ledger[page] = generation;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What goes wrong with it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Troubles {
    /// The monitor is a process of its own, with a guardian: the guest outlives its supervisor.
    pub outlives: bool,
    /// So many attempts to resume at the source fail.
    pub resumes_fail: u32,
    /// The step of the source that fails: `arm`, `pause`, `save`, `seal`.
    pub source_fails: Option<&'static str>,
    /// The step of the destination that fails: `load`, `seal`, `run`, `doubt, runs`, `doubt,
    /// stopped`, `discard`.
    pub destination_fails: Option<&'static str>,
}

/// One machine: memory, ledger, and what its monitor knows.
struct Machine {
    world: Arc<World>,
    truth: Arc<Truth>,
    at: Place,
    memory: Arc<MemoryRegion>,
    state: Mutex<Machinery>,
}

struct Machinery {
    ledger: Vec<u32>,
    /// A page of which the first half is one generation ahead.
    half: Option<usize>,
    chance: Chance,
    tracked: bool,
    protected: Vec<bool>,
    dirty: Vec<bool>,
    runs: bool,
    /// Gone, with its monitor.
    gone: bool,
    sealed: bool,
    was_running: bool,
    writes: u64,
}

/// What half a page holds in this generation: zeros if it was never written.
fn half_of(page: usize, generation: u32) -> Vec<u8> {
    if generation == 0 {
        return vec![0; HALF];
    }
    let word = (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ u64::from(generation).wrapping_mul(0xbf58_476d);
    word.to_le_bytes().repeat(HALF / 8)
}

impl Machine {
    fn new(
        world: &Arc<World>,
        truth: &Arc<Truth>,
        at: Place,
        chance: Chance,
    ) -> (Arc<Self>, Arc<GuestMemory>) {
        let bytes = PAGES as u64 * PAGE_BYTES;
        let file =
            File::from(memfd_create("pageferry-simulated", MemfdFlags::CLOEXEC).expect("a memfd"));
        ftruncate(&file, bytes).expect("its size");
        let memory = MemoryRegion::map_shared(file.as_fd(), 0, bytes as usize, Access::Write)
            .expect("its mapping");
        let slot = SlotSource {
            name: "simulated".into(),
            file,
            file_offset: 0,
            bytes,
            backing_page_bytes: PAGE_BYTES,
            process_address: memory.as_ptr() as u64,
        };
        let engine =
            Arc::new(GuestMemory::map(vec![slot], Access::Write).expect("the engine's mapping"));
        world.must_go("the engine's mapping of a guest", &engine);
        world.must_go("the memory of a guest", &memory);
        let state = Mutex::new(Machinery {
            ledger: vec![0; PAGES],
            half: None,
            chance,
            tracked: false,
            protected: vec![false; PAGES],
            dirty: vec![false; PAGES],
            runs: false,
            gone: false,
            sealed: false,
            was_running: false,
            writes: 0,
        });
        let (world, truth) = (Arc::clone(world), Arc::clone(truth));
        (Arc::new(Self { world, truth, at, memory, state }), engine)
    }

    /// The vCPU, a thread of the process that the guest lives in.
    fn start_vcpu(self: &Arc<Self>, process: Process) {
        let machine = Arc::clone(self);
        self.world.start(process, move || {
            while !lock(&machine.state).gone {
                let pause = machine.turn();
                clock::sleep(pause);
            }
        });
    }

    /// Half a page, if the guest runs. Returns how long the vCPU does something else then.
    fn turn(&self) -> Duration {
        let mut state = lock(&self.state);
        if !state.runs {
            return Duration::from_millis(20);
        }
        self.write(&mut state);
        state.writes += 1;
        let most = if state.writes > QUICK_WRITES { 4_000_000 } else { 400 };
        state.chance.time(Duration::from_micros(most / 20), Duration::from_micros(most))
    }

    fn write(&self, state: &mut Machinery) {
        let (page, half) = match state.half {
            Some(page) => (page, 1),
            None => (state.chance.below(TOUCHED) as usize, 0),
        };
        if let Err(wrong) = self.check_page(state, page) {
            self.world.fail(format!("at {:?}: {wrong}", self.at));
        }
        if state.tracked && state.protected[page] {
            (state.protected[page], state.dirty[page]) = (false, true);
        }
        let generation = state.ledger[page] + 1;
        let at = page * PAGE_BYTES as usize + half * HALF;
        self.memory.write(at, &half_of(page, generation)).expect("its memory");
        if half == 0 {
            state.half = Some(page);
        } else {
            (state.half, state.ledger[page]) = (None, generation);
            self.truth.wrote(self.at, page, generation);
        }
    }

    fn check_page(&self, state: &Machinery, page: usize) -> std::result::Result<(), String> {
        let mut bytes = [0; PAGE_BYTES as usize];
        self.memory.read(page * PAGE_BYTES as usize, &mut bytes).expect("its memory");
        for (half, part) in bytes.chunks_exact(HALF).enumerate() {
            let ahead = u32::from(half == 0 && state.half == Some(page));
            if part != half_of(page, state.ledger[page] + ahead) {
                return Err(format!(
                    "page {page} of generation {} is corrupt in its half {half}",
                    state.ledger[page]
                ));
            }
        }
        Ok(())
    }

    /// Compares all of memory with the ledger.
    fn check(&self) {
        let state = lock(&self.state);
        for page in 0..PAGES {
            if let Err(wrong) = self.check_page(&state, page) {
                self.world.fail(format!("at {:?}: {wrong}", self.at));
                return;
            }
        }
    }

    fn run(&self) {
        let mut state = lock(&self.state);
        if state.gone {
            self.world.fail(format!("a machine that is gone is let run at {:?}", self.at));
            return;
        }
        if !state.runs {
            state.runs = true;
            self.truth.begins(self.at, &state.ledger);
        }
    }

    fn halt(&self) {
        let mut state = lock(&self.state);
        state.runs = false;
        self.truth.stops(self.at);
    }

    fn go(&self) {
        let mut state = lock(&self.state);
        (state.runs, state.gone) = (false, true);
        self.truth.stops(self.at);
    }
}

/// A machine as its owner's supervisor is killed: what its guardian, or its end, does.
#[derive(Clone)]
pub struct Orphan {
    machine: Arc<Machine>,
    outlives: bool,
}

impl Orphan {
    /// The supervisor was killed.
    pub fn bereave(&self) {
        let (sealed, gone, runs, was_running) = {
            let state = lock(&self.machine.state);
            (state.sealed, state.gone, state.runs, state.was_running)
        };
        if gone {
            return;
        }
        match (self.outlives, self.machine.at, sealed) {
            (false, _, _) | (true, Place::Copy(_), false) => self.machine.go(),
            (true, Place::Source, false) if !runs && was_running => self.machine.run(),
            (true, Place::Copy(_), true) if was_running => self.machine.run(),
            (true, ..) => {}
        }
    }

    /// Its monitor has died.
    pub fn die(&self) {
        self.machine.go();
    }

    /// Compares its memory with its ledger.
    pub fn check(&self) {
        self.machine.check();
    }

    /// Whether nothing is left of it.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        lock(&self.machine.state).gone
    }
}

fn describe(memory: &GuestMemory) -> GuestDescription {
    let blocks = memory.slots().iter();
    GuestDescription {
        monitor: "simulated".into(),
        machine: "a vCPU and a ledger".into(),
        vcpus: 1,
        blocks: blocks
            .map(|slot| BlockDescription {
                name: slot.name.clone(),
                bytes: slot.region().len() as u64,
            })
            .collect(),
        platform: Vec::new(),
        images: Vec::new(),
    }
}

fn liveness(machine: &Arc<Machine>) -> Liveness {
    let machine = Arc::clone(machine);
    Arc::new(move || {
        if lock(&machine.state).gone {
            Err(Error::Guest("its monitor has ended".into()))
        } else {
            Ok(())
        }
    })
}

/// The guest at its source.
pub struct SimulatedSource {
    machine: Arc<Machine>,
    memory: Arc<GuestMemory>,
    process: Process,
    troubles: Troubles,
    retired: Option<Box<dyn DirtySource>>,
}

impl SimulatedSource {
    /// A guest that runs.
    #[must_use]
    pub fn start(
        world: &Arc<World>,
        truth: &Arc<Truth>,
        chance: Chance,
        process: Process,
        troubles: Troubles,
    ) -> Self {
        let (machine, memory) = Machine::new(world, truth, Place::Source, chance);
        let vmm = if troubles.outlives { world.process() } else { process };
        machine.run();
        machine.start_vcpu(vmm);
        Self { machine, memory, process, troubles, retired: None }
    }

    /// A guest that was found stopped by a supervisor that comes after a dead one, as a migration
    /// has left it; none if it is not so.
    #[must_use]
    pub fn take_up(orphan: &Orphan, memory: &Arc<GuestMemory>, process: Process) -> Option<Self> {
        let left = {
            let state = lock(&orphan.machine.state);
            state.sealed && !state.gone && !state.runs
        };
        let troubles = Troubles { outlives: orphan.outlives, ..Troubles::default() };
        let (machine, memory) = (Arc::clone(&orphan.machine), Arc::clone(memory));
        left.then(|| Self { machine, memory, process, troubles, retired: None })
    }

    /// What becomes of it when its supervisor is killed.
    #[must_use]
    pub fn orphan(&self) -> Orphan {
        Orphan { machine: Arc::clone(&self.machine), outlives: self.troubles.outlives }
    }

    /// Whether Commit may have been sent.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        lock(&self.machine.state).sealed
    }

    /// Ends it here: it runs at the destination.
    pub fn end(&mut self) -> Result<()> {
        self.step("end")?;
        if !lock(&self.machine.state).sealed {
            self.machine
                .world
                .fail("a guest is ended at the source that was not handed over".into());
        }
        self.machine.go();
        Ok(())
    }

    /// A step of its monitor. Nothing comes of it if whoever asks is dead.
    fn step(&self, name: &'static str) -> Result<()> {
        self.machine.world.step(name);
        if self.machine.world.is_dead(self.process) {
            return Err(Error::Guest("its supervisor is dead".into()));
        }
        liveness(&self.machine)()?;
        if self.troubles.source_fails == Some(name) {
            return Err(Error::Guest(format!("the {name} of this guest fails")));
        }
        Ok(())
    }
}

/// The pages that a machine's vCPU has written.
struct Written(Arc<Machine>);

impl DirtySource for Written {
    fn sync(&mut self, into: &mut DirtyBitmap) -> Result<Synced> {
        let mut state = lock(&self.0.state);
        let mut pages = 0;
        for page in 0..PAGES {
            if std::mem::take(&mut state.dirty[page]) {
                state.protected[page] = true;
                into.insert(PageRun::between(page as u64, page as u64 + 1));
                pages += 1;
            }
        }
        Ok(Synced { pages })
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        lock(&self.0.state).tracked = false;
    }
}

impl SourceGuest for SimulatedSource {
    fn preflight(&mut self) -> Result<()> {
        Ok(())
    }
    fn facts(&mut self) -> Result<Facts> {
        Ok(Facts {
            description: describe(&self.memory),
            state_bytes_max: 8 << 10,
            state_bytes_expected: 1 << 10,
            fixed_costs: FixedCosts {
                pause_us: 100,
                sync_us: 0,
                save_us: 100,
                load_us: 100,
                resume_us: 100,
            },
            may_discard: false,
        })
    }
    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }
    fn liveness(&self) -> Liveness {
        liveness(&self.machine)
    }
    fn is_running(&mut self) -> Result<bool> {
        self.step("is running")?;
        Ok(lock(&self.machine.state).runs)
    }
    fn start_tracking(&mut self, _watch: &mut Watch<'_>) -> Result<Box<dyn DirtySource>> {
        let mut state = lock(&self.machine.state);
        state.tracked = true;
        (state.protected, state.dirty) = (vec![true; PAGES], vec![false; PAGES]);
        drop(state);
        Ok(Box::new(Written(Arc::clone(&self.machine))))
    }
    fn drain_io(&mut self) -> Result<()> {
        Ok(())
    }
    fn arm(&mut self) -> Result<()> {
        self.step("arm")
    }
    fn pause(&mut self) -> Result<()> {
        self.step("pause")?;
        let mut state = lock(&self.machine.state);
        state.was_running = state.runs;
        drop(state);
        self.machine.halt();
        self.machine.world.step("paused");
        Ok(())
    }
    fn save(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        sink(&[])?;
        self.step("save")?;
        let saved = {
            let mut state = lock(&self.machine.state);
            // A device writes as it is saved.
            self.machine.write(&mut state);
            let mut saved =
                vec![state.half.map_or(u32::MAX, |page| page as u32), u32::from(state.was_running)];
            saved.extend(&state.ledger);
            saved
        };
        let bytes: Vec<u8> = saved.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.chunks(256).try_for_each(sink)
    }
    fn seal(&mut self) -> Result<()> {
        self.step("seal")?;
        lock(&self.machine.state).sealed = true;
        self.machine.world.step("sealed");
        Ok(())
    }
    fn resume(&mut self) -> Result<()> {
        if self.machine.world.is_dead(self.process) {
            return Err(Error::Guest("its supervisor is dead".into()));
        }
        self.machine.world.step("resume");
        // Killed at that very step.
        if self.machine.world.is_dead(self.process) {
            return Err(Error::Guest("its supervisor is dead".into()));
        }
        liveness(&self.machine)()?;
        if self.troubles.resumes_fail > 0 && !lock(&self.machine.state).runs {
            self.troubles.resumes_fail -= 1;
            return Err(Error::Guest("its monitor does not resume it now".into()));
        }
        lock(&self.machine.state).sealed = false;
        if lock(&self.machine.state).was_running {
            self.machine.run();
        }
        Ok(())
    }
    fn retire(&mut self, tracking: Box<dyn DirtySource>) {
        self.retired = Some(tracking);
    }
}

/// A place for it at the destination.
pub struct SimulatedDestination {
    machine: Arc<Machine>,
    memory: Arc<GuestMemory>,
    process: Process,
    vmm: Process,
    troubles: Troubles,
}

impl SimulatedDestination {
    /// The so-manyth place.
    #[must_use]
    pub fn new(
        world: &Arc<World>,
        truth: &Arc<Truth>,
        chance: Chance,
        process: Process,
        index: usize,
        troubles: Troubles,
    ) -> Self {
        let (machine, memory) = Machine::new(world, truth, Place::Copy(index), chance);
        let vmm = if troubles.outlives { world.process() } else { process };
        Self { machine, memory, process, vmm, troubles }
    }

    /// What becomes of it when its supervisor is killed.
    #[must_use]
    pub fn orphan(&self) -> Orphan {
        Orphan { machine: Arc::clone(&self.machine), outlives: self.troubles.outlives }
    }

    fn step(&self, name: &'static str) -> Result<()> {
        self.machine.world.step(name);
        if self.machine.world.is_dead(self.process) {
            return Err(Error::Guest("its supervisor is dead".into()));
        }
        liveness(&self.machine)()?;
        if self.troubles.destination_fails == Some(name) {
            return Err(Error::Guest(format!("the {name} of this guest fails")));
        }
        Ok(())
    }
}

impl DestinationGuest for SimulatedDestination {
    fn describe(&self) -> GuestDescription {
        describe(&self.memory)
    }
    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }
    fn liveness(&self) -> Liveness {
        liveness(&self.machine)
    }
    fn load(&mut self, state: &MemoryRegion, len: usize) -> Result<()> {
        self.step("load")?;
        let mut bytes = vec![0; len];
        state.read(0, &mut bytes)?;
        let words: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().expect("four")))
            .collect();
        if words.len() != PAGES + 2 {
            return Err(Error::Guest(format!("a device state of {len} bytes")));
        }
        let mut machine = lock(&self.machine.state);
        machine.half = usize::try_from(words[0]).ok().filter(|page| *page < PAGES);
        machine.ledger = words[2..].to_vec();
        drop(machine);
        self.machine.check();
        Ok(())
    }
    fn seal(&mut self, was_running: bool) -> Result<()> {
        self.step("seal there")?;
        let mut state = lock(&self.machine.state);
        (state.sealed, state.was_running) = (true, was_running);
        drop(state);
        self.machine.world.step("sealed there");
        Ok(())
    }
    fn run(&mut self, was_running: bool) -> Result<()> {
        self.step("run there")?;
        let doubt = self.troubles.destination_fails.filter(|step| step.starts_with("doubt"));
        if was_running && doubt != Some("doubt, stopped") {
            self.machine.start_vcpu(self.vmm);
            self.machine.run();
        }
        self.machine.world.step("runs there");
        match doubt {
            Some(_) => Err(Error::Unknown("its monitor does not say whether it runs".into())),
            None => Ok(()),
        }
    }
    fn discard(&mut self) -> Result<()> {
        self.machine.world.step("discard");
        if self.machine.world.is_dead(self.process) {
            return Err(Error::Guest("its supervisor is dead".into()));
        }
        if self.troubles.destination_fails == Some("discard") {
            return Err(Error::Guest("the copy cannot be ended".into()));
        }
        self.machine.go();
        Ok(())
    }
}
