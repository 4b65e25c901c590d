//! CPU time of processes over a stretch of time, without the guest's own.
//!
//! The CPU clock of each process (all its threads, also those that have ended), less the threads
//! that run the guest (QEMU names them `CPU n/...` with `-name debug-threads=on`, the built-in
//! monitor `vcpu n`): what the workload burns is not the migration's. Sampled while it lasts,
//! because a source ends at the end of its migration and takes its clock along.

use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often clocks are read, at the cost of a microsecond each. What a process burns in its last
/// moments is lost, for every way alike.
const SAMPLE_EVERY: Duration = Duration::from_millis(4);

/// How the names of threads begin that run a guest: in QEMU, and in the built-in monitor.
const GUEST_THREADS: [&str; 2] = ["CPU ", "vcpu "];

/// Nanoseconds of each process without its guest.
type Spent = HashMap<u32, u64>;

/// Counts from its making to [`Meter::stop`].
#[derive(Debug)]
pub struct Meter {
    first: Spent,
    last: Arc<Mutex<Spent>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// One process.
struct Process {
    pid: u32,
    clock: ClockId,
    /// `schedstat` of each thread that runs the guest: nanoseconds first.
    guest: Vec<PathBuf>,
}

impl Meter {
    /// Starts to count these processes.
    #[must_use]
    pub fn start(pids: Vec<u32>) -> Self {
        let processes: Vec<_> = pids.into_iter().filter_map(Process::open).collect();
        let mut first = Spent::new();
        read(&processes, &mut first);
        let last = Arc::new(Mutex::new(first.clone()));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&last), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(SAMPLE_EVERY);
                read(&processes, &mut shared.lock().unwrap_or_else(PoisonError::into_inner));
            }
        });
        Self { first, last, stop, thread }
    }

    /// CPU seconds since the start.
    #[must_use]
    pub fn stop(self) -> f64 {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let spent: u64 = last
            .iter()
            .map(|(pid, ns)| ns.saturating_sub(self.first.get(pid).copied().unwrap_or(0)))
            .sum();
        spent as f64 / 1e9
    }
}

impl Process {
    fn open(pid: u32) -> Option<Self> {
        let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid).ok()?)).ok()?;
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
        let runs_guest = |task: &PathBuf| {
            fs::read_to_string(task.join("comm"))
                .is_ok_and(|name| GUEST_THREADS.iter().any(|prefix| name.starts_with(prefix)))
        };
        let guest =
            tasks.map(|task| task.path()).filter(runs_guest).map(|task| task.join("schedstat"));
        Some(Self { pid, clock, guest: guest.collect() })
    }

    fn spent_ns(&self) -> Option<u64> {
        let now = self.clock.now().ok()?;
        let all = u64::try_from(now.tv_sec()).ok()? * 1_000_000_000
            + u64::try_from(now.tv_nsec()).ok()?;
        let of =
            |path: &PathBuf| fs::read_to_string(path).ok()?.split(' ').next()?.parse::<u64>().ok();
        Some(all.saturating_sub(self.guest.iter().filter_map(of).sum()))
    }
}

fn read(processes: &[Process], into: &mut Spent) {
    for process in processes {
        if let Some(ns) = process.spent_ns() {
            into.insert(process.pid, ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_busy_thread_is_counted_also_after_its_end() {
        let meter = Meter::start(vec![std::process::id()]);
        std::thread::spawn(|| {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(200) {
                std::hint::spin_loop();
            }
        })
        .join()
        .unwrap();
        let spent = meter.stop();
        assert!(spent > 0.03, "{spent} s of at least some of 0.2 s");
    }
}
