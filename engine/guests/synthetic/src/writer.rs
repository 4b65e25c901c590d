//! The threads that write memory and check it.

use crate::memory::Memory;
use crate::options::SyntheticOptions;
use pageferry_engine::error::{Error, Result};
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_transport::MemoryRegion;
use rustix::fs::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A guest that discards gives one page in so many steps back.
const DISCARD_ONE_IN: u64 = 16;

pub(crate) const WORDS: usize = PAGE_BYTES as usize / 8;

/// One thread's share: what it wrote, and where it goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Writer {
    pub(super) first: u64,
    pub(crate) generations: Vec<u32>,
    /// Pages that were given back and not written since.
    pub(super) discarded: Vec<bool>,
    pub(super) random: u64,
}

/// The guest's whole state besides its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(super) options: SyntheticOptions,
    pub(super) writers: Vec<Writer>,
}

/// The word at `index` of a page in a generation. Generation zero is a page never written.
pub(crate) fn word(page: u64, generation: u32, index: u64) -> u64 {
    if generation == 0 {
        return 0;
    }
    splitmix(page ^ (u64::from(generation) << 32))
        .wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

/// Sebastiano Vigna's SplitMix64, one step from `x`.
pub(crate) fn splitmix(x: u64) -> u64 {
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

    pub(crate) fn check_all(&self, memory: &MemoryRegion) -> Result<()> {
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
            bytes[index * 8..][..8]
                .copy_from_slice(&word(page, generation, index as u64).to_le_bytes());
        }
        memory.write(page as usize * PAGE_BYTES as usize, &bytes)?;
        self.generations[offset] = generation;
        self.discarded[offset] = false;
        Ok(())
    }
}

/// Threads that run writers until they are told to stop.
#[derive(Debug)]
pub(crate) struct Engine {
    stop: Arc<AtomicBool>,
    failure: Arc<Mutex<Option<Error>>>,
    threads: Vec<JoinHandle<Writer>>,
}

impl Engine {
    pub(crate) fn start(writers: Vec<Writer>, memory: &Memory, options: &SyntheticOptions) -> Self {
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
                            let due =
                                begun + Duration::from_secs_f64(f64::from(steps) / f64::from(rate));
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
    pub(crate) fn stop(self) -> Result<Vec<Writer>> {
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
