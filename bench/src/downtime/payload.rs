//! The payload guest under this host's KVM, moved by the engine within this process: a real
//! machine's state and real dirty tracking, without a kernel or a QEMU around it.

use super::{Guest, Harness, Move, MoveOptions};
use anyhow::{Context, Result, bail};
use pageferry_engine::destination::listener::SessionListener;
use pageferry_engine::destination::{Receiver, Served};
use pageferry_engine::guest::SourceGuest;
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_engine::net::choice::LinkChoice;
use pageferry_engine::report::Outcome;
use pageferry_engine::report::progress::Monitor;
use pageferry_engine::source::migrate;
use pageferry_microvm::config::{MachineConfig, TrackingChoice};
use pageferry_microvm::console::serial::Console;
use pageferry_microvm::destination::KvmDestination;
use pageferry_microvm::payload::PayloadOptions;
use pageferry_microvm::source::{Boot, KvmSource};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// For the source to connect to the receiver beside it.
const CONNECT_MAX: Duration = Duration::from_secs(30);
/// For the guest to write its working memory once. After that measuring begins all the same.
const WARM_UP_MAX: Duration = Duration::from_secs(20);
/// For a guest that runs to write a page. The slowest writes one a second.
const WRITE_ON_MAX: Duration = Duration::from_secs(10);
/// What is written where is the same in every run.
const SEED: u64 = 20_260_101;

/// A payload guest.
pub struct Payload {
    guest: Option<KvmSource>,
    config: MachineConfig,
    options: MoveOptions,
}

impl Payload {
    /// Boots the guest, and waits until it has written about as many pages as it has.
    pub fn start(options: MoveOptions, tracking: TrackingChoice) -> Result<Self> {
        debug_assert_eq!(options.guest, Guest::Payload);
        let each =
            f64::from(options.rate_mb) * 1e6 / PAGE_BYTES as f64 / f64::from(options.threads);
        if options.rate_mb > 0 && each < 1.0 {
            bail!(
                "--rate {} is less than a page a second for each of --threads {}",
                options.rate_mb,
                options.threads
            );
        }
        let working_set_pages = u64::from(options.working_mib) << 8;
        let payload = PayloadOptions {
            pattern: options.pattern,
            pages_per_second: (options.rate_mb > 0).then_some(each as u64),
            working_set_pages: Some(working_set_pages),
            seed: SEED,
        };
        let mut config = MachineConfig::new(u64::from(options.memory_mib) << 20, options.threads);
        config.tracking = tracking;
        let mut guest = KvmSource::start(&config, &Boot::Payload(payload), Console::none())?;
        let until = Instant::now() + WARM_UP_MAX;
        while Instant::now() < until
            && guest.check()?.pages_written.iter().sum::<u64>() < working_set_pages
        {
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(Self { guest: Some(guest), config, options })
    }
}

impl Payload {
    /// Waits until every vCPU has gone on by a page.
    fn writes_on(&mut self) -> Result<()> {
        let Some(guest) = self.guest.as_mut() else { return Ok(()) };
        let before = guest.last_ticks()?;
        let until = Instant::now() + WRITE_ON_MAX;
        while guest.last_ticks()?.iter().zip(&before).any(|(now, before)| now == before) {
            if Instant::now() >= until {
                bail!("the guest has come and writes nothing for {WRITE_ON_MAX:?}");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Harness for Payload {
    fn service(&self) -> Option<SocketAddr> {
        None
    }

    fn move_once(&mut self) -> Result<Move> {
        let mut source = self.guest.take().context("the guest was lost by an earlier move")?;
        let listener = SessionListener::open(SocketAddr::new(self.options.address, 0).into())
            .with_context(|| format!("listening at {}", self.options.address))?;
        let options = self.options.migrate_options(listener.address.to_string());
        let destination = KvmDestination::new(&self.config, Console::none())?;
        source.forget_gaps()?;
        let planted_pause = self.options.planted_pause;
        if !planted_pause.is_zero() {
            bail!("--plant-pause is for the synthetic guest");
        }
        let (report, arrived) = std::thread::scope(|scope| {
            let receiving = scope.spawn(|| receive(listener, destination));
            let report = migrate(&mut source, &options, &Monitor::default());
            (report, receiving.join())
        });
        // It runs where the engine says that it does.
        self.guest = if report.outcome == Outcome::Completed {
            source.end()?;
            arrived.ok().flatten()
        } else {
            Some(source)
        };
        self.writes_on()?;
        Ok(Move { report })
    }

    fn guest_gap_ms(&self) -> f64 {
        // Between two readings of its own time-stamp counter, which went on while it was paused.
        let gap = self.guest.as_ref().and_then(|guest| {
            let ticks = guest.gap_ticks_max().ok()?;
            Some(ticks.into_iter().max()? as f64 / f64::from(guest.machine().tsc_khz()))
        });
        gap.unwrap_or(f64::NAN)
    }

    fn check(&mut self) -> Result<()> {
        let guest = self.guest.as_mut().context("the guest was lost by a move")?;
        guest.check()?;
        Ok(())
    }

    fn hold(&mut self, held: bool) -> Result<()> {
        let guest = self.guest.as_mut().context("the guest was lost by a move")?;
        if held {
            guest.pause()?;
            return Ok(());
        }
        guest.resume()?;
        // Its first look at the clock finds how long it was held, and is none of a move's gaps.
        self.writes_on()
    }
}

/// The guest that came, if one did.
fn receive(listener: SessionListener, mut guest: KvmDestination) -> Option<KvmSource> {
    let mut receiver = Receiver::new(listener, LinkChoice::default());
    let incoming = receiver.listener().next(Instant::now() + CONNECT_MAX)?;
    match receiver.serve(incoming, &mut guest, &mut || Ok(())) {
        Served::Received(_) => guest.into_source(),
        _ => None,
    }
}
