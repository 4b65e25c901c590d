//! Page-write goodput over RDMA: pageferry's link as its pump drives it, and perftest's `ib_write_bw`, in turns,
//! with the same path, MTU and number of queue pairs. The first of a turn is the second of the one before it.
//!
//! pageferry pushes runs of pages of the given size with gaps as long between them, so that each is one write,
//! out of guest memory into memory as large. Both its ends are in this process; the target's threads sleep while
//! it is written to. `ib_write_bw` is two processes, as it must be, and writes one buffer over and over. Each
//! times itself: the link from its first post until the target has its fence, perftest from its first post to its
//! last completion. Connecting and registering are in neither time.

mod link;
mod perftest;

use crate::stats::Samples;
use crate::watch::{self, Sample};
use anyhow::{Context, Result, ensure};
use pageferry::page::PAGE_BYTES;
use pageferry_transport::STRIPE_BYTES;
use serde::Serialize;
use std::net::IpAddr;
use std::time::Duration;

/// One transfer, at some MB/s.
const TRANSFER_MAX: Duration = Duration::from_secs(120);

/// Sizes of a write that are worth a look: a scattered page, some, many.
pub const SIZES: [u64; 3] = [4 << 10, 64 << 10, 1 << 20];

/// How much of `ib_write_bw`'s goodput the link should reach.
fn aim(size: u64) -> f64 {
    if size < 64 << 10 { 0.90 } else { 0.95 }
}

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

/// All repetitions of one way with one size.
#[derive(Debug, Serialize)]
pub struct Row {
    /// As in the table.
    pub name: String,
    /// Bytes of a write.
    pub size: u64,
    /// One a turn.
    pub samples: Vec<Sample>,
    #[serde(skip)]
    way: Way,
}

/// A table of one run.
#[derive(Debug, Serialize)]
pub struct RdmaBench {
    /// What was measured.
    pub options: RdmaBenchOptions,
    /// The way that the writes took.
    pub path: String,
    /// The program's own words.
    pub perftest_version: String,
    /// Every way with every size.
    pub rows: Vec<Row>,
}

/// Moves the same number of bytes `repeat` times by each way with each size, in turns. Fails without perftest or
/// a path, before anything is measured.
pub fn run(options: RdmaBenchOptions) -> Result<RdmaBench> {
    options.check()?;
    let perftest_version = perftest::version()?;
    let path = link::path(&options)?;
    let ways = || std::iter::once(Way::Link).chain(options.perftest.iter().cloned().map(Way::Perftest));
    let mut rows: Vec<Row> = (options.sizes.iter())
        .flat_map(|&size| ways().map(move |way| Row { name: way.name(), size, samples: Vec::new(), way }))
        .collect();
    for turn in 0..options.repeat as usize {
        eprintln!("turn {} of {}", turn + 1, options.repeat);
        for place in 0..rows.len() {
            let index = (place + turn) % rows.len();
            let row = &mut rows[index];
            let sample = match &row.way {
                Way::Link => link::run(&options, row.size),
                Way::Perftest(flags) => perftest::run(&options, path.active_mtu, row.size, flags),
            }?;
            row.samples.push(sample);
        }
    }
    Ok(RdmaBench { path: path.to_string(), options, perftest_version, rows })
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
            ensure!(possible, "--sizes: {size} is not a number of whole pages up to {}", STRIPE_BYTES / 2);
        }
        let largest = self.sizes.iter().max().context("--sizes: there is none")?;
        let least = (2 * largest * u64::from(self.lanes)).div_ceil(1 << 20);
        for (name, mib) in [("--total", self.total_mib), ("--memory", self.memory_mib)] {
            ensure!(u64::from(mib) >= least, "{name}: {mib} is less than {least} MiB");
        }
        Ok(())
    }

    /// Writes of this size in one repetition, the same number on every queue pair.
    fn writes(&self, size: u64) -> u64 {
        let lanes = u64::from(self.lanes);
        (u64::from(self.total_mib) << 20) / size / lanes * lanes
    }
}

impl RdmaBench {
    /// The table for people.
    #[must_use]
    pub fn show(&self) -> String {
        let o = &self.options;
        let mut text = format!(
            "{}\n{} queue pairs, {} MiB a repetition, {} repetitions, {} MiB of memory, {}\n\
             {:<9}{:<30}{:>28}{:>26}{:>12}\n",
            self.path,
            o.lanes,
            o.total_mib,
            o.repeat,
            o.memory_mib,
            self.perftest_version,
            "bytes",
            "median [min..max]",
            "MB/s",
            "CPU s/GiB",
            "of the link",
        );
        for row in &self.rows {
            text += &format!(
                "{:<9}{:<30}{:>28}{:>26}{:>12.2}\n",
                row.size,
                row.name,
                row.of(|s| s.mb_per_s).show(1),
                row.of(|s| s.cpu_s_per_gib).show(1),
                row.rate() / self.rate(row.size, |way| *way == Way::Link),
            );
        }
        for &size in &o.sizes {
            let aim = aim(size);
            let link = self.rate(size, |way| *way == Way::Link);
            let best = self.rate(size, |way| *way != Way::Link);
            text += &format!(
                "writes of {size} bytes: {:.2} of ib_write_bw's best (at least {aim:.2} wanted)\n",
                link / best
            );
        }
        text + &watch::meanwhile(self.rows.iter().flat_map(|row| &row.samples))
    }

    /// The best median of these ways with this size, in MB/s.
    fn rate(&self, size: u64, of: impl Fn(&Way) -> bool) -> f64 {
        let rows = self.rows.iter().filter(|row| row.size == size && of(&row.way));
        rows.map(Row::rate).fold(f64::NAN, f64::max)
    }
}

impl Row {
    fn of(&self, f: fn(&Sample) -> f64) -> Samples {
        Samples(self.samples.iter().map(f).collect())
    }

    fn rate(&self) -> f64 {
        self.of(|s| s.mb_per_s).median()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_size_is_compared_with_the_best_median_of_that_size() {
        let row = |size, way: Way, rates: [f64; 3]| {
            let sample =
                |mb_per_s| Sample { mb_per_s, cpu_s_per_gib: 0.5, elsewhere_cores: 0.0, stolen_cores: 0.0 };
            Row { name: way.name(), size, samples: rates.map(sample).to_vec(), way }
        };
        let perftest = |flags: &str| Way::Perftest(flags.into());
        let rows = vec![
            row(4096, Way::Link, [9.0, 20.0, 99.0]),
            row(4096, perftest(""), [1.0, 10.0, 90.0]),
            row(4096, perftest("-l 16"), [25.0, 25.0, 25.0]),
            row(65536, Way::Link, [30.0, 30.0, 30.0]),
            row(65536, perftest(""), [40.0, 40.0, 40.0]),
        ];
        let bench =
            RdmaBench { options: options(), path: "a cable".into(), perftest_version: "1".into(), rows };
        let text = bench.show();
        assert!(text.contains("4096 bytes: 0.80 of ib_write_bw's best (at least 0.90 wanted)"), "{text}");
        assert!(text.contains("65536 bytes: 0.75 of ib_write_bw's best (at least 0.95 wanted)"), "{text}");
        assert!(text.contains("ib_write_bw -l 16"), "{text}");
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
