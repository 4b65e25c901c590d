//! The program inside the guest: console lines out, one-line commands in. See the library's first
//! page.
//!
//! `pageferry-workload --guest` takes its parameters from /proc/cmdline and uses I/O ports; without
//! `--guest` they are the arguments and no port is touched, to try it on any machine.
//!
//! Every line begins with `WORKLOAD`. Only this thread prints: a console that nobody reads must not
//! hold up the workers.

use pageferry_workload::disk::{self, Disk};
use pageferry_workload::echo;
use pageferry_workload::pages::PAGE_BYTES;
use pageferry_workload::params::Params;
use pageferry_workload::pulse::{ConsoleBeats, Gaps, Pulse};
use pageferry_workload::worker::{self, News, Share, Stats, SweepNow};
use std::io::{BufRead, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// Corrupt pages are printed up to this number, then only counted: a lost gigabyte would take an
/// hour.
const CORRUPT_LINES_MAX: u64 = 64;

/// The disk of `pf.disk`.
const DISK: &str = "/dev/vda";

enum Event {
    News(News),
    Command(String),
}

impl From<News> for Event {
    fn from(news: News) -> Self {
        Self::News(news)
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let in_guest = arguments.iter().any(|a| a == "--guest");
    let line =
        if in_guest { std::fs::read_to_string("/proc/cmdline") } else { Ok(arguments.join(" ")) };
    let params =
        line.map_err(|e| format!("/proc/cmdline: {e}")).and_then(|line| Params::parse(&line));
    match params.and_then(|params| Workload::start(&params, in_guest)).and_then(Workload::serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            say(format_args!("FAILED {message}"));
            ExitCode::FAILURE
        }
    }
}

/// Prints a line. A console that is gone is nothing to fail for: the memory is still being checked.
fn say(what: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "WORKLOAD {what}").and_then(|()| out.flush());
}

struct Workload {
    stats: Arc<Stats>,
    gaps: Arc<Gaps>,
    events: Receiver<Event>,
    orders: Vec<Sender<SweepNow>>,
    started: Instant,
    /// Between two status lines, if they come by themselves.
    status_every: Option<Duration>,
    writes_before: u64,
    status_before: Instant,
    corrupt_lines: u64,
    /// Workers whose sweep is still to come, and the pages swept so far.
    verdict: Option<(usize, u64)>,
}

impl Workload {
    fn start(params: &Params, in_guest: bool) -> Result<Self, String> {
        let (sender, events) = channel();
        let (stats, gaps) = (Arc::<Stats>::default(), Arc::<Gaps>::default());
        let (pulse_gaps, tick) = (Arc::clone(&gaps), Duration::from_micros(params.tick_us.into()));
        let ports = params.ports == 1;
        let console = console_beats(params, in_guest)?;
        spawn("pulse", move || Pulse::new(pulse_gaps, tick, in_guest && ports, console).run())?;
        let mut orders = Vec::new();
        for (index, share) in shares(params).into_iter().enumerate() {
            let (order, inbox) = channel();
            let (stats, news) = (Arc::clone(&stats), sender.clone());
            spawn(&format!("worker {index}"), move || worker::run(share, &stats, &inbox, &news))?;
            orders.push(order);
        }
        for _ in &orders {
            match events.recv_timeout(Duration::from_secs(600)) {
                Ok(Event::News(News::Filled(Ok(())))) => {}
                Ok(Event::News(News::Filled(Err(e)))) => {
                    return Err(format!(
                        "no memory for pf.mib={} pf.touch={}: {e}",
                        params.mib, params.touch_mib
                    ));
                }
                _ => return Err("a worker did not fill its memory within ten minutes".into()),
            }
        }
        for (index, worker) in disk_workers(params)?.into_iter().enumerate() {
            let (order, inbox) = channel();
            let (stats, news) = (Arc::clone(&stats), sender.clone());
            spawn(&format!("disk {index}"), move || worker.run(&stats, &inbox, &news))?;
            orders.push(order);
        }
        if params.echo > 0 {
            let socket =
                echo::open(params.echo).map_err(|e| format!("pf.echo={}: {e}", params.echo))?;
            spawn("echo", move || echo::run(&socket))?;
        }
        spawn("console", move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                if sender.send(Event::Command(line)).is_err() {
                    break;
                }
            }
            // The end of the console is no command to stop: keep the channel open.
            loop {
                std::thread::park();
            }
        })?;
        gaps.reset();
        say(format_args!("READY {params}"));
        Ok(Self {
            stats,
            gaps,
            events,
            orders,
            started: Instant::now(),
            status_every: (params.status_s > 0)
                .then(|| Duration::from_secs(params.status_s.into())),
            writes_before: 0,
            status_before: Instant::now(),
            corrupt_lines: 0,
            verdict: None,
        })
    }

    fn serve(mut self) -> Result<(), String> {
        let every = self.status_every.unwrap_or(Duration::from_secs(3600));
        let mut next = self.started + every;
        loop {
            match self.events.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(Event::Command(line)) => {
                    if !self.command(line.trim()) {
                        return Ok(());
                    }
                }
                Ok(Event::News(news)) => self.news(news),
                Err(RecvTimeoutError::Timeout) => {
                    if self.status_every.is_some() {
                        self.status();
                    }
                    next = (next + every).max(Instant::now());
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err("the console thread is gone".into());
                }
            }
        }
    }

    /// False when the program shall end.
    fn command(&mut self, line: &str) -> bool {
        match line {
            "" => {}
            "status" => self.status(),
            "verdict" if self.verdict.is_some() => {}
            "verdict" => {
                self.verdict = Some((self.orders.len(), 0));
                // A worker that is gone never answers; that it is gone shows as a missing verdict.
                self.orders.iter().for_each(|order| drop(order.send(SweepNow)));
            }
            "reset-gap" => {
                self.gaps.reset();
                say(format_args!("GAP RESET"));
            }
            "quit" => {
                say(format_args!("BYE"));
                return false;
            }
            _ => say(format_args!("UNKNOWN COMMAND {line:?}: verdict, reset-gap, status or quit")),
        }
        true
    }

    fn news(&mut self, news: News) {
        match news {
            News::Corrupt(what) => {
                self.corrupt_lines += 1;
                if self.corrupt_lines <= CORRUPT_LINES_MAX {
                    say(format_args!("CORRUPT {what}"));
                } else if self.corrupt_lines == CORRUPT_LINES_MAX + 1 {
                    say(format_args!("CORRUPT more: only counted from here on"));
                }
            }
            News::Swept(pages) => {
                let (missing, swept) = self.verdict.take().unwrap_or((1, 0));
                if missing > 1 {
                    self.verdict = Some((missing - 1, swept + pages));
                    return;
                }
                let errors = self.stats.errors.load(Relaxed);
                let word = if errors == 0 { "intact" } else { "corrupt" };
                say(format_args!(
                    "VERDICT {word} pages={} errors={errors} writes={} {}{}",
                    swept + pages,
                    self.stats.writes.load(Relaxed),
                    self.gap_figures(),
                    self.disk_figures()
                ));
            }
            News::Filled(_) => {}
        }
    }

    fn status(&mut self) {
        let writes = self.stats.writes.load(Relaxed);
        let seconds = self.status_before.elapsed().as_secs_f64().max(1e-3);
        let rate =
            ((writes - self.writes_before) as f64 * PAGE_BYTES as f64 / 1e6 / seconds).round();
        (self.writes_before, self.status_before) = (writes, Instant::now());
        say(format_args!(
            "t={:.1} writes={writes} checked={} errors={} write_mb={rate} {}{}",
            self.started.elapsed().as_secs_f64(),
            self.stats.checked.load(Relaxed),
            self.stats.errors.load(Relaxed),
            self.gap_figures(),
            self.disk_figures()
        ));
    }

    /// Nothing without a disk.
    fn disk_figures(&self) -> String {
        let (read, written) =
            (self.stats.disk_read.load(Relaxed), self.stats.disk_written.load(Relaxed));
        if read + written == 0 {
            String::new()
        } else {
            format!(" disk_read={read} disk_written={written}")
        }
    }

    fn gap_figures(&self) -> String {
        let ms = |figure: &std::sync::atomic::AtomicU64| figure.load(Relaxed) as f64 / 1000.0;
        format!(
            "gap_max_ms={:.1} run_gap_max_ms={:.1} stopped_max_ms={:.1} stopped_total_ms={:.1}",
            ms(&self.gaps.max),
            ms(&self.gaps.run_max),
            ms(&self.gaps.stopped_max),
            ms(&self.gaps.stopped_total)
        )
    }
}

fn console_beats(params: &Params, in_guest: bool) -> Result<Option<ConsoleBeats>, String> {
    if params.beat_us == 0 || !in_guest {
        return Ok(None);
    }
    let opened = ConsoleBeats::open(Duration::from_micros(params.beat_us.into()));
    opened.map(Some).map_err(|e| format!("the console for pf.beat_us={}: {e}", params.beat_us))
}

fn disk_workers(params: &Params) -> Result<Vec<disk::Worker>, String> {
    if params.disk == 0 {
        return Ok(Vec::new());
    }
    let failed = |e: std::io::Error| format!("{DISK} for pf.disk={}: {e}", params.disk);
    let disk = Arc::new(Disk::open(Path::new(DISK), params.disk).map_err(failed)?);
    (0..params.disk)
        .map(|index| disk::Worker::new(Arc::clone(&disk), index).map_err(failed))
        .collect()
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(body);
    thread.map(drop).map_err(|e| format!("starting the thread {name}: {e}"))
}

/// Divides pages and rates among the workers.
fn shares(params: &Params) -> Vec<Share> {
    const PAGES_PER_MIB: u32 = (1 << 20) / PAGE_BYTES as u32;
    let threads = params.threads;
    let (written, still) = (params.mib * PAGES_PER_MIB, params.touch_mib * PAGES_PER_MIB);
    let part = |all: u32, index: u32| {
        (u64::from(all) * u64::from(index + 1) / u64::from(threads)) as u32
            - (u64::from(all) * u64::from(index) / u64::from(threads)) as u32
    };
    let bytes = |mb: u32| f64::from(mb) * 1e6 / f64::from(threads);
    let mut first = 0;
    (0..threads)
        .map(|index| {
            let share = Share {
                first,
                written: part(written, index),
                still: part(still, index),
                pages_of_all: written + still,
                write_rate: if params.rate_mb == 0 { f64::INFINITY } else { bytes(params.rate_mb) },
                sweep_rate: bytes(params.sweep_mb),
                pattern: params.pattern,
            };
            first += share.written + share.still;
            share
        })
        .collect()
}
