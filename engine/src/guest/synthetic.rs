//! A guest without a machine: threads that write a memfd and keep a ledger of what they wrote. For tests
//! and benches of everything but QEMU.
//!
//! Every 8-byte word of a page is a function of the page's number, its generation and the word's place,
//! and a writer checks the whole page against its ledger before it writes the next generation. So a page
//! that was lost, torn, or put back to an older generation is found by the guest itself, soon after, or
//! by [`SyntheticSource::check`] at once. The ledger and the generators' states are the device state.

use super::{BlockDescription, DestinationGuest, GuestDescription, Liveness, SourceGuest};
use crate::dirty::DirtySource;
use crate::dirty::pagemap::{PagemapSource, Poison, TrackedRange, own_userfaultfd};
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, SlotSource};
use crate::page::PAGE_BYTES;
use crate::policy::FixedCosts;
use crate::precopy::Watch;
use pageferry_transport::{Access, MemoryRegion, sealed_memfd};
use rustix::fd::AsFd;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A guest that discards gives one page in so many steps back.
const DISCARD_ONE_IN: u64 = 16;

const WORDS: usize = PAGE_BYTES as usize / 8;

/// What kind of guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyntheticOptions {
    /// Size of its memory in pages.
    pub pages: u64,
    /// Pages that are written at all; the rest stays a hole.
    pub touched_pages: u64,
    /// Threads that write; each has its own share of the pages.
    pub threads: u32,
    /// Pages a second that each thread writes; `None` is as fast as it can.
    pub pages_per_second: Option<u32>,
    /// Seed of what is written where.
    pub seed: u64,
    /// Whether pages are given back to the host now and then, as a balloon does. They read as zeros
    /// until they are written again.
    pub discards: bool,
}

/// One thread's share: what it wrote, and where it goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Writer {
    first: u64,
    generations: Vec<u32>,
    /// Pages that were given back and not written since.
    discarded: Vec<bool>,
    random: u64,
}

/// The guest's whole state besides its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    options: SyntheticOptions,
    writers: Vec<Writer>,
}

/// The word at `index` of a page in a generation. Generation zero is a page never written.
fn word(page: u64, generation: u32, index: u64) -> u64 {
    if generation == 0 {
        return 0;
    }
    splitmix(page ^ (u64::from(generation) << 32)).wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

/// Sebastiano Vigna's SplitMix64, one step from `x`.
fn splitmix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Writer {
    /// Compares one page of memory with the ledger.
    fn check_page(&self, memory: &MemoryRegion, offset: usize) -> Result<()> {
        let page = self.first + offset as u64;
        let generation = if self.discarded[offset] { 0 } else { self.generations[offset] };
        let mut bytes = [0; PAGE_BYTES as usize];
        memory.read(page as usize * PAGE_BYTES as usize, &mut bytes)?;
        for (index, chunk) in bytes.chunks_exact(8).enumerate() {
            let found = u64::from_le_bytes(chunk.try_into().unwrap_or_default());
            let wanted = word(page, generation, index as u64);
            if found != wanted {
                return Err(Error::Guest(format!(
                    "page {page} of generation {generation} is corrupt: word {index} is {found:#x}, not {wanted:#x}"
                )));
            }
        }
        Ok(())
    }

    fn check_all(&self, memory: &MemoryRegion) -> Result<()> {
        (0..self.generations.len()).try_for_each(|offset| self.check_page(memory, offset))
    }

    /// Checks a page and writes its next generation; or, now and then, gives it back to `balloon`.
    fn step(&mut self, memory: &MemoryRegion, balloon: Option<&File>) -> Result<()> {
        self.random = splitmix(self.random);
        let offset = (self.random % self.generations.len() as u64) as usize;
        self.check_page(memory, offset)?;
        if let Some(file) = balloon
            && (self.random >> 32).is_multiple_of(DISCARD_ONE_IN)
        {
            let at = (self.first + offset as u64) * PAGE_BYTES;
            fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, PAGE_BYTES)
                .map_err(|e| Error::os("giving a page back", e))?;
            self.discarded[offset] = true;
            return Ok(());
        }
        let (page, generation) =
            (self.first + offset as u64, self.generations[offset].wrapping_add(1).max(1));
        let mut bytes = [0; PAGE_BYTES as usize];
        for index in 0..WORDS {
            bytes[index * 8..][..8].copy_from_slice(&word(page, generation, index as u64).to_le_bytes());
        }
        memory.write(page as usize * PAGE_BYTES as usize, &bytes)?;
        self.generations[offset] = generation;
        self.discarded[offset] = false;
        Ok(())
    }
}

/// Threads that run writers until they are told to stop.
#[derive(Debug)]
struct Engine {
    stop: Arc<AtomicBool>,
    failure: Arc<Mutex<Option<Error>>>,
    threads: Vec<JoinHandle<Writer>>,
}

impl Engine {
    fn start(writers: Vec<Writer>, memory: &Memory, options: &SyntheticOptions) -> Self {
        let pages_per_second = options.pages_per_second;
        let balloon = options.discards.then(|| Arc::clone(&memory.file));
        let (stop, failure) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
        let threads = writers
            .into_iter()
            .map(|mut writer| {
                let (stop, failure, memory) =
                    (Arc::clone(&stop), Arc::clone(&failure), Arc::clone(&memory.guest));
                let balloon = balloon.clone();
                std::thread::spawn(move || {
                    let begun = Instant::now();
                    let mut steps = 0u32;
                    while !stop.load(Ordering::Acquire) {
                        if let Err(e) = writer.step(&memory, balloon.as_deref()) {
                            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
                            break;
                        }
                        steps += 1;
                        if let Some(rate) = pages_per_second {
                            let due = begun + Duration::from_secs_f64(f64::from(steps) / f64::from(rate));
                            std::thread::sleep(due.saturating_duration_since(Instant::now()));
                        }
                    }
                    writer
                })
            })
            .collect();
        Self { stop, failure, threads }
    }

    /// Stops the threads; what they knew comes back.
    fn stop(self) -> Result<Vec<Writer>> {
        self.stop.store(true, Ordering::Release);
        let joined: Vec<_> = self.threads.into_iter().map(JoinHandle::join).collect();
        if let Some(e) = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(e);
        }
        joined
            .into_iter()
            .map(|writer| writer.map_err(|_| Error::Guest("a writer panicked".into())))
            .collect()
    }
}

/// The guest's memory twice: as the guest has it mapped, and as the engine has.
#[derive(Debug, Clone)]
struct Memory {
    guest: Arc<MemoryRegion>,
    engine: Arc<GuestMemory>,
    file: Arc<File>,
}

impl Memory {
    fn new(pages: u64) -> Result<Self> {
        let file = sealed_memfd("pageferry-synthetic", MemfdFlags::empty(), pages * PAGE_BYTES)
            .map(File::from)
            .map_err(|e| Error::os("making a memfd", e))?;
        let guest = MemoryRegion::map_shared(file.as_fd(), 0, (pages * PAGE_BYTES) as usize, Access::Write)?;
        let again = file.try_clone().map_err(|e| Error::os("keeping a memfd", e))?;
        let slot = SlotSource {
            name: "synthetic".into(),
            file,
            file_offset: 0,
            bytes: pages * PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
            process_address: guest.as_ptr() as u64,
        };
        Ok(Self {
            guest,
            engine: Arc::new(GuestMemory::map(vec![slot], Access::Write)?),
            file: Arc::new(again),
        })
    }
}

fn describe(memory: &GuestMemory) -> GuestDescription {
    let blocks = memory
        .slots()
        .iter()
        .map(|s| BlockDescription { name: s.name.clone(), bytes: s.region().len() as u64 });
    GuestDescription {
        monitor: "synthetic".into(),
        machine: "threads".into(),
        vcpus: 1,
        blocks: blocks.collect(),
        images: Vec::new(),
        platform: Vec::new(),
    }
}

/// A running synthetic guest.
#[derive(Debug)]
pub struct SyntheticSource {
    memory: Memory,
    options: SyntheticOptions,
    running: Option<Engine>,
    stopped: Option<Vec<Writer>>,
    sealed: bool,
    /// See [`Self::lose`].
    poison: Option<Poison>,
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
        let checked =
            self.stopped.iter().flatten().try_for_each(|writer| writer.check_all(&self.memory.guest));
        self.go();
        checked
    }

    /// The engine loses a page of it, as to broken hardware, until the next migration begins. The guest itself does not:
    /// its threads have a mapping of their own.
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
        let sum = self.stopped.iter().flatten().flat_map(|w| &w.generations).map(|g| u64::from(*g)).sum();
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

    fn go(&mut self) {
        if let Some(writers) = self.stopped.take() {
            self.running = Some(Engine::start(writers, &self.memory, &self.options));
        }
    }

    fn halt(&mut self) -> Result<()> {
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
    fn describe(&self) -> GuestDescription {
        describe(&self.memory.engine)
    }

    fn preflight(&mut self) -> Result<()> {
        if self.sealed {
            return Err(Error::refused("the guest is stopped after a migration in doubt"));
        }
        crate::dirty::pagemap::probe()
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory.engine
    }

    fn state_bytes_max(&self) -> u64 {
        4096 + self.options.pages * 8
    }

    fn state_bytes_expected(&self) -> u64 {
        self.options.touched_pages * 2
    }

    fn fixed_costs(&self) -> FixedCosts {
        FixedCosts { pause_us: 200, harvest_us: 0, save_us: 200, load_us: 200, resume_us: 100 }
    }

    fn liveness(&self) -> Liveness {
        Arc::new(|| Ok(()))
    }

    fn may_discard(&mut self) -> Result<bool> {
        Ok(self.options.discards)
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

    fn settle_io(&mut self) -> Result<()> {
        Ok(())
    }

    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        self.halt()
    }

    fn begin_save(&mut self) -> Result<()> {
        Ok(())
    }

    fn save(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let writers = self.stopped.clone().ok_or_else(|| Error::Guest("saving a guest that runs".into()))?;
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

    fn retire(&mut self, tracking: Box<dyn DirtySource>) {
        drop(tracking);
    }

    fn end(&mut self) -> Result<()> {
        assert!(self.sealed, "a guest ends at the source only after Commit");
        self.stopped = None;
        Ok(())
    }
}

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

    fn liveness(&self) -> Liveness {
        Arc::new(|| Ok(()))
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
        let State { options, writers } =
            self.state.take().ok_or_else(|| Error::Guest("running a guest without state".into()))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::{Reception, Served};
    use crate::doorway::Doorway;
    use crate::link::LinkChoice;
    use crate::policy::WhenStuck;
    use crate::progress::Monitor;
    use crate::report::Outcome;
    use crate::source::{MigrateOptions, migrate};

    const OPTIONS: SyntheticOptions = SyntheticOptions {
        pages: 512,
        touched_pages: 256,
        threads: 2,
        pages_per_second: None,
        seed: 7,
        discards: true,
    };

    /// Moves a guest over real TCP within this process.
    fn moved(mut source: SyntheticSource) -> SyntheticSource {
        let reception =
            Reception::new(Doorway::open("127.0.0.1:0".parse().unwrap()).unwrap(), LinkChoice::default());
        let mut options = MigrateOptions::to(reception.doorway().address.to_string());
        (options.downtime_us_max, options.when_stuck) = (500_000, WhenStuck::Switchover);
        (options.lanes, options.verify, options.rounds_max) = (2, true, 5);
        let pages = source.memory().pages();
        let receiver = std::thread::spawn(move || {
            let (mut reception, mut guest) = (reception, SyntheticDestination::new(pages).unwrap());
            let incoming = reception.doorway().next(Instant::now() + Duration::from_secs(10)).unwrap();
            let served = reception.serve(incoming, &mut guest, &mut || Ok(()));
            assert!(matches!(served, Served::Received(_)), "{served:?}");
            guest.into_source().unwrap()
        });
        let report = migrate(&mut source, &options, &Monitor::default());
        assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
        assert_eq!((report.control_messages, report.verified), (8, Some(true)));
        receiver.join().unwrap()
    }

    #[test]
    fn a_guest_that_writes_and_gives_pages_back_is_moved_without_loss() {
        let mut guest =
            SyntheticSource::start(SyntheticOptions { pages: 8192, touched_pages: 4096, ..OPTIONS }).unwrap();
        while guest.generations().unwrap() < 5000 {
            std::thread::yield_now();
        }
        for _ in 0..3 {
            guest = moved(guest);
            guest.check().unwrap();
        }
    }

    #[test]
    fn a_rate_can_be_changed_and_goes_with_the_guest() {
        let mut guest = SyntheticSource::start(SyntheticOptions { discards: false, ..OPTIONS }).unwrap();
        // Slower than a page in the whole test: what was written stays what was written.
        guest.set_rate(Some(1)).unwrap();
        let mut guest = moved(guest);
        let before = guest.generations().unwrap();
        assert!(guest.generations().unwrap() < before + 100);
        guest.set_rate(None).unwrap();
        while guest.generations().unwrap() < before + 5000 {
            std::thread::yield_now();
        }
        guest.check().unwrap();
    }

    #[test]
    fn a_guest_in_doubt_is_not_let_run_by_a_move_that_is_refused() {
        let mut guest = SyntheticSource::start(OPTIONS).unwrap();
        guest.pause().unwrap();
        guest.seal().unwrap();
        let report = migrate(&mut guest, &MigrateOptions::to("127.0.0.1:1"), &Monitor::default());
        assert!(report.refused && report.reason.unwrap().contains("in doubt"));
        assert!(guest.sealed && !guest.is_running().unwrap());
    }

    #[test]
    fn a_page_that_is_lost_or_stale_or_torn_is_found() {
        // A page that was given back is zeros by right.
        let options = SyntheticOptions { discards: false, ..OPTIONS };
        let mut guest = SyntheticSource::start(options).unwrap();
        while guest.generations().unwrap() < 2000 {
            std::thread::yield_now();
        }
        guest.check().unwrap();
        guest.halt().unwrap();
        let region = Arc::clone(&guest.memory.guest);
        let mut page = vec![0; PAGE_BYTES as usize];
        region.read(5 * PAGE_BYTES as usize, &mut page).unwrap();
        // Lost: zeros.
        region.write(5 * PAGE_BYTES as usize, &[0; 4096]).unwrap();
        assert!(guest.stopped.iter().flatten().any(|w| w.check_all(&region).is_err()));
        // Torn: the second half of the generation before.
        let generation = guest.stopped.as_ref().unwrap()[0].generations[5];
        let mut torn = page.clone();
        for index in WORDS / 2..WORDS {
            torn[index * 8..][..8].copy_from_slice(&word(5, generation - 1, index as u64).to_le_bytes());
        }
        region.write(5 * PAGE_BYTES as usize, &torn).unwrap();
        assert!(guest.stopped.iter().flatten().any(|w| w.check_all(&region).is_err()));
        region.write(5 * PAGE_BYTES as usize, &page).unwrap();
        assert!(guest.stopped.iter().flatten().all(|w| w.check_all(&region).is_ok()));
    }
}
