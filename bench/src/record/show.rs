//! A record as a table for a terminal.

use super::{CellEnding, Map, Record, Table};
use crate::stats::bootstrap;
use crate::stats::histogram::PERCENTILES;

/// With so many groups or more, a list of all figures is hard to compare.
const GROUPS_MIN: usize = 3;

impl Record {
    /// The table for people.
    #[must_use]
    pub fn show(&self) -> String {
        let mut text = format!("{}\n", self.title);
        if self.is_comparison() {
            text += &self.beside();
        } else {
            text += &self.figure_by_figure();
            text += &self.percentiles();
        }
        text += &self.compared();
        let maps = self.maps.iter().map(Map::table);
        for table in maps.chain(self.tables.iter().cloned()) {
            text += &table.show();
        }
        for failure in &self.failures {
            text +=
                &format!("FAILED: {}, turn {}: {}\n", failure.group, failure.turn + 1, failure.why);
        }
        if self.interrupted {
            text += "interrupted: what was measured until then is here\n";
        }
        text
    }

    /// Whether it has so many groups that they are better shown beside one another.
    #[must_use]
    pub fn is_comparison(&self) -> bool {
        self.groups().len() >= GROUPS_MIN && self.headlines().len() >= 2
    }

    /// Name and unit of every headline.
    #[must_use]
    pub fn headlines(&self) -> Vec<(&str, &str)> {
        let mut headlines = Vec::new();
        for figure in self.figures.iter().filter(|f| f.headline) {
            let headline = (figure.name.as_str(), figure.unit.as_str());
            if !headlines.contains(&headline) {
                headlines.push(headline);
            }
        }
        headlines
    }

    /// A line a group, a column a headline.
    fn beside(&self) -> String {
        let groups = self.groups();
        let width = groups.iter().map(|group| group.chars().count()).max().unwrap_or(0).max(20) + 2;
        let mut text = format!("{:<width$}", "median [range]");
        let heads: Vec<String> = self
            .headlines()
            .iter()
            .map(|(name, unit)| format!("{name} {unit}").trim_end().to_owned())
            .collect();
        let widths: Vec<usize> =
            heads.iter().map(|head| head.chars().count().max(22) + 2).collect();
        for (head, width) in heads.iter().zip(&widths) {
            text += &format!("{head:>width$}");
        }
        text += "\n";
        for group in groups {
            text += &format!("{group:<width$}");
            for ((name, _), width) in self.headlines().into_iter().zip(&widths) {
                let shown = self.figure(group, name).map_or_else(
                    || "-".into(),
                    |f| {
                        let s = &f.samples;
                        format!("{} [{}..{}]", digits(s.median()), digits(s.min()), digits(s.max()))
                    },
                );
                text += &format!("{shown:>width$}");
            }
            text += "\n";
        }
        text
    }

    fn figure_by_figure(&self) -> String {
        let mut text =
            format!("{:<40}{:>10}{:>22}{:>24}\n", "", "median", "95 % of medians", "range");
        let (headlines, others): (Vec<_>, Vec<_>) = self.figures.iter().partition(|f| f.headline);
        for figure in headlines.into_iter().chain(others) {
            let name = format!("{}, {} {}", figure.group, figure.name, figure.unit);
            let interval = bootstrap::median(&figure.samples, bootstrap::LEVEL).map_or_else(
                || "too few".into(),
                |i| format!("{} to {}", digits(i.low), digits(i.high)),
            );
            let range =
                format!("{} to {}", digits(figure.samples.min()), digits(figure.samples.max()));
            let median = digits(figure.samples.median());
            text += &format!("{:<40}{median:>10}{interval:>22}{range:>24}\n", name.trim_end());
        }
        text
    }

    fn percentiles(&self) -> String {
        let mut text = String::new();
        for distribution in &self.distributions {
            text += &format!("{}, {}: ", distribution.group, distribution.name);
            for (percent, ms) in PERCENTILES.iter().zip(&distribution.percentiles_ms) {
                if distribution.can_tell(*percent) {
                    text += &format!("p{percent} {} ", digits(*ms));
                }
            }
            text += &format!("max {} ms of {}\n", digits(distribution.max_ms), distribution.count);
        }
        text
    }

    /// A line for each figure of each group that was compared.
    fn compared(&self) -> String {
        let mut text = String::new();
        let mut before = None;
        for r in &self.ratios {
            let head = (&r.figure, &r.of);
            if before != Some(head) {
                text +=
                    &format!("{}{}, {}:", if before.is_some() { "\n" } else { "" }, r.figure, r.of);
                before = Some(head);
            } else {
                text += ",";
            }
            let interval = r.interval.map_or_else(String::new, |i| {
                format!(" ({} to {})", digits(i.low), digits(i.high))
            });
            text += &format!(" {}x{interval} {}", digits(r.ratio), r.to);
        }
        if before.is_some() {
            text += "\n";
        }
        text
    }
}

impl Map {
    /// The same in rows and columns of words.
    fn table(&self) -> Table {
        let words = |row: usize, column: usize| {
            let cell = self.cells.iter().find(|cell| cell.at == (column, row));
            cell.map_or_else(String::new, |cell| {
                let ending = match cell.ending {
                    CellEnding::Converged => "",
                    CellEnding::Forced => " forced",
                    CellEnding::Refused => " refused",
                    CellEnding::Failed => "failed",
                };
                cell.lines.join(" ") + ending
            })
        };
        let row = |(row, name): (usize, &String)| {
            let cells = (0..self.columns.len()).map(|column| words(row, column));
            std::iter::once(name.clone()).chain(cells).collect()
        };
        let corner = format!("{} \\ {}", self.y, self.x);
        Table {
            title: self.title.clone(),
            caption: self.caption.clone(),
            head: std::iter::once(corner).chain(self.columns.iter().cloned()).collect(),
            rows: self.rows.iter().enumerate().map(row).collect(),
        }
    }
}

impl Table {
    /// In columns of a terminal.
    fn show(&self) -> String {
        let mut text = format!("\n{}\n", self.title);
        let width = |column: usize| {
            let cells =
                self.rows.iter().filter_map(|row| row.get(column)).chain(self.head.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.head.len()).map(width).collect();
        for row in std::iter::once(&self.head).chain(&self.rows) {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            text += cells.collect::<Vec<_>>().join("  ").trim_end();
            text += "\n";
        }
        text + &self.caption + "\n"
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
    use crate::record::{Cell, Spec};

    #[test]
    fn failures_are_in_the_table() {
        let mut record = Record::begin("downtime", "a test".into(), &1).unwrap();
        record.sample("a", Spec::headline("total", "ms"), 0, 12.345);
        record.fail("b", 1, "it is not installed");
        let text = record.show();
        assert!(
            text.contains("12.3") && text.contains("FAILED: b, turn 2: it is not installed"),
            "{text}"
        );
    }

    #[test]
    fn a_map_is_shown_with_its_endings() {
        let cell = |at, ending| Cell { at, ending, lines: vec!["1 s".into(), "(5 ms)".into()] };
        let map = Map {
            title: "map".into(),
            caption: "caption".into(),
            x: "Gb/s".into(),
            columns: vec!["1".into(), "10".into()],
            y: "MB/s".into(),
            rows: vec!["80".into(), "20".into()],
            cells: vec![cell((0, 0), CellEnding::Forced), cell((1, 1), CellEnding::Converged)],
        };
        let text = map.table().show();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "map");
        assert!(
            lines[2].contains("MB/s \\ Gb/s") && lines[3].contains("1 s (5 ms) forced"),
            "{text}"
        );
        assert!(lines[4].ends_with("1 s (5 ms)") && lines[5] == "caption", "{text}");
    }

    #[test]
    fn numbers_keep_three_digits() {
        let shown = [0.0, 0.01234, 1.234, 12.34, 123.4, f64::NAN].map(digits);
        assert_eq!(shown, ["0", "0.012", "1.23", "12.3", "123", "-"]);
    }
}
