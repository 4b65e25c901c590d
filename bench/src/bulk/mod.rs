//! Bulk goodput over loopback: the TCP link, a raw pump of blocking sends and receives, and iperf3, in
//! turns, so that all meet the same machine. The first of a turn is the second of the one before it.
//!
//! The pump and the link have both their ends in this process, and touch their memory before the clock
//! starts. iperf3 is two processes, times itself (what its receiver reports), and sends the same small
//! buffer over and over, which stays in the cache.

mod iperf;
mod link;
mod pump;

use crate::stats::Samples;
use crate::watch::{self, Sample};
use anyhow::Result;
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
    /// Connections of the pump and of the link.
    pub lanes: usize,
    /// Repetitions of each way.
    pub repeat: u32,
    /// Bytes of one repetition.
    pub total_bytes: u64,
    /// Bytes of one write of the link. With less than 1 MiB, gaps of that size lie between them.
    pub run_bytes: usize,
    /// Memory at each end of the pump and of the link.
    pub region_bytes: usize,
}

/// A way to move bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Pump,
    Link(ZeroCopy),
    Iperf(iperf::Flags),
}

/// All repetitions of one way.
#[derive(Debug, Serialize)]
pub struct Row {
    /// As in the table.
    pub name: String,
    /// One a turn.
    pub samples: Vec<Sample>,
    #[serde(skip)]
    way: Way,
}

/// A table of one run.
#[derive(Debug, Serialize)]
pub struct Bulk {
    /// What was measured.
    pub options: BulkOptions,
    /// The program's own words.
    pub iperf_version: String,
    /// Every way.
    pub rows: Vec<Row>,
}

/// Moves the same number of bytes `repeat` times by each way, in turns. Fails without iperf3, before anything
/// is moved.
pub fn run(options: BulkOptions) -> Result<Bulk> {
    let iperf_version = iperf::version()?;
    let mut rows: Vec<Row> = ways(options.lanes)
        .into_iter()
        .map(|way| Row { name: way.name(), samples: Vec::new(), way })
        .collect();
    for turn in 0..options.repeat {
        eprintln!("turn {} of {}", turn + 1, options.repeat);
        for place in 0..rows.len() {
            let index = (place + turn as usize) % rows.len();
            let row = &mut rows[index];
            let sample = match row.way {
                Way::Pump => pump::run(&options),
                Way::Link(zero_copy) => link::run(&options, zero_copy),
                Way::Iperf(flags) => iperf::run(&options, flags),
            }?;
            row.samples.push(sample);
        }
    }
    Ok(Bulk { options, iperf_version, rows })
}

fn ways(lanes: usize) -> Vec<Way> {
    let links = [ZeroCopy::Auto, ZeroCopy::Never, ZeroCopy::Always].map(Way::Link);
    let mut ways = vec![Way::Pump];
    ways.extend(links);
    ways.extend(iperf::Flags::sensible(lanes).into_iter().map(Way::Iperf));
    ways
}

impl Way {
    fn name(self) -> String {
        match self {
            Self::Pump => "raw pump".into(),
            Self::Link(ZeroCopy::Auto) => "link".into(),
            Self::Link(ZeroCopy::Never) => "link, zero-copy never".into(),
            Self::Link(ZeroCopy::Always) => "link, zero-copy always".into(),
            Self::Iperf(flags) => format!("iperf3 {flags}"),
        }
    }
}

impl BulkOptions {
    /// What cannot be measured, if anything.
    pub fn check(&self) -> Result<()> {
        anyhow::ensure!(
            (1..=STRIPE_BYTES).contains(&(self.run_bytes as u64)),
            "--run: {} is not from 1 to {STRIPE_BYTES}",
            self.run_bytes
        );
        let least = (2 * self.run_bytes).max(pump::CALL_BYTES * self.lanes);
        anyhow::ensure!(self.region_bytes >= least, "--region: {} is less than {least}", self.region_bytes);
        Ok(())
    }
}

impl Bulk {
    /// The table for people.
    #[must_use]
    pub fn show(&self) -> String {
        let o = &self.options;
        let mut text = format!(
            "{} lanes, writes of {} bytes, {} MiB a repetition, {} repetitions, regions of {} MiB, {}\n\
             {:<26}{:>26}{:>26}{:>13}{:>17}\n",
            o.lanes,
            o.run_bytes,
            o.total_bytes >> 20,
            o.repeat,
            o.region_bytes >> 20,
            self.iperf_version,
            "median [min..max]",
            "MB/s",
            "CPU s/GiB",
            "of the pump",
            "of iperf3's best",
        );
        let (pump, best) = (self.rate(|way| way == Way::Pump), self.rate(|way| matches!(way, Way::Iperf(_))));
        for row in &self.rows {
            text += &format!(
                "{:<26}{:>26}{:>26}{:>13.2}{:>17.2}\n",
                row.name,
                row.of(|s| s.mb_per_s).show(0),
                row.of(|s| s.cpu_s_per_gib).show(3),
                row.rate() / pump,
                row.rate() / best,
            );
        }
        let auto = self.rate(|way| way == Way::Link(ZeroCopy::Auto));
        let fixed = self.rate(|way| matches!(way, Way::Link(ZeroCopy::Always | ZeroCopy::Never)));
        text += &format!(
            "zero-copy as the link chooses it: {:.2} of the better of always and never\n",
            auto / fixed
        );
        text + &watch::meanwhile(self.rows.iter().flat_map(|row| &row.samples))
    }

    /// The best median of these ways, in MB/s.
    fn rate(&self, of: impl Fn(Way) -> bool) -> f64 {
        self.rows.iter().filter(|row| of(row.way)).map(Row::rate).fold(f64::NAN, f64::max)
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

    fn bulk(rates: &[(Way, [f64; 3])]) -> Bulk {
        let sample =
            |mb_per_s| Sample { mb_per_s, cpu_s_per_gib: 0.5, elsewhere_cores: 0.0, stolen_cores: 0.0 };
        let row = |(way, rates): &(Way, [f64; 3])| Row {
            name: way.name(),
            samples: rates.iter().copied().map(sample).collect(),
            way: *way,
        };
        let options = BulkOptions { lanes: 2, repeat: 3, total_bytes: 1, run_bytes: 1, region_bytes: 1 };
        Bulk { options, iperf_version: "iperf 3".into(), rows: rates.iter().map(row).collect() }
    }

    #[test]
    fn a_ratio_is_of_medians_and_the_best_is_the_best_median() {
        let iperf = iperf::Flags::sensible(2);
        let text = bulk(&[
            (Way::Pump, [1000.0, 9000.0, 2000.0]),
            (Way::Link(ZeroCopy::Auto), [1900.0, 1800.0, 100.0]),
            (Way::Link(ZeroCopy::Never), [2400.0, 2400.0, 2400.0]),
            (Way::Iperf(iperf[0]), [1.0, 9000.0, 1.0]),
            (Way::Iperf(iperf[1]), [1200.0, 1200.0, 1200.0]),
        ])
        .show();
        let link = text.lines().find(|line| line.starts_with("link ")).unwrap();
        assert!(
            link.split_whitespace().eq([
                "link",
                "1800",
                "[100..1900]",
                "0.500",
                "[0.500..0.500]",
                "0.90",
                "1.50"
            ]),
            "{link}"
        );
        assert!(text.contains("chooses it: 0.75 of"), "{text}");
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let options =
            BulkOptions { lanes: 2, repeat: 1, total_bytes: 1 << 30, run_bytes: 4096, region_bytes: 2 << 20 };
        assert!(options.check().is_ok());
        assert!(BulkOptions { run_bytes: 0, ..options.clone() }.check().is_err());
        assert!(BulkOptions { run_bytes: (STRIPE_BYTES + 1) as usize, ..options.clone() }.check().is_err());
        assert!(BulkOptions { lanes: 3, ..options }.check().is_err());
    }
}
