//! What a run leaves behind: one JSON file with everything that was measured and on what, so that a
//! figure can be looked at, compared and doubted long after.
//!
//! ```text
//!   a command (downtime, ...)  ->  Record  ->  COMMAND-TIME.json   every sample, failures included
//!                                     |          ->  COMMAND-TIME.html   the same as a page (crate::report)
//!                                     +---- compare A.json B.json  (crate::compare)
//! ```
//!
//! A record is told by [`FORMAT`]; what this release does not know it ignores, what it misses it
//! refuses.

mod host;
pub mod model;
pub mod ratio;
pub mod save;
pub mod show;

pub use host::Host;

use crate::stats::Samples;
use crate::stats::histogram::Distribution;
use anyhow::{Context, Result, bail};
use model::Checked;
use pageferry_engine::report::MigrationReport;
use ratio::Ratio;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Version of the format. Raised when a reader of the old one would misread the new.
pub const FORMAT: u32 = 1;

/// The largest record that is read. One with a thousand moves has a few MiB.
const BYTES_MAX: u64 = 256 << 20;

/// Everything about one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// See [`FORMAT`].
    pub pageferry_bench_format: u32,
    /// The subcommand.
    pub command: String,
    /// What was measured, in one line.
    pub title: String,
    /// When it began, in seconds since 1970.
    pub begun_unix_s: u64,
    /// How long it took, in seconds.
    pub elapsed_s: f64,
    /// Whether it was stopped before all was measured.
    pub interrupted: bool,
    /// The machine.
    pub host: Host,
    /// The command's options, all of them.
    pub options: serde_json::Value,
    /// What the reader must know to read the figures right.
    pub notes: Vec<String>,
    /// The figures, in the order in which they are shown.
    pub figures: Vec<Figure>,
    /// Distributions of times.
    pub distributions: Vec<Distribution>,
    /// How groups compare.
    #[serde(default)]
    pub ratios: Vec<Ratio>,
    /// Curves, of models and sweeps.
    #[serde(default)]
    pub curves: Vec<Plot>,
    /// What is told best in rows.
    #[serde(default)]
    pub tables: Vec<Table>,
    /// Maps of two settings, of `sweep`.
    #[serde(default)]
    pub maps: Vec<Map>,
    /// The model of a host and how far it was off, of `simulate`.
    #[serde(default)]
    pub model: Option<Checked>,
    /// The engine's report of each migration.
    pub migrations: Vec<Migration>,
    /// What failed. Never left out of a table.
    pub failures: Vec<Failure>,
}

/// One figure of one group, a sample a turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What was measured so: a way to move a guest, a setting.
    pub group: String,
    /// What was measured.
    pub name: String,
    /// Its unit.
    pub unit: String,
    /// Which direction is good.
    pub better: Better,
    /// Whether it is what the run was made for, and not a part of it.
    pub headline: bool,
    /// The turn of each sample. Samples of one turn were taken close together.
    pub turns: Vec<u32>,
    /// The samples.
    pub samples: Samples,
}

/// Which direction of a figure is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Less is better.
    Lower,
    /// More is better.
    Higher,
    /// It only describes.
    Neither,
}

/// One migration as the engine reports it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Migration {
    /// What moved the guest.
    pub group: String,
    /// In which turn.
    pub turn: u32,
    /// The engine's report.
    pub report: MigrationReport,
}

/// Something that did not work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What failed.
    pub group: String,
    /// In which turn.
    pub turn: u32,
    /// Why, in one line.
    pub why: String,
}

/// Curves over one axis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plot {
    /// What it shows.
    pub title: String,
    /// What it must not be taken for.
    pub caption: String,
    /// Name and unit of the horizontal axis.
    pub x: String,
    /// Name and unit of the vertical axis.
    pub y: String,
    /// Whether the horizontal axis is logarithmic.
    pub x_log: bool,
    /// Whether the vertical axis is logarithmic.
    pub y_log: bool,
    /// The curves.
    pub series: Vec<Series>,
}

/// One curve.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// Its points.
    pub points: Vec<(f64, f64)>,
}

/// Rows of words and numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// What it shows.
    pub title: String,
    /// What it must not be taken for.
    pub caption: String,
    /// Names of the columns.
    pub head: Vec<String>,
    /// A cell for each of them.
    pub rows: Vec<Vec<String>>,
}

/// How migrations end over two settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map {
    /// What it shows.
    pub title: String,
    /// What it must not be taken for.
    pub caption: String,
    /// Name and unit of the horizontal setting.
    pub x: String,
    /// Its values.
    pub columns: Vec<String>,
    /// Name and unit of the vertical setting.
    pub y: String,
    /// Its values, from the top.
    pub rows: Vec<String>,
    /// A cell for each of them, row by row; as many as there were before an interruption.
    pub cells: Vec<Cell>,
}

/// One place of a map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    /// Column and row.
    pub at: (usize, usize),
    /// How it ended.
    pub ending: CellEnding,
    /// What stands in it, a line each.
    pub lines: Vec<String>,
}

/// How a migration ended, as a map shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CellEnding {
    /// Rounds shrank, and the downtime was predicted to be within the limit.
    Converged,
    /// They did not, and the guest was switched over all the same.
    Forced,
    /// They did not, and the guest stayed at the source.
    Refused,
    /// Something went wrong.
    Failed,
}

impl Figure {
    /// The samples of the turns that both have, side by side.
    #[must_use]
    pub fn paired(&self, other: &Self) -> (Samples, Samples) {
        let mut both = (Samples::default(), Samples::default());
        for (turn, value) in self.turns.iter().zip(&self.samples.0) {
            if let Some(place) = other.turns.iter().position(|t| t == turn) {
                both.0.push(*value);
                both.1.push(other.samples.0[place]);
            }
        }
        both
    }
}

impl Record {
    /// An empty one of a run that begins now.
    pub fn begin(command: &str, title: String, options: &impl Serialize) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            pageferry_bench_format: FORMAT,
            command: command.into(),
            title,
            begun_unix_s: now.as_secs(),
            elapsed_s: 0.0,
            interrupted: false,
            host: Host::look(),
            options: serde_json::to_value(options).context("keeping the options")?,
            notes: Vec::new(),
            figures: Vec::new(),
            distributions: Vec::new(),
            ratios: Vec::new(),
            curves: Vec::new(),
            tables: Vec::new(),
            maps: Vec::new(),
            model: None,
            migrations: Vec::new(),
            failures: Vec::new(),
        })
    }

    /// Adds one sample. What is not a number is not a sample.
    pub fn sample(&mut self, group: &str, spec: Spec, turn: u32, value: f64) {
        if !value.is_finite() {
            return;
        }
        let known = self.figures.iter_mut().find(|f| f.group == group && f.name == spec.name);
        let figure = match known {
            Some(figure) => figure,
            None => {
                self.figures.push(Figure {
                    group: group.into(),
                    name: spec.name.into(),
                    unit: spec.unit.into(),
                    better: spec.better,
                    headline: spec.headline,
                    turns: Vec::new(),
                    samples: Samples::default(),
                });
                self.figures.last_mut().expect("pushed just now")
            }
        };
        figure.turns.push(turn);
        figure.samples.push(value);
    }

    /// Adds a failure.
    pub fn fail(&mut self, group: &str, turn: u32, why: impl Into<String>) {
        self.failures.push(Failure { group: group.into(), turn, why: why.into() });
    }

    /// The figure of this group and name.
    #[must_use]
    pub fn figure(&self, group: &str, name: &str) -> Option<&Figure> {
        self.figures.iter().find(|f| f.group == group && f.name == name)
    }

    /// The groups, in the order of their first mention; a group that only failed is one too.
    #[must_use]
    pub fn groups(&self) -> Vec<&str> {
        let mut groups: Vec<&str> = Vec::new();
        let figures = self.figures.iter().map(|f| f.group.as_str());
        for group in figures.chain(self.failures.iter().map(|f| f.group.as_str())) {
            if !groups.contains(&group) {
                groups.push(group);
            }
        }
        groups
    }

    /// When it began, as `2026-01-31T12:00:00Z`.
    #[must_use]
    pub fn begun(&self) -> String {
        // Beyond the year 9999 humantime has no words.
        let begun = Duration::from_secs(self.begun_unix_s.min(253_402_300_799));
        humantime::format_rfc3339_seconds(UNIX_EPOCH + begun).to_string()
    }

    /// Reads one from a file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes =
            std::fs::metadata(path).with_context(|| format!("reading {}", path.display()))?.len();
        if bytes > BYTES_MAX {
            bail!("{} has {bytes} bytes, which no record has", path.display());
        }
        let text = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let value: serde_json::Value = serde_json::from_slice(&text)
            .with_context(|| format!("{} is not JSON; give it a record", path.display()))?;
        match value["pageferry_bench_format"].as_u64() {
            Some(format) if format == u64::from(FORMAT) => {}
            Some(format) => bail!(
                "{} has format {format} and this release reads {FORMAT}: measure anew, or take the release that wrote it",
                path.display()
            ),
            None => bail!("{} is no record of pageferry-bench", path.display()),
        }
        let record: Self = serde_json::from_value(value)
            .with_context(|| format!("{} is a damaged record", path.display()))?;
        for figure in &record.figures {
            if figure.turns.len() != figure.samples.0.len()
                || figure.samples.0.iter().any(|s| !s.is_finite())
            {
                bail!("{} is a damaged record: samples of {:?}", path.display(), figure.name);
            }
        }
        Ok(record)
    }
}

/// What a figure is, apart from its samples.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    /// See [`Figure::name`].
    pub name: &'static str,
    /// See [`Figure::unit`].
    pub unit: &'static str,
    /// See [`Figure::better`].
    pub better: Better,
    /// See [`Figure::headline`].
    pub headline: bool,
}

impl Spec {
    /// A time that the run was made for.
    #[must_use]
    pub const fn headline(name: &'static str, unit: &'static str) -> Self {
        Self { name, unit, better: Better::Lower, headline: true }
    }

    /// A part of one.
    #[must_use]
    pub const fn part(name: &'static str, unit: &'static str) -> Self {
        Self { name, unit, better: Better::Lower, headline: false }
    }

    /// A rate that the run was made for.
    #[must_use]
    pub const fn rate(name: &'static str, unit: &'static str) -> Self {
        Self { name, unit, better: Better::Higher, headline: true }
    }

    /// Something that only describes.
    #[must_use]
    pub const fn fact(name: &'static str, unit: &'static str) -> Self {
        Self { name, unit, better: Better::Neither, headline: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOTAL: Spec = Spec::headline("total", "ms");

    fn record() -> Record {
        let mut record = Record::begin("downtime", "a test".into(), &1).unwrap();
        for turn in 0..3 {
            record.sample("a", TOTAL, turn, f64::from(turn));
        }
        record.sample("b", TOTAL, 2, 20.0);
        record.sample("b", TOTAL, 1, f64::NAN);
        record.fail("c", 1, "it is not installed");
        record
    }

    #[test]
    fn a_record_reads_back_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r.json");
        // One record: each has the second in which it was made.
        let written = record();
        std::fs::write(&path, serde_json::to_vec(&written).unwrap()).unwrap();
        assert_eq!(Record::read(&path).unwrap(), written);
    }

    #[test]
    fn turns_that_only_one_has_are_not_paired_and_failures_stay_a_group() {
        let record = record();
        let (a, b) = (record.figure("a", "total").unwrap(), record.figure("b", "total").unwrap());
        assert_eq!(a.paired(b), (Samples(vec![2.0]), Samples(vec![20.0])));
        assert_eq!(record.groups(), ["a", "b", "c"]);
    }

    #[test]
    fn what_is_no_record_is_refused_in_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r.json");
        let mut damaged = record();
        damaged.figures[0].turns.pop();
        let texts = [
            "junk".to_owned(),
            "{}".into(),
            r#"{"pageferry_bench_format":99}"#.into(),
            r#"{"pageferry_bench_format":1}"#.into(),
            serde_json::to_string(&damaged).unwrap(),
        ];
        for text in texts {
            std::fs::write(&path, &text).unwrap();
            let error = format!("{:#}", Record::read(&path).unwrap_err());
            assert!(error.contains("r.json") && error.lines().count() == 1, "{error}");
        }
    }
}
