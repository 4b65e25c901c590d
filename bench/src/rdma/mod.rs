//! Page-write goodput over RDMA: pageferry's link as its pump drives it, and perftest's
//! `ib_write_bw`, in turns, with the same path, MTU and number of queue pairs. The first of a turn
//! is the second of the one before it.
//!
//! pageferry pushes runs of pages of the given size with gaps as long between them, so that each is
//! one write, out of guest memory into memory as large. Both its ends are in this process; the
//! target's threads sleep while it is written to. `ib_write_bw` is two processes, as it must be,
//! and writes one buffer over and over. Each times itself: the link from its first post until the
//! target has its fence, perftest from its first post to its last completion. Connecting and
//! registering are in neither time.

mod link;
mod perftest;

use crate::progress::Progress;
use crate::record::ratio::{Ratio, compare_groups};
use crate::record::{Plot, Record, Series};
use crate::watch::GOODPUT;
use anyhow::{Context, Result, ensure};
use pageferry_engine::memory::page::PAGE_BYTES;
use pageferry_transport::STRIPE_BYTES;
use serde::Serialize;
use std::net::IpAddr;
use std::time::Duration;

/// One transfer, at some MB/s.
const TRANSFER_MAX: Duration = Duration::from_secs(120);

/// Sizes of a write that are worth a look: a scattered page, some, many.
pub const SIZES: [u64; 3] = [4 << 10, 64 << 10, 1 << 20];

/// What is measured.
#[derive(Debug, Clone, Serialize)]
pub struct RdmaBenchOptions {
    /// This side's address.
    pub from: IpAddr,
    /// The address that is written to, also of this host.
    pub to: IpAddr,
    /// Queue pairs.
    pub lanes: u8,
    /// Bytes of a write.
    pub sizes: Vec<u64>,
    /// Repetitions of each way with each size.
    pub repeat: u32,
    /// Bytes of one repetition.
    pub total_mib: u32,
    /// Guest memory.
    pub memory_mib: u32,
    /// Ways to run `ib_write_bw`, as on its command line; the best of them counts.
    pub perftest: Vec<String>,
}

/// A way to move bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    Link,
    Perftest(String),
}

/// One way with one size of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    group: String,
    size: u64,
    way: Way,
}

/// Moves the same number of bytes `repeat` times by each way with each size, in turns, or until
/// `progress` hears of an interruption. Fails without perftest or a path, before anything is
/// measured.
pub fn run(options: &RdmaBenchOptions, progress: &Progress) -> Result<Record> {
    options.check()?;
    let perftest_version = perftest::version()?;
    let path = link::path(options)?;
    let title = format!(
        "page writes, {} queue pairs, {} MiB a repetition, {} MiB of memory; {path}",
        options.lanes, options.total_mib, options.memory_mib
    );
    let mut record = Record::begin("rdma", title, options)?;
    record.notes = notes(&perftest_version);
    let rows = options.rows();
    progress.expect(u64::from(options.repeat) * rows.len() as u64);
    'turns: for turn in 0..options.repeat {
        for place in 0..rows.len() {
            if progress.is_interrupted() {
                record.interrupted = true;
                break 'turns;
            }
            let row = &rows[(place + turn as usize) % rows.len()];
            progress.say(&row.group);
            let sample = match &row.way {
                Way::Link => link::run(options, row.size),
                Way::Perftest(flags) => perftest::run(options, path.active_mtu, row.size, flags),
            };
            match sample {
                Ok(sample) => sample.keep(&row.group, turn, &mut record),
                Err(e) => record.fail(&row.group, turn, format!("{e:#}")),
            }
            progress.step();
        }
    }
    record.curves = vec![curve(&record, &rows)];
    record.ratios = ratios(&record, &rows);
    record.elapsed_s = progress.elapsed_s();
    Ok(record)
}

impl Way {
    fn name(&self) -> String {
        match self {
            Self::Link => "pageferry".into(),
            Self::Perftest(flags) => format!("ib_write_bw {flags}").trim_end().into(),
        }
    }
}

impl RdmaBenchOptions {
    fn check(&self) -> Result<()> {
        for &size in &self.sizes {
            let possible = size > 0 && size.is_multiple_of(PAGE_BYTES) && size <= STRIPE_BYTES / 2;
            ensure!(
                possible,
                "--sizes: {size} is not a number of whole pages up to {}",
                STRIPE_BYTES / 2
            );
        }
        let largest = self.sizes.iter().max().context("--sizes: there is none")?;
        let least = (2 * largest * u64::from(self.lanes)).div_ceil(1 << 20);
        for (name, mib) in [("--total", self.total_mib), ("--memory", self.memory_mib)] {
            ensure!(u64::from(mib) >= least, "{name}: {mib} is less than {least} MiB");
        }
        Ok(())
    }

    fn rows(&self) -> Vec<Row> {
        let ways =
            || std::iter::once(Way::Link).chain(self.perftest.iter().cloned().map(Way::Perftest));
        let row =
            |size: u64, way: Way| Row { group: format!("{}, {size} bytes", way.name()), size, way };
        self.sizes.iter().flat_map(|&size| ways().map(move |way| row(size, way))).collect()
    }

    /// Writes of this size in one repetition, the same number on every queue pair.
    fn writes(&self, size: u64) -> u64 {
        let lanes = u64::from(self.lanes);
        (u64::from(self.total_mib) << 20) / size / lanes * lanes
    }
}

/// Of the link to the best of `ib_write_bw`, size by size.
fn ratios(record: &Record, rows: &[Row]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for ours in rows.iter().filter(|row| row.way == Way::Link) {
        let others = rows.iter().filter(|row| row.size == ours.size && row.way != Way::Link);
        let theirs: Vec<&str> = others.map(|row| row.group.as_str()).collect();
        let best = "ib_write_bw's best";
        let compared = compare_groups(record, &[&ours.group], &theirs, Some(best));
        ratios.extend(compared.into_iter().filter(|ratio| ratio.to == best));
    }
    ratios
}

/// Goodput over the size of a write, a line for each way.
fn curve(record: &Record, rows: &[Row]) -> Plot {
    let mut series: Vec<Series> = Vec::new();
    for row in rows {
        let Some(figure) = record.figure(&row.group, GOODPUT.name) else { continue };
        let (name, point) = (row.way.name(), (row.size as f64, figure.samples.median()));
        match series.iter_mut().find(|s| s.name == name) {
            Some(known) => known.points.push(point),
            None => series.push(Series { name, points: vec![point] }),
        }
    }
    Plot {
        title: "Goodput".into(),
        caption: "Medians, by the size of a write.".into(),
        x: "bytes of a write".into(),
        y: "MB/s".into(),
        x_log: true,
        y_log: false,
        series,
    }
}

fn notes(perftest_version: &str) -> Vec<String> {
    vec![
        "pageferry: the pump of a migration with its link, runs of pages of the given size with gaps as long between them,          pushed out of guest memory into memory as large, and a fence that the target waits for. Both ends are in this          process. ib_write_bw: a server and a client of its own a repetition, which write one buffer over and over; it looks          for completions without pause. Connecting and registering are in neither time."
            .into(),
        "The aims are 0.90 of ib_write_bw's best at 4 KiB, and 0.95 from 64 KiB on. The best is chosen for each figure by          itself, after the fact."
            .into(),
        format!("{perftest_version}."),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::Sample;

    fn options() -> RdmaBenchOptions {
        RdmaBenchOptions {
            from: "10.77.0.1".parse().unwrap(),
            to: "10.77.0.2".parse().unwrap(),
            lanes: 3,
            sizes: SIZES.to_vec(),
            repeat: 3,
            total_mib: 8,
            memory_mib: 8,
            perftest: vec![String::new(), "-l 16".into()],
        }
    }

    #[test]
    fn a_size_is_compared_with_the_best_of_that_size() {
        let rows = RdmaBenchOptions { sizes: vec![4096, 65536], ..options() }.rows();
        let mut record = Record::begin("rdma", "a test".into(), &1).unwrap();
        for turn in 0..3 {
            for row in &rows {
                let mb_per_s = match (&row.way, row.size) {
                    (Way::Link, 4096) => 20.0,
                    (Way::Link, _) => 30.0,
                    (Way::Perftest(flags), 4096) if flags.is_empty() => 10.0,
                    (Way::Perftest(_), 4096) => 25.0,
                    _ => 40.0,
                };
                let sample = Sample {
                    mb_per_s,
                    cpu_s_per_gib: 0.5,
                    elsewhere_cores: 0.0,
                    stolen_cores: 0.0,
                };
                sample.keep(&row.group, turn, &mut record);
            }
        }
        let ratios = ratios(&record, &rows);
        let goodput: Vec<f64> =
            ratios.iter().filter(|r| r.figure == GOODPUT.name).map(|r| r.ratio).collect();
        assert_eq!(goodput, [0.8, 0.75], "{ratios:?}");
        assert!(record.groups().contains(&"ib_write_bw -l 16, 4096 bytes"));
    }

    #[test]
    fn every_queue_pair_has_the_same_number_of_writes_and_one_at_least() {
        let options = options();
        assert!(options.check().is_ok());
        assert_eq!((options.writes(1 << 20), options.writes(64 << 10)), (6, 126));
        assert!(RdmaBenchOptions { total_mib: 5, ..options.clone() }.check().is_err());
        assert!(RdmaBenchOptions { memory_mib: 5, ..options.clone() }.check().is_err());
        for sizes in [vec![], vec![0], vec![4096, 4097], vec![STRIPE_BYTES]] {
            assert!(RdmaBenchOptions { sizes, ..options.clone() }.check().is_err());
        }
    }
}
