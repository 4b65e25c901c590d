//! Several groups beside one another, and the ratios that the run worked out.

use super::escape;
use super::sections::{section, table};
use crate::record::ratio::Ratio;
use crate::record::show::digits;
use crate::record::{Figure, Record};

/// A row a group, a column a headline. A group of which nothing succeeded has its row too.
pub(super) fn side_by_side(record: &Record) -> String {
    if !record.is_comparison() {
        return String::new();
    }
    let headlines = record.headlines();
    let mut rows = String::new();
    for group in record.groups() {
        let failed = record.failures.iter().filter(|f| f.group == group).count();
        rows += &format!("<tr><td>{}</td>", escape(group));
        for (name, _) in &headlines {
            let figure = record.figure(group, name);
            rows += &figure.map_or_else(|| "<td class=\"n\">-</td>".into(), cell);
        }
        rows += &match failed {
            0 => "<td></td></tr>".to_owned(),
            _ => format!("<td class=\"failed\">{failed} failed</td></tr>"),
        };
    }
    let heads: Vec<String> =
        headlines.iter().map(|(name, unit)| escape(format!("{name} {unit}").trim_end())).collect();
    let mut head = vec!["what"];
    head.extend(heads.iter().map(String::as_str));
    head.push("");
    let note = "<p class=\"quiet\">Median, and smallest and largest.</p>\n";
    section("Side by side", &format!("{}{note}", table(&head, &rows)))
}

fn cell(figure: &Figure) -> String {
    let s = &figure.samples;
    format!(
        "<td class=\"n\"><b>{}</b> <span class=\"quiet\">{} to {}</span></td>",
        digits(s.median()),
        digits(s.min()),
        digits(s.max())
    )
}

/// A table a figure: what is above the line is a column, what is below it a row.
pub(super) fn ratios(record: &Record) -> String {
    let mut html = String::new();
    for figure in names(record.ratios.iter().map(|r| r.figure.clone())) {
        let of_it: Vec<&Ratio> = record.ratios.iter().filter(|r| r.figure == figure).collect();
        let above = names(of_it.iter().map(|r| r.of.clone()));
        let mut rows = String::new();
        for below in names(of_it.iter().map(|r| r.to.clone())) {
            rows += &format!("<tr><td>{}</td>", escape(&below));
            for above in &above {
                let ratio = of_it.iter().find(|r| r.of == *above && r.to == below);
                rows += &ratio.map_or_else(|| "<td></td>".into(), |r| share(r));
            }
            rows += "</tr>";
        }
        let heads: Vec<String> = above.iter().map(|name| escape(name)).collect();
        let mut head = vec!["of"];
        head.extend(heads.iter().map(String::as_str));
        html += &format!("<h3>{}</h3>\n{}", escape(&figure), table(&head, &rows));
    }
    if !html.is_empty() {
        html += "<p class=\"quiet\">Median of the column's by median of the row's, over the turns that both had; in brackets \
                 where it lies with 95 %.</p>\n";
    }
    section("How they compare", &html)
}

fn share(ratio: &Ratio) -> String {
    let interval = ratio
        .interval
        .map_or_else(String::new, |i| format!(" ({} to {})", digits(i.low), digits(i.high)));
    format!("<td class=\"n\"><b>{}x</b>{interval}</td>", digits(ratio.ratio))
}

/// Each once, in the order of the first mention.
fn names(all: impl Iterator<Item = String>) -> Vec<String> {
    let mut names = Vec::new();
    for name in all {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Spec;
    use crate::record::ratio::compare_groups;

    #[test]
    fn a_way_that_only_failed_has_its_row_and_ratios_their_place() {
        let mut record = Record::begin("peers", "a test".into(), &1).unwrap();
        for turn in 0..3 {
            for (group, ms) in [("ours", 10.0), ("<theirs>", 20.0)] {
                record.sample(group, Spec::headline("total", "ms"), turn, ms);
                record.sample(group, Spec::headline("downtime", "ms"), turn, ms / 10.0);
            }
        }
        record.fail("broken", 0, "no device");
        record.ratios = compare_groups(&record, &["ours"], &["<theirs>"], None);
        let html = side_by_side(&record);
        assert!(
            html.contains("<td>broken</td>")
                && html.contains("1 failed")
                && html.contains("&lt;theirs&gt;")
        );
        let html = ratios(&record);
        assert_eq!(html.matches("<b>0.50x</b> (0.50 to 0.50)").count(), 2, "{html}");
    }
}
