//! Guests whose writes are followed.

use anyhow::{Context, Result};
use clap::ValueEnum;
use pageferry_engine::dirty::DirtySource;
use pageferry_engine::guest::SourceGuest;
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_microvm::config::{MachineConfig, TrackingChoice};
use pageferry_microvm::console::serial::Console;
use pageferry_microvm::machine::open_kvm;
use pageferry_microvm::payload::{Pattern, PayloadOptions};
use pageferry_microvm::source::{Boot, KvmSource};
use pageferry_synthetic::{SyntheticOptions, SyntheticSource};
use serde::Serialize;

/// What is written where is the same in every run.
const SEED: u64 = 20_260_101;

/// How writes are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Tracker {
    /// Page tables, by userfaultfd and PAGEMAP_SCAN: threads of this process.
    Pagemap,
    /// KVM's log: a guest under KVM.
    Log,
    /// KVM's dirty ring: a guest under KVM.
    Ring,
}

/// A guest that writes. Dropping it ends it.
pub trait Subject {
    /// Its memory in pages.
    fn pages(&self) -> u64;

    /// Pages that it has written so far, each time counted. It is paused while they are counted.
    fn written(&mut self) -> Result<u64>;

    /// Begins to follow its writes.
    fn follow(&mut self) -> Result<Box<dyn DirtySource>>;

    /// Has it be paused, or go on.
    fn hold(&mut self, held: bool) -> Result<()>;
}

impl Tracker {
    /// Its name in records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pagemap => "pagemap",
            Self::Log => "log",
            Self::Ring => "ring",
        }
    }

    /// Starts a guest of the kind that it follows. Fails with the reason where this host has no
    /// such tracker.
    pub(super) fn start(
        self,
        memory_mib: u32,
        working_mib: u32,
        rate_mb: u32,
    ) -> Result<Box<dyn Subject>> {
        let (pages, working) = (u64::from(memory_mib) << 8, u64::from(working_mib) << 8);
        let rate = (rate_mb > 0).then(|| u64::from(rate_mb) * 1_000_000 / PAGE_BYTES);
        let tracking = match self {
            Self::Pagemap => {
                let options = SyntheticOptions {
                    pages,
                    touched_pages: working,
                    threads: 1,
                    pages_per_second: rate.map(|rate| u32::try_from(rate).unwrap_or(u32::MAX)),
                    seed: SEED,
                    discards: false,
                };
                return Ok(Box::new(Threads(SyntheticSource::start(options)?)));
            }
            Self::Log => TrackingChoice::Log,
            Self::Ring => TrackingChoice::Ring,
        };
        open_kvm()?;
        let mut config = MachineConfig::new(pages * PAGE_BYTES, 1);
        config.tracking = tracking;
        let payload = PayloadOptions {
            pattern: Pattern::Random,
            pages_per_second: rate,
            working_set_pages: Some(working),
            seed: SEED,
        };
        let guest = KvmSource::start(&config, &Boot::Payload(payload), Console::none())
            .context("starting a payload guest")?;
        Ok(Box::new(Payload(guest)))
    }
}

struct Threads(SyntheticSource);

struct Payload(KvmSource);

impl Subject for Threads {
    fn pages(&self) -> u64 {
        self.0.memory().pages()
    }

    fn written(&mut self) -> Result<u64> {
        Ok(self.0.generations()?)
    }

    fn follow(&mut self) -> Result<Box<dyn DirtySource>> {
        Ok(self.0.start_tracking(&mut || Ok(()))?)
    }

    fn hold(&mut self, held: bool) -> Result<()> {
        hold(&mut self.0, held)
    }
}

impl Subject for Payload {
    fn pages(&self) -> u64 {
        self.0.memory().pages()
    }

    fn written(&mut self) -> Result<u64> {
        // Checked against its ledger on the way: a tracker that damages a guest is worth nothing.
        Ok(self.0.check()?.pages_written.iter().sum())
    }

    fn follow(&mut self) -> Result<Box<dyn DirtySource>> {
        Ok(self.0.start_tracking(&mut || Ok(()))?)
    }

    fn hold(&mut self, held: bool) -> Result<()> {
        hold(&mut self.0, held)
    }
}

fn hold(guest: &mut dyn SourceGuest, held: bool) -> Result<()> {
    Ok(if held { guest.pause() } else { guest.resume() }?)
}
