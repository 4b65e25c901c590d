//! The guest that is threads, moved by the engine within this process: no QEMU, so what is left of
//! a downtime is the engine's own.

use super::service::{Gate, Service};
use super::{Harness, Move, MoveOptions};
use anyhow::{Context, Result, bail};
use pageferry_engine::destination::listener::SessionListener;
use pageferry_engine::destination::{Receiver, Served};
use pageferry_engine::guest::{DestinationGuest, GuestDescription, SourceGuest};
use pageferry_engine::memory::GuestMemory;
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::net::choice::LinkChoice;
use pageferry_engine::report::progress::Monitor;
use pageferry_engine::source::migrate;
use pageferry_synthetic::wrapped::{Hooks, Wrapped};
use pageferry_synthetic::{SyntheticDestination, SyntheticOptions, SyntheticSource};
use pageferry_transport::MemoryRegion;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For the source to connect to the receiver beside it.
const CONNECT_MAX: Duration = Duration::from_secs(30);

/// For the guest to write most of its working memory once. After that measuring begins all the
/// same.
const WARM_UP_MAX: Duration = Duration::from_secs(20);

/// So much of its working memory the guest shall have written before it is measured.
const WARM_SHARE: f64 = 0.9;

/// What is written where is the same in every run.
const SEED: u64 = 20_260_101;

/// A synthetic guest and its service.
pub struct Synthetic {
    guest: Option<SyntheticSource>,
    options: MoveOptions,
    pages: u64,
    gate: Arc<Gate>,
    service: Service,
}

impl Synthetic {
    /// Starts the guest, and waits until it has written most of its working memory.
    pub fn start(options: MoveOptions) -> Result<Self> {
        let pages = u64::from(options.memory_mib) << 8;
        let guest = SyntheticSource::start(SyntheticOptions {
            pages,
            touched_pages: u64::from(options.working_mib) << 8,
            threads: options.threads,
            pages_per_second: pages_per_second(&options)?,
            seed: SEED,
            discards: false,
        })?;
        let gate = Arc::new(Gate::default());
        let service = Service::start(&gate)?;
        let harness = Self { guest: Some(guest), options, pages, gate, service };
        harness.warm_up()?;
        Ok(harness)
    }

    fn warm_up(&self) -> Result<()> {
        let wanted = (f64::from(self.options.working_mib) * 256.0 * WARM_SHARE) as u64;
        let until = Instant::now() + WARM_UP_MAX;
        let memory = Arc::clone(self.guest.as_ref().context("the guest is gone")?.memory());
        while Instant::now() < until {
            if memory.touched()?.iter().map(|run| run.count).sum::<u64>() >= wanted {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// What each thread writes, from MB/s of all together.
fn pages_per_second(options: &MoveOptions) -> Result<Option<u32>> {
    if options.rate_mb == 0 {
        return Ok(None);
    }
    let each = f64::from(options.rate_mb) * 1e6 / PAGE_BYTES as f64 / f64::from(options.threads);
    if each < 1.0 {
        bail!(
            "--rate {} is less than a page a second for each of --threads {}",
            options.rate_mb,
            options.threads
        );
    }
    Ok(Some(each as u32))
}

impl Harness for Synthetic {
    fn service(&self) -> Option<SocketAddr> {
        Some(self.service.address)
    }

    fn move_once(&mut self) -> Result<Move> {
        let source = self.guest.take().context("the guest was lost by an earlier move")?;
        let listener = SessionListener::open(SocketAddr::new(self.options.address, 0).into())
            .with_context(|| format!("listening at {}", self.options.address))?;
        let options = self.options.migrate_options(listener.address.to_string());
        let destination = Arriving {
            inner: SyntheticDestination::new(self.pages)?,
            gate: Arc::clone(&self.gate),
            planted_pause: self.options.planted_pause,
        };
        let mut source = Wrapped { guest: source, hooks: Leaving(Arc::clone(&self.gate)) };
        self.service.reset_gap();
        let (report, arrived) = std::thread::scope(|scope| {
            let receiving = scope.spawn(|| receive(listener, destination));
            let report = migrate(&mut source, &options, &Monitor::default());
            (report, receiving.join())
        });
        let arrived = arrived.ok().flatten();
        // It runs where the engine says that it does. Its service runs with it.
        self.guest = match arrived.and_then(SyntheticDestination::into_source) {
            Some(guest) => Some(guest),
            None => Some(source.guest),
        };
        self.gate.open();
        Ok(Move { report })
    }

    fn guest_gap_ms(&self) -> f64 {
        self.service.gap_ms()
    }

    fn check(&mut self) -> Result<()> {
        let guest = self.guest.as_mut().context("the guest was lost by a move")?;
        Ok(guest.check()?)
    }
}

/// The guest that came, if one did.
fn receive(listener: SessionListener, mut guest: Arriving) -> Option<SyntheticDestination> {
    let mut receiver = Receiver::new(listener, LinkChoice::default());
    let incoming = receiver.listener().next(Instant::now() + CONNECT_MAX)?;
    match receiver.serve(incoming, &mut guest, &mut || Ok(())) {
        Served::Received(_) => Some(guest.inner),
        _ => None,
    }
}

/// The service of the guest at the source is paused with it.
struct Leaving(Arc<Gate>);

impl Hooks for Leaving {
    fn before_pause(&mut self) -> pageferry_engine::Result<()> {
        self.0.close();
        Ok(())
    }
    fn after_resume(&mut self) {
        self.0.open();
    }
}

/// The guest at the destination. A pause of known length can be planted into its downtime, to see
/// that it is found.
struct Arriving {
    inner: SyntheticDestination,
    gate: Arc<Gate>,
    planted_pause: Duration,
}

impl DestinationGuest for Arriving {
    fn load(&mut self, state: &MemoryRegion, len: usize) -> pageferry_engine::Result<()> {
        std::thread::sleep(self.planted_pause);
        self.inner.load(state, len)
    }
    fn run(&mut self, was_running: bool) -> pageferry_engine::Result<()> {
        self.inner.run(was_running)?;
        self.gate.open();
        Ok(())
    }
    fn describe(&self) -> GuestDescription {
        self.inner.describe()
    }
    fn memory(&self) -> &Arc<GuestMemory> {
        self.inner.memory()
    }
    fn seal(&mut self, was_running: bool) -> pageferry_engine::Result<()> {
        self.inner.seal(was_running)
    }
    fn discard(&mut self) -> pageferry_engine::Result<()> {
        self.inner.discard()
    }
}
