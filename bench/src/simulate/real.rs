//! Real migrations of the synthetic guest over a shaped cable: what the model is calibrated with
//! and checked against.

use super::guest::{Area, ModelledGuest};
use super::model::Engine;
use super::traced::{Clocks, Trace, Traced};
use crate::shaped::{End, Shaped};
use anyhow::{Context, Result, bail};
use pageferry_engine::destination::listener::SessionListener;
use pageferry_engine::destination::{Receiver, Served};
use pageferry_engine::guest::{Facts, SourceGuest};
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::net::Address;
use pageferry_engine::net::choice::{LinkChoice, Transport};
use pageferry_engine::policy::{Limits, WhenStuck};
use pageferry_engine::report::MigrationReport;
use pageferry_engine::report::progress::Monitor;
use pageferry_engine::source::{MigrateOptions, migrate};
use pageferry_synthetic::{SyntheticDestination, SyntheticOptions, SyntheticSource};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// For the source to connect to the receiver beside it.
const CONNECT_MAX: Duration = Duration::from_secs(30);

/// For the guest to write most of its working memory once; then it is moved all the same.
const WARM_UP_MAX: Duration = Duration::from_secs(20);
/// So much of it.
const WARM_SHARE: f64 = 0.998;
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What is written where is the same in every run.
const SEED: u64 = 20_260_102;

/// A guest and what is asked of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Memory written over and over, in MiB.
    pub working_mib: u32,
    /// Writes in MB a second.
    pub rate_mb: u32,
    /// Longest downtime that the engine is allowed, in microseconds.
    pub downtime_us_max: u64,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MB/s over {} of {} MiB", self.rate_mb, self.working_mib, self.memory_mib)
    }
}

/// One migration.
#[derive(Debug)]
pub struct Moved {
    /// The engine's report.
    pub report: MigrationReport,
    /// What was noted beside it.
    pub trace: Trace,
    /// When it was asked for.
    pub begun: Instant,
}

impl Setting {
    /// Pages of its memory, and those that it writes.
    #[must_use]
    pub fn pages(&self) -> (u64, u64) {
        (u64::from(self.memory_mib) << 8, u64::from(self.working_mib) << 8)
    }

    /// Writes a second.
    #[must_use]
    pub fn writes_per_second(&self) -> f64 {
        f64::from(self.rate_mb) * 1e6 / PAGE_BYTES as f64
    }

    /// The same guest for the model, with a device state of so many bytes.
    #[must_use]
    pub fn modelled(&self, state_bytes: f64) -> ModelledGuest {
        let (pages, working) = self.pages();
        // A page that was never written is a hole.
        ModelledGuest {
            pages: pages as f64,
            touched_pages: working as f64,
            zero_pages: 0.0,
            areas: vec![Area {
                pages: working as f64,
                writes_per_second: self.writes_per_second(),
            }],
            vcpus: 1,
            state_bytes,
        }
    }

    /// What the engine is told. A guest that writes faster than the cable carries is to be
    /// measured, not to be refused.
    #[must_use]
    pub fn engine(&self, facts: &Facts) -> Engine {
        Engine {
            limits: Limits {
                downtime_us_max: self.downtime_us_max,
                when_stuck: WhenStuck::Switchover,
                rounds_max: MigrateOptions::to("").rounds_max,
            },
            fixed: facts.fixed_costs,
            state_bytes: facts.state_bytes_expected,
        }
    }

    fn options(&self, to: &Address, limits: &Limits) -> MigrateOptions {
        let mut options = MigrateOptions::to(to.to_string());
        options.link = LinkChoice { transport: Transport::Tcp, ..LinkChoice::default() };
        options.downtime_us_max = limits.downtime_us_max;
        options.when_stuck = limits.when_stuck;
        options.rounds_max = limits.rounds_max;
        options.insecure = true;
        options
    }

    /// One that was just born, to be asked what it expects of itself; it writes nearly nothing.
    pub fn idle(&self) -> Result<SyntheticSource> {
        let (pages, touched_pages) = self.pages();
        let options = SyntheticOptions {
            pages,
            touched_pages,
            threads: 1,
            pages_per_second: Some(1),
            seed: SEED,
            discards: false,
        };
        Ok(SyntheticSource::start(options)?)
    }

    /// Starts it and waits until it has written most of its working memory.
    pub fn start(&self) -> Result<SyntheticSource> {
        if self.working_mib == 0 || self.working_mib > self.memory_mib || self.rate_mb == 0 {
            bail!("a guest of {self} cannot be: it writes something, within its memory");
        }
        let (pages, working) = self.pages();
        // As fast as it can first: a quiet guest would need minutes to touch everything once.
        let mut guest = SyntheticSource::start(SyntheticOptions {
            pages,
            touched_pages: working,
            threads: 1,
            pages_per_second: None,
            seed: SEED,
            discards: false,
        })?;
        let until = Instant::now() + WARM_UP_MAX;
        let memory = Arc::clone(guest.memory());
        while Instant::now() < until {
            if memory.touched()?.iter().map(|run| run.count).sum::<u64>() as f64
                >= working as f64 * WARM_SHARE
            {
                break;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        guest.set_rate(Some(self.writes_per_second() as u32))?;
        Ok(guest)
    }
}

/// Moves the guest once over the cable. It is wherever it runs then.
pub fn move_once(
    setting: &Setting,
    mut guest: SyntheticSource,
    shaped: &Shaped,
) -> Result<(SyntheticSource, Moved)> {
    let engine = setting.engine(&guest.facts()?);
    let mut source = Traced { guest, hooks: Clocks::default() };
    let pages = setting.pages().0;
    let (opened, listening) = channel();
    let (moved, arrived) = std::thread::scope(|scope| {
        // A namespace is a thread's own, so each end is a thread of its own; the threads that it
        // starts follow it.
        let receiving = scope.spawn(move || -> Result<Option<SyntheticDestination>> {
            shaped.enter(End::Destination)?;
            let listener =
                SessionListener::open(SocketAddr::new(shaped.address(End::Destination), 0).into())
                    .context("listening at the far end of the cable")?;
            // Nobody listens only if the source has failed already.
            let _ = opened.send(listener.address.clone());
            receive(listener, pages)
        });
        let source = &mut source;
        let moving = scope.spawn(move || -> Result<(MigrationReport, Instant)> {
            shaped.enter(End::Source)?;
            let to = listening.recv().context("the far end does not listen")?;
            let begun = Instant::now();
            Ok((migrate(source, &setting.options(&to, &engine.limits), &Monitor::default()), begun))
        });
        (moving.join(), receiving.join())
    });
    let died = || anyhow::anyhow!("a thread of the migration panicked");
    let (moved, arrived) = (moved.map_err(|_| died())?, arrived.map_err(|_| died())?);
    let trace = source.hooks.trace();
    // If nobody listened, why is the destination's to say.
    let arrived = arrived?;
    let (report, begun) = moved?;
    let guest = arrived.and_then(SyntheticDestination::into_source).unwrap_or(source.guest);
    Ok((guest, Moved { report, trace, begun }))
}

/// The guest that came, if one did.
fn receive(listener: SessionListener, pages: u64) -> Result<Option<SyntheticDestination>> {
    let mut guest = SyntheticDestination::new(pages)?;
    let mut receiver = Receiver::new(listener, LinkChoice::default());
    let Some(incoming) = receiver.listener().next(Instant::now() + CONNECT_MAX) else {
        return Ok(None);
    };
    match receiver.serve(incoming, &mut guest, &mut || Ok(())) {
        Served::Received(_) => Ok(Some(guest)),
        _ => Ok(None),
    }
}
