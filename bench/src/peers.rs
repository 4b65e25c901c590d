//! The same guest moved by pageferry and by QEMU itself, in turns: total time, blackout, the gap that its
//! heartbeats show, CPU and bytes, as medians and ranges.

use crate::floor::hand_over;
use crate::machine::{Begin, GUEST_MAX, GuestOptions, Yard};
use crate::stats::Samples;
use crate::ways::{Sample, Way, migrate};
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;

/// A table of one scenario.
#[derive(Debug, Serialize)]
pub struct Peers {
    /// What the guest was.
    pub guest: GuestOptions,
    /// Whether destinations had all their memory before the migration.
    pub preallocated: bool,
    /// stop, save, load, cont without memory.
    pub floor: Vec<Sample>,
    /// Every migration of every way.
    pub ways: BTreeMap<Way, Vec<Sample>>,
    /// Migrations that failed, and why.
    pub failures: Vec<String>,
}

/// Moves one guest `repetitions` times by each way, in turns.
pub fn run(guest: GuestOptions, preallocated: bool, ways: &[Way], repetitions: u32) -> Result<Peers> {
    let mut yard = Yard::new(guest.clone())?;
    let mut peers =
        Peers { guest, preallocated, floor: Vec::new(), ways: BTreeMap::new(), failures: Vec::new() };
    eprintln!("booting the guest");
    let mut machine = yard.start(Begin::Boot, None, false)?;
    machine.wait_line("WORKLOAD READY", GUEST_MAX)?;
    for repetition in 0..repetitions {
        eprintln!("repetition {} of {repetitions}", repetition + 1);
        let (next, sample) = hand_over(&mut yard, machine)?;
        machine = next;
        peers.floor.push(sample);
        for way in ways {
            let (next, sample) = migrate(&mut yard, machine, *way, preallocated)?;
            machine = next;
            eprintln!(
                "  {way:?}: {:.3} s, blackout {:.1} ms, gap {:.1} ms",
                sample.total_s, sample.blackout_ms, sample.gap_ms
            );
            peers.ways.entry(*way).or_default().push(sample);
        }
        machine.verdict()?;
    }
    let memory = machine.memory.clone();
    drop(machine);
    let _ = std::fs::remove_file(memory);
    Ok(peers)
}

impl Peers {
    /// The table for people.
    #[must_use]
    pub fn show(&self) -> String {
        let g = &self.guest;
        let mut text = format!(
            "guest {} MiB, {} MiB touched, {} MB/s written over {} MiB; destination {}; {} repetitions\n{:<24}{:>24}{:>24}{:>24}{:>22}{:>22}\n",
            g.memory_mib,
            g.touched_mib + g.working_mib,
            g.rate_mb,
            g.working_mib,
            if self.preallocated { "preallocated" } else { "cold" },
            self.floor.len(),
            "median [min..max]",
            "total s",
            "blackout ms",
            "heartbeat gap ms",
            "CPU s",
            "MiB sent",
        );
        text += &row("floor (no memory)", &self.floor);
        for (way, samples) in &self.ways {
            text += &row(&format!("{way:?}"), samples);
        }
        if let (Some(ours), Some(best)) = (self.ways.get(&Way::Pageferry), self.best()) {
            let ours = |f: fn(&Sample) -> f64| of(ours, f).median();
            text += &format!(
                "pageferry against the best of QEMU's ways: total {:.2}x, gap {:.2}x, CPU {:.2}x; blackout {:.2}x the floor\n",
                ours(|s| s.total_s) / best.0,
                ours(|s| s.gap_ms) / best.1,
                ours(|s| s.cpu_s) / best.2,
                ours(|s| s.blackout_ms) / of(&self.floor, |s| s.blackout_ms).median(),
            );
        }
        text
    }

    /// The best median of QEMU's ways in total time, gap and CPU, each by itself.
    fn best(&self) -> Option<(f64, f64, f64)> {
        let theirs: Vec<_> =
            self.ways.iter().filter(|(way, _)| **way != Way::Pageferry).map(|(_, s)| s).collect();
        let best = |f: fn(&Sample) -> f64| theirs.iter().map(|s| of(s, f).median()).min_by(f64::total_cmp);
        Some((best(|s| s.total_s)?, best(|s| s.gap_ms)?, best(|s| s.cpu_s)?))
    }
}

fn of(samples: &[Sample], f: fn(&Sample) -> f64) -> Samples {
    Samples(samples.iter().map(f).collect())
}

fn row(name: &str, samples: &[Sample]) -> String {
    format!(
        "{name:<24}{:>24}{:>24}{:>24}{:>22}{:>22}\n",
        of(samples, |s| s.total_s).show(3),
        of(samples, |s| s.blackout_ms).show(1),
        of(samples, |s| s.gap_ms).show(1),
        of(samples, |s| s.cpu_s).show(2),
        of(samples, |s| s.sent_mib).show(0),
    )
}
