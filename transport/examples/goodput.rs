//! Goodput of the TCP link against a raw pump of blocking sends and receives, in turns, so that both
//! meet the same machine.
//!
//! ```text
//! goodput [--lanes N] [--run BYTES] [--total BYTES] [--repeat N] [--zero-copy auto,always,never]
//!         [--region BYTES]
//! ```
//!
//! `--run` is the size of each write: 1048576 for bulk, 4096 with gaps between for scattered pages.
//! Both source and destination are touched beforehand. Prints the median and the range in MB/s, and
//! the median of CPU seconds for each GiB, both ends together.

use pageferry_transport::tcp::{TcpInitiator, TcpOptions, TcpTarget, ZeroCopy};
use pageferry_transport::{
    Completion, FenceTag, Initiator, MemoryRegion, RemoteAddr, STRIPE_BYTES, Target, WorkId, WorkRequest,
};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// What the pump sends and receives at a time.
const PUMP_BYTES: usize = 1 << 20;

struct Options {
    lanes: usize,
    run_bytes: usize,
    total_bytes: u64,
    region_bytes: usize,
    repeat: usize,
    modes: Vec<(String, ZeroCopy)>,
}

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> Result<()> {
    let options = parse(std::env::args().skip(1))?;
    println!(
        "lanes {}, writes of {} bytes, {} MiB a repetition, {} repetitions, region {} MiB",
        options.lanes,
        options.run_bytes,
        options.total_bytes >> 20,
        options.repeat,
        options.region_bytes >> 20,
    );
    let mut pump = Vec::new();
    let mut links = vec![Vec::new(); options.modes.len()];
    for _ in 0..options.repeat {
        pump.push(run_pump(&options)?);
        for (rates, (_, mode)) in links.iter_mut().zip(&options.modes) {
            rates.push(run_link(&options, *mode)?);
        }
    }
    let reference = print("raw pump", &pump, None);
    for (rates, (name, _)) in links.iter().zip(&options.modes) {
        print(&format!("link, zero-copy {name}"), rates, Some(reference));
    }
    Ok(())
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        lanes: 2,
        run_bytes: 1 << 20,
        total_bytes: 2 << 30,
        region_bytes: 256 << 20,
        repeat: 7,
        modes: vec![("auto".into(), ZeroCopy::Auto)],
    };
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--lanes" => options.lanes = value.parse()?,
            "--run" => options.run_bytes = value.parse()?,
            "--total" => options.total_bytes = value.parse()?,
            "--region" => options.region_bytes = value.parse()?,
            "--repeat" => options.repeat = value.parse()?,
            "--zero-copy" => {
                let mode = |name: &str| match name {
                    "auto" => Ok((name.into(), ZeroCopy::Auto)),
                    "always" => Ok((name.into(), ZeroCopy::Always)),
                    "never" => Ok((name.into(), ZeroCopy::Never)),
                    _ => Err(format!("{name}: auto, always or never")),
                };
                options.modes = value.split(',').map(mode).collect::<Result<_, _>>()?;
            }
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    if options.run_bytes == 0 || options.run_bytes as u64 > STRIPE_BYTES || options.repeat == 0 {
        return Err(format!("--run is 1 to {STRIPE_BYTES}, --repeat at least 1").into());
    }
    Ok(options)
}

/// One repetition.
#[derive(Clone, Copy)]
struct Sample {
    megabytes_per_second: f64,
    cpu_seconds_per_gib: f64,
}

/// Measures wall clock and CPU time of this process, which holds both ends.
struct Stopwatch {
    start: Instant,
    cpu_start: Duration,
}

impl Stopwatch {
    fn start() -> Self {
        Self { start: Instant::now(), cpu_start: cpu_time() }
    }

    fn stop(&self, bytes: u64) -> Sample {
        let (elapsed, cpu) = (self.start.elapsed(), cpu_time() - self.cpu_start);
        Sample {
            megabytes_per_second: bytes as f64 / elapsed.as_secs_f64() / 1e6,
            cpu_seconds_per_gib: cpu.as_secs_f64() * f64::from(1 << 30) / bytes as f64,
        }
    }
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn print(name: &str, samples: &[Sample], reference: Option<f64>) -> f64 {
    let sorted = |of: fn(&Sample) -> f64| {
        let mut values: Vec<_> = samples.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let (rates, cpu) = (sorted(|s| s.megabytes_per_second), sorted(|s| s.cpu_seconds_per_gib));
    let middle = samples.len() / 2;
    let (median, low, high, cpu) = (rates[middle], rates[0], rates[rates.len() - 1], cpu[middle]);
    let ratio = reference.map(|pump| format!("  {:.2} of the pump", median / pump)).unwrap_or_default();
    println!("{name:<24} {median:7.0} MB/s  ({low:.0} to {high:.0})  {cpu:.3} CPU s/GiB{ratio}");
    median
}

fn streams(lanes: usize) -> Result<(Vec<TcpStream>, Vec<TcpStream>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut ends = (Vec::new(), Vec::new());
    for _ in 0..lanes {
        ends.0.push(TcpStream::connect(listener.local_addr()?)?);
        ends.1.push(listener.accept()?.0);
    }
    Ok(ends)
}

/// As many connections, a thread at each end, 1 MiB a call, over as much memory.
fn run_pump(options: &Options) -> Result<Sample> {
    let (here, there) = streams(options.lanes)?;
    let calls = (options.total_bytes / options.lanes as u64).div_ceil(PUMP_BYTES as u64);
    let slots = (options.region_bytes / options.lanes / PUMP_BYTES).max(1);
    // Touched before the clock starts, as the link's regions are.
    let mut buffers: Vec<(Vec<u8>, Vec<u8>)> =
        (0..options.lanes).map(|_| (vec![1; slots * PUMP_BYTES], vec![1; slots * PUMP_BYTES])).collect();
    let slot = |call: u64| {
        let start = (call as usize % slots) * PUMP_BYTES;
        start..start + PUMP_BYTES
    };
    let watch = Stopwatch::start();
    std::thread::scope(|scope| {
        for ((mut here, mut there), (from, into)) in here.into_iter().zip(there).zip(&mut buffers) {
            scope.spawn(move || (0..calls).try_for_each(|call| here.write_all(&from[slot(call)])));
            scope.spawn(move || (0..calls).try_for_each(|call| there.read_exact(&mut into[slot(call)])));
        }
    });
    Ok(watch.stop(calls * options.lanes as u64 * PUMP_BYTES as u64))
}

fn run_link(options: &Options, zero_copy: ZeroCopy) -> Result<Sample> {
    let (here, there) = streams(options.lanes)?;
    let mut initiator = TcpInitiator::new(here, TcpOptions { zero_copy, ..TcpOptions::default() })?;
    let mut target = TcpTarget::new(there)?;
    let source = MemoryRegion::anonymous(options.region_bytes)?;
    let destination = MemoryRegion::anonymous(options.region_bytes)?;
    for region in [&source, &destination] {
        region.populate(0, options.region_bytes)?;
    }
    initiator.register(&source)?;
    let remote = target.expose(&destination)?;

    // Small writes leave a gap after each, so that none can be merged.
    let step = if options.run_bytes < PUMP_BYTES { 2 * options.run_bytes } else { options.run_bytes };
    let writes: Vec<_> = (0..options.region_bytes / step)
        .map(|index| {
            let offset = index * step;
            Ok(WorkRequest {
                id: WorkId(index as u64),
                local: source.slice(offset, options.run_bytes)?,
                remote: RemoteAddr { key: remote.key, addr: remote.base + offset as u64 },
            })
        })
        .collect::<Result<_>>()?;

    let deadline = Instant::now() + Duration::from_secs(120);
    let mut out = Vec::new();
    let (mut posted, mut done, mut next) = (0u64, 0, 0);
    let watch = Stopwatch::start();
    while posted * (options.run_bytes as u64) < options.total_bytes {
        let accepted = initiator.post(&writes[next..writes.len().min(next + 1024)])?;
        posted += accepted as u64;
        next = (next + accepted) % writes.len();
        if accepted == 0 {
            done += initiator.poll(&mut out, deadline)?;
            out.clear();
        }
    }
    initiator.fence(FenceTag(1))?;
    target.wait_fence(FenceTag(1), deadline)?;
    let sample = watch.stop(posted * options.run_bytes as u64);
    while done as u64 <= posted {
        done += initiator.poll(&mut out, deadline)?;
    }
    assert!(out.contains(&Completion::Fence(FenceTag(1))));
    Ok(sample)
}
