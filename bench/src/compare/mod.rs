//! What changed between two records beyond noise.
//!
//! A figure counts as changed only if chance alone would hardly have made the difference (a
//! permutation test, corrected for the number of figures that are looked at), and if the whole
//! interval of the ratio of medians lies further from one than two in a hundred. Both are computed
//! from the samples alone. Two runs on a machine that became slower in between differ truly, though
//! nobody changed the code: take runs in turns, and compare a run with its repetition first.

use crate::record::{Better, Figure, Record};
use crate::stats::bootstrap::{self, Interval};
use crate::stats::permutation::{holm, probability};
use anyhow::{Result, bail};

/// How likely one false alarm among all figures may be.
const ALARM: f64 = 0.05;

/// A smaller change than this is nobody's concern, however sure it is.
const SHARE_MIN: f64 = 0.02;

/// One figure in both records.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Its group and name.
    pub name: String,
    /// Medians, before and after, in `unit`.
    pub medians: (f64, f64),
    /// Its unit.
    pub unit: String,
    /// Of the medians, after by before; none with too few samples.
    pub ratio: Option<Interval>,
    /// What is to be said of it.
    pub verdict: Verdict,
}

/// What is to be said of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing beyond noise.
    Same,
    /// It changed for the better.
    Better,
    /// It changed for the worse.
    Worse,
    /// It changed, and nobody said what is good.
    Other,
    /// Too few samples to say anything.
    Unknown,
}

/// Every figure that both have, and the names of those that only one has.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// In the order of the first record.
    pub changes: Vec<Change>,
    /// Figures of one record alone, with the one that has it.
    pub alone: Vec<String>,
    /// Why the two may differ for other reasons than the one that is looked for.
    pub warnings: Vec<String>,
}

/// Compares two records of one command.
pub fn compare(before: &Record, after: &Record) -> Result<Comparison> {
    if before.command != after.command {
        bail!("a record of {} and one of {} cannot be compared", before.command, after.command);
    }
    let pairs: Vec<(&Figure, &Figure)> = (before.figures.iter())
        .filter_map(|figure| Some((figure, after.figure(&figure.group, &figure.name)?)))
        .filter(|(a, b)| a.unit == b.unit)
        .collect();
    if pairs.is_empty() {
        bail!("the two records have no figure in common");
    }
    let probabilities: Vec<f64> =
        pairs.iter().map(|(a, b)| probability(&a.samples, &b.samples)).collect();
    let real = holm(&probabilities, ALARM);
    let changes = pairs.iter().zip(real).map(|((a, b), real)| change(a, b, real)).collect();
    let only = |here: &Record, there: &Record, which: &str| -> Vec<String> {
        let alone = here
            .figures
            .iter()
            .filter(|f| there.figure(&f.group, &f.name).is_none_or(|other| other.unit != f.unit));
        alone.map(|f| format!("{}, {} ({which})", f.group, f.name)).collect()
    };
    let alone = [only(before, after, "before"), only(after, before, "after")].concat();
    Ok(Comparison { changes, alone, warnings: warnings(before, after) })
}

fn change(before: &Figure, after: &Figure, real: bool) -> Change {
    let ratio = bootstrap::ratio(&after.samples, &before.samples, bootstrap::LEVEL);
    let verdict = match ratio {
        None => Verdict::Unknown,
        // A median of zero, or no ratio at all.
        Some(ratio) if !ratio.low.is_finite() || !ratio.high.is_finite() => Verdict::Unknown,
        Some(ratio) if !real || !ratio.is_outside(1.0 - SHARE_MIN, 1.0 + SHARE_MIN) => {
            Verdict::Same
        }
        Some(ratio) => match (before.better, ratio.low > 1.0) {
            (Better::Neither, _) => Verdict::Other,
            (Better::Lower, false) | (Better::Higher, true) => Verdict::Better,
            _ => Verdict::Worse,
        },
    };
    Change {
        name: format!("{}, {}", before.group, before.name),
        medians: (before.samples.median(), after.samples.median()),
        unit: before.unit.clone(),
        ratio,
        verdict,
    }
}

fn warnings(before: &Record, after: &Record) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut differ = |what: &str, a: &str, b: &str| {
        if a != b {
            warnings.push(format!("{what} differs: {a} before, {b} after"));
        }
    };
    let (a, b) = (&before.host, &after.host);
    differ("the processor", &a.processor, &b.processor);
    differ("the number of cores", &a.cores.to_string(), &b.cores.to_string());
    differ("the kernel", &a.kernel, &b.kernel);
    differ("QEMU", &a.qemu, &b.qemu);
    if before.options != after.options {
        warnings.push("the options differ".into());
    }
    for (record, which) in [(before, "before"), (after, "after")] {
        if record.interrupted {
            warnings.push(format!("the run {which} was interrupted"));
        }
        if !record.failures.is_empty() {
            warnings.push(format!("{} failures in the run {which}", record.failures.len()));
        }
    }
    warnings
}

impl Comparison {
    /// The table for people.
    #[must_use]
    pub fn show(&self) -> String {
        let width =
            self.changes.iter().map(|c| c.name.chars().count()).max().unwrap_or(0).max(6) + 2;
        let mut text = format!(
            "{:<width$}{:>14}{:>14}  {:<24}{}\n",
            "figure", "before", "after", "after/before [95 %]", "verdict"
        );
        for change in &self.changes {
            let (before, after) = change.medians;
            let ratio = change.ratio.map_or_else(
                || "too few samples".into(),
                |r| format!("{:.3} [{:.3}..{:.3}]", after / before, r.low, r.high),
            );
            text += &format!(
                "{:<width$}{:>14}{:>14}  {ratio:<24}{}\n",
                change.name,
                format!("{before:.3} {}", change.unit),
                format!("{after:.3} {}", change.unit),
                change.verdict.word(),
            );
        }
        self.alone.iter().for_each(|name| text += &format!("not in both: {name}\n"));
        self.warnings.iter().for_each(|warning| text += &format!("careful: {warning}\n"));
        text
    }
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Same => "no change beyond noise",
            Self::Better => "BETTER",
            Self::Worse => "WORSE",
            Self::Other => "CHANGED",
            Self::Unknown => "cannot be told",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Spec;
    use crate::stats::random::Random;

    const TOTAL: Spec = Spec::headline("downtime", "ms");
    const PART: Spec = Spec::part("load", "ms");

    /// Thirty times around `ms`, skewed as times are, with a spread of some 4 %.
    fn run(random: &mut Random, ms: f64) -> Record {
        let mut record = Record::begin("downtime", "a test".into(), &1).unwrap();
        for turn in 0..30 {
            for spec in [TOTAL, PART] {
                record.sample("tcp", spec, turn, ms * (1.0 - 0.04 * (1.0 - random.unit()).ln()));
            }
        }
        record
    }

    #[test]
    fn a_planted_slow_down_of_a_tenth_is_found_and_a_speed_up_too() {
        let mut random = Random::new(1);
        for _ in 0..20 {
            let (fast, slow) = (run(&mut random, 10.0), run(&mut random, 11.0));
            let verdicts =
                |a, b| compare(a, b).unwrap().changes.iter().map(|c| c.verdict).collect::<Vec<_>>();
            assert_eq!(verdicts(&fast, &slow), [Verdict::Worse; 2]);
            assert_eq!(verdicts(&slow, &fast), [Verdict::Better; 2]);
        }
    }

    #[test]
    fn two_runs_of_the_same_thing_are_not_called_different() {
        let mut random = Random::new(2);
        let alarms = (0..40)
            .filter(|_| {
                let compared = compare(&run(&mut random, 10.0), &run(&mut random, 10.0)).unwrap();
                compared.changes.iter().any(|c| c.verdict != Verdict::Same)
            })
            .count();
        assert!(alarms <= 2, "{alarms} false alarms in 40");
    }

    #[test]
    fn what_cannot_be_compared_is_said() {
        let mut random = Random::new(3);
        let (a, mut b) = (run(&mut random, 10.0), run(&mut random, 10.0));
        b.fail("rdma", 0, "no device");
        b.figures[1].name = "save".into();
        let compared = compare(&a, &b).unwrap();
        assert_eq!(compared.alone, ["tcp, load (before)", "tcp, save (after)"]);
        assert!(compared.show().contains("1 failures in the run after"));
        b.command = "peers".into();
        assert!(compare(&a, &b).unwrap_err().to_string().contains("cannot be compared"));
    }
}
