//! Ratios of medians within one run, taken turn by turn.

use super::{Better, Figure, Record};
use crate::stats::Samples;
use crate::stats::bootstrap::{self, Interval};
use serde::{Deserialize, Serialize};

/// How a figure of one group compares with that of another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// The figure's name.
    pub figure: String,
    /// The group above the line.
    pub of: String,
    /// The group below it, or the best of some.
    pub to: String,
    /// `median(of) / median(to)`, over the turns that both had.
    pub ratio: f64,
    /// Where it lies, at [`bootstrap::LEVEL`]; none with too few turns.
    pub interval: Option<Interval>,
}

/// Compares every headline of each of `ours` with that of each of `theirs` and, if `best` names it,
/// with the best of them. A group that has no such figure is left out.
#[must_use]
pub fn compare_groups(
    record: &Record,
    ours: &[&str],
    theirs: &[&str],
    best: Option<&str>,
) -> Vec<Ratio> {
    let mut names: Vec<&str> = Vec::new();
    for figure in record.figures.iter().filter(|f| f.headline) {
        if !names.contains(&figure.name.as_str()) {
            names.push(&figure.name);
        }
    }
    let mut ratios = Vec::new();
    for name in names {
        let figures: Vec<&Figure> =
            theirs.iter().filter_map(|group| record.figure(group, name)).collect();
        for our in ours.iter().filter_map(|group| record.figure(group, name)) {
            ratios.extend(best.and_then(|label| to_best(our, &figures, label)));
            let each = figures.iter().filter(|their| their.group != our.group);
            ratios.extend(each.filter_map(|their| to_best(our, &[their], &their.group)));
        }
    }
    ratios
}

/// To the best of these, over the turns that all of them had.
fn to_best(our: &Figure, theirs: &[&Figure], label: &str) -> Option<Ratio> {
    if theirs.is_empty() {
        return None;
    }
    let had = |figure: &Figure, turn: u32| figure.turns.contains(&turn);
    let turns: Vec<u32> =
        our.turns.iter().copied().filter(|turn| theirs.iter().all(|f| had(f, *turn))).collect();
    let at = |figure: &Figure| -> Samples {
        let value =
            |turn: &u32| Some(figure.samples.0[figure.turns.iter().position(|t| t == turn)?]);
        Samples(turns.iter().filter_map(value).collect())
    };
    let (ours, all): (Samples, Vec<Samples>) =
        (at(our), theirs.iter().map(|figure| at(figure)).collect());
    let best = if our.better == Better::Higher { f64::max } else { f64::min };
    let ratio = ours.median() / all.iter().map(Samples::median).fold(f64::NAN, best);
    ratio.is_finite().then(|| Ratio {
        figure: our.name.clone(),
        of: our.group.clone(),
        to: label.into(),
        ratio,
        interval: bootstrap::ratio_to_best(&ours, &all, best, bootstrap::LEVEL),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Spec;

    const TOTAL: Spec = Spec::headline("total", "ms");

    #[test]
    fn the_best_is_found_and_what_failed_is_not_in_the_way() {
        let mut record = Record::begin("peers", "a test".into(), &1).unwrap();
        for turn in 0..5 {
            let noise = 1.0 + f64::from(turn) / 10.0;
            for (group, ms) in [("ours", 30.0), ("slow", 60.0), ("fast", 40.0)] {
                record.sample(group, TOTAL, turn, ms * noise);
            }
        }
        record.fail("broken", 0, "no device");
        let ratios = compare_groups(&record, &["ours"], &["slow", "fast", "broken"], Some("best"));
        let found: Vec<_> =
            ratios.iter().map(|r| (r.to.as_str(), (r.ratio * 100.0).round())).collect();
        assert_eq!(found, [("best", 75.0), ("slow", 50.0), ("fast", 75.0)]);
        let interval = ratios[0].interval.unwrap();
        assert!(
            (interval.low - 0.75).abs() < 1e-9 && (interval.high - 0.75).abs() < 1e-9,
            "{interval:?}"
        );
    }

    #[test]
    fn of_a_rate_the_highest_is_the_best() {
        let mut record = Record::begin("bulk", "a test".into(), &1).unwrap();
        for turn in 0..3 {
            for (group, rate) in [("ours", 30.0), ("slow", 20.0), ("fast", 60.0)] {
                record.sample(group, Spec::rate("goodput", "MB/s"), turn, rate);
            }
        }
        let ratios = compare_groups(&record, &["ours"], &["slow", "fast"], Some("best"));
        assert_eq!((ratios[0].to.as_str(), ratios[0].ratio), ("best", 0.5));
        assert_eq!(ratios[0].interval.unwrap().low, 0.5);
    }

    #[test]
    fn turns_that_one_of_them_missed_do_not_count() {
        let mut record = Record::begin("peers", "a test".into(), &1).unwrap();
        record.sample("ours", TOTAL, 0, 1.0);
        record.sample("ours", TOTAL, 1, 3.0);
        record.sample("theirs", TOTAL, 1, 2.0);
        let ratios = compare_groups(&record, &["ours"], &["theirs"], None);
        assert_eq!((ratios.len(), ratios[0].ratio, ratios[0].interval), (1, 1.5, None));
    }
}
