//! What one transfer took: time, CPU, and what the machine was doing besides.

use crate::record::{Record, Spec};
use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::time::{Duration, Instant};

/// One repetition.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sample {
    /// 10^6 bytes a second.
    pub mb_per_s: f64,
    /// CPU seconds of both ends together.
    pub cpu_s_per_gib: f64,
    /// Cores that all other processes and the kernel's own threads had.
    pub elsewhere_cores: f64,
    /// Cores that the hypervisor took away.
    pub stolen_cores: f64,
}

/// 10^6 bytes a second.
pub(crate) const GOODPUT: Spec = Spec::rate("goodput", "MB/s");
const CPU: Spec = Spec::headline("CPU", "s/GiB");
const ELSEWHERE: Spec = Spec::fact("the rest of the machine", "cores");
const STOLEN: Spec = Spec::fact("taken by its host", "cores");

impl Sample {
    /// Puts it into a record.
    pub(crate) fn keep(&self, group: &str, turn: u32, record: &mut Record) {
        record.sample(group, GOODPUT, turn, self.mb_per_s);
        record.sample(group, CPU, turn, self.cpu_s_per_gib);
        record.sample(group, ELSEWHERE, turn, self.elsewhere_cores);
        record.sample(group, STOLEN, turn, self.stolen_cores);
    }
}

/// Counts from its making to [`Watch::stop`].
#[derive(Debug)]
pub(crate) struct Watch {
    start: Instant,
    before: Counters,
}

#[derive(Debug, Clone, Copy)]
struct Counters {
    ours_s: f64,
    busy_s: f64,
    stolen_s: f64,
}

impl Watch {
    pub(crate) fn start() -> Result<Self> {
        Ok(Self { before: Counters::read()?, start: Instant::now() })
    }

    /// `elapsed`: how long the bytes were on their way, if that is not the time since the start.
    pub(crate) fn stop(self, bytes: u64, elapsed: Option<Duration>) -> Result<Sample> {
        let watched = self.start.elapsed();
        let (before, after) = (self.before, Counters::read()?);
        let ours_s = after.ours_s - before.ours_s;
        Ok(Sample {
            mb_per_s: bytes as f64 / elapsed.unwrap_or(watched).as_secs_f64() / 1e6,
            cpu_s_per_gib: ours_s * f64::from(1 << 30) / bytes as f64,
            // Ticks of the kernel against nanoseconds of ours: never below nothing.
            elsewhere_cores: (after.busy_s - before.busy_s - ours_s).max(0.0)
                / watched.as_secs_f64(),
            stolen_cores: (after.stolen_s - before.stolen_s) / watched.as_secs_f64(),
        })
    }
}

impl Counters {
    /// Of this process with the children that it has waited for (those in ticks), and of the
    /// machine.
    fn read() -> Result<Self> {
        let here = clock_gettime(ClockId::ProcessCPUTime);
        let own = std::fs::read_to_string("/proc/self/stat").context("reading /proc/self/stat")?;
        // Behind the name, which may hold anything; cutime and cstime are the 16th and 17th of
        // proc(5).
        let own = numbers(own.rsplit(')').next().unwrap_or_default());
        let machine = std::fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        let machine = numbers(machine.lines().next().unwrap_or_default());
        let tick_s = 1.0 / rustix::param::clock_ticks_per_second() as f64;
        let ticks = |of: &[f64], which: &[usize]| {
            which.iter().filter_map(|&i| of.get(i)).sum::<f64>() * tick_s
        };
        Ok(Self {
            ours_s: here.tv_sec as f64 + here.tv_nsec as f64 / 1e9 + ticks(&own, &[13, 14]),
            // user, nice, system, irq, softirq: not idle, not iowait.
            busy_s: ticks(&machine, &[1, 2, 3, 6, 7]),
            stolen_s: ticks(&machine, &[8]),
        })
    }
}

/// The words of a line as numbers, in their places; 0 for one that is none.
fn numbers(line: &str) -> Vec<f64> {
    line.split_whitespace().map(|word| word.parse().unwrap_or(0.0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_time_of_a_child_is_counted_once_it_has_ended() {
        let watch = Watch::start().unwrap();
        let ended = Command::new("sh")
            .args(["-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done"])
            .status();
        assert!(ended.unwrap().success());
        let sample = watch.stop(1 << 30, Some(Duration::from_secs(2))).unwrap();
        assert!(sample.cpu_s_per_gib > 0.03, "{sample:?}");
        assert!((sample.mb_per_s - 536.87).abs() < 0.01, "{sample:?}");
    }
}
