//! What it costs to know which pages a guest writes: for the migration, a sync; for the guest, its
//! slower writes.
//!
//! ```text
//!   a turn of one guest    |  warm up  |  not followed: writes a second  |  start  | sync  ...  sync |  end  |
//!                                                                                    followed: writes a second
//! ```
//!
//! Three trackers, for two kinds of guest ([`subject`]). `pagemap` follows threads of this process,
//! as pageferry follows a QEMU; `log` and `ring` follow a guest under KVM. A guest is compared with
//! itself, so that its own speed does not matter. Nothing is moved. Every guest has its turn in
//! each repetition and is held in the turns of the others.

pub mod args;
pub mod subject;

use crate::progress::Progress;
use crate::record::ratio::compare_groups;
use crate::record::{Better, Plot, Record, Series, Spec};
use anyhow::{Context, Result, bail};
use pageferry_engine::memory::bitmap::DirtyBitmap;
use pageferry_engine::memory::page::PAGE_BYTES;
use serde::Serialize;
use std::time::{Duration, Instant};
use subject::{Subject, Tracker};

/// Of all syncs of a turn, by the pages that they told.
const PER_PAGE: Spec = Spec::headline("sync a page", "ns");
/// How many times as long the guest takes for a page while it is followed.
const SLOWDOWN: Spec = Spec::headline("slowdown of the guest", "times");
const SYNC: Spec = Spec::part("sync", "us");
const START: Spec = Spec::part("start", "us");
const END: Spec = Spec::part("end", "us");
const PAGES: Spec = Spec::fact("pages a sync", "");
const FREE: Spec =
    Spec { name: "written, not followed", unit: "MB/s", better: Better::Neither, headline: false };
const FOLLOWED: Spec =
    Spec { name: "written, followed", unit: "MB/s", better: Better::Neither, headline: false };

/// What is measured.
#[derive(Debug, Clone, Serialize)]
pub struct DirtyOptions {
    /// How writes are followed.
    pub trackers: Vec<Tracker>,
    /// Sizes of the guest's memory in MiB.
    pub memories_mib: Vec<u32>,
    /// How fast guests write, in MB a second; 0 is as fast as they can.
    pub rates_mb: Vec<u32>,
    /// The share of memory that is written at all, in percent.
    pub working_percent: u32,
    /// Turns of each guest.
    pub repetitions: u32,
    /// How long writes are counted, followed and not.
    pub window: Duration,
    /// Between two syncs.
    pub every: Duration,
}

/// A guest in a run.
struct Row {
    group: String,
    tracker: Tracker,
    memory_mib: u32,
    rate_mb: u32,
    /// None if it could not be started, or failed.
    subject: Option<Box<dyn Subject>>,
}

/// What one turn found.
struct Turn {
    start: Duration,
    end: Duration,
    syncs: u32,
    syncing: Duration,
    pages: u64,
    /// Pages a second.
    free: f64,
    followed: f64,
}

impl DirtyOptions {
    /// Fails on what cannot be.
    pub fn check(&self) -> Result<()> {
        for (option, is_empty) in [
            ("--trackers", self.trackers.is_empty()),
            ("--memories", self.memories_mib.is_empty()),
            ("--rates", self.rates_mb.is_empty()),
        ] {
            if is_empty {
                bail!("{option} needs at least one value");
            }
        }
        if let Some(small) = self.memories_mib.iter().find(|mib| **mib < MEMORY_MIB_MIN) {
            bail!("--memories {small} is too little: the payload guest needs {MEMORY_MIB_MIN} MiB");
        }
        // All of them are there for the whole run, to take turns.
        let guests = self.trackers.len() * self.rates_mb.len();
        let written_mib: u64 =
            self.memories_mib.iter().map(|mib| u64::from(mib * self.working_percent / 100)).sum();
        let needed_mib = written_mib * guests as u64;
        let free_mib = available_mib();
        if free_mib.is_some_and(|free| needed_mib > free) {
            bail!(
                "the guests would write {needed_mib} MiB of memory together and {} are free: fewer --memories, --rates or --trackers",
                free_mib.unwrap_or(0)
            );
        }
        if self.every.is_zero() || self.every > self.window {
            bail!(
                "--every {:?} must be more than nothing and at most --window {:?}",
                self.every,
                self.window
            );
        }
        Ok(())
    }

    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for memory_mib in &self.memories_mib {
            for rate_mb in &self.rates_mb {
                for tracker in &self.trackers {
                    let rate =
                        if *rate_mb == 0 { "no bound".into() } else { format!("{rate_mb} MB/s") };
                    rows.push(Row {
                        group: format!("{}, {memory_mib} MiB, {rate}", tracker.name()),
                        tracker: *tracker,
                        memory_mib: *memory_mib,
                        rate_mb: *rate_mb,
                        subject: None,
                    });
                }
            }
        }
        rows
    }
}

/// `MemAvailable` of proc(5).
fn available_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib / 1024)
}

/// The smallest guest: a payload guest with a working set.
const MEMORY_MIB_MIN: u32 = 16;

/// Measures all, or until `progress` hears of an interruption.
pub fn run(options: &DirtyOptions, progress: &Progress) -> Result<Record> {
    options.check()?;
    let title = format!(
        "following a guest that writes {} % of its memory at random, a sync each {:?}",
        options.working_percent, options.every
    );
    let mut record = Record::begin("dirty", title, options)?;
    record.notes = notes();
    let mut rows = options.rows();
    progress.expect(u64::from(options.repetitions) * rows.len() as u64);
    for row in &mut rows {
        progress.say(&row.group);
        match row.start(options) {
            Ok(subject) => row.subject = Some(subject),
            Err(e) => record.fail(&row.group, 0, format!("{e:#}")),
        }
    }
    'turns: for turn in 0..options.repetitions {
        for place in 0..rows.len() {
            if progress.is_interrupted() {
                record.interrupted = true;
                break 'turns;
            }
            let count = rows.len();
            let row = &mut rows[(place + turn as usize) % count];
            progress.say(&row.group);
            row.turn(options, turn, &mut record);
            progress.step();
        }
    }
    record.curves = vec![curve(&record, &rows)];
    record.ratios = ratios(&record, &rows);
    record.elapsed_s = progress.elapsed_s();
    Ok(record)
}

impl Row {
    fn start(&self, options: &DirtyOptions) -> Result<Box<dyn Subject>> {
        let working_mib = (self.memory_mib * options.working_percent / 100).max(1);
        let mut subject = self.tracker.start(self.memory_mib, working_mib, self.rate_mb)?;
        subject.hold(true)?;
        Ok(subject)
    }

    fn turn(&mut self, options: &DirtyOptions, turn: u32, record: &mut Record) {
        let Some(subject) = &mut self.subject else { return };
        match one(subject.as_mut(), options) {
            Ok(found) => found.keep(&self.group, turn, record),
            Err(e) => {
                record.fail(&self.group, turn, format!("{e:#}"));
                self.subject = None;
            }
        }
    }
}

fn one(subject: &mut dyn Subject, options: &DirtyOptions) -> Result<Turn> {
    subject.hold(false)?;
    // When tracking ends KVM drops what it had mapped piece by piece, and the guest's next touch of
    // each page is a fault.
    std::thread::sleep(options.window);
    let free = rate(subject, |_| {
        std::thread::sleep(options.window);
        Ok(())
    })?;
    let pages_of_all = subject.pages();
    let starting = Instant::now();
    let mut source = subject.follow()?;
    let start = starting.elapsed();
    let (mut syncs, mut syncing, mut pages) = (0, Duration::ZERO, 0);
    let followed = rate(subject, |_| {
        let until = Instant::now() + options.window;
        while Instant::now() < until {
            std::thread::sleep(options.every);
            let mut into = DirtyBitmap::new(pages_of_all);
            let begun = Instant::now();
            pages += source.sync(&mut into).context("a sync")?.pages;
            syncing += begun.elapsed();
            syncs += 1;
        }
        Ok(())
    })?;
    let ending = Instant::now();
    drop(source);
    let end = ending.elapsed();
    subject.hold(true)?;
    Ok(Turn { start, end, syncs, syncing, pages, free, followed })
}

/// Pages a second that the guest writes while something is done.
fn rate(
    subject: &mut dyn Subject,
    mut meanwhile: impl FnMut(&mut dyn Subject) -> Result<()>,
) -> Result<f64> {
    let before = subject.written()?;
    let begun = Instant::now();
    meanwhile(subject)?;
    let elapsed = begun.elapsed();
    let written = subject.written()?.saturating_sub(before);
    if written == 0 {
        bail!("the guest wrote nothing within {elapsed:?}");
    }
    Ok(written as f64 / elapsed.as_secs_f64())
}

impl Turn {
    fn keep(&self, group: &str, turn: u32, record: &mut Record) {
        let us = |duration: Duration| duration.as_secs_f64() * 1e6;
        let mb = |pages: f64| pages * PAGE_BYTES as f64 / 1e6;
        let syncs = f64::from(self.syncs);
        // Of a sync that told nothing there is no cost of a page, and what is no number is no
        // sample.
        record.sample(group, PER_PAGE, turn, us(self.syncing) * 1e3 / self.pages as f64);
        record.sample(group, SLOWDOWN, turn, self.free / self.followed);
        record.sample(group, SYNC, turn, us(self.syncing) / syncs);
        record.sample(group, START, turn, us(self.start));
        record.sample(group, END, turn, us(self.end));
        record.sample(group, PAGES, turn, self.pages as f64 / syncs);
        record.sample(group, FREE, turn, mb(self.free));
        record.sample(group, FOLLOWED, turn, mb(self.followed));
    }
}

/// A line for each tracker and size: what a page costs, over how many a sync tells.
fn curve(record: &Record, rows: &[Row]) -> Plot {
    let mut series: Vec<Series> = Vec::new();
    for row in rows {
        let median = |spec: Spec| record.figure(&row.group, spec.name).map(|f| f.samples.median());
        let (Some(pages), Some(ns)) = (median(PAGES), median(PER_PAGE)) else { continue };
        let name = format!("{}, {} MiB", row.tracker.name(), row.memory_mib);
        match series.iter_mut().find(|s| s.name == name) {
            Some(known) => known.points.push((pages, ns)),
            None => series.push(Series { name, points: vec![(pages, ns)] }),
        }
    }
    for line in &mut series {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    Plot {
        title: "What a page costs".into(),
        caption: "Medians of the time of a sync by the pages that it told. A log costs what the guest's memory costs, a ring \
                  what was written."
            .into(),
        x: "pages that a sync told".into(),
        y: "ns a page".into(),
        x_log: true,
        y_log: true,
        series,
    }
}

/// Ring beside log, where they follow the same kind of guest.
fn ratios(record: &Record, rows: &[Row]) -> Vec<crate::record::ratio::Ratio> {
    let mut ratios = Vec::new();
    for ring in rows.iter().filter(|row| row.tracker == Tracker::Ring) {
        let same = |row: &&Row| {
            row.tracker == Tracker::Log
                && row.memory_mib == ring.memory_mib
                && row.rate_mb == ring.rate_mb
        };
        let logs: Vec<&str> = rows.iter().filter(same).map(|row| row.group.as_str()).collect();
        ratios.extend(compare_groups(record, &[&ring.group], &logs, None));
    }
    ratios
}

fn notes() -> Vec<String> {
    vec![
        "pagemap follows threads of this process by userfaultfd write-protection and PAGEMAP_SCAN, as pageferry follows a QEMU. \
         log and ring follow a guest of a few hundred bytes under KVM with one vCPU. A guest's slowdown is its own speed \
         without the tracking by that with it; the speeds of the two kinds of guest say nothing about the trackers."
            .into(),
        "A sync of log and ring has every vCPU leave the guest first, which is in its time. Where KVM itself runs in an \
         emulator, that and each fault is dearer than on a real machine by far."
            .into(),
        "A guest with a bounded rate has its slowdown hidden by its waits: look at those without bound.".into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> DirtyOptions {
        DirtyOptions {
            trackers: vec![Tracker::Pagemap],
            memories_mib: vec![16],
            rates_mb: vec![0],
            working_percent: 50,
            repetitions: 3,
            window: Duration::from_millis(40),
            every: Duration::from_millis(10),
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_the_name_of_its_option() {
        let bad = [
            ("--memories", DirtyOptions { memories_mib: vec![8], ..options() }),
            ("--memories", DirtyOptions { memories_mib: vec![1 << 20; 64], ..options() }),
            ("--trackers", DirtyOptions { trackers: vec![], ..options() }),
            ("--every", DirtyOptions { every: Duration::from_secs(9), ..options() }),
        ];
        for (option, options) in bad {
            assert!(options.check().unwrap_err().to_string().contains(option));
        }
    }

    /// A guest that writes 100 pages a millisecond, and a tracker that tells every one of them.
    struct Clockwork(Instant);

    struct Honest(Instant);

    impl pageferry_engine::dirty::DirtySource for Honest {
        fn sync(
            &mut self,
            _: &mut DirtyBitmap,
        ) -> pageferry_engine::error::Result<pageferry_engine::dirty::Synced> {
            let pages = (self.0.elapsed().as_secs_f64() * 1e5) as u64;
            self.0 = Instant::now();
            Ok(pageferry_engine::dirty::Synced { pages })
        }
    }

    impl Subject for Clockwork {
        fn pages(&self) -> u64 {
            1 << 12
        }

        fn written(&mut self) -> Result<u64> {
            Ok((self.0.elapsed().as_secs_f64() * 1e5) as u64)
        }

        fn follow(&mut self) -> Result<Box<dyn pageferry_engine::dirty::DirtySource>> {
            Ok(Box::new(Honest(Instant::now())))
        }

        fn hold(&mut self, _: bool) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn rates_and_pages_of_a_known_guest_are_found() {
        let found = one(&mut Clockwork(Instant::now()), &options()).unwrap();
        for rate in [found.free, found.followed] {
            assert!((rate / 1e5 - 1.0).abs() < 0.01, "{rate} pages a second");
        }
        // All that was written while it was followed, but for what came after the last sync.
        let told = found.pages as f64 / 1e5;
        assert!(
            (0.03..1.0).contains(&told) && found.syncs >= 1,
            "{told} s of pages in {} syncs",
            found.syncs
        );
    }
}
