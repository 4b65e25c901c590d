//! Records as tables in Markdown: what one pastes into a message or a document.

use crate::record::Record;
use crate::record::show::digits;
use crate::stats::bootstrap::{self, LEVEL};
use std::fmt::Write;

/// A table of the headlines of each record, and one of its ratios to the best of others.
#[must_use]
pub fn summary(records: &[Record]) -> String {
    let mut text = String::new();
    for record in records {
        let host = &record.host;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "### {}: {}\n", record.command, cell(&record.title));
        let _ = writeln!(
            text,
            "{}, {} cores of {}, Linux {}, {}\n",
            record.begun(),
            host.cores,
            cell(&host.processor),
            host.kernel,
            host.pageferry
        );
        text += "| what | figure | median | 95 % of medians | range | turns |\n| --- | --- | --- | --- | --- | --- |\n";
        for f in record.figures.iter().filter(|f| f.headline) {
            let s = &f.samples;
            let interval = bootstrap::median(s, LEVEL).map_or_else(
                || "too few".into(),
                |i| format!("{} to {}", digits(i.low), digits(i.high)),
            );
            let _ = writeln!(
                text,
                "| {} | {} | {} {} | {interval} | {} to {} | {} |",
                cell(&f.group),
                f.name,
                digits(s.median()),
                f.unit,
                digits(s.min()),
                digits(s.max()),
                s.0.len()
            );
        }
        for failure in &record.failures {
            let why = cell(&failure.why);
            let _ = writeln!(
                text,
                "| {} | FAILED in turn {} | {why} | | | |",
                cell(&failure.group),
                failure.turn + 1
            );
        }
        text += "\n";
        if record.ratios.is_empty() {
            continue;
        }
        text += "| figure | of | to | ratio | 95 % |\n| --- | --- | --- | --- | --- |\n";
        for r in &record.ratios {
            let interval = r
                .interval
                .map_or_else(String::new, |i| format!("{} to {}", digits(i.low), digits(i.high)));
            let (of, to) = (cell(&r.of), cell(&r.to));
            let _ =
                writeln!(text, "| {} | {of} | {to} | {} | {interval} |", r.figure, digits(r.ratio));
        }
        text += "\n";
    }
    text
}

/// Text as it may stand in a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Spec;

    #[test]
    fn a_failure_has_its_row_and_no_text_breaks_the_table() {
        let mut record = Record::begin("peers", "a test".into(), &1).unwrap();
        (0..3).for_each(|turn| record.sample("a|b", Spec::headline("total", "ms"), turn, 12.5));
        record.fail("c", 0, "two\nlines");
        let text = summary(&[record]);
        assert!(
            text.contains("| a\\|b | total | 12.5 ms | 12.5 to 12.5 | 12.5 to 12.5 | 3 |"),
            "{text}"
        );
        assert!(text.contains("| c | FAILED in turn 1 | two lines |"), "{text}");
    }
}
