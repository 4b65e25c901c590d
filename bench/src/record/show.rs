//! A record as a table for a terminal.

use super::Record;
use crate::stats::bootstrap;
use crate::stats::histogram::PERCENTILES;
use std::fmt::Write;

impl Record {
    /// The table for people.
    #[must_use]
    pub fn show(&self) -> String {
        let mut text = format!("{}\n", self.title);
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{:<40}{:>10}{:>22}{:>24}", "", "median", "95 % of medians", "range");
        for figure in &self.figures {
            let name = format!("{}, {} {}", figure.group, figure.name, figure.unit);
            let interval = bootstrap::median(&figure.samples, bootstrap::LEVEL)
                .map_or_else(|| "too few".into(), |i| format!("{} to {}", digits(i.low), digits(i.high)));
            let range = format!("{} to {}", digits(figure.samples.min()), digits(figure.samples.max()));
            let median = digits(figure.samples.median());
            let _ = writeln!(text, "{:<40}{median:>10}{interval:>22}{range:>24}", name.trim_end());
        }
        for distribution in &self.distributions {
            let _ = write!(text, "{}, {}: ", distribution.group, distribution.name);
            for (percent, ms) in PERCENTILES.iter().zip(&distribution.percentiles_ms) {
                if distribution.can_tell(*percent) {
                    let _ = write!(text, "p{percent} {} ", digits(*ms));
                }
            }
            let _ = writeln!(text, "max {} ms of {}", digits(distribution.max_ms), distribution.count);
        }
        for r in &self.ratios {
            let interval = r
                .interval
                .map_or_else(String::new, |i| format!(" ({} to {})", digits(i.low), digits(i.high)));
            let _ = writeln!(text, "{}, {} by {}: {}x{interval}", r.figure, r.of, r.to, digits(r.ratio));
        }
        for failure in &self.failures {
            let _ = writeln!(text, "FAILED: {}, turn {}: {}", failure.group, failure.turn + 1, failure.why);
        }
        if self.interrupted {
            text += "interrupted: what was measured until then is here\n";
        }
        text
    }
}

/// Three digits that say something.
#[must_use]
pub fn digits(value: f64) -> String {
    match value.abs() {
        v if !v.is_finite() => "-".into(),
        0.0 => "0".into(),
        v if v >= 99.95 => format!("{value:.0}"),
        v if v >= 9.995 => format!("{value:.1}"),
        v if v >= 0.0995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Spec;

    #[test]
    fn failures_are_in_the_table() {
        let mut record = Record::begin("downtime", "a test".into(), &1).unwrap();
        record.sample("a", Spec::headline("total", "ms"), 0, 12.345);
        record.fail("b", 1, "it is not installed");
        let text = record.show();
        assert!(text.contains("12.3") && text.contains("FAILED: b, turn 2: it is not installed"), "{text}");
    }

    #[test]
    fn numbers_keep_three_digits() {
        let shown = [0.0, 0.01234, 1.234, 12.34, 123.4, f64::NAN].map(digits);
        assert_eq!(shown, ["0", "0.012", "1.23", "12.3", "123", "-"]);
    }
}
