//! CPU time of processes over a stretch of time, without the guest's own.
//!
//! Summed over threads from /proc/PID/task/TID/schedstat (nanoseconds), sampled while it lasts, because a
//! source ends at the end of its migration and takes its counters along. Threads that run the guest
//! (QEMU names them `CPU n/...` with `-name debug-threads=on`) are left out: what the workload burns is not
//! the migration's.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often counters are read. What a process burns in its last moments is lost, for every way alike.
const SAMPLE_EVERY: Duration = Duration::from_millis(4);

type Threads = HashMap<(u32, u32), u64>;

/// Counts from its making to [`Meter::stop`].
#[derive(Debug)]
pub struct Meter {
    first: Threads,
    last: Arc<Mutex<Threads>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Meter {
    /// Starts to count these processes.
    #[must_use]
    pub fn start(pids: Vec<u32>) -> Self {
        let mut first = Threads::new();
        read(&pids, &mut first);
        let last = Arc::new(Mutex::new(first.clone()));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&last), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                read(&pids, &mut shared.lock().unwrap_or_else(PoisonError::into_inner));
                std::thread::sleep(SAMPLE_EVERY);
            }
            read(&pids, &mut shared.lock().unwrap_or_else(PoisonError::into_inner));
        });
        Self { first, last, stop, thread }
    }

    /// CPU seconds since the start.
    #[must_use]
    pub fn stop(self) -> f64 {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let spent: u64 =
            last.iter().map(|(thread, ns)| ns - self.first.get(thread).copied().unwrap_or(0).min(*ns)).sum();
        spent as f64 / 1e9
    }
}

fn read(pids: &[u32], into: &mut Threads) {
    for pid in pids {
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for task in tasks.flatten() {
            let Some(tid) = task.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("CPU ")) {
                continue;
            }
            let spent = fs::read_to_string(task.path().join("schedstat")).ok();
            if let Some(ns) = spent.and_then(|text| text.split(' ').next()?.parse().ok()) {
                into.insert((*pid, tid), ns);
            }
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
