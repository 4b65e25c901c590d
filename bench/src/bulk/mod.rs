//! Bulk goodput over loopback: the TCP link, a raw pump of blocking sends and receives, and iperf3,
//! in turns, so that all meet the same machine. The first of a turn is the second of the one before
//! it.
//!
//! The link has a group for each number of lanes, size of a write and scatter of writes in memory.
//! The pump and iperf3 have no such writes: they have one for each number of lanes.
//!
//! The pump and the link have both their ends in this process, and touch their memory before the
//! clock starts. iperf3 is two processes, times itself (what its receiver reports), and sends the
//! same small buffer over and over, which stays in the cache.

pub mod args;
mod iperf;
mod link;
mod pump;

use crate::progress::Progress;
use crate::record::ratio::{Ratio, compare_groups};
use crate::record::{Plot, Record, Series};
use crate::watch::{GOODPUT, Sample};
use anyhow::{Result, ensure};
use pageferry_transport::STRIPE_BYTES;
use pageferry_transport::tcp::ZeroCopy;
use serde::Serialize;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

/// One transfer, at some MB/s.
const TRANSFER_MAX: Duration = Duration::from_secs(120);

/// What is measured.
#[derive(Debug, Clone, Serialize)]
pub struct BulkOptions {
    /// Numbers of connections of the pump and of the link.
    pub lanes: Vec<usize>,
    /// Bytes of one write of the link.
    pub sizes: Vec<usize>,
    /// How the link's writes lie in memory.
    pub scatter: Vec<Scatter>,
    /// Repetitions of each way.
    pub repeat: u32,
    /// Bytes of one repetition.
    pub total_bytes: u64,
    /// Memory at each end of the pump and of the link.
    pub region_bytes: usize,
}

/// How writes lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scatter {
    /// One after the other, so that they can be merged.
    None,
    /// With a gap as long as a write after each, in order.
    Gaps,
    /// With such gaps, in no order.
    Random,
}

/// The writes of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Writes {
    bytes: usize,
    scatter: Scatter,
}

/// A way to move bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Pump(usize),
    Link(usize, Writes, ZeroCopy),
    Iperf(iperf::Flags),
}

/// Moves the same number of bytes `repeat` times by each way, in turns, or until `progress` hears
/// of an interruption. Fails without iperf3, before anything is moved.
pub fn run(options: &BulkOptions, progress: &Progress) -> Result<Record> {
    let iperf_version = iperf::version()?;
    let title = format!(
        "{} MiB a repetition over loopback, {} MiB of memory at each end",
        options.total_bytes >> 20,
        options.region_bytes >> 20
    );
    let mut record = Record::begin("bulk", title, options)?;
    record.notes = notes(&iperf_version);
    let ways = options.ways();
    progress.expect(u64::from(options.repeat) * ways.len() as u64);
    'turns: for turn in 0..options.repeat {
        for place in 0..ways.len() {
            if progress.is_interrupted() {
                record.interrupted = true;
                break 'turns;
            }
            let way = ways[(place + turn as usize) % ways.len()];
            let name = way.name();
            progress.say(&name);
            match way.sample(options) {
                Ok(sample) => sample.keep(&name, turn, &mut record),
                Err(e) => record.fail(&name, turn, format!("{e:#}")),
            }
            progress.step();
        }
    }
    record.curves = vec![curve(&record, &ways)];
    record.ratios = ratios(&record, &ways);
    record.elapsed_s = progress.elapsed_s();
    Ok(record)
}

impl Way {
    fn name(self) -> String {
        let link = |lanes: usize, writes: Writes| {
            let scatter = match writes.scatter {
                Scatter::None => "",
                Scatter::Gaps => ", gaps",
                Scatter::Random => ", random",
            };
            format!("link, {}, {} bytes{scatter}", lanes_of(lanes), writes.bytes)
        };
        match self {
            Self::Pump(lanes) => format!("raw pump, {}", lanes_of(lanes)),
            Self::Link(lanes, writes, ZeroCopy::Auto) => link(lanes, writes),
            Self::Link(lanes, writes, ZeroCopy::Never) => link(lanes, writes) + ", zero-copy never",
            Self::Link(lanes, writes, ZeroCopy::Always) => {
                link(lanes, writes) + ", zero-copy always"
            }
            Self::Iperf(flags) => format!("iperf3 {flags}"),
        }
    }

    fn sample(self, options: &BulkOptions) -> Result<Sample> {
        match self {
            Self::Pump(lanes) => pump::run(options, lanes),
            Self::Link(lanes, writes, zero_copy) => link::run(options, lanes, writes, zero_copy),
            Self::Iperf(flags) => iperf::run(options.total_bytes, flags),
        }
    }
}

fn lanes_of(lanes: usize) -> String {
    if lanes == 1 { "1 lane".into() } else { format!("{lanes} lanes") }
}

impl BulkOptions {
    /// What cannot be measured, if anything.
    pub fn check(&self) -> Result<()> {
        for (option, is_empty) in [
            ("--lanes", self.lanes.is_empty()),
            ("--sizes", self.sizes.is_empty()),
            ("--scatter", self.scatter.is_empty()),
        ] {
            ensure!(!is_empty, "{option} needs at least one value");
        }
        let (mut largest, most) = (0, self.lanes.iter().copied().max().unwrap_or(1));
        for size in &self.sizes {
            ensure!(
                (1..=STRIPE_BYTES).contains(&(*size as u64)),
                "--sizes: {size} is not from 1 to {STRIPE_BYTES}"
            );
            largest = largest.max(*size);
        }
        let least = (2 * largest).max(pump::CALL_BYTES * most);
        ensure!(self.region_bytes >= least, "--region: {} is less than {least}", self.region_bytes);
        Ok(())
    }

    fn ways(&self) -> Vec<Way> {
        let mut ways = Vec::new();
        let largest = self.sizes.iter().copied().max().unwrap_or(0);
        for &lanes in &self.lanes {
            ways.push(Way::Pump(lanes));
            for &bytes in &self.sizes {
                for &scatter in &self.scatter {
                    let writes = Writes { bytes, scatter };
                    ways.push(Way::Link(lanes, writes, ZeroCopy::Auto));
                    // What the link chooses by itself is held against both where a copy costs most.
                    if bytes == largest && scatter == self.scatter[0] {
                        ways.push(Way::Link(lanes, writes, ZeroCopy::Never));
                        ways.push(Way::Link(lanes, writes, ZeroCopy::Always));
                    }
                }
            }
            for flags in iperf::Flags::sensible(lanes) {
                // With one connection it is the same for every number of lanes.
                if !ways.contains(&Way::Iperf(flags)) {
                    ways.push(Way::Iperf(flags));
                }
            }
        }
        ways
    }
}

/// Of each link to the pump with as many lanes, to iperf3's best, and, of what the link chooses by
/// itself, to the better of zero-copy always and never.
fn ratios(record: &Record, ways: &[Way]) -> Vec<Ratio> {
    let named = |wanted: &dyn Fn(Way) -> bool| -> Vec<String> {
        ways.iter().copied().filter(|way| wanted(*way)).map(Way::name).collect()
    };
    let iperf = named(&|way| matches!(way, Way::Iperf(_)));
    let mut ratios = Vec::new();
    let mut add = |our: &str, theirs: &[String], best: &str| {
        let theirs: Vec<&str> = theirs.iter().map(String::as_str).collect();
        ratios.extend(
            compare_groups(record, &[our], &theirs, Some(best))
                .into_iter()
                .filter(|r| r.to == best),
        );
    };
    for way in ways {
        let Way::Link(lanes, writes, ZeroCopy::Auto) = *way else { continue };
        let our = way.name();
        add(&our, &[Way::Pump(lanes).name()], "the raw pump with as many lanes");
        add(&our, &iperf, "iperf3's best");
        let forced = named(&|way| {
            [ZeroCopy::Never, ZeroCopy::Always].iter().any(|z| way == Way::Link(lanes, writes, *z))
        });
        add(&our, &forced, "the better of zero-copy always and never");
    }
    ratios
}

/// Goodput over the size of a write, a line for each number of lanes and scatter.
fn curve(record: &Record, ways: &[Way]) -> Plot {
    let mut series: Vec<Series> = Vec::new();
    for way in ways {
        let Way::Link(lanes, writes, ZeroCopy::Auto) = *way else { continue };
        let Some(figure) = record.figure(&way.name(), GOODPUT.name) else { continue };
        let name = format!("{}, {:?}", lanes_of(lanes), writes.scatter).to_lowercase();
        let point = (writes.bytes as f64, figure.samples.median());
        match series.iter_mut().find(|s| s.name == name) {
            Some(known) => known.points.push(point),
            None => series.push(Series { name, points: vec![point] }),
        }
    }
    for line in &mut series {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    Plot {
        title: "Goodput of the link".into(),
        caption: "Medians, by the size of a write; a line for each number of lanes and scatter of writes in memory.".into(),
        x: "bytes of a write".into(),
        y: "MB/s".into(),
        x_log: true,
        y_log: false,
        series,
    }
}

fn notes(iperf_version: &str) -> Vec<String> {
    vec![
        "The raw pump is as many pairs of threads with blocking 1 MiB sends and receives as there are lanes; pump and link send \
         from memory into memory. iperf3 sends one small buffer over and over, which stays in the cache, and its CPU includes \
         its start, in ticks of 10 ms."
            .into(),
        "Gaps: a gap as long as a write after each, so that none can be merged. Random: such gaps, and no order.".into(),
        format!("{iperf_version}."),
    ]
}

/// Both ends of so many connections on loopback.
fn streams(lanes: usize) -> Result<(Vec<TcpStream>, Vec<TcpStream>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut ends = (Vec::new(), Vec::new());
    for _ in 0..lanes {
        ends.0.push(TcpStream::connect(listener.local_addr()?)?);
        ends.1.push(listener.accept()?.0);
    }
    Ok(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> BulkOptions {
        BulkOptions {
            lanes: vec![1, 2],
            sizes: vec![4096, 1 << 20],
            scatter: vec![Scatter::Gaps, Scatter::Random],
            repeat: 3,
            total_bytes: 1 << 30,
            region_bytes: 2 << 20,
        }
    }

    #[test]
    fn a_link_is_held_against_its_own_pump_and_the_best_of_the_others() {
        let options = BulkOptions {
            lanes: vec![2],
            sizes: vec![4096],
            scatter: vec![Scatter::Gaps],
            ..options()
        };
        let ways = options.ways();
        let mut record = Record::begin("bulk", "a test".into(), &1).unwrap();
        for turn in 0..3 {
            for way in &ways {
                let mb_per_s = match way {
                    Way::Pump(_) => 2000.0,
                    Way::Link(_, _, ZeroCopy::Auto) => 1800.0,
                    Way::Link(_, _, ZeroCopy::Never) => 2400.0,
                    Way::Link(..) => 100.0,
                    Way::Iperf(flags) if flags.to_string() == "-P 2 -Z" => 1200.0,
                    Way::Iperf(_) => 600.0,
                };
                Sample { mb_per_s, cpu_s_per_gib: 0.5, elsewhere_cores: 0.0, stolen_cores: 0.0 }
                    .keep(&way.name(), turn, &mut record);
            }
        }
        let ratios = ratios(&record, &ways);
        let goodput: Vec<f64> =
            ratios.iter().filter(|r| r.figure == GOODPUT.name).map(|r| r.ratio).collect();
        assert_eq!(goodput, [0.9, 1.5, 0.75], "{ratios:?}");
    }

    #[test]
    fn every_way_is_there_once() {
        let ways: Vec<String> = options().ways().into_iter().map(Way::name).collect();
        let mut once = ways.clone();
        once.sort();
        once.dedup();
        assert_eq!(once.len(), ways.len(), "{ways:?}");
        // Per number of lanes a pump, four links and two with zero-copy forced; of iperf3 three
        // with one lane, three with two.
        assert_eq!(ways.len(), 2 * 7 + 6, "{ways:?}");
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        assert!(options().check().is_ok());
        let bad = [
            ("--sizes", BulkOptions { sizes: vec![0], ..options() }),
            ("--sizes", BulkOptions { sizes: vec![(STRIPE_BYTES + 1) as usize], ..options() }),
            ("--region", BulkOptions { lanes: vec![3], ..options() }),
            ("--scatter", BulkOptions { scatter: vec![], ..options() }),
        ];
        for (option, options) in bad {
            assert!(options.check().unwrap_err().to_string().contains(option));
        }
    }
}
